"""Run by tests/runtime/checkpoint/test_torchrun.py on every rank: saves of all ranks, and loads under another plan."""

import ast
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import stagecut
from stagecut.errors import CheckpointError
from stagecut.runtime.checkpoint import read_state

warnings.simplefilter("ignore")
torch.set_num_threads(1)


class Tied(nn.Module):
    """Input and output share a weight, so the first and the last stage do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.2), nn.Tanh()) for _ in range(3)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.linear(self.body(self.embed(tokens)), self.embed.weight)


def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(step)
    x, y = (torch.randint(11, (8, 5), generator=made) for _ in range(2))
    return x, y


def compiled(devices: list[list[str]], shard: bool) -> stagecut.Pipeline:
    torch.manual_seed(0)
    model = Tied().double()
    pieces = 2 // len(devices[0])  # dropout belongs to microbatches: the batch is cut alike under every plan
    return stagecut.compile(
        model, devices, loss_fn=loss_fn, microbatches=pieces, costs="analytic", shard=shard,
        example_inputs=(batch(0)[0],),
    )  # fmt: skip


def train(pm: stagecut.Pipeline, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        x, y = batch(step)
        losses.append(float(pm.step(x, target=y).loss))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def close(a: list[float], b: list[float]) -> None:
    assert all(abs(x - y) < 1e-12 for x, y in zip(a, b, strict=True)), (a, b)


def main(first: list[list[str]], second: list[list[str]], shard: bool, folder: Path) -> None:
    pm = compiled(first, shard)
    optimizer = torch.optim.AdamW(pm.parameters(), 1e-2)
    undisturbed = train(pm, optimizer, range(2))
    pm.save(folder, 2, optimizer=optimizer, data=[2])
    saving = None
    for step in range(2, 6):
        undisturbed += train(pm, optimizer, range(step, step + 1))
        if step == 3:
            saving = pm.save(folder, 4, optimizer=optimizer, data=[4], wait=False)
    assert saving is not None
    saving.wait()
    pm.close()
    dist.barrier()
    for devices, step in ((first, 4), (second, 2)):
        pm = compiled(devices, shard)
        with torch.no_grad():  # what was there is of no use
            for parameter in pm.parameters():
                parameter.mul_(0)
        optimizer = torch.optim.AdamW(pm.parameters(), 1e-2)
        loaded = pm.load(folder / f"step-{step:08d}", optimizer=optimizer)
        assert loaded.data == [step]
        close(train(pm, optimizer, range(step, 6)), undisturbed[step:])
        whole = pm.state_dict()
        pm.close()
        dist.barrier()
    assert set(read_state(folder)) == set(whole)
    refused(first, shard, folder)
    weights_alone(first, folder)
    print(f"rank {dist.get_rank()} goes on alike", flush=True)


def weights_alone(devices: list[list[str]], folder: Path) -> None:
    """Compile with the weights of the newest checkpoint: a model that has memory, and one that never had."""
    expected = read_state(folder)
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = Tied().double()
        pm = stagecut.load(folder, model, devices, loss_fn=loss_fn, costs="analytic", example_inputs=(batch(0)[0],))
        state = pm.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
        pm.close()
        dist.barrier()


def refused(devices: list[list[str]], shard: bool, folder: Path) -> None:
    """Fail on the last rank alone: every rank hears of it, and nothing is left."""
    pm = compiled(devices, shard)
    last = dist.get_rank() == dist.get_world_size() - 1
    said = r"data is a object" if last else rf"rank {dist.get_world_size() - 1}: data is a object"
    with pytest.raises(CheckpointError, match=f"^{said}"):
        pm.save(folder, 9, data=object() if last else 9)
    pm.close()
    dist.barrier()
    assert not [path for path in folder.iterdir() if path.name.startswith(".tmp")]


main(ast.literal_eval(sys.argv[1]), ast.literal_eval(sys.argv[2]), sys.argv[3] == "shard", Path(sys.argv[4]))
