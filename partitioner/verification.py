"""Verification of a capture on request: graph and model, on copies, in both modes, for other seeds and sizes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CaptureError, ShapeError
from ..structure import call_leaves, tensors_in, unflatten
from .comparing import Difference, Record, compare, play
from .recording.state import contents_of_object, restore, untouched

if TYPE_CHECKING:
    from .captured import Capture


@dataclass(frozen=True)
class CaptureCheck:
    """What verification found.

    Attributes:
        worst: the largest relative error of any tensor: largest difference over largest value; infinite where one of
            the two is missing or has another form.
        differences: what differs by more than rounding, in the order in which it was found.
        checked: the calls that were compared.
        skipped: calls that could not be compared, and why: the model fails, or the graph is not meant for them.
    """

    worst: float
    differences: tuple[str, ...]
    checked: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Say whether graph and model do the same, in at least one call."""
        return bool(self.checked) and not self.differences

    def __str__(self) -> str:
        skipped = f"; not compared: {'; '.join(self.skipped)}" if self.skipped else ""
        if not self.checked:
            return f"nothing was compared{skipped.replace('; not compared', '', 1)}"
        if self.ok:
            found = f"the graph does what the model does (worst relative error {self.worst:.1e})"
            return f"{found} in {_list(self.checked)}{skipped}"
        more = f" (and {len(self.differences) - 1} more differences)" if len(self.differences) > 1 else ""
        return f"the graph differs from the model: {self._first()}{more}{skipped}"

    def _first(self) -> str:
        """Prefer a parameter: its name says where to look."""
        return next((text for text in self.differences if "parameter" in text), self.differences[0])


@dataclass(frozen=True)
class _Round:
    """Calls in a row on one copy. ``rows`` None is the example's; ``training`` None leaves the modes as they are."""

    name: str
    training: bool | None
    seeds: tuple[int, ...]
    rows: int | None = None


def verify(
    capture: Capture, args: tuple[Any, ...], kwargs: dict[str, Any], seeds: Sequence[int], rows: int | None
) -> CaptureCheck:
    """Compare graph and model on copies; see :meth:`Capture.verify`."""
    if any(tensor.is_meta for tensor in [*tensors_in((args, kwargs)), *capture.model.parameters()]):
        raise CaptureError("a model without data (on the meta device) has no numbers to compare")
    found: list[Difference] = []
    checked: list[str] = []
    skipped: list[str] = []
    worst = 0.0
    with torch.inference_mode(False), torch.enable_grad():
        for item in _rounds(capture, args, kwargs, tuple(seeds) or (0,), rows):
            outcome = _compare(capture, item, args, kwargs)
            if isinstance(outcome, str):
                skipped.append(outcome)
                continue
            error, differences = outcome
            worst = max(worst, error)
            checked.append(item.name)
            found += differences
    return CaptureCheck(worst, tuple(map(str, found)), tuple(checked), tuple(skipped))


def _rounds(capture: Capture, args: Any, kwargs: Any, seeds: tuple[int, ...], rows: int | None) -> Iterator[_Round]:
    yield _Round("training", True, seeds)
    yield _Round("evaluation", False, seeds[:1])
    if len({module.training for module in capture.model.modules()}) > 1:
        yield _Round("the model's present modes", None, seeds[:1])
    leaves, _ = call_leaves(capture.model.forward, args, kwargs)
    given = next((leaf.shape[0] for known, leaf in zip(capture.inputs.leaves, leaves) if known.batched), None)
    if given is None or capture.inputs.rows is not None:
        return
    other = rows if rows is not None else _other(given)
    yield _Round(f"training with {other} rows", True, seeds[:1], other)
    yield _Round(f"evaluation with {other} rows", False, seeds[:1], other)


def _other(rows: int) -> int:
    fewer = max(2, rows // 2)
    return fewer if fewer < rows else rows + 3


def _compare(capture: Capture, item: _Round, args: Any, kwargs: Any) -> str | tuple[float, list[Difference]]:
    """Play one round on a copy of the model and on one of the graph; say why not, if one of them refuses."""
    try:
        wanted = _played(capture, item, args, kwargs, captured=False)
    except CaptureError:
        raise
    except Exception as error:
        return f"{item.name} (the model raises {_line(error)})"
    try:
        given = _played(capture, item, args, kwargs, captured=True)
    except ShapeError as refusal:
        return f"{item.name} (the graph refuses: {_line(refusal)})"
    except Exception as error:
        return float("inf"), [Difference(item.name, "", f"the graph raises {_line(error)}")]
    worst, differences = compare(item.name, wanted, given)
    if differences:
        again = _played(capture, item, args, kwargs, captured=False)
        if compare(item.name, wanted, again)[1]:
            return f"{item.name} (the model gives other results each time, from equal seeds too)"
    return worst, differences


def _played(capture: Capture, item: _Round, args: Any, kwargs: Any, *, captured: bool) -> list[Record]:
    """Play the calls of a round on a new copy of everything."""
    twin = copied(capture)
    model = twin.model
    if item.training is not None:
        model.train(item.training)
    objects = [leaf for leaf in call_leaves(model.forward, args, kwargs)[0] if not isinstance(leaf, torch.Tensor)]
    before = [entry for leaf in objects for entry in contents_of_object(leaf)]
    runs = twin.module if captured else model
    records = []
    with untouched(model):  # also what copies share with the original: globals, classes, closures of hooks
        for seed in item.seeds:
            try:
                records.append(play(runs, model, _arguments(twin, args, kwargs, item.rows), seed))
            finally:
                restore(before)
    return records


def copied(capture: Capture) -> Capture:
    """Copy a capture with its model and graphs, so that they refer to each other as those of the original do.

    Raises:
        CaptureError: something in the model cannot be copied.
    """
    # Records are shared, for constants in them are known by identity. Computed tensors, such as a weight under torch's
    # older weight norm, are computed again before they are used.
    memo: dict[int, Any] = {id(record): record for record in (capture.inputs, capture.trained, capture.evaluated)}
    held = [value for module in capture.model.modules() for value in vars(module).values()]
    memo |= {id(t): t.detach().clone() for t in held if isinstance(t, torch.Tensor) and not t.is_leaf}
    try:
        return copy.deepcopy(capture, memo)
    except Exception as error:
        raise CaptureError(
            f"{type(capture.model).__name__} cannot be copied, so it cannot be run beside itself ({_line(error)})",
            hint="copy.deepcopy(model) must work",
        ) from error


def _arguments(capture: Capture, args: Any, kwargs: Any, rows: int | None) -> tuple[Any, Any]:
    """Copy the tensors of a call, cut or repeated to ``rows``; one that is given twice stays one."""
    leaves, structure = call_leaves(capture.model.forward, args, kwargs)
    made: dict[int, Any] = {}
    for known, leaf in zip(capture.inputs.leaves, leaves):
        if isinstance(leaf, torch.Tensor) and id(leaf) not in made:
            made[id(leaf)] = _resized(leaf.detach(), rows if known.batched else None).requires_grad_(leaf.requires_grad)
    new_args, new_kwargs = unflatten(structure, [made.get(id(leaf), leaf) for leaf in leaves])
    return new_args, new_kwargs


def _resized(tensor: torch.Tensor, rows: int | None) -> torch.Tensor:
    if rows is None:
        return tensor.clone()
    return tensor.repeat(-(-rows // max(1, tensor.shape[0])), *[1] * (tensor.dim() - 1))[:rows].clone()


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _list(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else "nothing"
