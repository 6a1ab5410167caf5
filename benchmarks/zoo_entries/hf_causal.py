"""Decoders that predict the next token, with dense layers."""

from __future__ import annotations

from typing import Any

from .hf_inputs import causal_labels, ids_labels, ids_only, tokens
from .hf_spec import Spec


def causal(model_type: str, /, **sizes: Any) -> Spec:
    """Describe a decoder: the base model with a padded row, and the head with its loss."""
    return Spec(model_type, ("AutoModel", tokens), ("AutoModelForCausalLM", causal_labels), sizes)


def unpadded(model_type: str, /, **sizes: Any) -> Spec:
    """Describe a decoder that takes no mask."""
    return Spec(model_type, ("AutoModel", ids_only), ("AutoModelForCausalLM", ids_labels), sizes)


_USUAL = (
    *("gpt2", "gpt_neox", "gptj", "gpt_bigcode", "codegen", "bloom", "opt", "mpt", "falcon", "openai-gpt", "ctrl"),
    *("llama", "mistral", "ministral3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3"),
    *("cohere", "cohere2", "olmo", "olmo2", "olmo3", "granite", "starcoder2", "stablelm", "persimmon", "glm", "glm4"),
    *("smollm3", "exaone4", "helium", "arcee", "apertus", "diffllama", "doge", "xglm", "biogpt", "bitnet"),
    *("seed_oss", "modernbert-decoder", "nanochat", "vaultgemma", "hrm_text", "ernie4_5", "cwm", "jais2"),
)

SPECS = [
    *(causal(name) for name in _USUAL),
    causal("gpt_neo", attention_types=[[["global", "local"], 4]], window_size=8),
    causal("nemotron", head_dim=8, num_key_value_heads=4),
    Spec("trocr", None, ("TrOCRForCausalLM", ids_labels)),
    causal("recurrent_gemma", lru_width=32, attention_window_size=8),
    causal("gemma3n_text", num_hidden_layers=10, num_kv_shared_layers=2, vocab_size_per_layer_input=100),
]
