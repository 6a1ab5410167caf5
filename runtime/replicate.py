"""Replicas of a stage: one gradient reduction a step through DistributedDataParallel.

DDP's reducer expects one forward per backward. A pipeline has several microbatches in flight, so the stage's forwards
do not go through DDP's own forward; they and all but the last backward leave the reducer unarmed, gradients add up in
``.grad``, and right before the last backward ``prepare_for_backward`` arms it. The one all-reduce of the sums then
overlaps with that backward. ``no_sync()`` on all but the last *forward*, the usual recipe for accumulation, is wrong
here: in 1F1B the last forward is followed by several backwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# torch 2.13 renamed the switch.
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
_NO_BUFFER_SYNC: dict[str, Any] = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}


# Called with the process group of a stage's replicas; returns what ``register_comm_hook`` takes: state and hook.
CommHook = Callable[[Any], tuple[Any, Callable[..., Any]]]


class Reducer(Protocol):
    """How a stage's gradients become complete.

    ``follows_autograd`` says whether it has to be armed before the last gradients reach the parameters.
    """

    follows_autograd: bool

    def arm(self, roots: list[torch.Tensor]) -> None:
        """Announce the last backward of the step, which starts from ``roots``."""

    def complete(self) -> None:
        """Finish the reduction, also on a replica that was given no microbatch."""


class NoReduction:
    """A stage with one replica, or whose replicas add into the same ``.grad``: nothing to do."""

    follows_autograd = False

    def arm(self, roots: list[torch.Tensor]) -> None:
        """Nothing to announce."""

    def complete(self) -> None:
        """Nothing to finish."""


class Replicas:
    """The replicas of a stage, and what they tell each other beside gradients."""

    def __init__(self, module: nn.Module, group: Any, n_replicas: int) -> None:
        self.module = module
        self._group = group
        self._n_replicas = n_replicas

    def gathered(self, row: torch.Tensor) -> list[torch.Tensor]:
        """Return the rows of all replicas, in their order."""
        rows = [torch.empty_like(row) for _ in range(self._n_replicas)]
        torch.distributed.all_gather(rows, row, group=self._group)
        return rows

    def share_buffers(self, first_rank: int) -> None:
        """Overwrite this replica's buffers by those of the stage's first replica."""
        for buffer in self.module.buffers():
            torch.distributed.broadcast(buffer, first_rank, group=self._group)


class DataParallelReducer(Replicas):
    """Sum a stage's gradients over its replicas.

    Every microbatch's loss already carries its share of the batch, so the replicas' gradients add up to those of the
    unsplit model; DDP's average is multiplied by the replica count. Parameters that
    the last microbatch did not use are found by DDP from ``roots`` (``find_unused_parameters``), so a stage with
    conditional parameters neither hangs nor loses gradients. ``left_out`` names parameters of the module that other
    stages of the same worker add to as well: somebody else sums these when all stages are through. ``comm_hook``
    makes the communication hook that DDP hands its buckets to.
    """

    follows_autograd = True

    def __init__(
        self,
        module: nn.Module,
        group: Any,
        n_replicas: int,
        left_out: Sequence[str] = (),
        comm_hook: CommHook | None = None,
    ) -> None:
        super().__init__(module, group, n_replicas)
        self._left_out = frozenset(left_out)
        self._hook = None if comm_hook is None else comm_hook(group)
        self._trainable: tuple[bool, ...] = ()
        self._ddp: DistributedDataParallel | None = None
        self._armed = False

    def refresh(self) -> None:
        """Rebuild DDP where the set of trainable parameters changed; every replica of the stage must call it."""
        trainable = tuple(parameter.requires_grad for parameter in self._parameters())
        if trainable == self._trainable:
            return
        self._trainable = trainable
        self._ddp = None
        if any(trainable):
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
                self.module, self._left_out
            )
            self._ddp = DistributedDataParallel(
                self.module,
                process_group=self._group,
                init_sync=False,
                find_unused_parameters=True,
                **_NO_BUFFER_SYNC,
            )
            if self._hook is not None:
                state, hook = self._hook
                in_turn = torch.distributed.get_backend(self._group) == "gloo"
                self._ddp.register_comm_hook(state, _in_turn(hook) if in_turn else hook)

    def arm(self, roots: list[torch.Tensor]) -> None:
        """Let the reducer take the gradients of the backward that starts from ``roots``."""
        roots = [root for root in roots if root.requires_grad]
        if self._ddp is not None and _reaches(roots, self._trainable_parameters()):
            self._prepare(self._ddp, roots)

    def complete(self) -> None:
        """Take part with what there is where no backward armed the reducer; else DDP has finished it."""
        if self._ddp is None:
            return
        if not self._armed:
            self._take_part(self._ddp)
        self._armed = False
        for parameter in self._trainable_parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(self._n_replicas)

    def _take_part(self, ddp: DistributedDataParallel) -> None:
        parameters = self._trainable_parameters()
        witness = next((parameter for parameter in parameters if parameter.grad is not None), parameters[0])
        # DDP looks for parameters behind the roots' graph nodes, and a parameter itself has none: hence the view.
        root = witness.view_as(witness)
        self._prepare(ddp, [root])
        torch.autograd.backward([root], [torch.zeros_like(witness)])

    def _prepare(self, ddp: DistributedDataParallel, roots: list[torch.Tensor]) -> None:
        ddp.reducer.prepare_for_forward()
        ddp.reducer.prepare_for_backward(roots)
        self._armed = True

    def _trainable_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._parameters() if parameter.requires_grad]

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for name, parameter in self.module.named_parameters() if name not in self._left_out]


def _in_turn(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Let a hook finish before the next collective begins.

    What a hook chains to its first collective runs in a thread of gloo's, where more collectives (PowerSGD has three)
    overtake those of DDP, in another order on another rank: they would add up each other's data, or abort. Of NCCL's
    futures what is chained begins in the order of the calls.
    """

    def run(state: Any, bucket: Any) -> Any:
        future = hook(state, bucket)
        future.wait()
        return future

    run.__annotations__ = {}  # DDP compares them with types, and ours are text
    run.__qualname__ = getattr(hook, "__qualname__", "hook")
    return run


def _reaches(roots: list[torch.Tensor], parameters: list[nn.Parameter]) -> bool:
    """Say whether the autograd graph of ``roots`` leads to any of ``parameters``; stops at the first that it meets.

    DDP notices unused parameters when the first hook fires, so a backward that meets none would never be reduced.
    """
    wanted = {id(parameter) for parameter in parameters}
    pending: list[Any] = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if id(getattr(node, "variable", None)) in wanted:
            return True
        following = [next_node for next_node, _ in node.next_functions if next_node is not None]
        pending += [next_node for next_node in following if next_node not in seen]
        seen.update(following)
    return False
