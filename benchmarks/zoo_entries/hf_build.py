"""Small models of the transformers library from configurations alone: no weights, no network."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

HIDDEN, HEADS, LAYERS, VOCAB, POSITIONS = 32, 4, 8, 100, 64

# Each configuration takes the names that it knows and has a whole number under. A configuration that stores a size
# under its own name (GPT-2's n_embd) maps the common name to it.
SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "projection_dim", "hidden_dim"), HIDDEN),
    **dict.fromkeys(("decoder_hidden_size", "encoder_hidden_size", "embedding_size", "width"), HIDDEN),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size"), HIDDEN),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers", "num_encoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_encoder_attention_heads",), HEADS),
    "num_key_value_heads": 2,
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner"), 64),
    **dict.fromkeys(("feed_forward_hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("head_dim", "d_kv", "rotary_dim", "kv_channels", "attention_head_size"), HIDDEN // HEADS),
    "vocab_size": VOCAB,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_source_positions"), POSITIONS),
    "max_target_positions": POSITIONS,
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk"), 2),
    "image_size": 32,
}
# The number of layers under these names is that of lists, which describe a stage each.
_COUNTED = ("num_stages", "num_encoder_blocks")
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def tiny_config(model_type: str, /, **wanted: Any) -> Any:
    """Build a small configuration of that type; ``wanted`` overrides sizes, by nested dictionaries where it nests.

    A nested dictionary may name another ``model_type``. ``...`` as a value keeps the configuration's own default.
    """
    return _shrink(_types()[model_type], wanted)


def _types() -> Any:
    transformers: Any = importlib.import_module("transformers")
    return transformers.CONFIG_MAPPING


def _shrink(config_class: Any, wanted: dict[str, Any]) -> Any:
    defaults = config_class()
    below = {}
    for name in getattr(config_class, "sub_configs", {}):
        default, given = getattr(defaults, name, None), wanted.get(name)
        if given is ... or (default is None and not isinstance(given, dict)):
            continue
        inner = dict(given or {})
        kind = inner.pop("model_type", None) or (default.model_type if default is not None else None)
        below[name] = _shrink(_types()[kind] if kind in _types() else type(default), inner)
    sizes = {name: size for name, size in SIZES.items() if _takes(config_class, defaults, name, int)}
    tokens = {name: token for name, token in _TOKENS.items() if _takes(config_class, defaults, name, (int, type(None)))}
    options: dict[str, Any] = {"use_cache": False} if hasattr(defaults, "use_cache") else {}
    if _takes(config_class, defaults, "layer_types", list) and len(defaults.layer_types) == _n_layers(defaults):
        options["layer_types"] = None  # made anew for another number of layers
    merged = {**sizes, **tokens, **options, **wanted, **below}
    return config_class(**{name: value for name, value in merged.items() if value is not ...})


def _n_layers(defaults: Any) -> Any:
    return getattr(defaults, "num_hidden_layers", None)


def _takes(config_class: Any, defaults: Any, name: str, kind: Any) -> bool:
    stored = config_class.attribute_map.get(name, name)
    own = getattr(config_class, stored, None)
    if stored in _COUNTED or (isinstance(own, property) and own.fset is None):
        return False
    try:
        value = getattr(defaults, name)
    except Exception:  # not there, or a size that differs by layer and says so by an error of its own
        return False
    return isinstance(value, kind) and not isinstance(value, bool)


def build_model(class_name: str, config: Any) -> nn.Module:
    """Make a model of random weights; ``class_name`` is a model class or an ``AutoModel...``."""
    transformers: Any = importlib.import_module("transformers")
    model_class = getattr(transformers, class_name)
    module: nn.Module = model_class.from_config(config) if class_name.startswith("AutoModel") else model_class(config)
    return module
