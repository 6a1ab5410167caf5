"""Run by tests/exactness/test_torchrun.py on every rank: hooks on communication, accumulation, a sharded optimizer."""

import copy
import gc
import os
import sys
import warnings
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import functional as F

import stagecut

warnings.simplefilter("ignore")
torch.set_num_threads(1)
OPTIONS: dict[str, Any] = {"loss_fn": F.mse_loss, "microbatches": 2, "schedule": "1f1b", "costs": "analytic"}


def made() -> tuple[nn.Module, nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    return model, copy.deepcopy(model), x, y


def gradients(plain: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    plain.zero_grad()
    F.mse_loss(plain(x), y).backward()
    return {name: p.grad.clone() for name, p in plain.named_parameters() if p.grad is not None}


def own(pm: stagecut.Pipeline) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in pm.named_parameters() if p.grad is not None}
    assert found
    return found


def hooks(devices: Any) -> None:
    model, plain, x, y = made()
    wanted = gradients(plain, x, y)
    pm = stagecut.compile(model, devices, comm_hook=lambda g: (g, default_hooks.fp16_compress_hook), **OPTIONS)
    for _ in range(4):
        pm.zero_grad()
        pm.step(x, target=y)
        worst = max(float((wanted[n] - g).abs().max() / wanted[n].abs().max()) for n, g in own(pm).items())
        assert 1e-8 < worst < 5e-3, worst  # half precision has been between
    model, plain, x, y = made()

    def low_rank(group: Any) -> tuple[Any, Any]:
        state = powerSGD_hook.PowerSGDState(
            group, matrix_approximation_rank=1, start_powerSGD_iter=2, min_compression_rate=1
        )
        return state, powerSGD_hook.powerSGD_hook

    pm = stagecut.compile(model, devices, comm_hook=low_rank, **OPTIONS)
    ranks = []
    for _ in range(4):
        pm.zero_grad()
        pm.step(x, target=y)
        matrices = [g for g in own(pm).values() if g.dim() == 2]
        ranks.append(min(int(torch.linalg.matrix_rank(g, rtol=1e-6)) for g in matrices))
    assert ranks[0] > 1, ranks
    assert ranks[-1] == 1, ranks


def accumulation(devices: Any) -> None:
    model, plain, x, y = made()
    wanted = gradients(plain, x, y)
    pm = stagecut.compile(model, devices, **OPTIONS)
    for _ in range(2):
        with pm.no_sync():
            pm.step(x, target=y)
            pm.evaluate(x)
            F.mse_loss(pm(x), y).backward()
        pm.step(x, target=y)
        for name, gradient in own(pm).items():
            torch.testing.assert_close(gradient, 3 * wanted[name], rtol=1e-9, atol=1e-13, msg=name)
        pm.zero_grad()
    with pm.no_sync():
        pm.step(x, target=y)
    pm.zero_grad()
    pm.step(x, target=y)
    for name, gradient in own(pm).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-9, atol=1e-13, msg=name)


def sharded(devices: Any) -> None:
    model, plain, x, y = made()
    pm = stagecut.compile(model, devices, example_inputs=(x,), **OPTIONS)
    ours = ZeroRedundancyOptimizer(
        pm.local_parameters(), torch.optim.AdamW, process_group=pm.replica_group, lr=0.01, weight_decay=0.1
    )
    theirs = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(4):
        pm.zero_grad()
        pm.step(x, target=y)
        ours.step()
        gradients(plain, x, y)
        theirs.step()
    n_mine = sum(len(group["params"]) for group in ours.optim.param_groups)
    assert 0 < n_mine < len(pm.local_parameters()), "each replica has the state of a part"
    torch.testing.assert_close(pm.state_dict(), plain.state_dict(), rtol=1e-9, atol=1e-12)


def on_meta(devices: Any) -> None:
    _, plain, x, y = made()
    path = os.path.join(sys.argv[2], "model.safetensors")
    if dist.get_rank() == 0:
        save_file(plain.state_dict(), path)
    dist.barrier()
    with torch.device("meta"):
        model, _, _, _ = made()
    identities = [id(p) for p in model.parameters()]
    pm = stagecut.compile(model, devices, weights=path, example_inputs=(x,), **OPTIONS)
    assert identities == [id(p) for p in pm.parameters()]
    held = sum(p.numel() for p in pm.parameters())
    assert held == sum(p.numel() for p in pm.local_parameters())
    if len(devices) > 1:
        assert held < sum(p.numel() for p in plain.parameters()), "the other stage's are elsewhere"
    torch.testing.assert_close(pm.state_dict(), plain.state_dict())
    pm.step(x, target=y)
    wanted = gradients(plain, x, y)
    for name, gradient in own(pm).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-9, atol=1e-13, msg=name)
    with torch.device("meta"):
        fresh, _, _, _ = made()
    torch.manual_seed(dist.get_rank())  # rank 0's seed counts
    state = stagecut.compile(fresh, devices, weights="init", example_inputs=(x,), **OPTIONS).state_dict()
    assert all(value.std() > 0 for value in state.values())
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {name: p.sum().item() for name, p in fresh.named_parameters() if p.numel()})
    for name in state:
        held_by = [values[name] for values in everyone if name in values]
        assert len(held_by) == 2, "every stage has two replicas"
        assert held_by[0] == held_by[1] == state[name].sum().item(), "replicas begin alike"


