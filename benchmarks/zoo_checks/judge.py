"""Judge a captured model by its eager twin: training, another seed, another batch, evaluation, training again."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from zoo_entries import Entry

from .compare import TOLERANCE, Run, Verdict, compare, objective, tensors_of

# Float32 errors between these bounds may be rounding that the model amplifies: float64 decides.
_DOUBTFUL = 0.1


@dataclass
class Subject:
    """What is judged: a callable with the model's signature, and where to find its parameters and buffers.

    Attributes:
        module: called like the model; ``train()`` and ``eval()`` switch it.
        owner: its parameters and buffers go by the model's names.
        training: the mode it is in; it is only told to switch where that changes.
        flat: it gives its tensors as a flat tuple, whatever the model's result is.
    """

    module: Any
    owner: nn.Module
    training: bool = True
    flat: bool = False

    def switch(self, training: bool) -> None:
        """Bring the module into a mode."""
        if training != self.training:
            self.module.train(training)
            self.training = training


Maker = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Subject]


@dataclass(frozen=True)
class Check:
    """One comparison of the sequence."""

    name: str
    seed: int
    other_batch: bool = False
    training: bool = True


CHECKS = (
    Check("train", 11),
    Check("other_seed", 12),
    Check("other_batch", 13, other_batch=True),
    Check("eval", 12, training=False),
    Check("train_again", 14),
)


def judge(entry: Entry, make: Maker, *, double: bool = False) -> tuple[dict[str, Any], Subject | None]:
    """Build the model and its twin, make the subject, and run the checks.

    The twin's buffers are copied over the model's after every check, so that a check is not blamed for the one before.
    ``make`` may raise; that is the caller's to report.
    """
    model, twin = build_twins(entry, double=double)
    args, kwargs = call_of(entry, entry.batch, seed=1, double=double)
    entry.reset()
    _seed(0)
    subject = make(model, args, kwargs)
    tolerance = TOLERANCE[torch.float64 if double else torch.float32]
    eager = Subject(twin, twin)
    verdicts: dict[str, Any] = {}
    for check in CHECKS:
        if (check.other_batch and not _has_other_batch(entry)) or not (check.training or entry.modes):
            continue
        if entry.unjudged:
            verdicts[check.name] = {"ok": None, "detail": entry.unjudged}
            continue
        rows = entry.other_batch if check.other_batch else entry.batch
        assert rows is not None, "checks of another batch are left out where there is none"
        reference = _run(entry, eager, check, rows, double)
        if reference.error:
            verdicts[check.name] = {"ok": None, "detail": f"the eager model fails: {reference.error}"}
            continue
        given = _run(entry, subject, check, rows, double)
        if subject.flat:
            reference.output, given.output = tensors_of(reference.output), tensors_of(given.output)
        verdicts[check.name] = asdict(compare(reference, given, tolerance, gradients=check.training))
        del reference, given
        _align(twin, subject.owner)
    return verdicts, subject


def _has_other_batch(entry: Entry) -> bool:
    """Say whether a call with another number of rows has the same arguments: a list of targets has one for each row."""
    if entry.other_batch is None:
        return False
    calls = [call_of(entry, rows, seed=1) for rows in (entry.batch, entry.other_batch)]
    return tree_flatten(calls[0])[1] == tree_flatten(calls[1])[1]


def doubtful(verdicts: dict[str, Any]) -> bool:
    """Say whether some check failed by so little that float64 should decide."""
    failed = [verdict for verdict in verdicts.values() if verdict["ok"] is False]
    return bool(failed) and all(verdict["error"] < _DOUBTFUL for verdict in failed)


def build_twins(entry: Entry, *, double: bool = False) -> tuple[nn.Module, nn.Module]:
    """Build the model twice with the same weights, in training mode."""
    _seed(0)
    model = entry.build().train()
    try:
        if not entry.copies:
            raise TypeError(f"{entry.label} is not to be copied")
        twin = copy.deepcopy(model)
    except Exception:  # but it can be built again from the same seed
        _seed(0)
        twin = entry.build().train()
    return (model.double(), twin.double()) if double else (model, twin)


def call_of(entry: Entry, rows: int, *, seed: int, double: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make the arguments of a call, the same for the same seed."""
    _seed(seed)
    args, kwargs = entry.call(rows)
    return (_double(args), _double(kwargs)) if double else (args, kwargs)


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype is torch.float32 else value
    if isinstance(value, dict):
        return {key: _double(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_double(item) for item in value)
    return value


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _run(entry: Entry, subject: Subject, check: Check, rows: int, double: bool) -> Run:
    args, kwargs = call_of(entry, rows, seed=check.seed + 100 * rows, double=double)
    run = Run()
    entry.reset()
    try:
        subject.switch(check.training)
        for parameter in subject.owner.parameters():
            parameter.grad = None
        _seed(check.seed)
        with torch.set_grad_enabled(check.training):
            run.output = subject.module(*args, **kwargs)
            total = objective(run.output) if check.training else None
            if total is not None:
                total.backward()
    except Exception as error:
        lines = str(error).strip().splitlines()
        return Run(error=f"{type(error).__name__}: {lines[0][:300] if lines else ''}")
    if check.training:
        run.gradients = {name: parameter.grad for name, parameter in subject.owner.named_parameters()}
    # Copies, because the next step writes into them.
    run.buffers = {name: buffer.detach().clone() for name, buffer in subject.owner.named_buffers()}
    return run


def _align(twin: nn.Module, owner: nn.Module) -> None:
    wanted = dict(twin.named_buffers())
    with torch.no_grad():
        for name, buffer in owner.named_buffers():
            if name in wanted and wanted[name].shape == buffer.shape and not torch.equal(wanted[name], buffer):
                buffer.copy_(wanted[name])


def worst(verdicts: dict[str, Any], names: tuple[str, ...]) -> bool | None:
    """Say whether all of these checks passed; ``None`` where none of them applies."""
    known = [verdicts[name]["ok"] for name in names if name in verdicts and verdicts[name]["ok"] is not None]
    return all(known) if known else None


__all__ = ["CHECKS", "Check", "Maker", "Subject", "Verdict", "build_twins", "call_of", "doubtful", "judge", "worst"]
