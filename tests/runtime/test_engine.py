"""The mode of a pipeline that runs in this process: what ``self.training`` decides follows train() and eval()."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stagecut


class Dropped(nn.Module):
    """Asks for the mode in its own code, so that no module of torch's would follow it by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.dropout(self.first(x), 0.5, training=self.training))


@pytest.mark.parametrize("captured_in_training", [True, False])
def test_dropout_follows_the_mode_whatever_it_was_when_the_model_was_captured(captured_in_training: bool) -> None:
    torch.manual_seed(0)
    model, x, y = Dropped().train(captured_in_training), torch.randn(6, 4), torch.randint(0, 3, (6,))
    pipeline = stagecut.compile(
        model,
        [["cpu"], ["cpu"]],
        loss_fn=F.cross_entropy,
        launch="inline",
        microbatches=2,
        costs="analytic",
        example_inputs=(x,),
    )
    for training in (False, True, False):
        pipeline.train(training)
        with torch.no_grad():
            results = [pipeline(x) for _ in range(2)]
            if training:
                assert not torch.equal(results[0], results[1])
            else:
                torch.testing.assert_close(results[0], model(x))
                assert torch.equal(results[0], results[1])
        assert pipeline.verify(x, target=y).ok
