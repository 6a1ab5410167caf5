"""A cut with several chunks per device in arrays, and the loads of many placements at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .reduction import Dag, Floats, Ints
from .slots import CutDevice

_BLOCK = 8  # devices per byte of a mask
ROOM = 1e-12  # relative: bytes beyond a limit that are rounding


@dataclass(frozen=True)
class ChunkProblem:
    """What each node costs on each device (column ``d``), where a device may hold ``max_chunks`` chunks."""

    dag: Dag
    devices: tuple[CutDevice, ...]
    max_chunks: int
    seconds: Floats  # (n, devices); infinite where the node cannot run or is pinned elsewhere
    bytes: Floats  # (n, devices): static, and stash times the microbatches in flight there
    limits: Floats  # (devices,); infinite for none
    twins: tuple[int, ...]  # per device: the first device that it can be swapped with

    @property
    def n_chunks(self) -> int:
        """The most chunks that there can be."""
        return self.max_chunks * len(self.devices)

    @cached_property
    def pays(self) -> NDArray[np.bool_]:
        """Which devices pay for transfers."""
        return np.array([device.pays_transfers for device in self.devices])

    @cached_property
    def least_s(self) -> Floats:
        """Per node, the seconds on the fastest device that it can run on."""
        return self.seconds.min(axis=1)  # type: ignore[no-any-return]

    @cached_property
    def ceiling_s(self) -> float:
        """A load that every allowed placement stays below."""
        most = np.where(np.isfinite(self.seconds), self.seconds, 0.0).max(axis=1).sum()
        return float(most + self.dag.net_s.sum()) * (1 + 1e-6) or 1.0

    def fits(self, held: Floats) -> NDArray[np.bool_]:
        """Whether bytes per device (in the last axis) are within the limits."""
        inside: NDArray[np.bool_] = np.all(held <= self.limits * (1 + ROOM), axis=-1)
        return inside


def chunk_problem(
    dag: Dag, devices: Sequence[CutDevice], kinds: Sequence[str], in_flight: Sequence[int], max_chunks: int
) -> ChunkProblem:
    """Spread the costs per kind over the devices, and find which devices are interchangeable."""
    columns = [kinds.index(device.kind) for device in devices]
    seconds = np.where(dag.barred[:, columns] > 0, np.inf, dag.time_s[:, columns])
    for v, pins in enumerate(dag.pins):
        if pins:
            seconds[v, [d for d in range(len(devices)) if d not in pins]] = np.inf
    pinned = frozenset[int]().union(*dag.pins)
    first: dict[tuple[Any, ...], int] = {}
    twins = []
    for d, device in enumerate(devices):
        key = (device.kind, device.memory_bytes, device.pays_transfers, in_flight[d], d if d in pinned else -1)
        twins.append(first.setdefault(key, d))
    return ChunkProblem(
        dag=dag,
        devices=tuple(devices),
        max_chunks=max_chunks,
        seconds=seconds,
        bytes=dag.static_bytes[:, None] + np.array(in_flight, dtype=np.float64) * dag.stash_bytes[:, None],
        limits=np.array([np.inf if d.memory_bytes is None else d.memory_bytes for d in devices], dtype=np.float64),
        twins=tuple(twins),
    )


@dataclass(frozen=True)
class Placement:
    """Per node the position of its chunk, per position its device, and the largest device load.

    No chunk is empty, and chunks next to each other are on different devices.
    """

    position: Ints
    device: Ints
    max_load_s: float


def compact(position: Ints, device: Ints, max_load_s: float) -> Placement:
    """Drop the empty chunks, and join chunks next to each other on one device."""
    used = np.unique(position)
    begins = np.ones(len(used), dtype=np.bool_)
    begins[1:] = device[used[1:]] != device[used[:-1]]
    number = np.zeros(len(device), dtype=np.int64)
    number[used] = np.cumsum(begins) - 1
    return Placement(number[position], device[used[begins]], max_load_s)


class Scorer:
    """Loads of rows of placements; what is not allowed costs at least ``problem.ceiling_s``."""

    def __init__(self, problem: ChunkProblem) -> None:
        self.problem = problem
        n, k = problem.seconds.shape
        self._offset = np.arange(n) * k
        self._seconds = np.where(np.isfinite(problem.seconds), problem.seconds, problem.ceiling_s).ravel()
        self._bytes = problem.bytes.ravel() if np.isfinite(problem.limits).any() else None
        sizes = np.array([len(net) for net in problem.dag.nets], dtype=np.int64)
        by_size = np.argsort(-sizes, kind="stable")
        self._net_s = problem.dag.net_s[by_size]
        nets = [problem.dag.nets[t] for t in by_size]
        # The j-th node of every net that has one; nets with more nodes come first.
        most = int(sizes.max(initial=0))
        self._nth = [np.array([net[j] for net in nets if len(net) > j], dtype=np.int64) for j in range(most)]

    def loads(self, device_of: Ints) -> Floats:
        """Score placements: (rows, n) devices -> (rows, devices) seconds, in O(rows x (nodes + net sizes))."""
        problem = self.problem
        loads = self._sums(device_of, self._seconds)
        if self._nth:
            loads += self._transfers(device_of)
        if self._bytes is not None:
            excess = self._sums(device_of, self._bytes) - problem.limits * (1 + ROOM)
            limits = np.where(np.isfinite(problem.limits), np.maximum(problem.limits, 1.0), 1.0)
            loads += np.where(excess > 0, problem.ceiling_s * (1 + np.maximum(excess, 0.0) / limits), 0.0)
        return loads

    def _sums(self, device_of: Ints, values: Floats) -> Floats:
        n_rows, k = len(device_of), len(self.problem.devices)
        cells = device_of + (np.arange(n_rows) * k)[:, None]
        weights = values.take(device_of + self._offset)
        total: Any = np.bincount(cells.ravel(), weights.ravel(), n_rows * k)
        return total.reshape(n_rows, k)  # type: ignore[no-any-return]

    def _transfers(self, device_of: Ints) -> Floats:
        """Mark per net the devices that hold some of it, one bit each, and charge where there is more than one."""
        paid = np.zeros((len(device_of), len(self.problem.devices)))
        across = np.ascontiguousarray(device_of.T)
        masks, is_cut = [], np.zeros((len(self._net_s), len(device_of)), dtype=np.bool_)
        for block in range(0, len(self.problem.devices), _BLOCK):
            bit = np.zeros(len(self.problem.devices), dtype=np.uint8)
            bit[block : block + _BLOCK] = 1 << np.arange(len(bit[block : block + _BLOCK]), dtype=np.uint8)
            bits = bit.take(across)
            first = bits.take(self._nth[0], axis=0)
            mask = first.copy()
            for nodes in self._nth[1:]:
                mask[: len(nodes)] |= bits.take(nodes, axis=0)
            is_cut |= mask != first
            masks.append(mask)
        for d in np.flatnonzero(self.problem.pays):
            here = (masks[d // _BLOCK] >> np.uint8(d % _BLOCK)) & is_cut
            paid[:, d] = self._net_s @ here.astype(np.float64)
        return paid
