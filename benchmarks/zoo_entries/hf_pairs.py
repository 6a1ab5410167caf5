"""Encoder-decoder models of text."""

from __future__ import annotations

from typing import Any

from .hf_inputs import two_sequences, two_sequences_labels
from .hf_spec import Spec


def pair(model_type: str, /, **sizes: Any) -> Spec:
    """Describe an encoder-decoder: the base model with both inputs, and the head with labels."""
    return Spec(model_type, ("AutoModel", two_sequences), ("AutoModelForSeq2SeqLM", two_sequences_labels), sizes)


_USUAL = ("bart", "blenderbot", "blenderbot-small", "m2m_100", "marian", "mbart", "mvp", "pegasus", "plbart")
_T5 = {"decoder_start_token_id": 0}

SPECS = [
    *(pair(name) for name in _USUAL),
    *(pair(name, **_T5) for name in ("t5", "mt5", "umt5", "longt5", "switch_transformers")),
    pair("nllb-moe", encoder_sparse_step=2, decoder_sparse_step=2),
    pair("led", attention_window=[4] * 8, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64),
    pair("pegasus_x", block_size=4, num_global_tokens=4),
    pair("bigbird_pegasus", attention_type="original_full"),
    pair("prophetnet", num_hidden_layers=..., num_encoder_layers=8, num_decoder_layers=8),
    pair("t5gemma"),
    Spec(
        "fsmt",
        ("AutoModel", two_sequences),
        None,
        {"langs": ["en", "de"], "src_vocab_size": 100, "tgt_vocab_size": 100, "vocab_size": ...},
    ),
]
