"""The ladder: record the model at several sizes and in both modes, and keep one more module whole for every reason
that stands in the way, until one graph is right for all of them."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors import CaptureError
from ..runtime.program import InputLeaf, InputSpec
from ..runtime.program.calls import Guarded, KeptFunction
from ..structure import tensors_in, unflatten
from .arguments import fake_argument, real_argument, tensors_of
from .assembly import Findings, assembled, assembled_whole
from .captured import WHOLE_MODEL, Capture, OpaqueCall
from .recording.calls import Call, Recording
from .recording.checkpoints import fold_checkpoints
from .recording.forks import NotOptional, Segment, segment_of, with_segments
from .recording.kept import KeptFunctions
from .recording.modes import unite
from .recording.recorder import NeedsData, Recorder
from .recording.resolve import Misfit, Resolved, resolve
from .recording.state import (
    CHANGES_ITSELF,
    TraceRefused,
    all_caches,
    changed_attribute,
    contents_of,
    contents_of_object,
    emptied,
    new_values,
    restore,
)
from .recording.tensors import ModelState

_MAX_ROUNDS = 1000
_MAX_SIZES = 4
Sizes = dict[int, int]


class _Again(Exception):
    """Another module is to be kept whole: begin again."""


class _Fails(Exception):
    """The model does not run for these arguments."""


def matching_paths(model: nn.Module, patterns: Sequence[str]) -> dict[str, OpaqueCall]:
    """Find the modules that ``patterns`` name.

    Raises:
        CaptureError: a pattern matches no module.
    """
    modules = dict(model.named_modules())
    found: dict[str, OpaqueCall] = {}
    for pattern in patterns:
        matched = [path for path in modules if fnmatch.fnmatchcase(path, pattern)]
        if not matched:
            names = ", ".join(list(modules)[1:6])
            raise CaptureError(
                f"opaque names {pattern!r}, which is not a module of {type(model).__name__}",
                hint=f"its modules are {names}, …; see model.named_modules()",
            )
        found.update((path, OpaqueCall(path, type(modules[path]).__name__, "asked for")) for path in matched)
    return found


class Ladder:
    """Captures ``model`` for a call with ``leaves``; ``opaque`` are the modules to keep whole from the start.

    ``order`` lists the keyword arguments in the order in which the call gave them. ``real`` records on real tensors
    from the start. Where a forward changes attributes, it ``may_warm_up``: a first run may only set them up, once.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: InputSpec,
        leaves: list[Any],
        opaque: dict[str, OpaqueCall],
        order: Sequence[str] = (),
        *,
        may_warm_up: bool = True,
        real: bool = False,
    ) -> None:
        self.model = model
        self.inputs = inputs
        self.leaves = leaves
        self.opaque = dict(opaque)
        self.order = list(order)
        self.state = ModelState(model)
        self.types = {path: type(module) for path, module in model.named_modules()}
        batched = [leaf for known, leaf in zip(inputs.leaves, leaves) if known.batched]
        self.rows = max(2, batched[0].shape[0]) if batched else 1
        self.meta = any(t.is_meta for t in (*tensors_of(leaves), *model.parameters(), *model.buffers()))
        self.caches = all_caches()
        self.may_warm_up = may_warm_up and not self.meta
        self.warmed: set[bool] = set()
        self.written: set[str] = set()
        devices = {str(t.device) for t in (*tensors_of(leaves), *model.parameters(), *model.buffers())}
        self.device = devices.pop() if len(devices) == 1 else None
        self.without_data = FakeTensorMode(allow_non_fake_inputs=True)
        self._start_over(real=real)

    def _start_over(self, *, real: bool) -> None:
        """Forget what was found out about sizes, and the recording that it began with."""
        self.real = real
        self.fixed_rows = False
        self.free: Sizes | None = {} if real else None
        self.kept = KeptFunctions()
        self.decisions: dict[bool, dict[int, bool]] = {True: {}, False: {}}
        self.first: tuple[Any, Recording] | None = None

    def climb(self) -> Capture:
        """Record until it succeeds.

        Raises:
            CaptureError: the model fails on the example by itself.
        """
        for _ in range(_MAX_ROUNDS):
            if WHOLE_MODEL in self.opaque:
                break
            try:
                if self.free is None:
                    self.free = self._find_free_sizes()
                trained = fold_checkpoints(self._resolved(training=True))
                evaluated = fold_checkpoints(self._resolved(training=False))
                united, objects = unite(trained, evaluated), trained.objects | evaluated.objects
                return assembled(self._inputs(), united, objects, self._made())
            except _Again:
                continue
            except NeedsData as need:
                self._need_data(need)
        return assembled_whole(self._inputs(), self._made())

    # --- recording ---------------------------------------------------------------------------------------------------

    def _resolved(self, *, training: bool) -> Resolved:
        free = self.free or {}
        sizes: list[tuple[int, Sizes]] = [(self.rows, {})]
        sizes += [(self.rows, {})] if self.fixed_rows else [(self.rows + 1, {}), (self.rows + 2, free)]
        recordings: list[Recording] = []
        for rows, others in sizes:
            known = self._known()
            if training and not recordings and self.first is not None and self.first[0] == self._known():
                recordings.append(self.first[1])
                continue
            recordings.append(self._recorded(rows, others, training, bool(recordings)))
            if self._known() != known and (len(recordings) > 1 or not training):
                raise _Again
        try:
            resolved = resolve(recordings)
        except Misfit as misfit:
            if free and not self.fixed_rows:
                self.free = {}
            elif misfit.at_line and misfit.source and misfit.source not in self.kept.lines:
                self.kept.lines[misfit.source] = misfit.reason  # perhaps a function can be kept whole there
            elif not self._rejects_function(recordings, misfit.path):
                self._keep_whole(misfit.path, misfit.reason, misfit.source)
            raise _Again from None
        return self._with_forks(self._guarded(resolved), recordings[0], training)

    def _with_forks(self, resolved: Resolved, base: Recording, training: bool) -> Resolved:
        """Fold the calls that random numbers decide, by recordings that go the other way at one fork each."""
        segments: list[Segment] = []
        doubted = {fork.source for fork in base.forks}
        try:
            for number, fork in enumerate(base.forks):
                doubted = {fork.source}
                segment = segment_of(base, self._turned(training, {number}), number)
                if segment is None:  # it is the other side that makes calls
                    self._go_the_other_way(base, training, fork.source)
                elif segment.start < segment.end:
                    segments.append(segment)
            doubted = {fork.source for fork in base.forks}
            if segments:
                together = self._turned(training, set(range(len(base.forks))))
                if len(base.calls) - len(together.calls) != sum(segment.end - segment.start for segment in segments):
                    raise NotOptional
            return with_segments(resolved, segments)
        except (_Fails, NotOptional):
            self.kept.unforked |= doubted
            raise _Again from None

    def _turned(self, training: bool, forks: set[int]) -> Recording:
        decisions = {number: not self.decisions[training].get(number, False) for number in forks}
        return self._recorded(self.rows, {}, training, True, probing=True, decisions=decisions)

    def _go_the_other_way(self, base: Recording, training: bool, source: str | None) -> None:
        """Record again, with the other outcome at all forks that are at this line.

        Raises:
            NotOptional: that was done already.
        """
        numbers = {number for number, fork in enumerate(base.forks) if fork.source == source}
        if numbers & self.decisions[training].keys():
            raise NotOptional
        self.decisions[training].update(dict.fromkeys(numbers, True))
        raise _Again

    def _known(self) -> tuple[set[Any], ...]:
        """Return what is kept whole so far, modules and functions, and which lines are known not to be for a graph."""
        decisions = {(mode, number) for mode, made in self.decisions.items() for number in made}
        return set(self.opaque), set(self.kept.functions), set(self.kept.lines), self.kept.unforked | decisions

    def _rejects_function(self, recordings: list[Recording], path: str) -> bool:
        """Give up functions of a module that were kept whole: perhaps another one can be, in which they are called."""
        calls = [call for recording in recordings for call in recording.calls if call.path == path]
        called = {call.target.function for call in calls if isinstance(call.target, KeptFunction)}
        codes = [code for code, (function, _) in self.kept.functions.items() if function in called]
        for code in codes:
            self.kept.reject(code)
        return bool(codes)

    def _find_free_sizes(self) -> Sizes:
        """Find sizes of the arguments, other than the batch, that the model runs for with the same calls.

        A size that several arguments or dimensions share is taken to be one thing, such as the length of a text.
        """
        found: Sizes = {}
        sizes = {size for leaf in tensors_of(self.leaves) for size in leaf.shape[1:] if size > 2}
        if not 0 < len(sizes) <= _MAX_SIZES or self.meta:
            return found
        first = self._recorded(self.rows, {}, True, False)
        self.first = (self._known(), first)
        for size in sorted(sizes):
            for other in (size - 1, size // 2):
                with suppress(_Fails, Misfit):
                    resolve([first, self._recorded(self.rows, {size: other}, True, True, probing=True)])
                    found[size] = other
                    break
        return found

    def _guarded(self, resolved: Resolved) -> Resolved:
        """Check again, when the graph runs, what sizes decided; a small module that the batch decides in is kept."""
        for item in resolved.guards:
            guard = item.guard
            if item.of_batch and guard.path and not self.fixed_rows and self._share(guard.path) <= 0.5:
                self._keep_whole(guard.path, "it branches on the batch size", guard.source)
                raise _Again
            target = Guarded(guard.comparison, guard.outcome, guard.source or guard.path)
            call = Call("call_function", target, (guard.left[0], guard.right[0]), path=guard.path, source=guard.source)
            resolved.calls.append(call)
        return resolved

    def _share(self, path: str) -> float:
        """Return the part of the model's parameters that a module holds."""
        total = sum(parameter.numel() for parameter in self.model.parameters())
        return sum(parameter.numel() for parameter in self.model.get_submodule(path).parameters()) / max(1, total)

    def _recorded(
        self,
        rows: int,
        others: Sizes,
        training: bool,
        resized: bool,
        probing: bool = False,
        decisions: Mapping[int, bool] | None = None,
    ) -> Recording:
        refused: dict[str, Any] = dict.fromkeys(self.opaque)
        kept = self.kept.copy()
        try:
            recording = self._record(rows, others, training, refused, kept, decisions or {})
        except TraceRefused as refusal:
            if probing:
                raise _Fails from refusal
            if refusal.reason.startswith(CHANGES_ITSELF) and self._warm_up(training):
                raise _Again from None
            if kept.needs_data and not self.real and not self.meta:
                raise NeedsData(refusal.reason) from refusal
            self._keep_whole(WHOLE_MODEL, refusal.reason, refusal.source)
            raise _Again from None
        except (NeedsData, Exception) as error:
            if probing:
                raise _Fails from error
            if self._sets_itself_up(refused) and self._warm_up(training):
                raise _Again from None
            return self._failed(error, resized)
        if probing and kept.functions.keys() != self.kept.functions.keys():
            raise _Fails
        if not probing and self._sets_itself_up(refused) and self._warm_up(training):
            raise _Again
        self.kept = kept
        for path, found in refused.items():
            if found is not None and path not in self.opaque:
                if probing:
                    raise _Fails
                self._keep_whole(path, found.reason, found.source)
        recording.rows = rows
        self.written |= recording.written
        return recording

    def _record(
        self,
        rows: int,
        others: Sizes,
        training: bool,
        refused: dict[str, Any],
        functions: KeptFunctions,
        decisions: Mapping[int, bool],
    ) -> Recording:
        with (
            self._without_traces(refused),
            _in_mode(self.model, training),
            self._kept_state(),
            _own_settings(),
            self._stand_ins() as mode,
        ):
            decisions = {**self.decisions[training], **decisions}
            recorder = Recorder(self.state, refused, mode, functions, decisions, meta=self.meta)
            (args, kwargs), given = self._call(rows, others)
            names: dict[int, str] = {}
            for known, leaf in zip(self.inputs.leaves, given):
                if known.graph_input is not None:
                    names.setdefault(id(leaf), known.graph_input)
            objects = [leaf for leaf in self.leaves if not isinstance(leaf, torch.Tensor)]
            before = [entry for leaf in objects for entry in contents_of_object(leaf)]
            try:
                recording = recorder.record(args, kwargs, names, [leaf.graph_input for leaf in self.inputs.leaves])
                if changed_attribute(before) is not None:
                    raise TraceRefused("it changes an argument that is not a tensor")
            finally:
                restore(before)
            return recording

    def _call(self, rows: int, others: Sizes) -> tuple[tuple[Any, dict[str, Any]], list[Any]]:
        """Make the arguments of a call, and list their leaves; what is one tensor in the example is one here."""
        made: dict[int, Any] = {}
        for known, leaf in zip(self.inputs.leaves, self.leaves):
            if id(leaf) not in made:
                made[id(leaf)] = self._argument(leaf, rows if known.batched else None, others)
        given = [made[id(leaf)] for leaf in self.leaves]
        args, kwargs = unflatten(self.inputs.structure, given)
        return (args, {name: kwargs[name] for name in sorted(kwargs, key=self._place)}), given

    def _sets_itself_up(self, refused: dict[str, Any]) -> bool:
        """Say whether a module was refused for the first time because it changes its attributes."""
        new = [found for path, found in refused.items() if found is not None and path not in self.opaque]
        return any(found.reason.startswith(CHANGES_ITSELF) for found in new)

    def _warm_up(self, training: bool) -> bool:
        """Run the model once, so that it sets up what it sets up once: flags, hooks; tensors that it keeps are dropped.

        Returns False if that was done before. That the graph does what a first call does is checked at the end.
        """
        if not self.may_warm_up or training in self.warmed:
            return False
        self.warmed.add(training)
        before = [(module, contents_of(module)) for module in self.model.modules()]
        with _in_mode(self.model, training), self._kept_state(), _own_settings(), self._stand_ins():
            args, kwargs = self._call(self.rows, {})[0]
            with suppress(Exception):
                self.model(*args, **kwargs)
        for _, contents in before:
            if tensors_in(new_values(contents)):
                restore(contents)
        return True

    def _place(self, name: str) -> int:
        return self.order.index(name) if name in self.order else len(self.order)

    def _failed(self, error: BaseException, resized: bool) -> Recording:
        if resized and self.free:
            self.free = {}
            raise _Again from error
        if resized and not self.fixed_rows:
            self.fixed_rows = True
            raise _Again from error
        if not self.real:
            raise error if isinstance(error, NeedsData) else NeedsData(f"{type(error).__name__}: {error}") from error
        raise CaptureError(
            f"{type(self.model).__name__} fails on the example inputs by itself, before anything is cut "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})",
            hint="call model(*example_inputs) to see the error",
        ) from error

    def _need_data(self, need: NeedsData) -> None:
        if self.meta:
            self._keep_whole(WHOLE_MODEL, f"it has no data (meta tensors), and cannot be followed without: {need}")
            return
        self._start_over(real=True)
        self.opaque = {path: call for path, call in self.opaque.items() if call.reason == "asked for"}

    @contextmanager
    def _stand_ins(self) -> Iterator[FakeTensorMode | None]:
        """Let tensors have no data, unless real ones are needed."""
        if self.real:
            yield None
            return
        log = logging.getLogger("torch._subclasses.fake_tensor")  # it reports every size that is tried in vain
        before, log.disabled = log.disabled, True
        try:
            with torch.device("meta") if self.meta else nullcontext(), self.without_data:
                yield self.without_data
        finally:
            log.disabled = before

    def _argument(self, leaf: Any, rows: int | None, others: Sizes) -> Any:
        """Give an argument for ``rows`` samples: without data where that is enough, else the example's own rows."""
        return real_argument(leaf, rows) if self.real else fake_argument(leaf, rows, others, self.meta)

    @contextmanager
    def _without_traces(self, opaque: dict[str, Any]) -> Iterator[None]:
        """Undo what runs of ``opaque`` modules change in their attributes, and forget cached results.

        All other state is left as a run leaves it: that recordings then differ shows that the model has it.
        """
        before = {path: contents_of(module) for path, module in self.model.named_modules()}
        with emptied(self.caches):
            try:
                yield
            finally:
                for path, contents in before.items():
                    if any(path == outer or path.startswith(f"{outer}.") for outer in opaque):
                        restore(contents)

    @contextmanager
    def _kept_state(self) -> Iterator[None]:
        """Undo what a run writes to buffers and other tensors of the model, and on real data to parameters.

        Batch norms write to their statistics without a trace in the version counter.
        """
        mutable = [t for _, t in self.state.tensors.values() if self.real or not isinstance(t, nn.Parameter)]
        before = [(tensor, tensor.detach().clone()) for tensor in mutable]
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in before:
                    if not torch.equal(tensor, value) if not tensor.is_meta else False:
                        tensor.copy_(value)

    def _keep_whole(self, path: str, reason: str, source: str | None = None) -> None:
        while path in self.opaque and path:
            path = path.rpartition(".")[0]
        self.opaque[path] = OpaqueCall(path, self.types[path].__name__, reason, source)

    # --- the graph ---------------------------------------------------------------------------------------------------

    def _made(self) -> Findings:
        return Findings(self.model, self.types, self.opaque, self.kept.functions.values(), self.written, self.device)

    def _inputs(self) -> InputSpec:
        leaves = tuple(map(self._freed, self.inputs.leaves))
        return InputSpec(self.inputs.structure, leaves, self.rows if self.fixed_rows else None)

    def _freed(self, leaf: InputLeaf) -> InputLeaf:
        """Let the sizes be free that were found to be."""
        if leaf.shape is None:
            return leaf
        whole = WHOLE_MODEL in self.opaque
        free = self.free or {}
        first, *others = leaf.shape or (None,)
        shape = (first, *(None if whole or size in free else size for size in others)) if leaf.shape else ()
        return replace(leaf, shape=None if whole else shape)


@contextmanager
def _own_settings() -> Iterator[None]:
    """Record with gradients, and leave the default dtype as it was, whatever the model sets and fails to set back.

    Autocast keeps the weights that it has cast; among them must be no stand-in.
    """
    dtype, caches = torch.get_default_dtype(), torch.is_autocast_cache_enabled()
    try:
        torch.set_autocast_cache_enabled(False)
        with torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_autocast_cache_enabled(caches)
        torch.clear_autocast_cache()


@contextmanager
def _in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    for module, _ in before:
        module.training = training
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode
