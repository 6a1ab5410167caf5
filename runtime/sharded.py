"""Replicas of a stage that keep a share of its parameters, gradients and optimizer state each: FSDP2 under a pipeline.

``torch.distributed.fsdp.fully_shard`` cuts a stage's parameters along dimension 0; they become DTensors of which every
replica holds some rows. For a step the stage gathers them, once for all microbatches, and computes with plain tensors;
afterwards gradients are summed into the shares (a reduce-scatter), and what was gathered is let go. FSDP's own hooks
expect a backward to follow its forward; with several microbatches in flight they are not used, only ``unshard()`` and
``reshard()``. Gradients and optimizer state are shared out as in stage 2 of ZeRO (Rajbhandari et al., 2020,
https://arxiv.org/abs/1910.02054), parameters between steps too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .replicate import Replicas


class ShardedReducer(Replicas):
    """Gathers a stage's parameters for a step, and sums its gradients into the shares of its replicas.

    Every microbatch's loss already carries its share of the batch, so that sums are the gradients of the unsplit model.
    Parameters that other stages use too stay whole on every replica; ``elsewhere`` names those that somebody else sums.

    Attributes:
        replaced: by id of a parameter of before, the parameter, and the sharded one in its place; until it is cleared.
    """

    follows_autograd = False

    def __init__(
        self,
        module: nn.Module,
        group: Any,
        n_replicas: int,
        device_type: str,
        whole: Collection[str] = (),
        elsewhere: Collection[str] = (),
    ) -> None:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        super().__init__(module, group, n_replicas)
        before = dict(module.named_parameters())
        self._mesh = DeviceMesh.from_group(group, device_type)
        self._unit: Any = fully_shard(module, mesh=self._mesh, ignored_params={before[name] for name in whole})
        self._parameters = dict(module.named_parameters())
        self._summed = [name for name in before if name not in elsewhere]
        self.replaced = {id(p): (p, self._parameters[name]) for name, p in before.items() if name not in whole}
        self._unsharded: dict[str, nn.Parameter] = {}

    @property
    def is_first(self) -> bool:
        """Say whether this is the stage's first replica."""
        return dist.get_rank(self._group) == 0

    @property
    def sharded(self) -> dict[str, nn.Parameter]:
        """Return the parameters of which each replica has a share, by their path in the stage's module."""
        return {name: parameter for name, parameter in self._parameters.items() if hasattr(parameter, "full_tensor")}

    def rebind(self, attributes: dict[str, Any]) -> None:
        """Let ops that use a parameter directly use the gathered one, which is the same object in every step."""
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        self.unshard()
        for path, value in attributes.items():
            if id(value) in self.replaced:
                attributes[path] = self._unsharded[names[id(self.replaced[id(value)][1])]]
        self.reshard()

    def unshard(self) -> None:
        """Bring all of every parameter here, as trainable as its share is."""
        self._unit.unshard()
        self._unsharded = dict(self.module.named_parameters())
        for name, parameter in self._unsharded.items():
            parameter.requires_grad_(self._parameters[name].requires_grad)
            if parameter is not self._parameters[name]:
                parameter.grad = None

    def reshard(self) -> None:
        """Let go of what was gathered."""
        for name, parameter in self._unsharded.items():
            if parameter is not self._parameters[name]:
                parameter.grad = None
        self._unit.reshard()

    def arm(self, roots: list[torch.Tensor]) -> None:
        """Nothing to announce: sums begin when the stage is through with its backwards."""

    def complete(self) -> None:
        """Sum every gradient that a replica has over all of them."""
        found = [self._unsharded[name] for name in self._summed]
        has = torch.tensor([parameter.grad is not None for parameter in found], dtype=torch.uint8)
        has = has.to(self._mesh.device_type)
        dist.all_reduce(has, dist.ReduceOp.MAX, group=self._group)
        for name, parameter, anywhere in zip(self._summed, found, has.tolist()):
            if not anywhere:
                continue
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            kept = self._parameters[name]
            if kept is parameter:
                dist.all_reduce(own, group=self._group)
                kept.grad = own
            else:
                kept.grad = self._scattered(own, kept)

    def _scattered(self, own: torch.Tensor, kept: Any) -> torch.Tensor:
        from torch.distributed.tensor import DTensor, Partial

        parts = DTensor.from_local(own.detach().contiguous(), self._mesh, [Partial("sum")], run_check=False)
        share: torch.Tensor = parts.redistribute(placements=kept.placements)
        return share


def adopt(model: nn.Module, replaced: Mapping[int, tuple[nn.Parameter, nn.Parameter]]) -> None:
    """Let every module of the user's model have the sharded parameters where it had those of before."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in replaced:
                module._parameters[name] = replaced[id(parameter)][1]


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of a tensor of which every replica may have a share: then all of them must ask."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def load(tensor: Any, values: torch.Tensor) -> None:
    """Write values into a tensor, or into this replica's share of it."""
    if not hasattr(tensor, "full_tensor"):
        tensor.copy_(values)
        return
    from torch.distributed.tensor import distribute_tensor

    own = values.to(tensor.to_local())  # dtype and device
    tensor.copy_(distribute_tensor(own, tensor.device_mesh, tensor.placements, src_data_rank=None))
