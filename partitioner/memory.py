"""What a stage holds at its fullest: state, activations of the microbatches in flight, the workspace of one op."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from .analysis import OpFacts
from .opgraph import STATE_COPIES, OpNode

_LOSS_COPIES = 3


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one replica of a stage.

    Attributes:
        parameter_bytes: parameters and buffers, each once.
        state_bytes: these with gradients and optimizer state.
        saved_bytes: what one microbatch holds from its forward to its backward: what autograd saves, and the values
            that came and went over wires, each storage once.
        input_bytes: what came over wires, which is all that recompute keeps: of a view only what it shows.
        workspace_bytes: the largest of the ops' own needs while they run, of packets on their way in and out, and of
            the loss, for which three times the result is taken (its logarithms, their gradient, the result's gradient).
    """

    parameter_bytes: int
    state_bytes: int
    saved_bytes: int
    input_bytes: int
    workspace_bytes: int

    def peak_bytes(self, in_flight: int, recompute: bool) -> int:
        """Return the most bytes at once, with so many microbatches in flight."""
        held = in_flight * self.saved_bytes
        if recompute:
            held = in_flight * self.input_bytes + self.saved_bytes
        return self.state_bytes + held + self.workspace_bytes


def stage_memory(
    own: Collection[str],
    ops: Mapping[str, OpNode],
    facts: Mapping[str, OpFacts],
    wires_in: Collection[str],
    wires_out: Collection[str],
    sizes: Mapping[str, int],
    trainable: Collection[str],
    workspace_bytes: Mapping[str, int],
    reported: Collection[str] = (),
) -> StageMemory:
    """Add up what a stage of the ops ``own`` holds.

    ``sizes`` has the bytes of each parameter and buffer, ``reported`` names the values of the model's result if the
    stage is the last.
    """
    names = dict.fromkeys(name for op in own for name in ops[op].parameters)
    incoming, outgoing = _received(ops, facts, wires_in), _storages(facts, wires_out)
    result = _storages(facts, reported)
    saved: dict[int, int] = {**outgoing, **result}
    for op in own:
        saved.update(facts[op].saves)
    saved.update(incoming)
    return StageMemory(
        parameter_bytes=sum(sizes[name] for name in names),
        state_bytes=sum(sizes[name] * (STATE_COPIES if name in trainable else 1) for name in names),
        saved_bytes=sum(saved.values()),
        input_bytes=sum(incoming.values()),
        workspace_bytes=max(
            max((workspace_bytes.get(op, 0) for op in own), default=0),
            sum(incoming.values()) + sum(outgoing.values()),
            _LOSS_COPIES * sum(result.values()),
        ),
    )


def _received(ops: Mapping[str, OpNode], facts: Mapping[str, OpFacts], names: Collection[str]) -> dict[int, int]:
    """Return the bytes that arrive of each storage; every value arrives densely, in memory of its own."""
    found: dict[int, int] = {}
    for name in names:
        holds = facts[name].holds
        for storage, n_bytes in holds.items():
            found[storage] = found.get(storage, 0) + (ops[name].output_bytes if len(holds) == 1 else n_bytes)
    return found


def _storages(facts: Mapping[str, OpFacts], names: Collection[str]) -> dict[int, int]:
    return {storage: n_bytes for name in names for storage, n_bytes in facts[name].holds.items()}
