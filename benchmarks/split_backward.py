"""What it costs to compute input and weight gradients apart: F + I + W over F + B, of one microbatch on one stage.

B is autograd's backward, for all. Ours are the explicit graphs of ``stagecut.runtime.joint``; the peer's are
``stage_backward_input`` and ``stage_backward_weight`` of ``torch.distributed.pipelining``, on the same module. All run
in turn in one process with one thread, the middle stage of three, so that there are gradients on both sides:

    python benchmarks/split_backward.py

Reported are the medians of the ratios of each round, with their quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

import stagecut
from stagecut.building import tensors_of
from stagecut.heap import keep_freed_memory
from stagecut.models.transformer import GPT
from stagecut.partitioner.analysis import analyse
from stagecut.partitioner.planner import random_ops
from stagecut.partitioner.split import split
from stagecut.runtime.stage import StageRuntime
from stagecut.structure import flatten
from stagecut.vision_compat import import_torchvision


def models(rows: int) -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """Return model and microbatch by name."""
    import_torchvision()
    from torchvision.models import resnet50

    tiny = nn.Sequential(*(layer for _ in range(200) for layer in (nn.Linear(64, 64), nn.Tanh())))
    return {
        "transformer": (GPT(1024, 256, 8, 8, 128), torch.randint(1024, (rows, 128))),
        "resnet50": (resnet50(), torch.randn(2 * rows, 3, 64, 64)),
        "tiny layers": (tiny, torch.randn(rows, 64)),
    }


class Stage:
    """The middle stage of a model, with one microbatch's inputs and gradients."""

    def __init__(self, model: nn.Module, x: torch.Tensor) -> None:
        plan = stagecut.plan(
            model, [["cpu"]] * 3, example_inputs=(x,), costs="analytic", microbatches=1, schedule="1f1b"
        )
        captured = stagecut.capture(model, (x,))
        spec = split(captured, plan, random_ops(analyse(captured, tensors_of(captured, (x,), {}), len(x))))
        before, own = (StageRuntime(spec.stages[s], torch.device("cpu"), None) for s in (0, 1))
        names = before.spec.graph_inputs
        results = before.forward(0, dict.fromkeys(names, x), {}).results
        self.runtime = own
        self.graph_inputs = dict.fromkeys(own.spec.graph_inputs, x)
        self.packets = {n: (_detached(results[n]), True) for group in own.spec.wires_in for n in group.values}
        self.weights = list(own.module.parameters())
        self.forward(splits=False)
        outputs, self.gradients = self._roots()
        self.gradients = [torch.randn_like(output) for output in outputs]

    def _roots(self) -> tuple[list[torch.Tensor], list[Any]]:
        results = self.runtime.held[0].results
        sent = [n for group in self.runtime.spec.wires_out for n in group.values]
        roots = [leaf for n in dict.fromkeys(sent) for leaf in flatten(results[n])[0]]
        roots = [root for root in roots if isinstance(root, torch.Tensor) and root.requires_grad]
        return roots, getattr(self, "gradients", [])

    def forward(self, splits: bool) -> None:
        self.runtime.begin(splits, trains=True, n_microbatches=1)
        self.runtime.forward(0, self.graph_inputs, self.packets)

    def whole(self) -> None:
        """F and B by autograd."""
        self.forward(splits=False)
        self.runtime.backward(0, *self._roots())

    def explicit(self) -> None:
        """F and B by explicit graphs."""
        self.forward(splits=True)
        self.runtime.backward(0, *self._roots())

    def apart(self) -> None:
        """F, I and W by explicit graphs."""
        self.forward(splits=True)
        self.runtime.backward_input(0, *self._roots())
        self.runtime.backward_weight(0)

    def peer(self) -> None:
        """F, I and W by the peer."""
        self.forward(splits=False)
        roots, gradients = self._roots()
        roots = [root.clone() for root in roots]  # it detaches them in place; a ReLU's must not be
        leaves = [leaf for leaf in self.runtime.held[0].leaves.values() if isinstance(leaf, torch.Tensor)]
        _, groups = stage_backward_input(roots, gradients, leaves, iter(self.weights))
        stage_backward_weight(iter(self.weights), groups)

    def timed(self, run: Callable[[], None]) -> float:
        for weight in self.weights:
            weight.grad = None
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        self.runtime.free(0)
        return seconds


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--model", action="append")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    keep_freed_memory()  # as workers do
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| model | F + B | explicit F + B | explicit F + I + W | torch.distributed.pipelining F + I + W |")
    print("|---|---|---|---|---|")
    for name, (model, x) in models(options.rows).items():
        if options.model and name not in options.model:
            continue
        stage = Stage(model, x)
        ways = {"whole": stage.whole, "explicit": stage.explicit, "apart": stage.apart, "peer": stage.peer}
        times: dict[str, list[float]] = {way: [] for way in ways}
        for round_ in range(options.rounds + 3):
            for way, run in ways.items():
                seconds = stage.timed(run)
                if round_ >= 3:
                    times[way].append(seconds)
        if stage.runtime.whole_because is not None:
            raise SystemExit(f"{name}: not recorded: {stage.runtime.whole_because}")
        cells = [f"{statistics.median(times['whole']) * 1e3:.1f} ms"]
        for way in ("explicit", "apart", "peer"):
            low, middle, high = statistics.quantiles([a / b for a, b in zip(times[way], times["whole"])], n=4)
            cells.append(f"{middle:.3f} ({low:.3f} to {high:.3f})")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
