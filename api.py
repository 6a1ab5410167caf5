"""The public face: capture, price, cut, schedule, place, run."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import ConstraintError, DeviceError
from .partitioner.analysis import analyse
from .partitioner.capture import Capture, capture
from .partitioner.cluster import Cluster
from .partitioner.cpu import usable_cores
from .partitioner.describe import Devices, Replicas, describe
from .partitioner.plan import Plan, load, parse
from .partitioner.planner import Wishes, make_plan, random_ops
from .partitioner.split import split
from .progress import Progress, shown_progress
from .records import to_json
from .runtime.engine import Engine, InlineEngine
from .runtime.launch import WorkerPool
from .runtime.local import LocalEngine
from .runtime.pipeline import Pipeline
from .runtime.program import PipelineSpec
from .runtime.spmd import SpmdEngine, ensure_process_group, share_text, under_torchrun
from .structure import call_leaves

LAUNCHES = ("auto", "local", "torchrun", "inline")


def compile(
    model: nn.Module,
    devices: Devices,
    *,
    loss_fn: Callable[..., Any] | None = None,
    replicas: Replicas = None,
    microbatches: int | None = None,
    schedule: str | None = None,
    plan: Plan | str | Path | None = None,
    costs: str = "measured",
    memory_bytes: float | None = None,
    opaque: Sequence[str] = (),
    loss_reduction: str = "mean",
    loss_weight: Callable[[Any], float] | None = None,
    example_inputs: tuple[Any, ...] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    launch: str = "auto",
    threads_per_worker: int | None = None,
    timeout_s: float = 300.0,
) -> Pipeline:
    """Compile ``model`` into a pipelined, replicated training program.

    The model is captured and planned at the first call, from its arguments' shapes (or now, from ``example_inputs``).

    Args:
        model: any module; its parameters become the pipeline's, and stay the same objects.
        devices: one entry a stage: ``[0, 1]``, ``["cpu", "cpu"]``; nested for replicas: ``[[0, 1], [2, 3]]``.
            Integers are accelerator indices, or CPU workers where there is no accelerator (docs/clusters.md has more).
        loss_fn: called as ``loss_fn(output, target)`` on each microbatch; a mean over its rows. Without one, the loss
            is the model's own result (0-dim, or ``.loss``).
        replicas: data-parallel copies of every stage, for a flat list of devices; one number, or one a stage:
            ``[3, 1]``.
        microbatches: pieces of the batch that each replica was given; chosen by the planner if None.
        schedule: ``"1f1b"`` or ``"fill-drain"``; chosen by the planner if None.
        plan: a plan, or the path of a saved one, to run instead of planning.
        costs: ``"measured"`` times each distinct op once (CPU), ``"analytic"`` uses a roofline.
        memory_bytes: limit per worker.
        opaque: modules to keep whole.
        loss_reduction: ``"mean"``, or ``"sum"`` if ``loss_fn`` sums over its rows.
        loss_weight: weight of a microbatch's loss in the batch's mean, from its target (its count of tokens that are
            not ignored, say); the microbatch's rows if None.
        launch: ``"local"`` worker processes, ``"torchrun"`` ranks, ``"inline"`` in this process; ``"auto"`` notices
            torchrun.
        threads_per_worker: CPU threads of each worker; an equal share of the cores if None.
        timeout_s: seconds without any progress after which a step fails with :class:`StallError`.

    Raises:
        DeviceError: a device does not exist or cannot be used.
        ConstraintError: arguments contradict each other.
        PlanError: the plan does not fit the model, or no plan exists.
        CaptureError: the example inputs cannot be used.
    """
    if loss_reduction not in ("mean", "sum"):
        raise ConstraintError(f"loss_reduction must be 'mean' or 'sum', got {loss_reduction!r}")
    if launch not in LAUNCHES:
        raise ConstraintError(f"launch must be one of {', '.join(LAUNCHES)}, got {launch!r}")
    if launch == "auto":
        launch = "torchrun" if under_torchrun() else "local"
    known = load(plan) if isinstance(plan, (str, Path)) else plan
    cluster = describe(devices, replicas, memory_bytes)
    _check_cluster(cluster, known, launch)
    _announce(devices, cluster)
    n_threads = threads_per_worker or max(1, usable_cores() // cluster.n_devices)
    builder = _Builder(model, cluster, Wishes(microbatches, schedule, costs), known, opaque, n_threads, launch)
    launcher = _Launcher(model, loss_fn, launch, n_threads, timeout_s, cluster.n_devices)
    pipeline = Pipeline(
        model,
        builder,
        launcher,
        loss_fn=loss_fn,
        loss_weight=loss_weight,
        loss_reduction=loss_reduction,
        release=launcher.release,
    )
    if example_inputs is not None or example_kwargs is not None:
        try:
            pipeline.prepare(*(example_inputs or ()), **(example_kwargs or {}))
        except BaseException:
            pipeline.close()
            raise
    return pipeline


def plan(
    model: nn.Module,
    devices: Devices,
    *,
    example_inputs: tuple[Any, ...],
    example_kwargs: dict[str, Any] | None = None,
    replicas: Replicas = None,
    microbatches: int | None = None,
    schedule: str | None = None,
    costs: str = "measured",
    memory_bytes: float | None = None,
    opaque: Sequence[str] = (),
    threads_per_worker: int = 1,
) -> Plan:
    """Plan without running anything; the devices need not exist: ``devices="sim:8xH100-80GB"``, or a TOML file.

    Arguments and errors are those of :func:`compile`; costs of devices that are not there are analytic.
    """
    kwargs = example_kwargs or {}
    cluster = describe(devices, replicas, memory_bytes)
    with _gradients_on(), shown_progress() as progress:
        captured = capture(model, example_inputs, kwargs, opaque=opaque)
        tensors = _tensors(captured, example_inputs, kwargs)
        wishes = Wishes(microbatches, schedule, costs)
        return make_plan(captured, tensors, cluster, wishes, n_threads=threads_per_worker, progress=progress)


@contextmanager
def _gradients_on() -> Iterator[None]:
    """Plan for training also where the first call happens to be an evaluation under ``torch.no_grad()``."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _tensors(captured: Capture, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    leaves, _ = call_leaves(captured.model.forward, args, kwargs)
    return [leaf for known, leaf in zip(captured.inputs.leaves, leaves) if known.graph_input is not None]


