"""Text encoders, trained to fill in masked tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from .hf_inputs import class_labels, ids_only, masked_labels, tokens
from .hf_spec import Spec


def masked(model_type: str, /, **sizes: Any) -> Spec:
    """Describe an encoder: the base model with a padded row, and the head that fills in tokens."""
    return Spec(model_type, ("AutoModel", tokens), ("AutoModelForMaskedLM", masked_labels), sizes)


def _masked_alone(config: Any, rows: int) -> dict[str, Any]:
    call = masked_labels(config, rows)
    return {"input_ids": call["input_ids"], "labels": call["labels"]}


def _characters(config: Any, rows: int) -> dict[str, Any]:
    """Make code points, enough of them for the stride that shortens them."""
    return {"input_ids": torch.randint(97, 123, (rows, 16)), "attention_mask": torch.ones(rows, 16, dtype=torch.long)}


def _characters_labels(config: Any, rows: int) -> dict[str, Any]:
    return {**_characters(config, rows), "labels": torch.randint(2, (rows,))}


_USUAL = (
    *("albert", "bert", "convbert", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "eurobert", "flaubert"),
    *("ibert", "layoutlm", "megatron-bert", "mobilebert", "modernbert", "mpnet", "nomic_bert", "gte"),
    *("rembert", "roberta", "roberta-prelayernorm", "roformer", "squeezebert", "xlm", "xlm-roberta", "xlm-roberta-xl"),
    *("yoso", "mra", "nystromformer", "camembert", "data2vec-text", "tapas"),
)

_CHUNKS = {
    "local_attn_chunk_length": 4,
    "lsh_attn_chunk_length": 4,
    "num_buckets": 4,
    "num_hashes": 1,
    "is_decoder": False,
}

SPECS = [
    *(masked(name) for name in _USUAL),
    Spec("fnet", ("AutoModel", ids_only), ("AutoModelForMaskedLM", _masked_alone)),
    masked("esm", vocab_size=100, mask_token_id=4, position_embedding_type="rotary"),
    masked("big_bird", attention_type="original_full"),
    masked("longformer", attention_window=[4] * 8),
    replace(
        masked("reformer", axial_pos_embds=False, attn_layers=["local", "lsh"] * 4, **_CHUNKS),
        unjudged="draws its seeds from the system (torch.seed), so that two eager runs differ",
    ),
    replace(
        masked("funnel", block_sizes=[3, 3, 2], num_decoder_layers=2, num_hidden_layers=..., layer_types=...),
        plain=("FunnelModel", tokens),
    ),
    Spec(
        "canine",
        ("AutoModel", _characters),
        ("CanineForSequenceClassification", _characters_labels),
        {"local_transformer_stride": 4},
    ),
    Spec(
        "xlnet",
        ("AutoModel", tokens),
        ("XLNetForSequenceClassification", class_labels),
        {"max_position_embeddings": ...},
    ),
]
