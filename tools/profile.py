"""The subcommand ``partition-viz profile``: run some steps of a model, and keep what they took."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DeviceError, StagecutError
from .plan_options import GIB, WORKERS, given, is_file_of_plan, workers_of

if TYPE_CHECKING:
    from ..models.registry import LoadedModel
    from ..partitioner.measured_run import MeasuredRun
    from ..partitioner.plan import Plan
    from ..runtime.pipeline import Pipeline
    from ..runtime.results import Profile

_WARM_UP_STEPS = 2  # and the one before them: stages record their graphs in the third step
# What a plan has decided; where it runs may be said beside it.
_DECIDED = ("stages", "replicas", "microbatches", "schedule", "batch", "costs", "memory_gib")


def profile(options: argparse.Namespace) -> MeasuredRun:
    """Load the model, compile it for the devices, and measure steps on its example batch.

    Raises:
        StagecutError: the arguments contradict each other, the devices are not here, no plan fits, or a step fails.
    """
    from ..partitioner.measured_run import measured_run

    _check(options)
    plan = _plan_of(options)
    if plan is not None and options.devices is None and options.cluster is None:
        _check_devices(options.plan, plan)
    model = _loaded(options.spec, options.batch, plan)
    with _compiled(model, plan, options) as pipeline:
        measured = _measured(pipeline, model, options.steps)
        return measured_run(pipeline.plan, measured.timeline, measured.steps_s)


def _check(options: argparse.Namespace) -> None:
    """Refuse before anything takes long what cannot end well.

    Raises:
        StagecutError: a plan instead of a model, or devices that are only described.
    """
    from ..partitioner.cluster_file import SUFFIX
    from ..partitioner.cluster_spec import PREFIX

    if is_file_of_plan(options.spec):
        raise StagecutError(
            f"{options.spec} is a plan, and only a model can run",
            hint=f"partition-viz profile SPEC --plan {options.spec} -o {options.output}, with the model's SPEC",
        )
    named = options.cluster or options.devices or ""
    if named.startswith(PREFIX) or named.endswith(SUFFIX):
        raise StagecutError(
            f"{named} describes devices that need not exist, and nothing can be measured on those",
            hint="--devices cpu,cpu to measure here, or partition-viz show for what is predicted there",
        )


def _plan_of(options: argparse.Namespace) -> Plan | None:
    from ..partitioner.measured_run import read_plan

    if options.plan is None:
        return None
    useless = given(options, _DECIDED)
    if useless:
        raise StagecutError(
            f"{options.plan} is a plan that is made already; {', '.join(useless)} cannot change it",
            hint="leave out --plan, or the other options",
        )
    return read_plan(options.plan)[0]


def _check_devices(path: Path, plan: Plan) -> None:
    from ..partitioner.describe import describe

    try:
        describe(list(plan.devices))
    except DeviceError as error:
        raise DeviceError(
            f"{path} is a plan for {', '.join(plan.devices)}, and it cannot run here: {error.message}",
            hint="leave out --plan: partition-viz profile SPEC --devices cpu,cpu plans for this machine",
        ) from error


def _loaded(spec: str, rows: int | None, plan: Plan | None) -> LoadedModel:
    """Load the model with the batch that is asked for, or that the plan is for: its prediction is of that one."""
    from ..models.registry import load_model, makes_own_batch
    from ..structure import flatten

    if plan is None:
        return load_model(spec, batch_rows=rows)
    model = load_model(spec, batch_rows=None if makes_own_batch(spec) else plan.batch_rows)
    leaves, _ = flatten((model.example_inputs, model.example_kwargs))
    shapes = [tuple(leaf.shape) for leaf in leaves if getattr(leaf, "shape", ())]
    if plan.batch_rows not in {shape[0] for shape in shapes}:
        raise StagecutError(
            f"the plan is for {plan.batch_rows} rows, and the example inputs of {spec} have shapes {shapes}",
            hint=f"return {plan.batch_rows} rows from the function, or leave out --plan",
        )
    return model


def _compiled(model: LoadedModel, plan: Plan | None, options: argparse.Namespace) -> Pipeline:
    from ..api import compile

    default = workers_of(WORKERS) if plan is None else list(plan.devices)
    named = default if options.devices is None else workers_of(options.devices)
    return compile(
        model.module,
        options.cluster or named,
        loss_fn=model.loss_fn,
        stages=options.stages,
        replicas=options.replicas,
        microbatches=options.microbatches,
        schedule=options.schedule,
        plan=plan,
        costs=options.costs or "measured",
        memory_bytes=None if options.memory_gib is None else options.memory_gib * GIB,
        example_inputs=model.example_inputs,
        example_kwargs=model.example_kwargs,
        example_target=model.example_target,
        trial_s=0.0,  # the prediction that is held against the steps has chosen the plan
    )


def _measured(pipeline: Pipeline, model: LoadedModel, n_steps: int) -> Profile:
    from ..progress import shown_progress

    steps = partial(pipeline.profile, *model.example_inputs, target=model.example_target, **model.example_kwargs)
    try:
        steps(steps=_WARM_UP_STEPS)
        with shown_progress() as progress:
            return steps(steps=n_steps, progress=progress)
    except StagecutError:
        raise
    except Exception as error:
        site = getattr(error, "stagecut", None)
        if site is None:
            raise
        raise StagecutError(
            f"{model.name}: a training step failed in {site}: {type(error).__name__}: {error}", hint=_loss_hint(model)
        ) from error


def _loss_hint(model: LoadedModel) -> str | None:
    if model.loss_fn is not None:
        return None
    return (
        "a model without a loss beside it has to return its own, which takes the mean over the rows: let the function "
        "return a module whose forward gives a 0-dim tensor, or a result with .loss"
    )
