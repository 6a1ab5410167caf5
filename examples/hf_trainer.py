"""A Hugging Face Trainer drives a pipeline of two stages, and ends where it ends with the plain model.

    pip install 'stagecut[trainers]'
    python examples/hf_trainer.py

The Trainer owns the loop: batches, optimizer, learning-rate schedule, clipping. It calls the pipeline like any model,
with ``labels``, and finds the loss in the result.
"""

from __future__ import annotations

import copy
import tempfile
import warnings

import torch
from torch import nn
from torch.utils.data import Dataset

import stagecut
from stagecut.vision_compat import import_torchvision

import_torchvision()  # PyPI's torchvision, which these import, needs help on a CPU build of torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments  # noqa: E402


class Counting(Dataset):
    """Sentences that count upwards from somewhere, modulo the vocabulary."""

    def __init__(self, n_rows: int, length: int, vocabulary: int) -> None:
        starts = torch.arange(n_rows)[:, None] * 7
        self.tokens = (starts + torch.arange(length)) % vocabulary

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def train(model: nn.Module, data: Dataset, folder: str) -> float:
    """Let a Trainer train the model; return its mean loss."""
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=20,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        max_grad_norm=1.0,
        lr_scheduler_type="cosine",
        remove_unused_columns=False,  # it looks for the names of columns in forward's signature
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    return float(Trainer(model=model, args=arguments, train_dataset=data).train().training_loss)


def main() -> None:
    """Train both, and compare."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_positions=32, n_embd=64, n_layer=4, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    config.loss_type, config.use_cache = "ForCausalLMLoss", False
    model = GPT2LMHeadModel(config)
    plain = copy.deepcopy(model)
    plain.accepts_loss_kwargs = False  # as a pipeline; else the Trainer has the loss divided by its own count of tokens
    data = Counting(256, 32, 64)
    with tempfile.TemporaryDirectory() as folder, stagecut.compile(model, [0, 1], stages=2, microbatches=4) as pm:
        ours = train(pm, data, folder)
        print(pm.startup)
        theirs = train(plain, data, folder)
    worst = max(float((a - b).detach().abs().max()) for a, b in zip(model.parameters(), plain.parameters()))
    print(f"mean loss {ours:.4f} in two stages, {theirs:.4f} unsplit; weights differ by {worst:.1e} at most")
    if worst > 1e-3:
        raise SystemExit("the two did not end in the same place")


main()
