"""Import torchvision also where its compiled operators cannot be loaded."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import torch

from .errors import StagecutError

# torchvision registers shape functions for these two while it is imported, whether or not its compiled library, which
# declares them, could be loaded. The library is built for one build of torch: the wheel that pip takes by default wants
# CUDA's runtime, so beside a CPU build of torch it does not load and the import ends with "operator torchvision::nms
# does not exist". A declaration is all that the import needs. The operators stay without a kernel: the models work,
# and `torchvision.ops.nms` says itself that it has no compiled operators.
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

# A declaration lives as long as the library object that made it.
_declared: list[Any] = []


def import_torchvision() -> ModuleType:
    """Return the module ``torchvision``, with the operators it fails without declared if they are missing.

    A torchvision that imports by itself is left alone: declaring first would clash with its compiled library.

    Raises:
        StagecutError: torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise StagecutError("torchvision is not installed", hint="pip install torchvision") from error
    except RuntimeError as error:
        if not any(f"operator torchvision::{name} does not exist" in str(error) for name in _SCHEMAS):
            raise
    _forget_half_imported()
    _declare_missing()
    return importlib.import_module("torchvision")


def _forget_half_imported() -> None:
    for name in [name for name in sys.modules if name.startswith("torchvision.")]:
        del sys.modules[name]


def _declare_missing() -> None:
    make_library: Any = torch.library.Library  # which has no annotations
    library = make_library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    _declared.append(library)
