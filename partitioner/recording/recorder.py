"""The recorder: runs a model's forward and writes every torch call down, with layers kept as calls of their own.

The model's Python runs as it is; torch calls are seen through torch's function mode, calls of modules, of custom
autograd functions and of ``torch.utils.checkpoint`` through replacements that last as long as the recording. Tensors
are known by identity. A module whose forward does what no graph can keep is rolled back and written down as one call.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint as torch_checkpoint

from ...runtime.program.calls import ApplyFunction, DataCheck, OutOfReach, SameForm, Settled, form_of
from ...structure import flatten, unflatten
from . import functions, madeup
from .calls import Call, Recording, Region, map_values, map_values_with_path, parts_of, without_memory
from .doubts import Doubts
from .forks import MOST_FORKS, Fork
from .kept import Catching, KeptFunctions, reaches, run_kept
from .naming import SPELLED, UNSPOKEN, Values
from .numbers import Expr, Guard, Known, KnownFloat, KnownInt, Ref, plain
from .refusals import outcome_that_goes_on
from .replaced import apply_function, call_module, replaced
from .settled import settled_value
from .state import (
    TraceRefused,
    changed_attribute,
    hook_contents,
    own_random_state,
    restore,
    unchanged,
)
from .surroundings import asking_frame, line, line_of, place_of_call, settings
from .tensors import Made, ModelState, alias, storage_of, swapped_state, versions_of

_MOST_NUMBERS = 4096


class NeedsData(BaseException):
    """Stand-ins without data do not get through the model; it must be recorded on real tensors."""


class Recorder(TorchFunctionMode):
    """One recording. ``opaque`` maps module paths to reasons, and grows where a module cannot be followed."""

    def __init__(
        self,
        state: ModelState,
        opaque: dict[str, TraceRefused],
        without: FakeTensorMode | None,
        kept: KeptFunctions,
        decisions: Mapping[int, bool],
        *,
        meta: bool = False,
    ) -> None:
        """``without`` is the mode in which tensors have no data; None records on real data.

        ``kept`` are the functions that are kept whole; it grows before ``opaque`` does. ``decisions`` say what to do at
        forks, by their number; False where they do not.

        Of a model on the ``meta`` device nothing can be run on made-up data.
        """
        super().__init__()
        self.state = state
        self.opaque = opaque
        self.real = without is None
        self._without = without
        self._catching = Catching(kept, self.call_kept)
        self._is_meta = meta
        self._stand_in = None if without is None else functools.partial(_stand_in, without)
        self._kept_alive: list[Any] = []
        self._real_of: dict[int, torch.Tensor] = {}
        self.calls: list[Call] = []
        self.guards: list[Guard] = []
        self.lengths: list[tuple[int, str, str | None]] = []
        self.forks: list[Fork] = []
        self._decisions = decisions
        self.entered: set[str] = set()
        self.written: set[str] = set()
        self.groups: dict[int, dict[str, Any]] = {}
        self._doubts = Doubts()
        self._iterated: Any = None
        self._same: dict[int, Any] = {}
        self._stack: list[str] = []
        self._group: int | None = None
        self._paused = False
        self._keeping = False
        self._n_on_data = 0
        self._autocast: list[tuple[str, bool, str]] = []
        self._made = Made()
        self._values = Values(state, self._made, self._add)
        self._own: list[tuple[str, torch.Tensor]] = []
        self._own_storages: dict[int, str] | None = None
        self._settings = settings()
        self._cudnn = torch.backends.cudnn.enabled

    def record(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], names: dict[int, str], placeholders: list[str | None]
    ) -> Recording:
        """Run the model; ``names`` maps the identity of each tensor among the arguments to its placeholder."""
        given = {names[id(leaf)]: leaf for leaf in flatten((args, kwargs))[0] if id(leaf) in names}
        for name in placeholders:
            if name is not None:
                self._append(Call("placeholder", name), given.get(name))
        watched = self._made if self.real else nullcontext()
        with replaced(self), watched, self._catching, self:
            result = self.state.model(*args, **kwargs)
            with self._pause():
                leaves, structure = flatten(result)
                if any(isinstance(leaf, str) and UNSPOKEN in leaf for leaf in leaves):
                    raise TraceRefused("it returns a tensor's data as text")
                encoded = [self._values.ref_of(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        return Recording(
            self.calls,
            (encoded, structure),
            self._values.objects,
            self.guards,
            self.entered,
            self.groups,
            self.written,
            self.lengths,
            self.forks,
        )

    # --- torch functions ---------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused or func is torch._C._set_grad_enabled:
            return func(*args, **kwargs)
        with self._pause():
            return self._function(func, functions.name_of(func), args, kwargs)

    def _function(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        if (
            getattr(func, "__name__", "") == "__set__"
            and name == "requires_grad"
            and self._values.ref(args[0]) is not None
        ):
            return self._function(torch.Tensor.requires_grad_, "requires_grad_", args, kwargs)
        if getattr(func, "__name__", "") in ("__set__", "__delete__"):
            raise self._refusal(f"it assigns a tensor's {name!r}")
        getter = functions.is_property(func)
        if name == "__format__":
            return UNSPOKEN
        if name == "_assert":
            return self._assert(args[0])
        if name in functions.QUESTIONS and (getter or name != "grad") and not (name == "type" and len(args) > 1):
            return self._ask(func, name, args, kwargs)
        if name in functions.REFUSED:
            raise self._refusal(functions.REFUSED[name])
        if name in functions.READS:
            return self._read(func, name, args)
        op, target = ("call_function", getattr) if getter else functions.target_of(func, name)
        given = (args[0], name) if getter else args
        encoded = tuple(self._values.encoded(item, True) for item in given)
        encoded_kwargs = self._values.encoded(kwargs, True)
        args, kwargs = self._without_data(args), self._without_data(kwargs)
        versions = versions_of(args, kwargs)
        result = self._run(func, args, kwargs)
        if result is None and not functions.may_return_nothing(name):
            raise self._refusal(f"it calls {name}, which returns nothing that a graph could use")
        in_place = functions.changes_in_place(name, kwargs)
        if in_place or name == "__setitem__":
            self._note_writes([*args[:1], kwargs.get("out")])
        result = self._append(Call(op, target, encoded, encoded_kwargs), result, versions, in_place)
        self._doubts.note(name, args, result)
        self._iterated = (id(args[0]), place_of_call()) if name == "unbind" else None
        if result is not None and not any(isinstance(part, torch.Tensor) for _, part in parts_of(result)):
            raise self._refusal(f"it uses the result of {name}, which is not a tensor")
        return result

    def _run(self, function: Any, args: Any, kwargs: Any, module: nn.Module | None = None) -> Any:
        """Call without data, or, where that is not enough, on made-up data."""
        args, kwargs = without_memory(tuple(args)), without_memory(dict(kwargs))
        try:
            return function(*args, **kwargs)
        except OutOfReach:
            raise
        except Exception as error:
            if self._without is None or self._is_meta:
                if self.real:
                    raise
                raise NeedsData(f"{line() or ''}: {type(error).__name__}: {error}") from error
            first = error
        self._n_on_data += 1
        try:
            on_data = functools.partial(call_module, module) if module is not None else function
            result, unsure = madeup.run(on_data, args, kwargs, module, self._without)
        except OutOfReach:
            raise
        except Exception:
            raise NeedsData(f"{line() or ''}: {type(first).__name__}: {first}") from first
        self._kept_alive.append(unsure)
        self._doubts.unsure.update(id(tensor) for tensor in unsure)
        return result

    def _without_data(self, value: Any) -> Any:
        """Replace real tensors: what a call writes to them must not reach the model."""
        if self._stand_in is None:
            return value
        stand_in = self._stand_in

        def replace(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            made = stand_in(leaf)
            if made is not leaf:
                self._real_of[id(made)] = leaf
                self._kept_alive.append(made)
            return made

        return map_values(replace, value)

    def _note_writes(self, values: list[Any]) -> None:
        """Remember which of the model's own tensors are changed in place, through views and ``.data`` too."""
        if self._own_storages is None:
            stand_in = self._stand_in or (lambda tensor: tensor)
            self._own = [(name, stand_in(tensor)) for name, tensor in self.state.tensors.values()]
            storages = [(name, storage_of(tensor)) for name, tensor in self._own]
            self._own_storages = {storage._cdata: name for name, storage in storages if storage is not None}
        for _, tensor in (part for value in values for part in parts_of(value)):
            storage = storage_of(tensor)
            name = None if storage is None else self._own_storages.get(storage._cdata)
            self.written.update([] if name is None else [name])

    def _ask(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        answer = func(*without_memory(tuple(args)), **without_memory(dict(kwargs)))
        tensor = args[0] if args else None
        if not isinstance(tensor, torch.Tensor):
            return answer
        if id(tensor) in self._doubts.unsure and name in (
            "size",
            "shape",
            "numel",
            "nelement",
            "__len__",
            "stride",
            "nbytes",
        ):
            raise self._refusal("it reads a shape that depends on data")
        if isinstance(answer, torch.Tensor):
            raise self._refusal(f"it reads a tensor's {name!r}")
        known = self._values.ref(tensor)
        if known is None or name not in ("size", "shape", "numel", "nelement", "__len__"):
            return answer
        if name == "__len__" and self._iterated == (id(tensor), place_of_call()):  # list(tensor) asks for it too
            return answer
        return self._sized(known, name, answer, without_memory(tuple(args)), kwargs)

    def _assert(self, condition: Any) -> None:
        """Keep what the model demands of data; what it demands of sizes holds, and was noted as it was compared."""
        if isinstance(condition, torch.Tensor):
            self._append(Call("call_function", DataCheck(True, line() or ""), self._values.encoded((condition,))), None)
        elif not condition:
            raise AssertionError("an assertion of the model fails")

    def _sized(self, ref: Ref, name: str, answer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if isinstance(answer, torch.Size):
            return torch.Size([KnownInt.make(n, Expr("size", (ref, d)), self._watch) for d, n in enumerate(answer)])
        if name in ("numel", "nelement"):
            return KnownInt.make(answer, Expr("numel", (ref,)), self._watch)
        if name == "__len__":
            self.lengths.append((answer, self._here(), line()))
            self._refuse_line(line())
        dim = 0 if name == "__len__" else kwargs.get("dim", args[1] if len(args) > 1 else 0)
        return KnownInt.make(answer, Expr("size", (ref, dim)), self._watch)

    def _read(self, func: Any, name: str, args: Any) -> Any:
        """Let Python see the data of constants; refuse for anything else."""
        if name == "__bool__" and id(args[0]) in self._doubts.decided:
            return self._doubts.decided[id(args[0])]
        constant = getattr(args[0], "constant", None) if args else None
        if constant is not None:
            return func(*args)
        with unset_fake_temporarily():
            settled = self._settled(name, args)
            if settled is not None:
                return func(settled, *args[1:])
        if name == "__bool__" and id(args[0]) in self._doubts.coins and self._may_fork():
            return self._fork(args[0])
        if name in ("__bool__", "item"):
            goes_on = outcome_that_goes_on(asking_frame())
            if goes_on is not None and name == "item":
                return self._function(torch.Tensor.reshape, "reshape", (args[0], ()), {})
            if goes_on is not None:
                self._append(Call("call_function", DataCheck(goes_on, line() or ""), self._values.encoded(args)), None)
                return goes_on
        what = {"__bool__": "branches on a tensor's data", "item": "reads a number out of a tensor"}
        raise self._refusal(f"it {what.get(name, 'reads the data of a tensor')} ({name})")

    def _may_fork(self) -> bool:
        return self._group is None and len(self.forks) < MOST_FORKS and line() not in self._catching.kept.unforked

    def _fork(self, condition: torch.Tensor) -> bool:
        """Take one side of a branch that a random number decides."""
        outcome = self._decisions.get(len(self.forks), False)
        self.forks.append(Fork(self._values.ref_of(condition), outcome, len(self.calls), line()))
        self._doubts.decided[id(condition)] = outcome
        return outcome

    def _settled(self, name: str, args: Any) -> torch.Tensor | None:
        """Compute a tensor that Python reads, if only sizes decide it, and check it whenever the graph runs."""
        known = self._values.ref(args[0]) if args else None
        if known is None or name not in functions.NUMBERS or id(args[0]) in self._doubts.unsure:
            return None
        settled = settled_value(self.calls, known)
        if settled is None or settled.numel() > _MOST_NUMBERS or bool(settled.isnan().any()):
            return None
        self._append(Call("call_function", Settled(settled.tolist(), line() or ""), (known,)), None)
        return settled

    def _watch(self, left: Any, comparison: str, right: Any, outcome: bool) -> None:
        if not self._paused:
            a, b = (value.expr if isinstance(value, Known) else value for value in (left, right))
            if any(isinstance(side, Expr) and side.from_data for side in (a, b)):
                raise self._refusal("it branches on a number that an opaque module returned")
            values = (plain(left), plain(right))
            self.guards.append(Guard((a, values[0]), comparison, (b, values[1]), outcome, self._here(), line()))

    # --- modules and functions ---------------------------------------------------------------------------------------

    def call_module(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Keep a layer as one call, or follow the forward of anything else."""
        path = self.state.paths.get(id(module))
        if path is None:
            return call_module(module, *args, **kwargs)
        self.entered.add(path)
        if path in self.opaque or (path and functions.is_layer(module)):
            return self._keep(module, path, args, kwargs)
        mark = (len(self.calls), len(self.guards), len(self.forks), self._values.mark(), [*self._autocast], self._group)
        while path not in self.opaque:
            self._stack.append(path)
            try:
                return self._follow(module, args, kwargs)
            except TraceRefused as refusal:
                self._roll_back(*mark)
                code = self._catching.kept.find(refusal, module)
                if code is not None:
                    self._catching.catch(code)
                elif path == "":
                    raise
                else:
                    refusal.source = refusal.source or line_of(refusal)
                    self.opaque[path] = refusal.with_traceback(None)  # which holds all that the model computed
            finally:
                self._stack.pop()
        return self._keep(module, path, args, kwargs)

    def _follow(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if module._backward_hooks or module._backward_pre_hooks:
            raise TraceRefused("it has backward hooks, which run around the module as a whole")
        hooked = hook_contents(module)
        with unchanged(module, self._same):
            try:
                result = call_module(module, *args, **kwargs)
            except Exception as error:
                if UNSPOKEN in str(error):
                    raise TraceRefused("it uses a tensor's data as text") from error
                raise
        changed = changed_attribute(hooked)
        if changed is not None:
            restore(hooked)
            raise TraceRefused("a forward hook changes something outside of the module")
        return result

    def _keep(self, module: nn.Module, path: str, args: Any, kwargs: Any) -> Any:
        with self._pause():
            call = Call("call_module", path, self._values.encoded(args), self._values.encoded(kwargs))
            args, kwargs = self._without_data(args), self._without_data(kwargs)
            versions = versions_of(args, kwargs)
            before = self._n_on_data
            with own_random_state() if path in self.opaque else nullcontext():
                owner = module if path in self.opaque else None
                result = self._run(functools.partial(self._isolated(path), module), args, kwargs, owner)
            looks = path in self.opaque and (self.real or self._n_on_data > before)
            result = self._append(call, result, versions, opaque=path in self.opaque)
            if looks:  # at data, which may decide whether it returns None; what follows goes on from what it did now
                check = Call("call_function", SameForm(form_of(result), path), (Ref(len(self.calls) - 1),))
                self._append(check, None)
            return result

    def _isolated(self, path: str) -> Callable[..., Any]:
        """Call modules with stand-ins for their parameters and buffers, which they might change."""
        stand_in = self._stand_in
        if stand_in is None:
            return call_module

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with swapped_state(module, stand_in) as state:
                before = {name: tensor._version for name, tensor in state.items()}
                result = call_module(module, *args, **kwargs)
            changed = [name for name, tensor in state.items() if tensor._version != before[name]]
            self.written.update(f"{path}.{name}".removeprefix(".") for name in changed)
            return result

        return call

    def call_kept(self, code: types.CodeType, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Write a call of a function that is kept whole down, or give the function up."""
        if self.paused:
            return original(*args, **kwargs)
        try:
            if reaches(original, self.state.tensors):
                raise OutOfReach("it uses the model's tensors or modules without being given them")
            with self._pause():
                return self._call_kept(self._catching.kept.functions[code][0], args, kwargs)
        except (TraceRefused, NeedsData, OutOfReach) as error:
            kept = self._catching.kept
            kept.needs_data = kept.needs_data or isinstance(error, NeedsData)
            self._catching.release(code)
            refusal = kept.reject(code)
        raise refusal

    def _call_kept(self, function: types.FunctionType, args: Any, kwargs: Any) -> Any:
        owner = args[0] if args and id(args[0]) in self.state.paths else None
        versions = versions_of(args, kwargs)
        self._keeping = True
        try:
            with own_random_state():
                target, args, result = run_kept(function, owner, args, kwargs, self._run_without_data)
        finally:
            self._keeping = False
        call = Call("call_function", target, self._values.encoded(args), self._values.encoded(kwargs))
        return self._append(call, result, versions, opaque=True)

    def _run_without_data(self, function: Any, args: Any, kwargs: Any) -> Any:
        return self._run(function, self._without_data(args), self._without_data(kwargs))

    def called_inside(self, module: nn.Module) -> None:
        """Refuse that a function which is to be kept calls a module of the model."""
        if self._keeping and id(module) in self.state.paths:
            raise OutOfReach("it calls a module of the model")

    def converted(self, module: nn.Module) -> None:
        """Refuse to convert the model's parameters, even to what they are."""
        if id(module) in self.state.paths:
            raise self._refusal("it converts or moves a module of the model (to, float, half)")

    def attribute_set(self, module: nn.Module) -> None:
        """Refuse to change what a module remembers that is kept whole: a graph would not."""
        path = self.state.paths.get(id(module))
        if path is not None and any(path == outer or path.startswith(f"{outer}.") for outer in self.opaque):
            raise self._refusal("it changes an attribute of a module that is kept whole")

    def apply(self, cls: Any, args: Any, kwargs: Any) -> Any:
        """Write a call of a custom autograd function down."""
        if cls is torch_checkpoint.CheckpointFunction:
            function, preserve, *rest = args
            with self.checkpointed({"preserve_rng_state": preserve}):
                return function(*rest)
        return self.call(ApplyFunction(cls), functools.partial(apply_function.__func__, cls), args, kwargs)

    def call(self, target: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Write one call of ``function`` down as a call of ``target``, whatever it does inside."""
        with self._pause():
            call = Call("call_function", target, self._values.encoded(args), self._values.encoded(kwargs))
            args, kwargs = self._without_data(args), self._without_data(kwargs)
            versions = versions_of(args, kwargs)
            result = self._run(function, args, kwargs)
            return self._append(call, result, versions)

    def check(self, condition: torch.Tensor) -> None:
        """Write down that the model demands ``condition`` everywhere."""
        place = line() or ""
        everywhere = condition.all()
        with self._pause():
            self._append(Call("call_function", DataCheck(True, place), self._values.encoded((everywhere,))), None)

    @contextmanager
    def checkpointed(self, options: dict[str, Any]) -> Iterator[None]:
        """Mark the calls inside as computed again in the backward; an outer checkpoint covers inner ones."""
        outer = self._group
        if outer is None:
            self._group = len(self.groups)
            self.groups[self._group] = options
        try:
            yield
        finally:
            self._group = outer

    # --- bookkeeping -------------------------------------------------------------------------------------------------

    @contextmanager
    def _pause(self) -> Iterator[None]:
        """Let calls be; torch's function modes too, which would only slow them down, but for one that sets a device."""
        before, self._paused = self._paused, True
        try:
            if torch._C._len_torch_function_stack() == 1:
                with torch._C.DisableTorchFunction():
                    yield
            else:
                yield
        finally:
            self._paused = before

    @property
    def paused(self) -> bool:
        """Say whether what runs belongs to a call that is being written down."""
        return self._paused

    def autocast_entered(self, context: Any) -> None:
        """Note that the model's code opened an autocast region."""
        self._autocast.append((context.device, bool(context._enabled), str(context.fast_dtype).removeprefix("torch.")))

    def autocast_left(self) -> None:
        """Note that the model's code closed it."""
        if self._autocast:
            self._autocast.pop()

    def _here(self) -> str:
        return self._stack[-1] if self._stack else ""

    def _refuse_line(self, source: str | None) -> None:
        if source in self._catching.kept.lines:
            raise TraceRefused(self._catching.kept.lines[source], source)

    def _refusal(self, reason: str) -> TraceRefused:
        return TraceRefused(reason, line())

    def _append(
        self, call: Call, result: Any, versions: Any = None, in_place: bool = False, opaque: bool = False
    ) -> Any:
        call.path, call.group = self._here(), self._group
        if call.op != "placeholder":
            call.source = line()
            self._refuse_line(call.source)
            if torch.is_inference_mode_enabled():
                raise self._refusal("it runs under torch.inference_mode")
            if settings() != self._settings:
                raise self._refusal(
                    "it runs under its own settings (saved-tensor hooks, kernels, precision, default dtype)"
                )
            cudnn = torch.backends.cudnn.enabled
            grad = None if torch.is_grad_enabled() else False
            call.region = Region(grad, tuple(self._autocast), None if cudnn == self._cudnn else cudnn)
        index = len(self.calls)
        self.calls.append(call)
        replaced: dict[int, Any] = {}
        for path, part in parts_of(result):
            if isinstance(part, torch.Tensor):
                given = versions.get(id(part)) if versions else None
                if given is not None and not in_place and part._version == given:
                    original = self._same.get(id(part), self._real_of.get(id(part), part))
                    part = replaced.setdefault(id(part), alias(part))
                    self._same[id(part)] = original
                self._values.bind(part, Ref(index, path))
                call.shapes[path] = tuple(part.shape)
            elif part is not None and not isinstance(part, SPELLED):
                self._values.bind(part, Ref(index, path))
        if replaced:
            leaves, structure = flatten(result)
            result = unflatten(structure, [replaced.get(id(leaf), leaf) for leaf in leaves])
        return map_values_with_path(self._number(index), result) if opaque else result

    def _number(self, index: int) -> Callable[[Any, Any], Any]:
        """Let numbers that an opaque module returned remember where they came from."""

        def remember(path: Any, leaf: Any) -> Any:
            if isinstance(leaf, (bool, str)):
                raise self._refusal(f"an opaque module returned {leaf!r}, which may differ from call to call")
            if type(leaf) is int:
                return KnownInt.make(leaf, Expr("value", (Ref(index, path),)), self._watch)
            if type(leaf) is float:
                return KnownFloat.make(leaf, Expr("value", (Ref(index, path),)), self._watch)
            return leaf

        return remember

    def _add(self, call: Call) -> Ref:
        """Add what a call needs: an attribute, an argument put together."""
        call.path, call.group = self._here(), self._group
        self.calls.append(call)
        return Ref(len(self.calls) - 1)

    def _roll_back(
        self, n_calls: int, n_guards: int, n_forks: int, n_bound: int, autocast: list[Any], group: int | None
    ) -> None:
        del self.calls[n_calls:]
        del self.guards[n_guards:]
        del self.forks[n_forks:]
        self._values.roll_back(n_bound)
        self._autocast, self._group = autocast, group


def _stand_in(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    return tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor)
