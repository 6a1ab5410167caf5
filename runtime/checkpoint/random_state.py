"""The generators of random numbers of a process, as tensors and plain values."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

from ...errors import CheckpointError
from .values import decoded, encoded


def random_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the states of torch's, Python's and, where it is in use, NumPy's generators."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        tensors |= {f"cuda/{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    values: dict[str, Any] = {"python": encoded(random.getstate(), "random")}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, position, has_gauss, cached = numpy.random.get_state()
        tensors["numpy"] = torch.from_numpy(keys.astype("int64"))
        values["numpy"] = encoded([kind, int(position), int(has_gauss), float(cached)], "numpy.random")
    return tensors, values


def restore_random_state(tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
    """Set the generators to states that :func:`random_state` returned.

    Raises:
        CheckpointError: they are no states; then no generator was changed.
    """
    try:
        _try_out(tensors, values)
    except (LookupError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"a checkpoint's state of random generators is none: {error!r}") from error
    torch.set_rng_state(tensors["torch"])
    devices = sorted(int(key.removeprefix("cuda/")) for key in tensors if key.startswith("cuda/"))
    if devices and torch.cuda.is_available() and torch.cuda.device_count() == len(devices):
        torch.cuda.set_rng_state_all([tensors[f"cuda/{i}"] for i in devices])
    random.setstate(decoded(values["python"]))
    if "numpy" in tensors:
        import numpy

        numpy.random.set_state(_numpy_state(tensors, values))


def _try_out(tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
    """Set generators that nobody uses."""
    torch.Generator().set_state(tensors["torch"])
    random.Random().setstate(decoded(values["python"]))
    if "numpy" in tensors:
        import numpy

        numpy.random.RandomState().set_state(_numpy_state(tensors, values))


def _numpy_state(tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> tuple[Any, ...]:
    kind, position, has_gauss, cached = decoded(values["numpy"])
    return kind, tensors["numpy"].numpy().astype("uint32"), position, has_gauss, cached
