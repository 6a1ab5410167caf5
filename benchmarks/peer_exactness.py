"""Where ``torch.distributed.pipelining`` computes something else without a word, and what stagecut computes there.

    python benchmarks/peer_exactness.py

Every case is a training step (or two) of two stages in float64, by the peer in two processes and by stagecut with the
same microbatches, against the unsplit model. An error is the largest difference of a gradient (or of BatchNorm's
running statistics) over the largest value of the unsplit model's; cases that end with an exception say which. The first
two cases are controls.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import stagecut

WIDTH, ROWS, PIECES = 8, 16, 4
TIMEOUT_S = 120
Tensors = dict[str, torch.Tensor]


class Tied(nn.Module):
    """The first and the last layer share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.tanh(self.middle(torch.tanh(self.first(x)))), self.first.weight)


class FirstHalf(nn.Module):
    def __init__(self, model: Tied) -> None:
        super().__init__()
        self.first = model.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.first(x))


class SecondHalf(nn.Module):
    def __init__(self, model: Tied) -> None:
        super().__init__()
        self.middle, self.first = model.middle, model.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.tanh(self.middle(x)), self.first.weight)


def layers(norm: bool = False) -> nn.Sequential:
    """Return two stages, one after the other."""

    def stage() -> nn.Module:
        between: nn.Module = nn.BatchNorm1d(WIDTH) if norm else nn.Tanh()
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), between, nn.Linear(WIDTH, WIDTH))

    return nn.Sequential(stage(), stage())


