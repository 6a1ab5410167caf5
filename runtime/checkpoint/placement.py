"""Which tensors of a model belong to which stage, and so who writes them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..program import PipelineSpec
from .records import Placement


def users_by_name(spec: PipelineSpec, names: Mapping[int, str]) -> dict[str, list[int]]:
    """List, per parameter or buffer, the stages that use it; ``names`` are those of the tensors, by identity."""
    users: dict[str, list[int]] = {name: [] for name in names.values()}
    for stage in spec.stages:
        tensors = [t for module in stage.modules.values() for t in (*module.parameters(), *module.buffers())]
        tensors += [t for t in stage.attributes.values() if isinstance(t, torch.Tensor)]
        for name in dict.fromkeys(names[id(t)] for t in tensors if id(t) in names):
            users[name].append(stage.index)
    return users


def by_stage(spec: PipelineSpec | None, model: nn.Module) -> Placement:
    """Let one process write a file for each stage, and what no stage uses with the first; all in one before a plan."""
    state = model.state_dict(keep_vars=True)
    names = {id(tensor): name for name, tensor in reversed(list(state.items())) if isinstance(tensor, torch.Tensor)}
    users = users_by_name(spec, names) if spec is not None else {name: [] for name in names.values()}
    files: dict[str, list[str]] = {}
    for name, stages in users.items():
        files.setdefault(f"stage-{min(stages, default=0):04d}", []).append(name)
    return Placement(files, lambda name: True)
