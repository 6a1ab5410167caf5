"""The public face: capture, price, cut, schedule, place, run."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .building import (
    Builder,
    Launcher,
    check_stages,
    check_threads,
    constant,
    loss_of_batch,
    planning,
    tensors_of,
)
from .errors import ConstraintError, DeviceError
from .partitioner.asked_order import order_of
from .partitioner.capture import capture
from .partitioner.cluster import Cluster
from .partitioner.configurations import Wishes
from .partitioner.describe import Devices, Replicas, describe, over_sockets
from .partitioner.plan import Plan, load
from .partitioner.planner import make_plan
from .products import why_no_onednn
from .progress import Progress, shown_progress
from .runtime import accelerators
from .runtime.batchnorm import MODES
from .runtime.deadlines import RANK_S
from .runtime.local import RAISE, RESTART
from .runtime.options import Options, StageOptions
from .runtime.pipeline import Pipeline
from .runtime.rank_devices import RANKS, rank_devices
from .runtime.replicate import CommHook
from .runtime.spmd import on_one_machine, under_torchrun
from .runtime.watch.finding import ACTIONS, BOUNDARIES, CHECKS
from .runtime.watch.logs import configure
from .runtime.watch.watching import Watch
from .runtime.weights import check_weights, weights_of

LAUNCHES = ("auto", "local", "torchrun", "inline")


def compile(
    model: nn.Module,
    devices: Devices,
    *,
    loss_fn: Callable[..., Any] | None = None,
    stages: int | None = None,
    replicas: Replicas = None,
    microbatches: int | None = None,
    schedule: str | Path | None = None,
    recompute: bool | None = None,
    plan: Plan | str | Path | None = None,
    costs: str = "measured",
    memory_bytes: float | None = None,
    opaque: Sequence[str] = (),
    loss_reduction: str = "mean",
    loss_weight: Callable[[Any], float] | None = None,
    example_inputs: tuple[Any, ...] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    example_target: Any = None,
    launch: str = "auto",
    threads_per_worker: int | None = None,
    timeout_s: float | None = None,
    on_worker_lost: str = "restart",
    trial_s: float = 20.0,
    compile_stages: bool | str = False,
    gradient_accumulation_fusion: bool = False,
    onednn_matmul: bool = False,
    batchnorm: str = "microbatch",
    weights: str | Path | None = None,
    comm_hook: CommHook | None = None,
    shard: bool = False,
    check_finite: str | None = None,
    on_nonfinite: str = "error",
) -> Pipeline:
    """Compile ``model`` into a pipelined, replicated training program.

    The model is captured and planned at the first call, from its arguments' shapes (or now, from ``example_inputs``;
    ``example_target`` is what ``loss_fn`` would compare the result with, so that the loss is priced too).

    Args:
        model: any module; its parameters become the pipeline's, and stay the same objects.
        devices: what may be used: ``[0, 1]``, ``["cpu", "cpu"]``, ``["cuda:0", "cpu"]``; the planner makes stages and
            replicas of them, or uses one alone if that is fastest. Nested they are the stages: ``[[0, 1], [2, 3]]``.
            Integers are accelerator indices, or CPU workers where there is no accelerator (docs/clusters.md has more).
            ``"ranks"`` is one device for each rank that torchrun started, however many there are this time.
        loss_fn: called as ``loss_fn(output, target)`` on each microbatch; a mean over its rows. Without one, the loss
            is the model's own result (0-dim, or ``.loss``).
        stages: how many stages to make; chosen by the planner if None. With more than there are devices, every device
            has several.
        replicas: data-parallel copies of every stage, for a flat list of devices; one number, or one a stage:
            ``[3, 1]``. Chosen by the planner if None.
        microbatches: pieces of the batch that each replica was given; chosen by the planner if None.
        schedule: a published one by name (``"1f1b"``, ``"zb-h1"``, ``"interleaved-1f1b"``, ``"zb-v"``, and more in
            docs/schedules.md); ``"search"`` for the best order that is found for this very model; or the path of a file
            with an order (``.json`` or ``.csv``). Chosen by the planner if None or ``"auto"``.
        recompute: whether stages keep only their inputs and compute activations again in the backward; by stage, where
            memory asks for it, if None.
        plan: a plan, or the path of a saved one, to run instead of planning.
        costs: ``"measured"`` times each distinct op once (CPU), ``"analytic"`` uses a roofline.
        memory_bytes: limit per worker.
        opaque: modules to keep whole.
        loss_reduction: ``"mean"``, or ``"sum"`` if ``loss_fn`` sums over its rows.
        loss_weight: weight of a microbatch's loss in the batch's mean, from its target (its count of tokens that are
            not ignored, say); the microbatch's rows if None.
        launch: ``"local"`` worker processes, ``"torchrun"`` ranks, ``"inline"`` in this process; ``"auto"`` notices
            torchrun.
        threads_per_worker: CPU threads of each worker; an equal share of the cores among those used if None.
        timeout_s: seconds without any progress after which a step fails with :class:`StallError`. If None, 20 times
            the median step, at least 30; for the first step 60, or 20 times the predicted one; at least 600 with
            ``compile_stages``. Under torchrun, seconds that a rank waits for another one, in every process
            group that stagecut makes; 300 if None.
        on_worker_lost: ``"restart"``: if a local worker's process is killed or exits, new workers do the step again,
            once, with a warning and the same numbers; ``"raise"``: that is a :class:`WorkerLost`. Under torchrun it
            is ``--max-restarts`` that starts ranks again.
        trial_s: where predictions are too close to tell which plan is fastest, run the closest ones in turn for some
            steps, about so many seconds, before the first step; 0 goes by the predictions. The model stays as it was.
            Local workers with measured costs only; ``pm.plan.reasons`` says what was tried.
        compile_stages: run each stage through ``torch.compile``: True, or the name of a backend. Backwards are whole
            then, and results differ from the unsplit model's by rounding.
        gradient_accumulation_fusion: let the matrix products that are gradients of weights and biases add to those of
            the microbatches before, instead of adding afterwards: less time and memory traffic, most for small layers,
            and other rounding than the unsplit model's, so that steps are no longer repeated to the bit. It concerns
            recorded stages (docs/schedules.md): none that compute activations again, have BatchNorms in
            ``batchnorm="sync"`` or hooks, and of ``"inline"`` ones those alone whose backwards are split.
        onednn_matmul: let oneDNN compute large matrix products of 32-bit floats on CPUs, in the same recorded stages,
            where torch calls its BLAS (MKL on x86, which uses AVX-512 on Intel's processors only): on an AMD EPYC with
            AVX-512 a transformer's step takes 0.6 of the time. Products round otherwise than the unsplit model's, so
            steps are repeated to rounding; float64 and bfloat16 are as they are without. Measured costs know of it.
        batchnorm: ``"microbatch"`` updates running statistics with every microbatch, as the unsplit model run in the
            same microbatches does; ``"deferred"`` once a step, with those of the whole batch: each microbatch is
            normalised by its own either way. ``"sync"`` normalises the microbatches that replicas have at the same time
            together, as the unsplit model run in ``microbatches`` pieces does, however many replicas there are.
        weights: values for a model that was made on the meta device: a safetensors file, a folder of such files or of
            checkpoints, or ``"init"`` for what the modules' ``reset_parameters()`` make. Stages get memory where they
            run; under torchrun no process ever holds the whole.
        comm_hook: a communication hook of DistributedDataParallel for gradients of replicas under torchrun: called with
            the process group of a stage's replicas, it returns (state, hook):
            ``lambda group: (group, default_hooks.fp16_compress_hook)``.
        shard: let each of a stage's replicas under torchrun keep a share of its parameters, gradients and optimizer
            state (FSDP2's ``fully_shard``); the stage gathers its parameters for the step. Parameters are DTensors from
            then on: give ``example_inputs``, and make the optimizer afterwards.
        check_finite: ``"loss"`` looks at the loss of every microbatch, ``"boundaries"`` also at every value and
            gradient that leaves a stage, and names the first stage that made one that is not finite
            (docs/reliability.md).
        on_nonfinite: ``"error"`` raises :class:`NonFiniteError` after the step, which the pipeline survives; ``"warn"``
            warns.

    Raises:
        DeviceError: a device does not exist or cannot be used.
        ConstraintError: arguments contradict each other, or ``STAGECUT_LOGS`` in the environment cannot be read.
        PlanError: the plan does not fit the model, or no plan exists.
        CaptureError: the example inputs cannot be used.
        CheckpointError: ``weights`` are not there, or do not fit.
    """
    if loss_reduction not in ("mean", "sum"):
        raise ConstraintError(f"loss_reduction must be 'mean' or 'sum', got {loss_reduction!r}")
    configure()
    _check_finite(check_finite, on_nonfinite)
    if launch not in LAUNCHES:
        raise ConstraintError(f"launch must be one of {', '.join(LAUNCHES)}, got {launch!r}")
    if on_worker_lost not in (RESTART, RAISE):
        raise ConstraintError(f"on_worker_lost must be {RESTART!r} or {RAISE!r}, got {on_worker_lost!r}")
    if timeout_s is not None and not timeout_s > 0:
        raise ConstraintError(f"timeout_s must be more than 0 seconds, got {timeout_s!r}", hint="leave it out")
    if not trial_s >= 0:
        raise ConstraintError(f"trial_s must be 0 seconds or more, got {trial_s!r}")
    check_threads(threads_per_worker)
    if launch == "auto":
        launch = "torchrun" if under_torchrun() else "local"
    if comm_hook is not None and launch != "torchrun":
        raise ConstraintError(
            f"comm_hook was given, and launch={launch!r} reduces gradients in shared memory: nothing is communicated",
            hint="torchrun --nproc-per-node N train.py",
        )
    if batchnorm not in MODES:
        raise ConstraintError(f"batchnorm must be one of {', '.join(MODES)}, got {batchnorm!r}")
    if shard:
        _check_shard(launch, compile_stages, comm_hook)
    check_weights(model, weights is not None)
    filled = None if weights is None else weights_of(weights, model)
    fuses, onednn = gradient_accumulation_fusion, onednn_matmul
    _check_recorded({"gradient_accumulation_fusion": fuses, "onednn_matmul": onednn}, compile_stages, recompute)
    stage = StageOptions(_backend(compile_stages), batchnorm, check_finite == BOUNDARIES, fuses, onednn)
    options = Options(stage, comm_hook, shard, filled, on_worker_lost)
    known = load(plan) if isinstance(plan, (str, Path)) else plan
    if devices == RANKS:
        devices = _devices_of_ranks(launch, timeout_s)
    cluster = describe(devices, replicas, memory_bytes)
    if onednn_matmul:
        _check_onednn(cluster)
    cluster = over_sockets(cluster) if launch == "torchrun" and not on_one_machine() else cluster
    check_stages(cluster, stages)
    _check_cluster(cluster, known, launch)
    _announce(devices, cluster)
    order = order_of(schedule, stages, microbatches)
    wishes = Wishes(
        order.n_microbatches,
        order.name,
        costs,
        None,
        order.n_stages,
        recompute,
        launch == "torchrun",
        order.orders,
        onednn_matmul=onednn_matmul,
    )
    builder = Builder(model, cluster, wishes, known, opaque, threads_per_worker, launch, loss_fn, trial_s, timeout_s)
    builder.target, builder.can_step = example_target, None not in (loss_fn, example_target)
    launcher = Launcher(model, loss_fn, launch, threads_per_worker, timeout_s, cluster.n_devices, options)
    pipeline = Pipeline(
        model,
        builder,
        launcher,
        loss_fn=loss_fn,
        loss_weight=loss_weight,
        loss_reduction=loss_reduction,
        release=launcher.release,
        watch=Watch(check_finite, on_nonfinite, launch),
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
    loss_fn: Callable[..., Any] | None = None,
    example_target: Any = None,
    stages: int | None = None,
    replicas: Replicas = None,
    microbatches: int | None = None,
    schedule: str | Path | None = None,
    recompute: bool | None = None,
    costs: str = "measured",
    memory_bytes: float | None = None,
    opaque: Sequence[str] = (),
    threads_per_worker: int | None = None,
    optimizer: str | None = None,
) -> Plan:
    """Plan without running anything; the devices need not exist: ``devices="sim:8xH100-80GB"``, or a TOML file.

    Arguments and errors are those of :func:`compile`; costs of devices that are not there are analytic. With
    ``optimizer="adamw"`` (or ``"sgd"``, ``"momentum"``) its step is part of the predicted one: replicas all step the
    whole model, the stages of a pipeline a part each.
    """
    configure()
    check_threads(threads_per_worker)
    kwargs = example_kwargs or {}
    cluster = describe(devices, replicas, memory_bytes)
    check_stages(cluster, stages)
    order = order_of(schedule, stages, microbatches)
    wishes = Wishes(
        order.n_microbatches,
        order.name,
        costs,
        None,
        order.n_stages,
        recompute,
        orders=order.orders,
        optimizer=optimizer,
    )
    with planning(), shown_progress() as progress:
        captured = capture(model, example_inputs, kwargs, opaque=opaque)
        tensors = tensors_of(captured, example_inputs, kwargs)
        threads_of = None if threads_per_worker is None else constant(threads_per_worker)
        loss = loss_of_batch(loss_fn, example_target, captured, tensors)
        return make_plan(captured, tensors, cluster, wishes, threads_of=threads_of, progress=progress, loss=loss)


def _check_recorded(asked: Mapping[str, bool], compile_stages: bool | str, recompute: bool | None) -> None:
    """Refuse options of recorded stages where no stage will be recorded.

    Raises:
        ConstraintError: see above.
    """
    if not (compile_stages or recompute):
        return
    other, owner = ("compile_stages", "torch.compile") if compile_stages else ("recompute=True", "autograd")
    for option, given in asked.items():
        if given:
            raise ConstraintError(
                f"{option} was given, and {other} leaves the backward to {owner}", hint="one of the two"
            )


def _check_onednn(cluster: Cluster) -> None:
    """Refuse to multiply by oneDNN where there is none, or nothing for it.

    Raises:
        ConstraintError: see above.
    """
    why = why_no_onednn()
    if why is None and all(device.kind.name != "cpu" for device in cluster.devices):
        why = "no device is a CPU"
    if why is not None:
        raise ConstraintError(f"onednn_matmul was given, and {why}", hint="leave it out")


def _backend(compile_stages: bool | str) -> str | None:
    """Return the backend of ``torch.compile`` that is asked for.

    Raises:
        ConstraintError: there is none of that name.
    """
    if isinstance(compile_stages, bool):
        return "inductor" if compile_stages else None
    known = torch.compiler.list_backends(exclude_tags=())
    if compile_stages not in known:
        raise ConstraintError(f"compile_stages={compile_stages!r} is no backend of torch.compile: {', '.join(known)}")
    return compile_stages


def _check_finite(check_finite: str | None, on_nonfinite: str) -> None:
    """Refuse other words than those that are known.

    Raises:
        ConstraintError: see above.
    """
    if check_finite is not None and check_finite not in CHECKS:
        raise ConstraintError(f"check_finite must be None or one of {', '.join(CHECKS)}, got {check_finite!r}")
    if on_nonfinite not in ACTIONS:
        raise ConstraintError(f"on_nonfinite must be one of {', '.join(ACTIONS)}, got {on_nonfinite!r}")


def _devices_of_ranks(launch: str, timeout_s: float | None) -> Devices:
    """List the devices of the ranks there are.

    Raises:
        DeviceError: there are none, or one has no device.
    """
    if launch != "torchrun":
        raise DeviceError(
            f"devices='ranks' are those of torchrun's ranks, and launch={launch!r} has none",
            hint="torchrun --nproc-per-node N train.py, or devices=['cpu', 'cpu']",
        )
    return rank_devices(timeout_s or RANK_S)


def _check_shard(launch: str, compile_stages: bool | str, comm_hook: CommHook | None) -> None:
    """Refuse what sharded parameters do not go with.

    Raises:
        ConstraintError: see above.
    """
    if launch != "torchrun":
        raise ConstraintError(
            f"shard=True was given, and with launch={launch!r} all workers share one copy of the parameters already",
            hint="torchrun --nproc-per-node N train.py",
        )
    if compile_stages or comm_hook is not None:
        other = "compile_stages" if compile_stages else "comm_hook"
        raise ConstraintError(f"shard=True and {other} were both given, and one excludes the other")


def _check_cluster(cluster: Cluster, known: Plan | None, launch: str) -> None:
    if cluster.simulated:
        raise DeviceError("simulated devices can be planned for, not run on", hint="stagecut.plan(model, 'sim:…', …)")
    if known is not None:
        planned = tuple({stage.workers: stage.devices for stage in known.stages}.values())
        missing = Counter(known.devices) - Counter(cluster.names)
        if missing or (cluster.groups is not None and planned != cluster.stages):
            raise ConstraintError(f"the plan is for devices {planned}, and devices={cluster.stages} was given")
    kinds = {torch.device(name).type for name in cluster.names}
    unknown = sorted(kinds - {"cpu", *accelerators.SHARED_MEMORY})
    if launch == "inline" and kinds != {"cpu"}:
        raise DeviceError(
            f"launch='inline' runs all workers on the CPU, and devices are {', '.join(cluster.names)}",
            hint="leave launch out: every device has a process of its own then",
        )
    if launch == "local" and unknown:
        raise DeviceError(
            f"local workers share memory with their parent, and on {', '.join(unknown)} none is known that they could",
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


__all__ = ["Progress", "compile", "plan"]
