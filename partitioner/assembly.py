"""What was recorded becomes a capture: the graphs, and what is known of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from ..runtime.program import InputSpec, OutputLeaf
from ..runtime.program.calls import Folded, KeptFunction
from ..structure import LEAF, Structure, unflatten
from .captured import WHOLE_MODEL, Capture, ModelResult, OpaqueCall
from .recording.calls import Call
from .recording.emit import Emitter, specialise
from .recording.graph import CapturedGraph
from .recording.modes import Results, United
from .recording.naming import SPELLED
from .recording.numbers import Ref
from .recording.state import TraceRefused


@dataclass(frozen=True)
class Findings:
    """What recordings found out.

    Classes of modules by path, modules and functions kept whole, tensors that are written to, the one device of all.
    """

    model: nn.Module
    types: Mapping[str, type]
    opaque: Mapping[str, OpaqueCall]
    functions: Iterable[tuple[Any, TraceRefused]]
    written: set[str]
    device: str | None


def assembled_whole(inputs: InputSpec, findings: Findings) -> Capture:
    """Make the capture of a model that is one opaque call."""
    calls = [Call("placeholder", leaf.graph_input) for leaf in inputs.leaves if leaf.graph_input is not None]
    position = iter(range(len(calls)))
    objects: dict[str, Any] = {}
    leaves: list[Any] = []
    for known in inputs.leaves:
        if known.graph_input is not None:
            leaves.append(Ref(next(position)))
        elif isinstance(known.constant, SPELLED):
            leaves.append(known.constant)
        else:
            objects[f"_constant_{len(objects)}"] = known.constant
            calls.append(Call("get_attr", f"_constant_{len(objects) - 1}"))
            leaves.append(Ref(len(calls) - 1))
    args, kwargs = unflatten(inputs.structure, leaves)
    calls.append(Call("call_module", "model", args, kwargs))
    return assembled(inputs, United(calls, Results([Ref(len(calls) - 1)], LEAF), None), objects, findings)


def assembled(inputs: InputSpec, united: United, objects: Mapping[str, Any], findings: Findings) -> Capture:
    """Make a capture of the calls of both modes; ``objects`` are what no code can spell, by name."""
    model = findings.model
    whole = WHOLE_MODEL in findings.opaque
    root: Any = nn.ModuleDict({"model": model}) if whole else model
    emitter = Emitter(
        lambda path: objects[path] if path in objects else _attribute(root, path),
        findings.types.get,
        lambda attributes, graph: CapturedGraph(attributes, graph, "FoldedOps", nn.Module()),
    )
    emitter.emit(united.calls)
    trained = [emitter.value(leaf) for leaf in united.trained.leaves]
    evaluated = [emitter.value(leaf) for leaf in united.evaluated.leaves] if united.evaluated else None
    emitter.output(_nodes(trained), None if evaluated is None else _nodes(evaluated))
    name = f"Captured{type(model).__name__}"
    union = CapturedGraph(emitter.attributes, emitter.graph, name, root)
    for path, owner in emitter.owners.items():
        union.get_submodule(path).training = model.get_submodule(owner).training
    training = specialise(emitter.graph, lambda path: True)
    modules = [call for path, call in findings.opaque.items() if not _is_inside(path, findings.opaque)]
    in_training = _result(trained, united.trained.structure)
    return Capture(
        model=model,
        graph_module=CapturedGraph(union, training, name, root),
        union=union,
        inputs=_named(inputs, emitter.graph),
        trained=in_training,
        evaluated=_result(evaluated or [], united.evaluated.structure) if united.evaluated else in_training,
        opaque=(*modules, *([] if whole else _functions(united.calls, dict(findings.functions)))),
        mode_owners=_owners(emitter, whole),
        written=frozenset(findings.written),
        device=findings.device,
    )


def _nodes(leaves: list[Any]) -> list[fx.Node]:
    return [leaf for leaf in leaves if isinstance(leaf, fx.Node)]


def _result(leaves: list[Any], structure: Structure) -> ModelResult:
    found = (OutputLeaf(leaf.name) if isinstance(leaf, fx.Node) else OutputLeaf(None, leaf) for leaf in leaves)
    return ModelResult(tuple(found), structure)


def _functions(calls: Sequence[Call], why: Mapping[Any, TraceRefused]) -> list[OpaqueCall]:
    """List the functions that the graph calls whole, with the first module that each is called in."""
    found: dict[Any, OpaqueCall] = {}
    for call in (inner for outer in calls for inner in (outer, *outer.body)):
        if isinstance(call.target, KeptFunction):
            function: Any = call.target.function
            known = OpaqueCall(call.path, "function", why[function].reason, why[function].source, function)
            found.setdefault(function, known)
    return list(found.values())


def _owners(emitter: Emitter, whole: bool) -> dict[str, str]:
    owners: dict[str, str] = {}
    for target, value in emitter.attributes.items():
        if isinstance(value, nn.Module):
            inside = whole or isinstance(value, Folded)
            owners[target] = emitter.owners.get(target, "" if inside else target)
    return owners


def _is_inside(path: str, opaque: Mapping[str, OpaqueCall]) -> bool:
    parts = path.split(".") if path else []
    return any(".".join(parts[:count]) in opaque for count in range(len(parts)))


def _named(inputs: InputSpec, graph: fx.Graph) -> InputSpec:
    """Take over the names that fx gave to the placeholders; it avoids Python's own, such as ``input``."""
    names = iter([node.name for node in graph.nodes if node.op == "placeholder"])
    leaves = [replace(leaf, graph_input=next(names)) if leaf.graph_input else leaf for leaf in inputs.leaves]
    return replace(inputs, leaves=tuple(leaves))


def _attribute(root: Any, path: str) -> Any:
    value = root
    for part in path.split("."):
        value = getattr(value, part)
    return value
