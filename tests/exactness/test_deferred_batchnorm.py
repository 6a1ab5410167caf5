"""BatchNorm with statistics of the whole batch: what nn.BatchNorm's own update would have made of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import stagecut
from stagecut.runtime.batch import piece_sizes

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def made(momentum: float | None = 0.1) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))
    more = (nn.BatchNorm1d(5, momentum=momentum), nn.Tanh(), nn.Linear(5, 3), nn.BatchNorm1d(3, affine=False))
    return nn.Sequential(*layers, *more).double()


def expected(model: nn.Module, x: torch.Tensor, n_pieces: int) -> dict[str, torch.Tensor]:
    """Return the buffers after a step: each norm's own update, of all that it was given in the microbatches."""
    plain = copy.deepcopy(model)
    given: dict[str, list[torch.Tensor]] = {}
    norms = {name: m for name, m in plain.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    for name, norm in norms.items():
        norm.register_forward_pre_hook(lambda _, a, name=name: given.setdefault(name, []).append(a[0].detach()))  # type: ignore[misc]
    before = {name: copy.deepcopy(norm) for name, norm in norms.items()}
    for rows in x.split(piece_sizes(len(x), n_pieces)):
        plain(rows)
    found = {}
    for name, norm in before.items():
        norm._forward_pre_hooks.clear()
        norm(torch.cat(given[name]))
        found.update({f"{name}.{what}": value for what, value in norm.named_buffers()})
    return found


@pytest.mark.parametrize(
    ("devices", "options"),
    [
        ([["cpu"], ["cpu"]], {"launch": "inline"}),
        ([["cpu"], ["cpu"]], {"launch": "inline", "schedule": "zb-h1", "recompute": None}),
        ([["cpu", "cpu"], ["cpu"]], {"launch": "inline"}),
        ([["cpu"], ["cpu"]], {}),
        ([["cpu", "cpu"], ["cpu"]], {}),
        ([["cpu"], ["cpu"]], {"recompute": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_are_those_of_the_whole_batch(
    devices: list[list[str]], options: dict[str, Any], momentum: float | None
) -> None:
    model = made(momentum)
    torch.manual_seed(1)
    batches = [torch.randn(rows, 2, 4, 4, dtype=torch.float64) for rows in (12, 12, 11, 12, 12)]
    target = torch.randint(3, (12,))
    wishes = {"microbatches": 2, "schedule": "1f1b", "costs": "analytic", "batchnorm": "deferred", **options}
    n_pieces = 2 * max(map(len, devices))
    with stagecut.compile(model, devices, loss_fn=F.cross_entropy, **wishes) as pm:
        for x in batches:  # the later ones by recorded graphs
            wanted = expected(model, x, n_pieces)
            pm.step(x, target=target[: len(x)])
            buffers = dict(model.named_buffers())
            for name, value in wanted.items():
                torch.testing.assert_close(buffers[name], value, rtol=1e-10, atol=1e-12, msg=name)
        assert pm.verify(batches[0], target=target).worst <= 1e-10
        torch.testing.assert_close({n: b.clone() for n, b in model.named_buffers()}, buffers)
        model.eval()
        pm.eval()
        torch.testing.assert_close(pm.evaluate(batches[0]).output, model(batches[0]).detach())
        pm.train()


class Calling(nn.Module):
    """Calls the function with buffers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(self.layer(x), self.mean, self.variance, training=self.training)


def test_norms_that_cannot_be_reached_are_refused() -> None:
    x = torch.randn(8, 4)
    with pytest.raises(stagecut.ConstraintError, match=r"op batch_norm .* calls a function instead of nn\.BatchNorm"):
        stagecut.compile(Calling(), ["cpu"], batchnorm="deferred", launch="inline", example_inputs=(x,))
    whole = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()))
    with pytest.raises(stagecut.ConstraintError, match=r"1\.0 is inside of Sequential, which is kept whole"):
        stagecut.compile(whole, ["cpu"], batchnorm="deferred", opaque=["1"], launch="inline", example_inputs=(x,))
    with pytest.raises(
        stagecut.ConstraintError, match="batchnorm must be one of microbatch, deferred, sync, got 'all'"
    ):
        stagecut.compile(whole, ["cpu"], batchnorm="all")
