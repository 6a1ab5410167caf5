"""Float32 matrix products by torch's BLAS and by oneDNN: what onednn_matmul gains on this processor.

A linear layer's three products by shape, as recorded stages call them: forward, gradient of its input, gradient of its
weight. One thread, the two in turn; reported are the medians, in GFLOP/s of the three together, and the ratio of times
by round. On an otherwise idle core, a minute:

    python benchmarks/matrix_products.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch

from stagecut.products import linear, product, why_no_onednn

# Rows, inputs, outputs.
SHAPES = (
    (16, 64, 64),
    (128, 64, 64),
    (256, 64, 64),
    (64, 256, 256),
    (256, 256, 768),
    (1024, 256, 256),
    (1024, 256, 1024),
    (1024, 1024, 256),
    (1024, 1024, 4096),
)
_LEAST_S = 0.02  # of a round


def contestants(rows: int, inputs: int, outputs: int) -> dict[str, Callable[[], None]]:
    """Return what computes the three products by each."""
    x, weight, bias, gradient = (
        torch.randn(rows, inputs),
        torch.randn(outputs, inputs),
        torch.randn(outputs),
        torch.randn(rows, outputs),
    )

    def by_blas() -> None:
        torch.nn.functional.linear(x, weight, bias)
        torch.mm(gradient, weight)
        torch.mm(gradient.t(), x)

    def by_onednn() -> None:
        linear(x, weight, bias)
        product(gradient, weight)
        product(gradient.t(), x)

    return {"BLAS": by_blas, "oneDNN": by_onednn}


def seconds(run: Callable[[], None], times: int) -> float:
    """Return the seconds of one of so many runs in a row."""
    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) / times


def main() -> None:
    """Time all shapes, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    why = why_no_onednn()
    if why is not None:
        sys.exit(why)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| rows | inputs | outputs | BLAS | oneDNN | time of oneDNN / BLAS (quartiles) |\n|---|---|---|---|---|---|")
    for rows, inputs, outputs in SHAPES:
        runs = contestants(rows, inputs, outputs)
        times = {who: max(1, round(_LEAST_S / seconds(run, 5))) for who, run in runs.items()}
        taken: dict[str, list[float]] = {who: [] for who in runs}
        for _ in range(options.rounds):
            for who, run in runs.items():
                taken[who].append(seconds(run, times[who]))
        flops = 3 * 2 * rows * inputs * outputs
        rates = [f"{flops / statistics.median(own) / 1e9:.0f} GFLOP/s" for own in taken.values()]
        ratios = [theirs / blas for blas, theirs in zip(taken["BLAS"], taken["oneDNN"])]
        low, middle, high = statistics.quantiles(ratios, n=4)
        cells = [str(rows), str(inputs), str(outputs), *rates, f"{middle:.2f} ({low:.2f} to {high:.2f})"]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
