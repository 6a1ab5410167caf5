"""torchvision's detection models, called as in training: images and a list of targets; the result is their losses."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .entry import Call, Entry

_SIDE = 128
_BOXES = 3
_CLASSES = 5
_kernels: list[Any] = []


def detection_entries(names: list[str]) -> list[Entry]:
    """Make an entry per model.

    The number of targets is the number of images, and a list's length is part of a call's structure, so there is no
    other batch size.
    """
    note = "targets are a list of dictionaries; its length is part of the call"
    return [
        Entry("torchvision", name, partial(_build, name), partial(_call, name), 2, None, note=note) for name in names
    ]


def _build(name: str) -> nn.Module:
    _provide_nms()
    models: Any = importlib.import_module("torchvision.models")
    # The SSD models have an image size of their own.
    sizes = {} if name.startswith("ssd") else {"min_size": _SIDE, "max_size": _SIDE}
    options: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": _CLASSES, **sizes}
    model: nn.Module = models.get_model(name, **options)
    return model


def _call(name: str, rows: int) -> Call:
    images = torch.rand(rows, 3, _SIDE, _SIDE)  # (B, 3, H, W)
    return (images, [_target(name) for _ in range(rows)]), {}


def _target(name: str) -> dict[str, Tensor]:
    corner = torch.rand(_BOXES, 2) * _SIDE / 2
    extent = (0.1 + 0.3 * torch.rand(_BOXES, 2)) * _SIDE
    target = {"boxes": torch.cat([corner, corner + extent], 1), "labels": torch.randint(1, _CLASSES, (_BOXES,))}
    if name.startswith("maskrcnn"):
        target["masks"] = torch.randint(2, (_BOXES, _SIDE, _SIDE), dtype=torch.uint8)
    if name.startswith("keypointrcnn"):
        # Inside the box and visible.
        inside = corner[:, None] + torch.rand(_BOXES, 17, 2) * extent[:, None]
        target["keypoints"] = torch.cat([inside, torch.ones(_BOXES, 17, 1)], 2)
    return target


def _provide_nms() -> None:
    """Give non-maximum suppression a kernel where torchvision's compiled library could not be loaded."""
    boxes: Any = importlib.import_module("torchvision.ops.boxes")
    extension: Any = importlib.import_module("torchvision.extension")
    if extension._has_ops() or _kernels:
        return
    make_library: Any = torch.library.Library
    library = make_library("torchvision", "IMPL")
    library.impl("nms", _nms, "CPU")
    _kernels.append(library)
    boxes.nms = _call_nms


def _call_nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    kept: Tensor = torch.ops.torchvision.nms(boxes, scores, iou_threshold)
    return kept


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    order = scores.argsort(descending=True, stable=True)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    corners = torch.maximum(boxes[:, None, :2], boxes[:, :2]), torch.minimum(boxes[:, None, 2:], boxes[:, 2:])
    overlap = (corners[1] - corners[0]).clamp(min=0).prod(2)
    close = overlap / (areas[:, None] + areas - overlap) > iou_threshold  # (N, N)
    gone = torch.zeros(len(boxes), dtype=torch.bool)
    kept = []
    for index in order.tolist():
        if not gone[index]:
            kept.append(index)
            gone |= close[index]
    return torch.tensor(kept, dtype=torch.long)
