"""A Lightning module around a pipeline of two stages ends where it ends around the plain model.

pip install 'stagecut[trainers]'
python examples/lightning_module.py
"""

from __future__ import annotations

import copy
import logging
import warnings

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import stagecut
from stagecut.vision_compat import import_torchvision

import_torchvision()  # PyPI's torchvision, which these import, needs help on a CPU build of torch
import lightning  # noqa: E402


class Classifier(lightning.LightningModule):
    """What Lightning wants to know of a model, plain or pipelined."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        """Return the loss; Lightning calls ``backward`` on it."""
        x, y = batch
        loss = F.cross_entropy(self.model(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Optimize all parameters."""
        return torch.optim.AdamW(self.parameters(), 3e-3)


def train(model: nn.Module, data: TensorDataset) -> list[float]:
    """Let Lightning train a model for two epochs; return the losses."""
    module = Classifier(model)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        gradient_clip_val=1.0,
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=24))
    return module.losses


def main() -> None:
    """Train both, and compare."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU())))
    plain = copy.deepcopy(model)
    x = torch.randn(250, 32)  # the last batch is short
    data = TensorDataset(x, x[:, :8].argmax(1))
    with stagecut.compile(model, [0, 1], stages=2, microbatches=4) as pm:
        ours = train(pm, data)
        print(pm.startup)
    theirs = train(plain, data)
    worst = max(float((a - b).detach().abs().max()) for a, b in zip(model.parameters(), plain.parameters()))
    print(f"loss {ours[0]:.4f} to {ours[-1]:.4f} in two stages, {theirs[0]:.4f} to {theirs[-1]:.4f} unsplit")
    print(f"weights differ by {worst:.1e} at most")
    if worst > 1e-4:
        raise SystemExit("the two did not end in the same place")


main()
