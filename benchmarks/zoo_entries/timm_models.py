"""One small model per family (model file) of timm, and a few larger ones, with small inputs and random weights."""

from __future__ import annotations

import importlib
import importlib.util
from functools import partial
from typing import Any

import torch
from torch import nn

from stagecut.vision_compat import import_torchvision

from .entry import Entry, Table, table_of

_SIDE = 64
_FAMILIES = (
    *("adv_inception_v3", "beit_base_patch16_224", "cait_xxs24_224", "coat_tiny", "convit_tiny"),
    *("convmixer_768_32", "cpubone_nano", "crossvit_tiny_240", "cs3darknet_focus_s", "csatv2", "cspnext_tiny"),
    *("davit_tiny", "deepseek_vit_412m", "deit_tiny_patch16_224", "densenet121", "dla46x_c", "dpn48b"),
    *("edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0", "efficientvim_m1", "efficientvit_b0"),
    *("efficientvit_m0", "ens_adv_inception_resnet_v2", "ese_vovnet19b_slim_dw", "fasternet_t0", "fastvit_t8"),
    *("focalnet_tiny_srf", "gcvit_xxtiny", "gemma4_vit_167m", "ghostnet_050", "gmlp_ti16_224", "halonet_h1"),
    *("hardcorenas_b", "hgnetv2_b0", "hiera_tiny_224", "hrnet_w18_small", "iformer_t", "inception_next_atto"),
    *("inception_v4", "jx_nest_tiny", "lcnetv2_small", "legacy_seresnet18", "legacy_xception", "levit_128s"),
    *("lowformer_b0", "mobilenetv3_small_050", "mobilenetv5_base", "mobilevit_xxs", "mvitv2_tiny"),
    *("naflexvit_base_patch16_parfac_gap", "nasnetalarge", "nextvit_small", "pit_ti_224", "pnasnet5large"),
    *("poolformerv2_s12", "pvt_v2_b0", "qwen3_vit_88m", "rdnet_tiny", "regnetx_002", "repghostnet_050"),
    *("repvit_m1", "res2next50", "resnest14d", "resnetv2_18", "rexnet_100", "sam2_hiera_tiny"),
    *("samvit_base_patch16_224", "selecsls42", "sequencer2d_s", "shvit_s1", "skresnet18", "starnet_s050"),
    *("swiftformer_xs", "swin_tiny_patch4_window7_224", "swinv2_cr_tiny_224", "swinv2_tiny_window16_256"),
    *("test_byobnet", "test_coatnet", "test_convnext", "test_efficientnet", "test_mambaout", "test_nfnet"),
    *("test_resnet", "test_vit", "test_vit_relpos", "tiny_vit_5m_224", "tnt_s_legacy_patch16_224", "tresnet_m"),
    *("twins_svt_small", "vgg11", "visformer_tiny", "vit_tiny_patch16_dinov3_qkvb", "vit_tiny_r_s16_p8_224"),
    *("vitamin_small_224", "volo_d1_224", "xception41p", "xcit_nano_12_p8_224"),
)
# Beside the smallest of their families, which are stubs for timm's own tests.
_LARGER = (
    *("vit_tiny_patch16_224", "vit_relpos_small_patch16_224", "resnet18", "resnet26t", "convnext_atto", "gernet_s"),
    *("tf_efficientnet_b0", "mnasnet_small", "mambaout_femto", "coatnet_pico_rw_224", "maxvit_pico_rw_256"),
    *("eca_nfnet_l0", "mixer_s32_224", "resmlp_12_224", "caformer_s18", "eva02_tiny_patch14_224", "lambda_resnet26t"),
)
_SIDES = {
    **dict.fromkeys(("halonet_h1", "lambda_resnet26t", "maxvit_pico_rw_256"), 256),
    "efficientformer_l1": 224,
    "deepseek_vit_412m": 112,
    **dict.fromkeys(("ens_adv_inception_resnet_v2", "inception_v4", "adv_inception_v3"), 96),
    "eva02_tiny_patch14_224": 56,
}
# Takes an image size, and resizes the images that are of another.
_ANY_SIDE = {"crossvit_tiny_240"}
# Its family has no smaller one.
_SMALLER = {"deepseek_vit_412m": {"depth": 8}}
_PARAMETERS = {"deepseek_vit_412m": 103, "gemma4_vit_167m": 167, "vgg11": 133}


def load() -> Table:
    """List the models, but for those that the installed timm does not have."""
    if importlib.util.find_spec("timm") is None:
        return table_of([], {"timm": "timm is not installed"})
    import_torchvision()
    timm: Any = importlib.import_module("timm")
    names = [*_FAMILIES, *_LARGER]
    missing = {name: "not in the installed timm" for name in names if not timm.is_model(name)}
    return table_of([_entry(name) for name in names if name not in missing], missing)


def _entry(name: str) -> Entry:
    side = _SIDES.get(name, _SIDE)
    n_parameters = _PARAMETERS.get(name, 0) * 1_000_000
    build = partial(_build, name, side)
    return Entry("timm", name, build, lambda rows: ((torch.randn(rows, 3, side, side),), {}), n_parameters=n_parameters)


def _build(name: str, side: int) -> nn.Module:
    timm: Any = importlib.import_module("timm")
    if name in _ANY_SIDE:
        made: nn.Module = timm.create_model(name, pretrained=False)
        return made
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, img_size=side, **_SMALLER.get(name, {}))
    except TypeError as error:  # convolutional networks take pictures of any size, and no size
        if "img_size" not in str(error):
            raise
        model = timm.create_model(name, pretrained=False)
    return model
