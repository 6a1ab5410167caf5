"""Vision models: pictures and short videos."""

from __future__ import annotations

from typing import Any

import torch

from .hf_inputs import clip, clip_labels, image, image_64, image_64_labels, image_labels, pixel_labels
from .hf_spec import Spec


def patched(model_type: str, /, **sizes: Any) -> Spec:
    """Describe a transformer over patches of pictures of the configuration's size."""
    # A type with several classes for a task has no automatic one.
    head = {"deit": "DeiTForImageClassification"}.get(model_type, "AutoModelForImageClassification")
    return Spec(model_type, ("AutoModel", image), (head, image_labels), {"patch_size": 8, **sizes})


def shrinking(model_type: str, /, **sizes: Any) -> Spec:
    """Describe a network whose feature maps shrink."""
    head = {"levit": "LevitForImageClassification"}.get(model_type, "AutoModelForImageClassification")
    return Spec(model_type, ("AutoModel", image_64), (head, image_64_labels), sizes)


def filmed(model_type: str, /, **sizes: Any) -> Spec:
    """Describe a transformer over short videos."""
    head = ("AutoModelForVideoClassification", clip_labels)
    return Spec(model_type, ("AutoModel", clip), head, {"num_frames": 4, "patch_size": 8, **sizes})


def _boxes(config: Any, rows: int) -> dict[str, Any]:
    labels = [{"class_labels": torch.tensor([1, 2]), "boxes": 0.2 + 0.3 * torch.rand(2, 4)} for _ in range(rows)]
    return {**image_64(config, rows), "labels": labels}


def _depths(config: Any, rows: int) -> dict[str, Any]:
    return {**image_64(config, rows), "labels": torch.rand(rows, 64, 64) + 1}


def _masked_patches(config: Any, rows: int) -> dict[str, Any]:
    return {**image(config, rows), "bool_masked_pos": torch.rand(rows, 16) < 0.5}


def _half_image(config: Any, rows: int) -> dict[str, Any]:
    return image(config.vision_config, rows)


def _half_labels(config: Any, rows: int) -> dict[str, Any]:
    return {**_half_image(config, rows), "labels": torch.randint(config.num_labels, (rows,))}


def _half(model_type: str) -> Spec:
    """Describe the picture's half of a pair of encoders, as a classifier."""
    head = ("AutoModelForImageClassification", _half_labels)
    sizes = {"vision_config": {"patch_size": 8}}
    return Spec(model_type, None, head, sizes, name=f"{model_type}-image")


_CONVNEXT = {"hidden_sizes": [16, 16, 32, 32], "depths": [2, 2, 2, 2]}
_SWIN = {"depths": [2, 2, 4], "num_heads": [2, 2, 4], "window_size": 4, "patch_size": 2, "embed_dim": 16}
_RESNET = {"embedding_size": 16, "hidden_sizes": [16, 16, 32, 32], "depths": [3, 4, 6, 3], "layer_type": "basic"}
_PYRAMID = {"hidden_sizes": [16, 16, 32, 32], "depths": [2, 2, 2, 2], "num_attention_heads": [1, 1, 2, 2]}
_BACKBONE = {"model_type": "resnet", **_RESNET, "out_features": ["stage2", "stage3", "stage4"]}

