"""What a recorded stage takes beside autograd, and with options that round otherwise: microbatches, there and back.

One thread, no pipeline: 100 tiny layers (64 wide) on 16 and on 128 rows, and four blocks of a transformer (d 256,
sequence 128) on two and on eight sequences. Each adds its gradients to those of the microbatch before. "Fused" is with
gradient_accumulation_fusion, "oneDNN" with onednn_matmul. They run in turn; reported is the median over the rounds of
the best of four, and of its ratio to autograd's. On an otherwise idle core, three minutes:

    python benchmarks/recorded.py
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import fx, nn

from stagecut.entries import below_autograd
from stagecut.models.transformer import GPT
from stagecut.runtime.recorded import record, state_of
from stagecut.runtime.seeding import Seed
from stagecut.runtime.sinks import Accumulate
from stagecut.structure import flatten


def cases() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """Return modules with inputs, by what they are."""
    tiny = nn.Sequential(*(layer for _ in range(100) for layer in (nn.Linear(64, 64), nn.ReLU())))
    for layer in tiny[::2]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # else gradients become subnormal
    blocks = GPT(1024, 256, 4, 8, 128, tied=False).blocks
    return {
        "100 tiny layers, 16 rows": (tiny, torch.randn(16, 64)),
        "100 tiny layers, 128 rows": (tiny, torch.randn(128, 64)),
        "4 blocks of a transformer, 2 sequences": (blocks, torch.randn(2, 128, 256)),
        "4 blocks of a transformer, 8 sequences": (copy.deepcopy(blocks), torch.randn(8, 128, 256)),
    }


def by_autograd(module: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """Return what runs one microbatch through autograd."""
    ones = torch.ones_like(module(x))

    def run() -> None:
        module(x.detach().requires_grad_()).backward(ones)

    return run


def by_recording(module: nn.Module, x: torch.Tensor, fuses: bool = False, onednn: bool = False) -> Callable[[], None]:
    """Return what runs one microbatch through the module's recording."""
    graph, ones = fx.symbolic_trace(module), torch.ones_like(module(x))
    leaves, structure = flatten([x.clone().requires_grad_()])
    parts = record(graph, leaves, structure, None, Seed(), fuses, onednn).parts
    weights = list(state_of(graph).values())

    def run() -> None:
        with below_autograd():
            found = parts.forward([*weights, x])
            given = [*found[parts.n_results :], ones.clone()]  # it may be written over
            del found
            parts.backward(given, Accumulate(weights, [None] * len(weights), fuses))

    return run


def seconds(run: Callable[[], None]) -> float:
    """Return the seconds of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Run all cases, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    titles = ["", "autograd"]
    for who in ("recorded", "fused", "oneDNN"):
        titles += [who, "/ autograd (quartiles)"]
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    for what, (module, x) in cases().items():
        contestants = {
            "autograd": by_autograd(module, x),
            "recorded": by_recording(module, x),
            "fused": by_recording(module, x, fuses=True),
            "oneDNN": by_recording(module, x, onednn=True),
        }
        times: dict[str, list[float]] = {who: [] for who in contestants}
        for _ in range(options.rounds):
            for who, run in contestants.items():
                times[who].append(min(seconds(run) for _ in range(4)))
        cells = [f"{statistics.median(times['autograd']) * 1e3:.2f} ms"]
        for who in ("recorded", "fused", "oneDNN"):
            ratios = [a / b for a, b in zip(times[who], times["autograd"])]
            low, middle, high = statistics.quantiles(ratios, n=4)
            cells += [f"{statistics.median(times[who]) * 1e3:.2f} ms", f"{middle:.3f} ({low:.3f} to {high:.3f})"]
        print(f"| {what} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
