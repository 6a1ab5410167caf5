"""Which ops can be recorded as ATen ops once and for all, and which hold code that has to run at every step."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from .calls import Folded, Guarded, InRegion, ModeSwitch, SameForm, Settled

_OWN_CALLS = (Guarded, Settled, SameForm)  # they look at sizes and forms, which recordings are made for
_KNOWN = ("torch.nn.", f"{__package__.rpartition('.')[0]}.deferred")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def why_not_module(module: nn.Module) -> str | None:
    """Say what in ``module`` no recording can stand for; None if all can be recorded."""
    for path, inner in module.named_modules():
        where = f"module {path!r} ({type(inner).__name__})" if path else f"a {type(inner).__name__}"
        if has_module_hooks(inner):
            return f"{where} has hooks"
        if isinstance(inner, fx.GraphModule):
            for node in inner.graph.nodes:
                why = why_not_call(node.target) if node.op == "call_function" else None
                if why is not None:
                    return f"{node.name}: {why}"
        elif getattr(inner, "max_norm", None) is not None:
            return f"{where} changes its weights in the forward"
        elif type(inner) not in (Folded, ModeSwitch) and not type(inner).__module__.startswith(_KNOWN):
            return f"{where} is kept whole"
    return None


def has_module_hooks(module: nn.Module) -> bool:
    """Say whether somebody wants to be called when the module runs."""
    return any(getattr(module, name, None) for name in _HOOKS)


def why_not_call(target: Any) -> str | None:
    """Say why a function that a graph calls cannot be recorded; None if it can."""
    if isinstance(target, InRegion):
        return None if target.function is None or isinstance(target.function, str) else why_not_call(target.function)
    home = getattr(target, "__module__", None) or "builtins"
    if isinstance(target, _OWN_CALLS) or home.split(".")[0] in ("torch", "operator", "_operator", "builtins", "math"):
        return None
    return f"{getattr(target, '__name__', type(target).__name__)} is kept whole"


def why_not_node(node: fx.Node, owner: nn.Module) -> str | None:
    """Say why an op of a graph over ``owner``'s modules cannot be recorded; None if it can."""
    why = None
    if node.op == "call_function":
        why = why_not_call(node.target)
    elif node.op == "call_module":
        why = why_not_module(owner.get_submodule(str(node.target)))
    return None if why is None else f"{node.name}: {why}"
