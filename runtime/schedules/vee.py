"""Schedules on the V placement: worker w owns stages w and 2 p - 1 - w, so that the last stage meets the first.

- ZB-V (Qi et al., 2024, https://arxiv.org/abs/2401.10241, section 6): no bubble where F, I and W take as long, with the
  memory of 1F1B.
- V-Half and V-Min (Qi et al., NeurIPS 2024, https://arxiv.org/abs/2405.15362): every microbatch repeats one block of
  times, six units after the one before. How long a block lasts decides the memory: about p / 2 and p / 3
  microbatches on every worker.
- DualPipeV (DeepSeek-AI, 2025, https://github.com/deepseek-ai/DualPipe; from a cut in half of DualPipe,
  https://arxiv.org/abs/2412.19437): forwards of one direction beside backwards of the other, 2 p microbatches at least.

Chunk 0 is the stage on the way there, chunk 1 the one on the way back.
"""

from __future__ import annotations

from collections.abc import Iterator

Unit = tuple[str, int, int]  # kind, chunk, microbatch
_INTERVAL = 6  # F, I and W of two chunks


class _Counting:
    """Writes units down with the next microbatch of their kind and chunk."""

    def __init__(self) -> None:
        self.units: list[Unit] = []
        self.done: dict[tuple[str, int], int] = {}

    def add(self, *tokens: str) -> None:
        """Add units such as ``F0``, ``I1``, ``W1``, and ``B1`` for both parts of a backward in one."""
        for token in tokens:
            kind, chunk = token[0], int(token[1])
            m = self.count(token)
            for part in ("I", "W") if kind == "B" else (kind,):
                self.done[part, chunk] = m + 1
            self.units.append((kind, chunk, m))

    def count(self, token: str) -> int:
        return self.done.get(("I" if token[0] == "B" else token[0], int(token[1])), 0)


def order_zb_v(position: int, n_workers: int, n_microbatches: int) -> list[Unit]:
    """Return one worker's order of ZB-V; with fewer than 2 p - 1 microbatches, that of 2 p - 1 without the others."""
    w, p, n = position, n_workers, max(2 * n_workers - 1, n_microbatches)
    own = _Counting()
    own.add(*["F0"] * (2 * (p - w) - 1), *["F1", "F0"] * w, *["F1", "I1", "W1"] * (p - w))
    while own.count("F1") < own.count("F0") or own.count("F0") < n:
        if own.count("F0") < n:
            own.add("F0")
        own.add("I0", "W0", "F1", "I1", "W1")
    own.add(*["I0", "I1"] * w, *["I0", "W0"] * (p - w))
    own.add(*["W1"] * (n - own.count("W1")), *["W0"] * (n - own.count("W0")))
    return [unit for unit in own.units if unit[2] < n_microbatches]


def order_dualpipe_v(position: int, n_workers: int, n_microbatches: int) -> list[Unit]:
    """Return one worker's order of DualPipeV, for at least 2 p microbatches; overlapped pairs follow each other."""
    w, p, n = position, n_workers, n_microbatches
    own = _Counting()
    own.add(*["F0"] * (2 * (p - w - 1)), *["F0", "F1"] * (w + 1), *["I1", "W1", "F1"] * (p - w - 1))
    own.add(*["F0", "B1", "F1", "B0"] * (n - 2 * p + w + 1))
    own.add(*["B1", "F1", "B0"] * (p - w - 1))
    late: list[Unit] = []
    for place in range(2 * (w + 1) + p - w - 1):
        draining = place < 2 * (w + 1)
        if not draining:
            own.units.append(late.pop(0))
        token = "B" if place <= w else "I"  # from the middle of the drain on weight gradients wait
        chunk = 1 - place % 2 if draining else 0
        m = own.count(f"I{chunk}")
        own.add(f"{token}{chunk}")
        if token == "I":
            late.append(("W", chunk, m))
    return own.units + late


def order_v_half(position: int, n_workers: int, n_microbatches: int) -> list[Unit]:
    """Return one worker's order of V-Half."""
    return _repeated(_half_block(position, n_workers), n_microbatches)


def order_v_min(position: int, n_workers: int, n_microbatches: int) -> list[Unit]:
    """Return one worker's order of V-Min."""
    return _repeated(_min_block(position, n_workers), n_microbatches)


def _min_block(w: int, p: int) -> dict[str, int]:
    """Place a microbatch's F and I as early as can be; shifted by two where they would meet the next but p / 3."""
    later = 0 if p % 3 else 2
    return _with_weights({"F0": w, "F1": 2 * p - 1 - w, "I1": 2 * p + w + later, "I0": 4 * p - 1 - w + later})


def _half_block(w: int, p: int) -> dict[str, int]:
    """Place F and I so that three units pass per worker there and back."""
    turn = 1 if p % 2 else 4
    return _with_weights({"F0": 2 * w, "F1": 3 * p - 2 - w, "I1": 3 * p - 1 + 2 * w, "I0": 6 * p - 3 - w + turn})


def _with_weights(block: dict[str, int]) -> dict[str, int]:
    """Give each W the first unit after its I that no other microbatch needs."""
    taken = {time % _INTERVAL for time in block.values()}
    assert len(taken) == len(block), "a worker does one thing at a time"
    for chunk in "10":
        time = block[f"I{chunk}"] + 1
        while time % _INTERVAL in taken:
            time += 1
        taken.add(time % _INTERVAL)
        block[f"W{chunk}"] = time
    return block


def _repeated(block: dict[str, int], n_microbatches: int) -> list[Unit]:
    def units() -> Iterator[tuple[int, Unit]]:
        for m in range(n_microbatches):
            for token, time in block.items():
                yield time + _INTERVAL * m, (token[0], int(token[1]), m)

    return [unit for _, unit in sorted(units())]
