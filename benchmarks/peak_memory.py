"""Predicted against measured: the peak of resident memory of the fullest worker, on new workers for each configuration.

The models of prediction.py, which the constants behind ``plan.worker_bytes`` were fitted to, and two more, which they
were not, in one device, two replicas, two stages, and both: eight steps each, planned with analytic costs. What runs
beside it changes nothing, unlike steps. A quarter of an hour:

    python benchmarks/peak_memory.py
"""

from __future__ import annotations

import argparse
import copy
import statistics
import warnings

import torch
from prediction import CONFIGURATIONS, LOSSES, base_bytes, models, peak_bytes, predicted_bytes, timed_step
from torch import nn
from torch.nn import functional as F

import stagecut
from stagecut.vision_compat import import_torchvision

_STEPS = 8
_OTHERS = ("mobilenet_v3_large", "densenet121")


def cases() -> dict[str, tuple[nn.Module, torch.Tensor, torch.Tensor]]:
    """Return model, batch and targets by name."""
    import_torchvision()
    import torchvision

    images, classes = torch.randn(32, 3, 96, 96), torch.randint(1000, (32,))
    return models() | {name: (getattr(torchvision.models, name)(), images, classes) for name in _OTHERS}


def errors(name: str) -> list[float]:
    """Print a line of a table for each configuration of a model; return predicted over measured, less one."""
    model, x, y = cases()[name]
    loss_fn = LOSSES.get(name, F.cross_entropy)
    found = []
    for what, wishes in CONFIGURATIONS.items():
        plan = stagecut.plan(model, **wishes, example_inputs=(x,), loss_fn=loss_fn, example_target=y, costs="analytic")
        stagecut.end_workers()
        base = base_bytes()
        stagecut.end_workers()
        with stagecut.compile(copy.deepcopy(model), list(plan.devices), loss_fn=loss_fn, plan=plan) as pm:
            for _ in range(_STEPS):
                timed_step(pm, x, y)
            measured = max(peak_bytes(pm))
        predicted = predicted_bytes(plan, base)
        found.append(predicted / measured - 1)
        mib = f"{predicted / 2**20:.0f} MiB | {measured / 2**20:.0f} MiB"
        print(f"| {name} | {what} | {mib} | {found[-1]:+.1%} |", flush=True)
    return found


def main() -> None:
    """Run the chosen models, and print their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=["transformer", "resnet50", "mlp", "tiny", *_OTHERS])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| model | configuration | predicted | measured | error |\n|---|---|---|---|---|")
    found = [error for name in options.model or list(cases()) for error in errors(name)]
    sizes = sorted(map(abs, found))
    print(f"\nOff by {statistics.median(sizes):.1%} in the median, {sizes[-1]:.1%} at worst.")


if __name__ == "__main__":
    main()
