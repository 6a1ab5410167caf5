"""All classification, segmentation, video, detection and optical flow models of torchvision, with small inputs."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from stagecut.vision_compat import import_torchvision

from .detection import detection_entries
from .entry import Call, Entry, Table, table_of

_SIDE = 64
# The auxiliary classifier of Inception and the attention windows of MaxViT fix their sizes; ViT takes an image size.
_FIXED_SIDES = {"inception_v3": 299, "maxvit_t": 224}
_OPTIONS: dict[str, dict[str, Any]] = {name: {"init_weights": False} for name in ("googlenet", "inception_v3")}
_CLIP = (3, 8, 64, 64)
# The last pooling of S3D covers 2 x 7 x 7 positions, which 16 frames of 224 pixels have.
_CLIPS = {"s3d": (3, 16, 224, 224)}
_LARGE = {
    "regnet_y_128gf": 645,
    "vit_h_14": 632,
    "vit_l_16": 304,
    "vit_l_32": 304,
    "convnext_large": 198,
    "regnet_y_32gf": 145,
    **dict.fromkeys(("vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn"), 140),
    **dict.fromkeys(("wide_resnet101_2", "efficientnet_v2_l", "regnet_x_32gf"), 120),
}


def load() -> Table:
    """List every model that the installed torchvision has."""
    if importlib.util.find_spec("torchvision") is None:
        return table_of([], {"torchvision": "torchvision is not installed"})
    import_torchvision()
    models: Any = importlib.import_module("torchvision.models")
    entries = [image_entry(name) for name in models.list_models(module=models)]
    entries += [_segmentation_entry(name) for name in models.list_models(module=models.segmentation)]
    entries += [_video_entry(name) for name in models.list_models(module=models.video)]
    entries += [_flow_entry(name) for name in models.list_models(module=models.optical_flow)]
    return table_of([*entries, *detection_entries(models.list_models(module=models.detection))])


def build(name: str, **options: Any) -> nn.Module:
    """Build a torchvision model with random weights."""
    models: Any = importlib.import_module("torchvision.models")
    model: nn.Module = models.get_model(name, weights=None, **options)
    return model


def image_entry(name: str, side: int = _SIDE) -> Entry:
    """Return a classification model, called with images of ``side`` pixels where it is free in that."""
    side = _FIXED_SIDES.get(name, side)
    options = _OPTIONS.get(name, {})
    if name.startswith("vit_"):
        patch = int(name.rsplit("_", 1)[1])
        side = max(patch, side // patch * patch)
        options = {"image_size": side}
    return _entry(name, partial(build, name, **options), (3, side, side))


def _segmentation_entry(name: str) -> Entry:
    return _entry(name, partial(build, name, weights_backbone=None, aux_loss=_aux(name)), (3, _SIDE, _SIDE))


def _aux(name: str) -> bool | None:
    return None if name.startswith("lraspp") else True


def _video_entry(name: str) -> Entry:
    making: Callable[[], nn.Module] = partial(_small_mvit, name) if name.startswith("mvit") else partial(build, name)
    return _entry(name, making, _CLIPS.get(name, _CLIP))


def _small_mvit(name: str) -> nn.Module:
    """Build an MViT for short, small clips: its constructor takes the sizes, the named functions fix them."""
    module: Any = importlib.import_module("torchvision.models.video.mvit")
    original = module._mvit

    def smaller(**options: Any) -> nn.Module:
        options.update(spatial_size=_CLIP[2:], temporal_size=_CLIP[1])
        made: nn.Module = original(**options)
        return made

    with mock.patch.object(module, "_mvit", smaller):
        return build(name)


def _flow_entry(name: str) -> Entry:
    def call(rows: int) -> Call:
        return (_images(rows, (3, 128, 128)), _images(rows, (3, 128, 128))), {"num_flow_updates": 3}

    return Entry("torchvision", name, partial(build, name), call)


def _entry(name: str, making: Callable[[], nn.Module], shape: tuple[int, ...]) -> Entry:
    n_parameters = _LARGE.get(name, 0) * 1_000_000
    return Entry(
        "torchvision", name, making, lambda rows: ((_images(rows, shape),), {}), 2, 3, n_parameters=n_parameters
    )


def _images(rows: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(rows, *shape)  # (B, *shape)
