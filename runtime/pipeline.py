"""The pipeline that a user holds: an ``nn.Module`` that steps, predicts, verifies and measures."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import ConstraintError, NonFiniteError, StagecutError, StageError
from ..structure import flatten, unflatten
from .accelerators import is_accelerator
from .attach import Pending, attach
from .batch import (
    match_inputs,
    merge_outputs,
    piece_sizes,
    shares,
    signature_of,
    split_gradients,
    split_inputs,
    split_target,
    where_given,
)
from .build import Build
from .engine import Engine
from .facade import Facade
from .program import PipelineSpec, Timeline
from .requests import BACKWARD, EVALUATE, FORWARD, TRAIN, StepReport, StepRequest
from .results import EvalResult, Profile, Startup, StepResult, timeline_of, total_loss
from .surroundings import autocast_dtype
from .verify import VerifyReport, compare, gradients_of, preserved, reference_model, reference_step
from .watch.logs import WORKERS
from .watch.stats import Stats
from .watch.watching import Watch


class Pipeline(Facade):
    """A compiled model.

    Made by :func:`stagecut.compile`. Its parameters are the very objects of the model that it was made from; names,
    state dicts, ``train()`` and ``eval()`` are the model's. Local worker processes are started by ``compile``; they get
    their stages at the first call, when capture and plan are made, or before it when example inputs were given.

    A pipeline is a context manager; leaving it, or :meth:`close`, lets its workers go: they wait for the next
    ``compile`` (``stagecut.end_workers()`` ends those that wait).
    """

    # Hugging Face's Trainer asks. With it, it would pass on the count of labels of several batches for the loss to be a
    # share of, and each microbatch would take it for the count of its own.
    accepts_loss_kwargs = False

    def __init__(
        self,
        model: nn.Module,
        build: Build,
        launch: Callable[[PipelineSpec], Engine],
        *,
        loss_fn: Callable[..., Any] | None,
        loss_weight: Callable[[Any], float] | None,
        loss_reduction: str,
        release: Callable[[], None],
        watch: Watch,
    ) -> None:
        super().__init__()
        self.__dict__["_model"] = model
        self._build = build
        self._launch = launch
        self._release = release
        self._loss_fn = loss_fn
        self._loss_weight = loss_weight
        self._loss_reduction = loss_reduction
        self._spec: PipelineSpec | None = None
        self._engine: Engine | None = None
        self._plan: Any = None
        self._broken: BaseException | None = None
        self._closed = False
        self._n_calls = 0
        self._n_steps = 0
        self._sync = True
        self._plan_s = self._workers_s = 0.0
        self._startup: Startup | None = None
        self._forgotten: list[int] = []
        self._told: set[int] = set()  # stages
        self._watch = watch
        self.training = model.training

    @property
    def plan(self) -> Any:
        """Return the plan that runs.

        Raises:
            StagecutError: nothing has been planned yet.
        """
        if self._plan is None:
            raise StagecutError(
                "the plan is made from the shapes of the first call, and there was none yet",
                hint="stagecut.compile(..., example_inputs=(x,)) plans at once",
            )
        return self._plan

    @property
    def startup(self) -> Startup:
        """Return how long it took until the first step or forward was done, and with what.

        Raises:
            StagecutError: there was none yet.
        """
        if self._startup is None:
            raise StagecutError(
                "nothing has run yet, so nobody knows how long the start takes", hint="run a step first"
            )
        return self._startup

    def step(self, *args: Any, target: Any = None, **kwargs: Any) -> StepResult:
        """Run forward and backward of one batch; gradients are added into ``.grad``.

        Args:
            args, kwargs: what the model takes; tensors are cut along dimension 0, their rows being samples.
            target: what ``loss_fn(output, target)`` compares with; tensors with as many rows are cut alike.

        Returns:
            The loss of the whole batch: the mean over its rows of ``loss_fn``'s mean per microbatch (or what
            ``loss_weight`` and ``loss_reduction`` say).

        Raises:
            ShapeError: the arguments do not fit the captured model.
            WorkerLost, StallError: a worker ended or hung.
            Exception: whatever the model or the loss raised, as itself; ``error.stagecut`` says where.
        """
        return self._step(args, kwargs, target, profile=False)[0]

    def _step(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any, *, profile: bool
    ) -> tuple[StepResult, StepReport]:
        request, _ = self._request(TRAIN, args, kwargs, target=target, want_loss=True, profile=profile)
        report = self._run(request)
        return StepResult(total_loss(report, request)), report

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Add up gradients on each replica, step by step, for the next step after it to sum them over replicas.

        As ``DistributedDataParallel.no_sync``: what accumulates over several batches is reduced once. Inside, ``.grad``
        is a part (one replica's) that may be dropped by ``zero_grad()``, and not be changed.
        """
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's result for the batch; ``backward()`` on a loss of it runs the pipeline's backward.

        It is on the device of the batch's first tensor.

        The schedule is fill-drain: all forwards now, all backwards when autograd asks. Under ``torch.no_grad()``
        nothing is kept.
        """
        if not torch.is_grad_enabled():
            return self.evaluate(*args, **kwargs).output
        request, sizes = self._request(FORWARD, args, kwargs, want_outputs=True)
        report = self._run(request)
        merged, how = merge_outputs([report.outputs[m] for m in range(len(sizes))], sizes)
        leaves, structure = flatten(where_given(merged, args, kwargs))
        is_tensor = [isinstance(leaf, torch.Tensor) for leaf in leaves]
        engine = self._engine

        def spread(gradients: list[Any]) -> list[Any]:
            """Give every leaf its gradient: only tensors went through autograd.

            It must not know the result: that would hang in a circle, and live until the garbage collector comes by.
            """
            given = iter(gradients)
            return [next(given) if own else None for own in is_tensor]

        # Forgetting is only noted: the garbage collector may run in the middle of another request.
        pending = Pending(
            lambda gradients: self._run_backward(engine, request, split_gradients(spread(gradients), how, sizes)),
            lambda: self._forgotten.append(request.call),
        )
        attached = iter(attach(pending, [leaf for leaf, own in zip(leaves, is_tensor) if own]))
        return unflatten(structure, [next(attached) if own else leaf for leaf, own in zip(leaves, is_tensor)])

    def evaluate(self, *args: Any, target: Any = None, **kwargs: Any) -> EvalResult:
        """Run the batch forward without gradients, in the mode (``train()`` or ``eval()``) that is set."""
        want_loss = target is not None
        request, sizes = self._request(EVALUATE, args, kwargs, target=target, want_outputs=True, want_loss=want_loss)
        report = self._run(request)
        output, _ = merge_outputs([report.outputs[m] for m in range(len(sizes))], sizes)
        loss = total_loss(report, request) if want_loss else None
        return EvalResult(where_given(output, args, kwargs), loss)

    def verify(
        self, *args: Any, target: Any = None, rtol: float | None = None, raises: bool = True, **kwargs: Any
    ) -> VerifyReport:
        """Compare loss and every gradient with the unsplit model on the same batch in the same microbatches.

        Gradients, buffers and random state are left as they were. Where the model draws random numbers the reference
        is the uncut captured graph under the same seeds, else it is the model itself.

        Args:
            rtol: allowed error relative to the largest gradient of the parameter; by dtype if None.
            raises: raise if something differs, instead of only saying so in the report.

        Raises:
            StagecutError: something differs; the message names the first parameter.
        """
        with self._complete("verify"), preserved(self.model):
            request, _ = self._request(TRAIN, args, kwargs, target=target, want_loss=True)
            report = self._run(request)
            given = gradients_of(self.model, total_loss(report, request))
        assert self._spec is not None
        assert self._engine is not None
        state = self._engine.full_state()
        owned = {name for name, parameter in self.model.named_parameters() if parameter.shape == state[name].shape}
        device = torch.device(self._spec.devices[0])
        with reference_model(self.model, state, device) as model, preserved(model):
            engine = self._engine
            reference = reference_step(model, self._spec, request, self._loss_fn, engine.n_threads, engine.n_together)
        kind = "captured graph" if self._spec.random else "model"
        result = compare(given, reference, owned, rtol, kind)
        if raises and not result.ok:
            raise StagecutError(str(result))
        return result

    def profile(
        self,
        *args: Any,
        target: Any = None,
        steps: int = 5,
        progress: Callable[[str, int, int], None] | None = None,
        **kwargs: Any,
    ) -> Profile:
        """Measure ``steps`` training steps on one batch after a warm-up; gradients and buffers stay as they were.

        ``progress`` is called before the first and after each of them with what is done, how many are, and of how many.
        """
        if steps < 1:
            raise ConstraintError(f"steps must be at least 1, got {steps}")
        tell = progress or (lambda what, done, total: None)
        measured: list[tuple[float, Timeline]] = []
        with self._complete("profile"), preserved(self.model):
            self._step(args, kwargs, target, profile=False)
            for done in range(steps):
                tell("measuring steps", done, steps)
                self.model.zero_grad(set_to_none=True)
                start = time.perf_counter()
                _, report = self._step(args, kwargs, target, profile=True)
                measured.append((time.perf_counter() - start, timeline_of(report, self._n_workers)))
        tell("measuring steps", steps, steps)
        middle = sorted(measured, key=lambda pair: pair[0])[len(measured) // 2]
        return Profile(middle[1], tuple(seconds for seconds, _ in measured))

    def replan(self, *args: Any, target: Any = None, steps: int = 5, gain: float = 0.03, **kwargs: Any) -> Any:
        """Measure this pipeline, plan again with what was measured, and move to the new plan if that pays.

        Costs of ops are measured where they were analytic, then scaled so that every stage takes what it was measured
        to take. Weights, optimizer state and ``.grad`` stay as they are: parameters are the same objects.

        Args:
            args, target, kwargs: a batch, as for :meth:`step`.
            steps: how many steps to measure.
            gain: the share of the step that the new plan must save, as predicted, for the pipeline to move.

        Returns:
            The plan that runs from now on.

        Raises:
            StagecutError: under torchrun, where ranks own their stages' weights.
        """
        self._build.target = target
        self.prepare(*args, **kwargs)

        def measure() -> Timeline:
            timeline = self.profile(*args, target=target, steps=steps, **kwargs).timeline
            assert self._spec is not None
            if any(map(is_accelerator, self._spec.devices)):
                self._let_go()  # a model is captured where it is whole
            return timeline

        found = self._build.replan(args, kwargs, measure, gain)
        if found is not None:
            self._let_go()
            self._spec, self._plan = found
        self.prepare(*args, **kwargs)
        return self.plan

    def _let_go(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def stats(self) -> Stats:
        """Return what every worker did since the present plan began to run: a table when printed, JSON by its fields.

        Workers count as they go, and are not asked. Under torchrun this is a collective call, as ``state_dict()`` is.
        """
        self._owner.check("pm.stats()")
        return self._watch.stats(self._engine)

    @contextmanager
    def _complete(self, what: str) -> Iterator[None]:
        """Let steps of the pipeline's own sum their gradients; refuse them while the user's have yet to be summed.

        Raises:
            StagecutError: there are such gradients.
        """
        if self._engine is not None and self._engine.unsynced:
            raise StagecutError(
                f"{what}() between steps under no_sync would lose the gradients that are not summed yet",
                hint=f"call pm.{what}(...) after a step outside of no_sync",
            )
        before, self._sync = self._sync, True
        try:
            yield
        finally:
            self._sync = before

    @property
    def _n_workers(self) -> int:
        assert self._spec is not None
        return self._spec.layout.n_workers

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Capture, plan and start the workers for calls like this one, without running it."""
        self._owner.check("this pipeline")
        if self._closed:
            raise StageError("this pipeline is closed", hint="call stagecut.compile(...) again")
        if self._broken is not None:
            raise StageError(
                f"this pipeline is broken by an earlier error: {type(self._broken).__name__}: {self._broken}",
                hint="pm.restart() starts the workers again with the parameters as they are",
            )
        if self._engine is None:
            begin = time.perf_counter()
            if self._spec is None:
                target = self._build.target
                contenders = self._build(args, kwargs)
                settled = contenders[0] if len(contenders) == 1 else self._try(contenders, args, kwargs, target)
                self._spec, self._plan = settled
            planned = time.perf_counter()
            self._watch.planned(self._spec, self._plan)
            with self._watch.setting_up():
                self._engine = self._launch(self._spec)
            self._plan_s, self._workers_s = planned - begin, time.perf_counter() - planned
            WORKERS.info("all workers set up in %.2f s", self._workers_s)

    def _try(
        self, contenders: Sequence[tuple[PipelineSpec, Any]], args: tuple[Any, ...], kwargs: dict[str, Any], target: Any
    ) -> tuple[PipelineSpec, Any]:
        """Run some steps under each plan in turn, and settle for one; the model stays as it was.

        All share the model: whichever engine runs next takes its parameters into its own workers' memory.
        """
        engines: list[Engine] = []

        def step(spec: PipelineSpec, engine: Engine) -> None:
            self._spec, self._engine = spec, engine
            self.model.zero_grad(set_to_none=True)
            self._step(args, kwargs, target, profile=False)

        try:
            with preserved(self.model):
                for spec, _ in contenders:
                    engines.append(self._launch(spec))
                steps = [partial(step, spec, engine) for (spec, _), engine in zip(contenders, engines)]
                taken, plan = self._build.try_out(steps)
        except Exception as error:
            warnings.warn(
                f"stagecut: plans could not be tried, the one predicted to be fastest is taken: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )
            taken, plan = self._build.without_trial(error)
        finally:
            self._spec = self._engine = self._broken = self._startup = None
            self._told.clear()  # that was about other plans' stages
            for engine in engines:
                engine.close()
        return contenders[taken][0], plan

    def restart(self) -> None:
        """Start the workers again after an error; parameters and buffers are kept as they are."""
        self._owner.check("pm.restart()")
        self._watch.restarted()
        self.close()
        self._closed = False
        self._broken = None

    def _request(
        self,
        kind: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        target: Any = None,
        want_loss: bool = False,
        want_outputs: bool = False,
        profile: bool = False,
    ) -> tuple[StepRequest, list[int]]:
        if self._spec is None:
            self._build.target = target if target is not None else self._build.target
            self._build.can_step = want_loss and (target is not None or kind == TRAIN)
        self.prepare(*args, **kwargs)
        spec = self._spec
        assert spec is not None
        assert self._engine is not None
        inputs, rows = match_inputs(spec.inputs, self.model.forward, args, kwargs)
        sizes = piece_sizes(rows, spec.microbatches_per_replica * spec.layout.n_replicas)
        pieces = split_inputs(spec.inputs, inputs, sizes)
        targets = None if target is None else split_target(target, rows, sizes)
        autocast = autocast_dtype(spec.devices[0])
        self._n_calls += 1
        self._n_steps += kind in (TRAIN, FORWARD)
        request = StepRequest(
            kind=kind,
            call=self._n_calls,
            signature=signature_of(pieces, hash((self.training, autocast))),
            inputs=pieces,
            targets=targets,
            weights=self._weights(sizes, targets),
            seed=self._engine.common_seed(int(torch.randint(2**31, ()).item())) if spec.random else 0,
            autocast=autocast,
            want_loss=want_loss,
            want_outputs=want_outputs,
            profile=profile,
            sync=self._sync,
            step=self._n_steps,
        )
        return request, sizes

    def _weights(self, sizes: list[int], targets: tuple[Any, ...] | None) -> tuple[float, ...]:
        if self._loss_reduction == "sum":
            return (1.0,) * len(sizes)
        if self._loss_weight is None or targets is None:
            return tuple(shares(sizes))
        return tuple(shares([float(self._loss_weight(target)) for target in targets]))

    def _run(self, request: StepRequest) -> StepReport:
        assert self._engine is not None
        while self._forgotten:
            self._engine.forget(self._forgotten.pop())
        if request.kind in (TRAIN, BACKWARD):
            self._engine.unsynced.check(request.sync)
        begin = time.perf_counter()
        try:
            report = self._engine.run(request)
        except BaseException as error:
            self._broken = error
            if isinstance(error, Exception):
                self._watch.failed(error, request, self._engine)
            self._engine.unsynced.drop()
            self._engine.close()
            self._engine = None
            raise
        if self._startup is None:
            self._startup = Startup(self._plan_s, self._workers_s, time.perf_counter() - begin)
            if sys.stderr.isatty():
                print(f"stagecut: {self._startup}", file=sys.stderr)
        self._tell_whole(report)
        try:
            self._watch.ran(request, report, time.perf_counter() - begin, self._engine)
        except NonFiniteError:
            if request.kind == FORWARD:
                self._forgotten.append(request.call)  # nobody gets the result, so no backward of it will come
            raise
        return report

    def _tell_whole(self, report: StepReport) -> None:
        """Say once which stages run backwards whole that the schedule has in two parts."""
        for stage, why in report.whole_because.items():
            if stage not in self._told:
                self._told.add(stage)
                warnings.warn(
                    f"stagecut: stage {stage} runs its backward whole: {why}; gradients are exact, and the stages "
                    "before it wait longer than the schedule means them to",
                    stacklevel=5,
                )

    def _run_backward(self, engine: Engine | None, forward: StepRequest, gradients: tuple[list[Any], ...]) -> None:
        self._owner.check("this pipeline's backward")
        if engine is None or engine is not self._engine:
            raise StageError("the workers that hold this result's activations are gone", hint="run the forward again")
        nothing: tuple[dict[str, Any], ...] = ({},) * forward.n_microbatches
        self._run(replace(forward, kind=BACKWARD, want_outputs=False, inputs=nothing, output_gradients=gradients))

    def close(self) -> None:
        """Let the workers go, to the next pipeline of this process; parameters stay usable.

        Raises:
            CheckpointError: one that was being written in the background could not be.
        """
        if not self._closed:
            WORKERS.info("closed")
        self._closed = True
        if self._engine is not None:
            self._engine.unsynced.drop()
            self._engine.close()
            self._engine = None
        self._release()
        self._finish_saving()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
