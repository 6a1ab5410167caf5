"""``stagecut.load``: a plan from its file, or a pipeline from a folder of checkpoints."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from .errors import CheckpointError, ConstraintError, PlanError
from .partitioner.plan import Plan
from .partitioner.plan import load as load_plan

if TYPE_CHECKING:
    from torch import nn

    from .partitioner.describe import Devices, Replicas
    from .runtime.pipeline import Pipeline
    from .runtime.replicate import CommHook


@overload
def load(path: str | Path) -> Plan: ...


@overload
def load(
    path: str | Path,
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
    comm_hook: CommHook | None = None,
    shard: bool = False,
    check_finite: str | None = None,
    on_nonfinite: str = "error",
) -> Pipeline: ...


def load(
    path: str | Path,
    model: nn.Module | None = None,
    devices: Devices | None = None,
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
    comm_hook: CommHook | None = None,
    shard: bool = False,
    check_finite: str | None = None,
    on_nonfinite: str = "error",
) -> Plan | Pipeline:
    """Read a plan; or, with a model and devices, compile the model with the weights of a checkpoint.

    ``stagecut.load("plan.json")`` is a plan. ``stagecut.load("checkpoints", model, devices=[0, 1])`` is the pipeline
    that :func:`compile` makes with the same options, planned for these devices whatever wrote the checkpoint, whose
    model has the parameters and buffers of the folder's newest whole checkpoint, or of the one that ``path`` is. They
    are read before the workers start; a model on the meta device is filled where each stage runs, and no process holds
    the whole.

    It is the weights alone that are loaded: to evaluate, to export, to train for something else. An optimizer takes
    parameters that exist, so training goes on by ``pm.resume(folder, optimizer=...)`` or ``pm.load``, which set the
    weights too, with the optimizer, its scheduler, and the generators of random numbers: call :func:`compile` for it.

    Raises:
        PlanError: ``path`` is no plan, and no model was given.
        CheckpointError: there is no whole checkpoint, it is of another model, or ``path`` is a file; the model is as it
            was.
        ConstraintError: model and devices are not given both, or options for neither.
        StagecutError: as :func:`compile` raises it.
    """
    options = {name: value for name, value in locals().items() if name not in ("path", "model", "devices")}
    if model is None:
        return _plan(Path(path), devices, options)
    if devices is None:
        raise ConstraintError(
            "stagecut.load was given a model, and no devices to compile it for",
            hint=f"stagecut.load({str(path)!r}, model, devices=[0, 1])",
        )
    if Path(path).is_file():
        raise CheckpointError(
            f"{path} is a file, and checkpoints are in folders",
            hint=f"stagecut.compile(model, devices, plan={str(path)!r}), if it is a plan",
        )
    return _pipeline(Path(path), model, devices, options)


def _plan(path: Path, devices: Devices | None, options: dict[str, Any]) -> Plan:
    """Read a plan, for which nothing else can have been given."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(load).parameters.items()}
    given = ["devices"] if devices is not None else []
    given += [name for name, value in options.items() if value is not defaults[name]]
    if given:
        raise ConstraintError(
            f"stagecut.load was given {', '.join(given)}, and no model to compile",
            hint=f"stagecut.load({str(path)!r}, model, devices=[0, 1], ...)",
        )
    if path.is_dir():
        raise PlanError(
            f"{path} is a folder, and a plan is a file",
            hint=f"stagecut.load({str(path)!r}, model, devices=[0, 1]), if there are checkpoints in it",
        )
    return load_plan(path)


def _pipeline(path: Path, model: nn.Module, devices: Devices, options: dict[str, Any]) -> Pipeline:
    """Compile first, then read: what is wrong with the options is found before the model is touched."""
    from .api import compile
    from .runtime.checkpoint.weights import CheckpointWeights, has_checkpoint

    if not has_checkpoint(path):
        raise CheckpointError(f"there is no checkpoint in {path}", hint="pm.save(folder, step=...) writes one")
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        return compile(model, devices, weights=path, **options)
    inputs, kwargs = options.pop("example_inputs"), options.pop("example_kwargs")
    pipeline = compile(model, devices, **options)
    try:
        CheckpointWeights(path, model).fill_all(model)
        if inputs is not None or kwargs is not None:
            pipeline.prepare(*(inputs or ()), **(kwargs or {}))
    except BaseException:
        pipeline.close()
        raise
    return pipeline