SPECS = [
    *(patched(name) for name in ("vit", "deit", "beit", "data2vec-vision", "dinov2", "dinov2_with_registers")),
    *(patched(name) for name in ("ijepa", "vit_msn")),
    *(_half(name) for name in ("siglip", "clip")),
    Spec("vit_mae", None, ("ViTMAEForPreTraining", image), {"patch_size": 8}, "draws the masked patches itself"),
    shrinking("convnext", **_CONVNEXT),
    shrinking("convnextv2", **_CONVNEXT),
    shrinking("swin", **_SWIN),
    shrinking("swinv2", **_SWIN),
    shrinking("focalnet", embed_dim=16, depths=[2, 2, 4, 2], hidden_sizes=[16, 32, 64, 128]),
    shrinking("resnet", **_RESNET),
    shrinking("regnet", embedding_size=16, hidden_sizes=[16, 16, 32, 32], depths=[2, 2, 2, 2], groups_width=8),
    shrinking("bit", embedding_size=16, hidden_sizes=[64, 128, 256, 512], depths=[3, 4, 6, 3], num_groups=8),
    shrinking("efficientnet", width_coefficient=0.25, depth_coefficient=0.5, hidden_dim=320, image_size=64),
    shrinking("mobilenet_v1", depth_multiplier=0.25),
    shrinking("mobilenet_v2", depth_multiplier=0.35),
    shrinking("mobilevit", hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 64], image_size=64),
    shrinking("mobilevitv2", width_multiplier=0.25, image_size=64),
    shrinking("poolformer", hidden_sizes=[16, 16, 32, 32], depths=[2, 2, 2, 2]),
    shrinking("pvt", **_PYRAMID, image_size=64),
    shrinking(
        "pvt_v2", hidden_sizes=[16, 16, 32, 32], depths=[2, 2, 2, 2], num_attention_heads=[1, 1, 2, 2], image_size=64
    ),
    shrinking("segformer", hidden_sizes=[16, 16, 32, 32], depths=[2, 2, 2, 2], num_attention_heads=[1, 1, 2, 2]),
    shrinking(
        "levit",
        hidden_sizes=[16, 32, 48],
        num_attention_heads=[1, 2, 3],
        key_dim=[8, 8, 8],
        depths=[2, 3, 3],
        image_size=64,
    ),
    shrinking("cvt", embed_dim=[16, 32, 48], num_heads=[1, 2, 3], depth=[2, 2, 4]),
    shrinking("swiftformer"),
    shrinking("textnet"),
    shrinking("hiera", image_size=[64, 64], embed_dim=16, num_heads=[1, 2, 4, 8], depths=[2, 2, 2, 2]),
    Spec("donut-swin", ("AutoModel", image), None, {**_SWIN, "image_size": 64}),
    Spec("dinov3_vit", ("AutoModel", image), None, {"patch_size": 8}),
    Spec("vitdet", ("AutoModel", image), None, {"patch_size": 8}),
    Spec(
        "sam_vision_model",
        ("AutoModel", image),
        None,
        {"patch_size": 8, "output_channels": 16, "image_size": 32, "window_size": 2},
    ),
    Spec(
        "upernet",
        None,
        ("UperNetForSemanticSegmentation", pixel_labels),
        {
            "backbone_config": {**_BACKBONE, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
            "hidden_size": 16,
            "pool_scales": [1, 2],
            "auxiliary_in_channels": 32,
            "auxiliary_channels": 16,
        },
    ),
    Spec(
        "dpt",
        ("DPTModel", image),
        ("DPTForSemanticSegmentation", pixel_labels),
        {
            "patch_size": 8,
            "image_size": 64,
            "backbone_out_indices": [1, 3, 5, 7],
            "neck_hidden_sizes": [8, 8, 16, 16],
            "fusion_hidden_size": 16,
            "is_hybrid": False,
        },
    ),
    Spec("glpn", ("AutoModel", image_64), ("GLPNForDepthEstimation", _depths), {**_PYRAMID, "decoder_hidden_size": 16}),
    Spec(
        "yolos",
        ("AutoModel", image_64),
        ("YolosForObjectDetection", _boxes),
        {"image_size": [64, 64], "patch_size": 8, "num_detection_tokens": 10, "num_labels": 3},
    ),
    Spec(
        "detr",
        ("AutoModel", image_64),
        ("DetrForObjectDetection", _boxes),
        {"backbone_config": _BACKBONE, "num_queries": 10, "num_labels": 3},
    ),
    Spec(
        "conditional_detr",
        ("AutoModel", image_64),
        ("ConditionalDetrForObjectDetection", _boxes),
        {"backbone_config": _BACKBONE, "num_queries": 10, "num_labels": 3},
    ),
    Spec(
        "deformable_detr",
        ("AutoModel", image_64),
        ("DeformableDetrForObjectDetection", _boxes),
        {"backbone_config": _BACKBONE, "num_queries": 10, "num_labels": 3},
    ),
    filmed("timesformer"),
    filmed("vivit", tubelet_size=[2, 8, 8], patch_size=...),
    Spec("videomae", None, ("VideoMAEForVideoClassification", clip_labels), {"num_frames": 4, "patch_size": 8}),
]
