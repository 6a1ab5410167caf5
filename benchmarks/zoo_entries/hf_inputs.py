"""Calls of Hugging Face models: token ids with a padded row, images, sounds, series, and their labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LENGTH = 12
_FIRST_WORD = 3  # 0, 1 and 2 are padding, beginning and end


def vocabulary(config: Any) -> int:
    """Return the number of tokens of a configuration or of the text part in it."""
    size = getattr(config, "vocab_size", None)
    return int(size if size is not None else config.get_text_config().vocab_size)


def words(config: Any, rows: int, length: int = LENGTH) -> Tensor:
    """Draw token ids without special ones, ``(B, T)``."""
    return torch.randint(_FIRST_WORD, vocabulary(config), (rows, length))


def tokens(config: Any, rows: int) -> dict[str, Any]:
    """Make ids with a mask that pads the last row."""
    ids = words(config, rows)
    mask = torch.ones_like(ids)
    mask[-1, -3:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def causal_labels(config: Any, rows: int) -> dict[str, Any]:
    """Make ids with themselves as labels, padding left out."""
    call = tokens(config, rows)
    return {**call, "labels": call["input_ids"].masked_fill(call["attention_mask"] == 0, -100)}


def masked_labels(config: Any, rows: int) -> dict[str, Any]:
    """Make ids with labels at some positions."""
    call = tokens(config, rows)
    hidden = torch.rand(call["input_ids"].shape) < 0.3
    hidden[:, 0] = True
    return {**call, "labels": torch.where(hidden, words(config, rows), -100)}


def class_labels(config: Any, rows: int) -> dict[str, Any]:
    """Make ids with a class per row."""
    return {**tokens(config, rows), "labels": torch.randint(2, (rows,))}


def ids_only(config: Any, rows: int) -> dict[str, Any]:
    """Make ids without a mask."""
    return {"input_ids": words(config, rows)}


def ids_labels(config: Any, rows: int) -> dict[str, Any]:
    """Make ids without a mask, with themselves as labels."""
    ids = words(config, rows)
    return {"input_ids": ids, "labels": ids.clone()}


def two_sequences(config: Any, rows: int) -> dict[str, Any]:
    """Make the inputs of an encoder and a decoder."""
    return {**tokens(config, rows), "decoder_input_ids": words(config, rows, 8)}


def two_sequences_labels(config: Any, rows: int) -> dict[str, Any]:
    """Make the input of an encoder, and labels, which the decoder is fed shifted."""
    return {**tokens(config, rows), "labels": words(config, rows, 8)}


def image(config: Any, rows: int) -> dict[str, Any]:
    """Make images of the configuration's size."""
    side = getattr(config, "image_size", None) or 32
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    return {"pixel_values": torch.randn(rows, getattr(config, "num_channels", 3), height, width)}


def image_labels(config: Any, rows: int) -> dict[str, Any]:
    """Make images with a class per row."""
    return {**image(config, rows), "labels": torch.randint(config.num_labels, (rows,))}


def image_64(config: Any, rows: int) -> dict[str, Any]:
    """Make images of 64 pixels, for networks that shrink them five times."""
    return {"pixel_values": torch.randn(rows, 3, 64, 64)}


def image_64_labels(config: Any, rows: int) -> dict[str, Any]:
    """Make images of 64 pixels with a class per row."""
    return {**image_64(config, rows), "labels": torch.randint(config.num_labels, (rows,))}


def pixel_labels(config: Any, rows: int) -> dict[str, Any]:
    """Make images with a class per pixel."""
    return {**image_64(config, rows), "labels": torch.randint(config.num_labels, (rows, 64, 64))}


def clip(config: Any, rows: int) -> dict[str, Any]:
    """Make short videos of the configuration's size, ``(B, T, C, H, W)``."""
    frames = getattr(config, "num_frames", 2)
    return {"pixel_values": torch.randn(rows, frames, 3, config.image_size, config.image_size)}


def clip_labels(config: Any, rows: int) -> dict[str, Any]:
    """Make short videos with a class per row."""
    return {**clip(config, rows), "labels": torch.randint(config.num_labels, (rows,))}


def wave(config: Any, rows: int) -> dict[str, Any]:
    """Make sounds as samples."""
    return {"input_values": torch.randn(rows, 4000)}


def wave_words(config: Any, rows: int) -> dict[str, Any]:
    """Make sounds with a short text per row."""
    return {**wave(config, rows), "labels": torch.randint(_FIRST_WORD, vocabulary(config), (rows, 3))}


def image_and_text(config: Any, rows: int) -> dict[str, Any]:
    """Make pairs of a picture and a text, as contrastive models take them."""
    vision = getattr(config, "vision_config", config)
    text = getattr(config, "text_config", config)
    return {**tokens(text, rows), **image(vision, rows)}


def contrastive(config: Any, rows: int) -> dict[str, Any]:
    """Make pairs with the request for their contrastive loss."""
    return {**image_and_text(config, rows), "return_loss": True}
