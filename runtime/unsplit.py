"""The unsplit model again, as a module of its own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .engine import model_state


def unsplit(model: nn.Module, state: Mapping[str, torch.Tensor]) -> nn.Module:
    """Copy ``model`` with the values of ``state``, in memory of its own; ties stay ties, and frozen stays frozen.

    It is where the model is, or on the CPU if that is on several devices.
    """
    memo: dict[int, Any] = {}
    devices = {tensor.device for tensor in model_state(model).values()}
    device = devices.pop() if len(devices) == 1 else torch.device("cpu")
    for name, tensor in model_state(model).items():
        if id(tensor) not in memo:
            value = state.get(name, tensor).detach().to(device, copy=True)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if is_parameter else value
    return copy.deepcopy(model, memo)