def synced(devices: Any) -> None:
    """Statistics over replicas."""
    torch.manual_seed(3)
    layers = (nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    model = nn.Sequential(*layers).double()
    x, y = torch.randn(12, 6, dtype=torch.float64), torch.randn(12, 4, dtype=torch.float64)
    pm = stagecut.compile(model, devices, batchnorm="sync", example_inputs=(x,), **OPTIONS)
    for rows in (12, 11, 5, 12):
        assert pm.verify(x[:rows], target=y[:rows]).worst <= 1e-10
        pm.step(x[:rows], target=y[:rows])


class Mixed(nn.Module):
    """A weight that first and last op share, one that an op uses directly, a frozen and an unused one, a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.tied = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.randn(5, 6))
        self.middle = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 6))
        self.unused = nn.Linear(3, 3)
        self.middle[3].bias.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.tied(self.middle(self.tied(x)) * self.scale.sum(0))
        return result


def shares(devices: Any) -> None:
    """FSDP2 on stages: gradients, clipping, optimizer steps and states are those of the unsplit model."""
    torch.manual_seed(4)
    model = Mixed().double()
    plain = copy.deepcopy(model)
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 6, dtype=torch.float64)
    before = [weakref.ref(model.middle[0].weight), weakref.ref(model.scale)]
    pm = stagecut.compile(model, devices, shard=True, batchnorm="sync", example_inputs=(x,), **OPTIONS)
    gc.collect()
    kept = [p for p in (ref() for ref in before) if p is not None]
    assert sum(p.untyped_storage().nbytes() for p in kept) == 0, "whole parameters take no memory any more"
    names = dict(plain.named_parameters()).keys()
    assert dict(pm.named_parameters()).keys() == names
    shared_out = {name: p for name, p in pm.named_parameters() if hasattr(p, "full_tensor")}
    assert {"middle.0.weight", "scale"} & set(shared_out)
    n_held = sum(p.to_local().numel() for p in shared_out.values())
    assert n_held <= 0.7 * sum(p.numel() for p in shared_out.values()), "each replica has a part"
    ours = torch.optim.AdamW([p for p in pm.parameters() if p.numel()], lr=0.01, foreach=False)
    theirs = torch.optim.AdamW(plain.parameters(), lr=0.01)

    def in_rounds(rows: int) -> None:
        n_rounds = 2 if rows > 2 else 1
        for part, wanted in zip(x[:rows].chunk(n_rounds), y[:rows].chunk(n_rounds)):
            (F.mse_loss(plain(part), wanted) * (len(part) / rows)).backward()

    for round_, rows in enumerate((8, 8, 7, 2, 8)):
        if round_ % 2:
            F.mse_loss(pm(x[:rows]), y[:rows]).backward()
        else:
            pm.step(x[:rows], target=y[:rows])
        in_rounds(rows)
        for name, p in pm.named_parameters():
            grad = plain.get_parameter(name).grad
            if p.grad is not None:
                found = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                torch.testing.assert_close(found, grad, rtol=1e-9, atol=1e-13, msg=name)
            elif p.numel():
                assert grad is None, name
        assert pm.verify(x, target=y).worst <= 1e-10
        norm = pm.clip_grad_norm_(0.5)
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(plain.parameters(), 0.5), rtol=1e-9, atol=0.0)
        ours.step()
        theirs.step()
        if round_ != 2:  # gradients of two steps add up once
            pm.zero_grad()
            plain.zero_grad()
    torch.testing.assert_close(pm.state_dict(), plain.state_dict(), rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(pm.to_module()(x), plain(x), rtol=1e-8, atol=1e-11)
    pm.load_state_dict(Mixed().double().state_dict())
    pm.load_state_dict(plain.state_dict())
    pm.eval()
    plain.eval()
    torch.testing.assert_close(pm.evaluate(x).output, plain(x).detach(), rtol=1e-9, atol=1e-12)
    pm.train()
    with pm.no_sync(), pytest.raises(stagecut.StageError, match="would keep whole gradients"):
        pm.step(x, target=y)
    pm.step(x, target=y)


def main() -> None:
    devices = eval(sys.argv[1], {"__builtins__": {}})
    dist.init_process_group("gloo")
    hooks(devices)
    accumulation(devices)
    sharded(devices)
    on_meta(devices)
    synced(devices)
    shares(devices)
    print(f"rank {dist.get_rank()} is exact", flush=True)
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


main()
