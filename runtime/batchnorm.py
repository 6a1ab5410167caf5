"""BatchNorm in microbatches: which statistics normalise, and which are remembered.

``"microbatch"`` leaves nn.BatchNorm alone; the other modes put modules of their own in its place (deferred.py,
synced.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ConstraintError
from .deferred import DeferredBatchNorm
from .instructions import Layout
from .program.specs import StageSpec
from .synced import Exchange, SyncedBatchNorm

MICROBATCH, DEFERRED, SYNC = MODES = ("microbatch", "deferred", "sync")
_CALLS = (F.batch_norm, torch.batch_norm, torch.native_batch_norm)


def in_mode(spec: StageSpec, mode: str, exchange: Callable[[], Exchange] | None) -> StageSpec:
    """Return a stage with the BatchNorms of a mode.

    ``exchange`` returns how its replicas exchange statistics of the microbatch at hand; None for a single one.
    """
    if mode == DEFERRED:
        return _with(spec, DeferredBatchNorm)
    if mode == SYNC and exchange is not None:
        return _with(spec, partial(SyncedBatchNorm, exchange=exchange))
    return spec


def _with(spec: StageSpec, make: Callable[[_BatchNorm], nn.Module]) -> StageSpec:
    modules = {path: make(m) if _is_norm(m) else m for path, m in spec.modules.items()}  # type: ignore[arg-type]
    return replace(spec, modules=modules)


def leave_out_of_compilation(module: nn.Module) -> None:
    """Let ``torch.compile`` call these BatchNorms as they are.

    One exchanges statistics with other processes. Of the other, torch 2.13 loses a change of a buffer: after
    ``total = count + n`` and ``count.add_(n)``, which it takes for one, ``count`` is what it was. A decorator on the
    classes would import the compiler for everyone.
    """
    for inner in module.modules():
        if isinstance(inner, (DeferredBatchNorm, SyncedBatchNorm)):
            inner.forward = torch.compiler.disable(inner.forward)  # type: ignore[method-assign, no-untyped-call]


def synced_stages(stages: Sequence[StageSpec], layout: Layout, mode: str) -> frozenset[int]:
    """Return the stages whose replicas exchange statistics inside of their computations."""
    if mode != SYNC:
        return frozenset()
    return frozenset(s.index for s in stages if _norms_of(s) and len(layout.workers[s.index]) > 1)


def replicas_of(synced: frozenset[int], layout: Layout) -> int:
    """Return how many microbatches are normalised together by stages whose replicas exchange statistics."""
    return max((len(layout.workers[s]) for s in synced), default=1)


def check_reachable(stages: Sequence[StageSpec], layout: Layout, mode: str) -> None:
    """Refuse stages with BatchNorms to which a mode would not apply.

    Raises:
        ConstraintError: one is inside of code that is kept whole, or is a call of a function; or stages with BatchNorms
            have different numbers of replicas, of which no unsplit model knows.
    """
    if mode == MICROBATCH:
        return
    for stage in stages:
        for path, module in stage.modules.items():
            inner = [name for name, m in module.named_modules() if _is_norm(m) and m is not module]
            if inner:
                _refuse(mode, f"{path}.{inner[0]} is inside of {type(module).__name__}, which is kept whole")
        for record in stage.nodes:
            if record.target in _CALLS:
                where = record.module_path or "the model"
                _refuse(mode, f"op {record.name} of {where} calls a function instead of nn.BatchNorm")
    counts = {stage.index: len(layout.workers[stage.index]) for stage in stages if _norms_of(stage)}
    if mode == SYNC and len(set(counts.values())) > 1:
        of = ", ".join(f"stage {s} has {n}" for s, n in counts.items())
        raise ConstraintError(
            f"batchnorm='sync' normalises over the replicas of a stage, and here their numbers differ: {of}",
            hint="give all stages the same number, or leave batchnorm='microbatch'",
        )


def _norms_of(stage: StageSpec) -> list[nn.Module]:
    return [module for module in stage.modules.values() if _is_norm(module)]


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm)


def _refuse(mode: str, why: str) -> None:
    raise ConstraintError(
        f"batchnorm={mode!r} reaches modules of the graph only: {why}",
        hint="batchnorm='microbatch', the default, leaves all of them as the unsplit model has them",
    )