def ignoring(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over the rows that count."""
    return F.cross_entropy(output, target, ignore_index=-1)


@dataclass(frozen=True)
class Case:
    """A model, its loss, and how it is run.

    Attributes:
        schedule: the peer's; ``ours``: what stagecut is told instead of ``microbatches`` and ``loss_fn`` alone.
        n_steps: calls of ``step`` whose gradients add up.
        wraps: wraps the peer's stages in DistributedDataParallel, with these options, and runs two replicas.
        compares: ``"gradients"`` or ``"buffers"``.
    """

    model: Callable[[], nn.Module]
    loss: Callable[..., Any] = F.mse_loss
    schedule: str = "Schedule1F1B"
    ours: dict[str, Any] | None = None
    n_steps: int = 1
    wraps: dict[str, Any] | None = None
    compares: str = "gradients"


CASES = {
    "nothing special": Case(layers),
    "replicas by DDP": Case(layers, wraps={}),
    "BatchNorm's running statistics": Case(lambda: layers(norm=True), compares="buffers"),
    "zero-bubble schedule and DDP": Case(
        layers, schedule="ScheduleInterleavedZeroBubble", wraps={}, ours={"schedule": "zb-h1"}
    ),
    "tied weights": Case(Tied),
    "accumulation over two steps": Case(layers, n_steps=2),
    "ignore_index": Case(layers, loss=ignoring, ours={"loss_weight": lambda target: int((target >= 0).sum())}),
    "DDP with static_graph": Case(layers, wraps={"static_graph": True}),
}


def batch(case: Case, replica: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets, of one replica or of all."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=generator)
    y: torch.Tensor = torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=generator)
    if case.loss is ignoring:
        y = torch.randint(WIDTH, (ROWS,), generator=generator)
        y[: ROWS // 2 - 1] = -1  # the first pieces count less than the last
    rows = slice(None) if replica is None else slice(replica * ROWS // 2, (replica + 1) * ROWS // 2)
    return x[rows], y[rows]


def model_of(case: Case) -> nn.Module:
    """Make the model, the same every time."""
    torch.manual_seed(0)
    return case.model().double()


def unsplit(case: Case, n_pieces: int) -> Tensors:
    """Run the unsplit model: gradients of the whole batch, or buffers after the same pieces."""
    model, (x, y) = model_of(case), batch(case)
    for _ in range(case.n_steps):
        if case.compares == "buffers":
            for piece, target in zip(x.chunk(n_pieces), y.chunk(n_pieces)):
                case.loss(model(piece), target)
        else:
            case.loss(model(x), y).backward()
    return found_in(case, model)


def found_in(case: Case, model: nn.Module) -> Tensors:
    """Return what is compared."""
    if case.compares == "buffers":
        return {name: b.clone() for name, b in model.named_buffers() if b.is_floating_point()}
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def error(found: Tensors, wanted: Tensors) -> float:
    """Return the largest difference over the largest value that was wanted, of any tensor."""
    errors = [
        float((found[name] - wanted[name]).abs().max() / wanted[name].abs().max()) if name in found else 1.0
        for name in wanted
    ]
    return max(errors)


def ours(name: str) -> str:
    """Run stagecut on a case."""
    case = CASES[name]
    replicas = 1 if case.wraps is None else 2
    wishes = {"microbatches": PIECES // replicas, "schedule": "1f1b", **(case.ours or {})}
    model, (x, y) = model_of(case), batch(case)
    devices = [["cpu"] * replicas] * 2
    with stagecut.compile(model, devices, loss_fn=case.loss, costs="analytic", **wishes) as pm:
        for _ in range(case.n_steps):
            pm.step(x, target=y)
        return f"{error(found_in(case, model), unsplit(case, PIECES)):.1e}"


def serve(name: str, rank: int, folder: str) -> None:
    """Be one rank of the peer, and write down the error of what this rank has."""
    import torch.distributed as dist
    from torch.distributed import pipelining

    case = CASES[name]
    world = 2 if case.wraps is None else 4
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world)
    model = model_of(case)
    halves: list[nn.Module] = [FirstHalf(model), SecondHalf(model)] if isinstance(model, Tied) else list(model)  # type: ignore[arg-type]
    place, replica = rank % 2, rank // 2
    pipes = [dist.new_group([2 * r, 2 * r + 1]) for r in range(world // 2)]
    across = [dist.new_group([p + 2 * r for r in range(world // 2)]) for p in range(2)]
    module = halves[place]
    if case.wraps is not None:
        module = nn.parallel.DistributedDataParallel(module, process_group=across[place], **case.wraps)
    several = case.schedule in ("ScheduleInterleavedZeroBubble",)
    stage = pipelining.PipelineStage(module, place, 2, torch.device("cpu"), group=pipes[replica])
    pieces = PIECES // (world // 2)
    schedule = getattr(pipelining, case.schedule)([stage] if several else stage, pieces, loss_fn=case.loss)
    x, y = batch(case, None if case.wraps is None else replica)
    for _ in range(case.n_steps):
        schedule.step(*((x,) if place == 0 else ()), **({"target": y} if place == 1 else {}))
    mine = {id(t) for t in (*halves[place].parameters(), *halves[place].buffers())}
    names = {n for n, t in (*model.named_parameters(), *model.named_buffers()) if id(t) in mine}
    wanted = {n: value for n, value in unsplit(case, PIECES).items() if n in names}
    Path(folder, f"{rank}.json").write_text(json.dumps(error(found_in(case, model), wanted)))


def peers(name: str) -> str:
    """Run the peer on a case; return the largest error of its ranks, or how it failed."""
    world = 2 if CASES[name].wraps is None else 4
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--peer", name, folder]
        running = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for rank in range(world)
        ]
        said = []
        for process in running:
            try:
                said.append(process.communicate(timeout=TIMEOUT_S)[0])
            except subprocess.TimeoutExpired:
                process.kill()
                said.append(f"nothing for {TIMEOUT_S} s")
        if any(process.returncode for process in running):
            lines = [line for text in said for line in text.splitlines() if "Error" in line or "nothing for" in line]
            return (lines or ["ended without a word"])[-1].strip()[:120]
        return f"{max(json.loads(Path(folder, f'{rank}.json').read_text()) for rank in range(world)):.1%}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", nargs=3, metavar=("CASE", "FOLDER", "RANK"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.peer:
        name, folder, rank = options.peer
        serve(name, int(rank), folder)
        return
    print("| case | torch.distributed.pipelining | stagecut |")
    print("|---|---|---|")
    for name in CASES:
        print(f"| {name} | {peers(name)} | {ours(name)} |", flush=True)


if __name__ == "__main__":
    main()
