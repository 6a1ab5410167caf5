"""Floating-point operations of what runs: of one aten op, and of chosen modules during a run of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


def op_flops(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> int:
    """Return the operations of one aten op: by torch's registry, and by hand for CPU kernels that it leaves out."""
    count = flop_registry.get(func._overloadpacket)
    if count is not None:
        return int(count(*args, **kwargs, out_val=result))
    name = func._overloadpacket.__name__
    if name == "_scaled_dot_product_flash_attention_for_cpu":
        return int(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))  # type: ignore[no-untyped-call]
    if name == "_scaled_dot_product_flash_attention_for_cpu_backward":
        return int(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))  # type: ignore[no-untyped-call]
    if name in ("mkldnn_rnn_layer", "mkldnn_rnn_layer_backward"):
        steps = args[0].shape[0] * args[0].shape[1]
        products = 1 if name == "mkldnn_rnn_layer" else 2  # of the gradients with the weights, and with the inputs
        return int(2 * products * steps * (args[1].numel() + args[2].numel()))
    return 0


class ModuleFlops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the operations of a run: ``total``, and in ``of`` those of each module that ``names`` maps to a name."""

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self.of = dict.fromkeys(names.values(), 0)
        self._names = names
        self._before: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.total += op_flops(func, args, kwargs or {}, result)
        return result

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what the body runs."""
        hooks = (
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        )
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def call(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function and count what it runs by ``name``."""
        before = self.total
        try:
            return function(*args, **kwargs)
        finally:
            self.of[name] = self.of.get(name, 0) + self.total - before

    def _enter(self, module: nn.Module, args: Any) -> None:
        if module in self._names:
            self._before.append(self.total)

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        if module in self._names and self._before:
            self.of[self._names[module]] += self.total - self._before.pop()


def meta_like(value: torch.Tensor) -> torch.Tensor:
    """Describe a tensor by one without data."""
    return value if value.is_meta else torch.empty_like(value, device="meta")
