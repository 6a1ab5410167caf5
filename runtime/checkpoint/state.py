"""Optimizer state by the model's own names, so that other plans and other processes find it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ...errors import CheckpointError
from ..sharded import dense, load
from .values import decoded, encoded

STATE, GROUP = "optimizer", "optimizer group"
Read = Callable[[str], torch.Tensor]


def optimizer_states(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], mine: Callable[[str], bool]
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Return the state of those parameters for which ``mine`` holds, by name: tensors by key, and what else there is.

    Raises:
        CheckpointError: state is spread over ranks by the optimizer itself, or holds what no checkpoint can.
    """
    _check_kind(optimizer)
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    values: dict[str, Any] = {}
    for parameter, state in optimizer.state.items():
        name = _name_of(parameter, names)
        kept: dict[str, Any] = {}
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                whole = dense(value.detach())  # gathers shares: every replica has to come here
                if mine(name):
                    tensors.setdefault(name, {})[f"{STATE}/{name}/{key}"] = whole
                kept[key] = None
            else:
                kept[key] = [encoded(value, f"optimizer state {key!r} of {name}")]
        if mine(name):
            values[name] = kept
    return tensors, values


def optimizer_groups(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str]
) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Return the groups: the names of their parameters, and their settings; settings that are tensors by key."""
    tensors: dict[str, torch.Tensor] = {}
    groups: list[Any] = []
    for index, group in enumerate(optimizer.param_groups):
        settings: dict[str, Any] = {}
        for key, value in group.items():
            if key == "params":
                continue
            if isinstance(value, torch.Tensor):
                tensors[f"{GROUP}/{index}/{key}"] = value.detach()
                settings[key] = None
            else:
                settings[key] = [encoded(value, f"{key!r} of the optimizer's group {index}")]
        groups.append({"names": [_name_of(p, names) for p in group["params"]], "settings": settings})
    return tensors, groups


def check_groups(optimizer: torch.optim.Optimizer, names: Mapping[int, str], groups: list[Any]) -> None:
    """Look that an optimizer has the groups that were written.

    Raises:
        CheckpointError: it has others.
    """
    _check_kind(optimizer)
    own = [[_name_of(p, names) for p in group["params"]] for group in optimizer.param_groups]
    written = [group["names"] for group in groups]
    if own != written:
        raise CheckpointError(_difference(own, written))


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    groups: list[Any],
    states: Mapping[str, Mapping[str, Any]],
    read: Read,
    mine: Callable[[str], bool],
) -> None:
    """Give an optimizer the settings and states that were written; its own parameters stay the objects that they are.

    Its groups were looked at by :func:`check_groups`.
    """
    for index, (group, record) in enumerate(zip(optimizer.param_groups, groups)):
        for key, value in record["settings"].items():
            group[key] = _like(read(f"{GROUP}/{index}/{key}"), group.get(key)) if value is None else decoded(value[0])
    optimizer.state.clear()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = _name_of(parameter, names)
            if name in states and mine(name):
                counts_there = bool(group.get("capturable") or group.get("fused"))
                optimizer.state[parameter] = _state(parameter, name, states[name], read, counts_there)


def _state(
    parameter: nn.Parameter, name: str, record: Mapping[str, Any], read: Read, counts_there: bool
) -> dict[str, Any]:
    """Read a parameter's state; ``counts_there``: what has another shape lies on its device too."""
    found: dict[str, Any] = {}
    for key, value in record.items():
        if value is not None:
            found[key] = decoded(value[0])
            continue
        tensor = read(f"{STATE}/{name}/{key}")
        if tensor.shape == parameter.shape:
            found[key] = _placed(tensor, parameter)
        else:  # counts of steps are on the CPU, unless a kernel counts (as torch's own load_state_dict has it)
            found[key] = tensor.to(parameter.device) if counts_there else tensor
    return found


def _placed(tensor: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    if not hasattr(parameter, "full_tensor"):
        return tensor.to(parameter.device)
    share = torch.empty_like(parameter.detach(), dtype=tensor.dtype)
    load(share, tensor)
    return share


def _like(tensor: torch.Tensor, own: Any) -> torch.Tensor:
    return tensor.to(own.device) if isinstance(own, torch.Tensor) else tensor


def _check_kind(optimizer: torch.optim.Optimizer) -> None:
    if hasattr(optimizer, "consolidate_state_dict"):
        raise CheckpointError(
            f"{type(optimizer).__name__} spreads its state over ranks by itself, under no parameter's name",
            hint="an optimizer over pm.parameters(), with shard=True where its state is too large",
        )


def _name_of(parameter: torch.Tensor, names: Mapping[int, str]) -> str:
    name = names.get(id(parameter))
    if name is None:
        raise CheckpointError(
            f"the optimizer has a parameter of shape {tuple(parameter.shape)} that is not the pipeline's",
            hint="make it of pm.parameters()",
        )
    return name


def _difference(own: list[list[str]], written: list[list[str]]) -> str:
    if len(own) != len(written):
        return f"the optimizer has {len(own)} groups of parameters, and {len(written)} were written"
    index = next(i for i, (a, b) in enumerate(zip(own, written)) if a != b)
    names = sorted(set(own[index]) ^ set(written[index])) or ["another order"]
    return f"group {index} of the optimizer has other parameters than the one that was written: {', '.join(names[:4])}"
