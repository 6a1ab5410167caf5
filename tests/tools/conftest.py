from dataclasses import replace

import pytest
import torch
from torch import nn

import stagecut

HOSTILE = "<img src=x onerror=alert(1)>"


class Skips(nn.Module):
    """Three blocks; what the first makes is also used by the last."""

    def __init__(self, first="first"):
        super().__init__()
        self.early = first
        for name, width in ((first, 8), ("middle", 16), ("last", 4)):
            self.add_module(name, nn.Sequential(nn.LazyLinear(width), nn.ReLU(), nn.LazyLinear(8), nn.ReLU()))

    def forward(self, x):
        early = self.get_submodule(self.early)(x)
        return self.last(torch.cat([self.middle(early), early], 1))


def make_plan(first="first", devices=(["cpu"], ["cpu"]), **options):
    model, x = Skips(first), torch.randn(8, 8)
    model(x)
    options = {"schedule": "1f1b", "microbatches": 4, **options}
    return stagecut.plan(model, devices, example_inputs=(x,), costs="analytic", **options)


@pytest.fixture(scope="session")
def plan():
    return make_plan(devices=[["cpu"]] * 3)


@pytest.fixture(scope="session")
def timeline(plan):
    return plan.predicted


@pytest.fixture(scope="session")
def hostile_plan():
    made = make_plan(HOSTILE)
    return replace(made, model=f"</style><script>alert('{made.model}')</script>\x1b[31m")


@pytest.fixture(scope="session")
def simulated_plan():
    return make_plan(devices="sim:4xA100-80GB", replicas=2)


@pytest.fixture
def saved(plan, tmp_path):
    """Return the path of the plan in a file."""
    plan.save(tmp_path / "saved.json")
    return str(tmp_path / "saved.json")
