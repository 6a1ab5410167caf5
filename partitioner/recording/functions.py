"""What torch functions are to a recording: questions about a tensor, reads of its data, or work to write down; and
which modules are layers."""

from __future__ import annotations

import operator
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# Answers that depend on shapes, types and layout only.
QUESTIONS = frozenset(
    [
        "size",
        "dim",
        "ndim",
        "ndimension",
        "shape",
        "dtype",
        "device",
        "layout",
        "numel",
        "nelement",
        "stride",
        "element_size",
        "itemsize",
        "nbytes",
        "requires_grad",
        "is_leaf",
        "grad_fn",
        "is_cuda",
        "is_cpu",
        "is_meta",
        "is_sparse",
        "is_sparse_csr",
        "is_quantized",
        "is_mkldnn",
        "is_mps",
        "is_xpu",
        "is_nested",
        "is_vulkan",
        "is_ort",
        "is_hpu",
        "is_ipu",
        "is_xla",
        "is_mtia",
        "is_maia",
        "is_floating_point",
        "is_complex",
        "is_contiguous",
        "is_signed",
        "is_conj",
        "is_neg",
        "is_inference",
        "is_same_size",
        "is_pinned",
        "get_device",
        "storage_offset",
        "has_names",
        "names",
        "__len__",
        "sparse_dim",
        "dense_dim",
        "type",
        "_version",
        "output_nr",
        "can_cast",
        "result_type",
        "promote_types",
        "is_tensor",
        "is_storage",
        "is_distributed",
        "retains_grad",
        "broadcast_shapes",
        "_has_compatible_shallow_copy_type",
        "is_set_to",
        "__hash__",
        "grad",
        "is_shared",
        "name",
        "volatile",
        "get_default_dtype",
        "get_default_device",
        "_is_view",
        "dim_order",
        "is_grad_enabled",
        "_parse_to",
    ]
)
# What the graph would compute once, at capture, and never again.
READS = frozenset(
    [
        "item",
        "tolist",
        "numpy",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "__complex__",
        "__contains__",
        "__nonzero__",
        "equal",
        "allclose",
        "is_nonzero",
        "__repr__",
        "__str__",
        "__array__",
        "__array_wrap__",
        "__dlpack__",
        "data_ptr",
        "storage",
        "untyped_storage",
        "_typed_storage",
        "storage_type",
    ]
)
NUMBERS = frozenset(["item", "tolist", "__bool__", "__int__", "__float__", "__index__"])
REFUSED = {
    "backward": "it runs a backward of its own",
    "register_hook": "it registers a hook on a tensor",
    "register_post_accumulate_grad_hook": "it registers a hook on a tensor",
    "retain_grad": "it keeps a gradient of its own",
    "grad": "it computes gradients of its own",
    "__deepcopy__": "it copies a tensor with copy.deepcopy",
    "__reduce_ex__": "it pickles a tensor",
    "set_": "it replaces a tensor's storage",
    "share_memory_": "it moves a tensor to shared memory",
    "resize_": "it resizes a tensor in place",
    "resize_as_": "it resizes a tensor in place",
    "vmap": "it maps a function over a dimension",
}
# The shape of the result depends on data, so nothing that Python reads off it may be kept.
UNKNOWN_SHAPE = frozenset(
    [
        "nonzero",
        "argwhere",
        "masked_select",
        "unique",
        "unique_consecutive",
        "bincount",
        "repeat_interleave",
        "combinations",
    ]
)
_NO_RESULT = frozenset(["_assert", "_assert_async", "_assert_scalar", "__setitem__", "_foreach"])
_OPERATORS = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "matmul", "mod", "and_", "or_", "xor")},
    "true_divide": operator.truediv,
    "floor_divide": operator.floordiv,
}
_DUNDERS = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift eq ne lt le gt ge neg invert getitem"
for _name in _DUNDERS.split():
    _OPERATORS[f"__{_name}__"] = getattr(operator, f"__{_name}__")
for _name in [
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
]:
    _OPERATORS[f"__i{_name}__"] = getattr(operator, f"__i{_name}__")
_OPERATORS["__setitem__"] = operator.setitem


def is_property(function: Any) -> bool:
    """Say whether ``function`` is the getter of a tensor property."""
    return getattr(function, "__name__", "") == "__get__" and hasattr(function, "__self__")


def name_of(function: Any) -> str:
    """Return the name under which users know ``function``."""
    if getattr(function, "__name__", "") in ("__get__", "__set__", "__delete__") and hasattr(function, "__self__"):
        return str(getattr(function.__self__, "__name__", "?"))
    return str(getattr(function, "__name__", function))


def target_of(function: Callable[..., Any], name: str) -> tuple[str, Any]:
    """Return ``op`` and ``target`` of the fx node that stands for a call of ``function``."""
    if name in _OPERATORS and _is_method(function):
        return "call_function", _OPERATORS[name]
    if _is_method(function) and getattr(torch.Tensor, name, None) is not None:
        return "call_method", name
    return "call_function", function


def _is_method(function: Any) -> bool:
    if isinstance(function, (types.MethodDescriptorType, types.WrapperDescriptorType)):
        return True
    return isinstance(function, types.FunctionType) and function.__qualname__.startswith(("Tensor.", "TensorBase."))


def changes_in_place(name: str, kwargs: dict[str, Any]) -> bool:
    """Say whether a function returns its first argument, or ``out``, changed."""
    in_place_operator = name.startswith("__i") and name.endswith("__") and name not in ("__invert__", "__index__")
    plain_name = name.endswith("_") and not name.endswith("__")
    return plain_name or in_place_operator or kwargs.get("out") is not None or kwargs.get("inplace") is True


def may_return_nothing(name: str) -> bool:
    """Say whether a function that returns None does work all the same."""
    return name in _NO_RESULT or (name.startswith("_foreach") or changes_in_place(name, {}))


def is_layer(module: nn.Module) -> bool:
    """Say whether a module is one of torch's own layers, which are kept whole; torch's containers are followed."""
    if isinstance(module, torch.jit.ScriptModule) or type(module).__name__ == "OptimizedModule":
        return True
    if not type(module).__module__.startswith(("torch.nn.modules", "torch.ao.nn")):
        return False
    is_container = any(True for _ in module.children()) and not isinstance(module, nn.MultiheadAttention)
    return not is_container
