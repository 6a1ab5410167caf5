"""Models of text with pictures or sounds."""

from __future__ import annotations

from typing import Any

import torch

from .hf_inputs import LENGTH, contrastive, image, image_and_text, tokens, words
from .hf_spec import Spec

_VISION = {"patch_size": 8, "image_size": 32}
_IMAGE_TOKEN = 99


def contrasted(model_type: str, /, **sizes: Any) -> Spec:
    """Describe a model that tells which text belongs to which picture."""
    plain = ("AutoModel", image_and_text)
    return Spec(model_type, plain, ("AutoModel", contrastive), {"vision_config": _VISION, **sizes})


def shown(model_type: str, head: str, /, *, n_images: int = 16, **sizes: Any) -> Spec:
    """Describe a language model that reads pictures at the places of ``n_images`` tokens."""

    def plain(config: Any, rows: int) -> dict[str, Any]:
        ids = torch.randint(3, 90, (rows, n_images + 6))
        ids[:, 2 : 2 + n_images] = _IMAGE_TOKEN
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image(config.vision_config, rows)}

    def trained(config: Any, rows: int) -> dict[str, Any]:
        call = plain(config, rows)
        return {**call, "labels": call["input_ids"].masked_fill(call["input_ids"] == _IMAGE_TOKEN, -100)}

    return Spec(model_type, ("AutoModel", plain), (head, trained), {"vision_config": _VISION, **sizes})


def _pictures_of_text(config: Any, rows: int) -> dict[str, Any]:
    boxes = torch.randint(0, 20, (rows, LENGTH, 2))
    return {**tokens(config, rows), "bbox": torch.cat([boxes, boxes + 10], 2), **image(config, rows)}


def _pictures_of_text_class(config: Any, rows: int) -> dict[str, Any]:
    return {**_pictures_of_text(config, rows), "labels": torch.randint(2, (rows,))}


def _regions(config: Any, rows: int) -> dict[str, Any]:
    regions = {"visual_feats": torch.randn(rows, 5, config.visual_feat_dim), "visual_pos": torch.rand(rows, 5, 4)}
    return {**tokens(config, rows), **regions}


def _regions_labels(config: Any, rows: int) -> dict[str, Any]:
    call = _regions(config, rows)
    return {**call, "labels": torch.randint(config.num_qa_labels, (rows,))}


def _embedded(config: Any, rows: int) -> dict[str, Any]:
    return {**tokens(config, rows), "visual_embeds": torch.randn(rows, 5, config.visual_embedding_dim)}


def _embedded_class(config: Any, rows: int) -> dict[str, Any]:
    return {**_embedded(config, rows), "labels": torch.rand(rows, config.num_labels).softmax(1)}


def _questions(config: Any, rows: int) -> dict[str, Any]:
    return {**tokens(config, rows), **image(config, rows)}


def _answers(config: Any, rows: int) -> dict[str, Any]:
    return {**_questions(config, rows), "labels": torch.rand(rows, config.num_labels)}


def _captions(config: Any, rows: int) -> dict[str, Any]:
    call = {**tokens(config, rows), **image(config.vision_config, rows)}
    return {**call, "labels": call["input_ids"].clone()}


def _captions_plain(config: Any, rows: int) -> dict[str, Any]:
    return {**tokens(config, rows), **image(config.vision_config, rows)}


def _written(config: Any, rows: int) -> dict[str, Any]:
    return {**image(config.encoder, rows), "labels": words(config.decoder, rows, 8)}


_WRITER = {
    "encoder": {"model_type": "vit", **_VISION},
    "decoder": {"model_type": "gpt2", "add_cross_attention": True, "is_decoder": True},
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}

SPECS = [
    *(
        contrasted(name)
        for name in ("altclip", "chinese_clip", "clipseg", "blip", "clip", "siglip", "metaclip_2", "aimv2")
    ),
    contrasted(
        "groupvit",
        vision_config={**_VISION, "depths": [2, 4, 2], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 4]},
    ),
    contrasted("owlvit"),
    Spec("flava", ("AutoModel", image_and_text), None, {"image_config": _VISION}),
    Spec("vilt", ("AutoModel", _questions), ("ViltForQuestionAnswering", _answers), {"patch_size": 8}),
    Spec("git", ("AutoModel", _captions_plain), ("GitForCausalLM", _captions), {"vision_config": _VISION}),
    Spec(
        "visual_bert",
        ("AutoModel", _embedded),
        ("VisualBertForQuestionAnswering", _embedded_class),
        {"visual_embedding_dim": 16},
    ),
    Spec(
        "lxmert",
        ("AutoModel", _regions),
        ("LxmertForQuestionAnswering", _regions_labels),
        {"visual_feat_dim": 16, "l_layers": 4, "x_layers": 2, "r_layers": 2, "num_qa_labels": 5},
    ),
    Spec(
        "layoutlmv3",
        ("AutoModel", _pictures_of_text),
        ("LayoutLMv3ForSequenceClassification", _pictures_of_text_class),
        {"coordinate_size": 6, "shape_size": 4, "patch_size": 8, "input_size": 32, "max_2d_position_embeddings": 64},
    ),
    shown(
        "llava",
        "LlavaForConditionalGeneration",
        image_token_index=_IMAGE_TOKEN,
        vision_feature_select_strategy="default",
    ),
    shown(
        "vipllava", "VipLlavaForConditionalGeneration", image_token_index=_IMAGE_TOKEN, vision_feature_layers=[-2, -3]
    ),
    shown("paligemma", "PaliGemmaForConditionalGeneration", image_token_index=_IMAGE_TOKEN),
    shown("aya_vision", "AyaVisionForConditionalGeneration", n_images=4, image_token_index=_IMAGE_TOKEN),
    shown("internvl", "InternVLForConditionalGeneration", n_images=4, image_token_id=_IMAGE_TOKEN),
    shown("gemma3", "Gemma3ForConditionalGeneration", image_token_index=_IMAGE_TOKEN, mm_tokens_per_image=16),
    Spec("vision-encoder-decoder", None, ("VisionEncoderDecoderModel", _written), _WRITER),
]