def _check_cluster(cluster: Cluster, known: Plan | None, launch: str) -> None:
    if cluster.simulated:
        raise DeviceError("simulated devices can be planned for, not run on", hint="stagecut.plan(model, 'sim:…', …)")
    if known is not None and tuple(stage.devices for stage in known.stages) != cluster.stages:
        given, planned = cluster.stages, tuple(stage.devices for stage in known.stages)
        raise ConstraintError(f"the plan is for devices {planned}, and devices={given} was given")
    kinds = {torch.device(name).type for name in cluster.names}
    if launch == "local" and kinds != {"cpu"}:
        raise DeviceError(
            f"local workers run on CPU only in this version, and devices are {', '.join(cluster.names)}",
            hint=f"torchrun --nproc-per-node {len(cluster.names)} train.py",
        )


def _announce(devices: Devices, cluster: Cluster) -> None:
    """Say once that integers mean CPU workers here."""
    written = [devices] if isinstance(devices, (int, str)) else list(devices)
    flat = [d for group in written for d in ([group] if isinstance(group, (int, str)) else group)]
    if any(isinstance(d, int) or d.replace(",", "").isdigit() for d in flat) and set(cluster.names) == {"cpu"}:
        warnings.warn(
            f"stagecut: no accelerator here; devices={devices!r} are {len(cluster.names)} CPU workers", stacklevel=3
        )


class _Builder:
    """Capture, plan and split for a first call; under torchrun rank 0 plans for all."""

    def __init__(
        self,
        model: nn.Module,
        cluster: Cluster,
        wishes: Wishes,
        known: Plan | None,
        opaque: Sequence[str],
        n_threads: int,
        launch: str,
    ) -> None:
        self.model, self.cluster, self.wishes, self.known = model, cluster, wishes, known
        self.opaque, self.n_threads, self.launch = opaque, n_threads, launch

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[PipelineSpec, Plan]:
        with _gradients_on():
            return self._build(args, kwargs)

    def _build(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[PipelineSpec, Plan]:
        captured = capture(self.model, args, kwargs, opaque=self.opaque)
        tensors = _tensors(captured, args, kwargs)
        if self.launch == "torchrun":
            ensure_process_group()
            chosen = parse(json.loads(share_text(lambda: json.dumps(to_json(self._plan(captured, tensors))))))
        else:
            chosen = self._plan(captured, tensors)
        facts = analyse(captured, tensors, tensors[0].shape[0] if tensors[0].dim() else 1)
        return split(captured, chosen, random_ops(facts)), chosen

    def _plan(self, captured: Capture, tensors: list[torch.Tensor]) -> Plan:
        if self.known is not None:
            return self.known
        with shown_progress() as progress:
            return make_plan(captured, tensors, self.cluster, self.wishes, n_threads=self.n_threads, progress=progress)


class _Launcher:
    """Starts the engine of a pipeline; local workers start at once, beside the planning."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Any] | None,
        launch: str,
        n_threads: int,
        timeout_s: float,
        n_workers: int,
    ) -> None:
        self.model, self.loss_fn, self.launch = model, loss_fn, launch
        self.n_threads, self.timeout_s, self.n_workers = n_threads, timeout_s, n_workers
        self.pool = WorkerPool(n_workers, n_threads) if launch == "local" else None

    def __call__(self, spec: PipelineSpec) -> Engine:
        if self.launch == "inline":
            return InlineEngine(spec, self.model, self.loss_fn)
        if self.launch == "torchrun":
            return SpmdEngine(spec, self.model, self.loss_fn)
        pool = self.pool if self.pool is not None else WorkerPool(self.n_workers, self.n_threads)
        self.pool = None
        return LocalEngine(spec, self.model, self.loss_fn, pool, self.timeout_s)

    def release(self) -> None:
        """End workers that were started and never used."""
        if self.pool is not None:
            self.pool.kill()
            self.pool = None


__all__ = ["Progress", "compile", "plan"]
