"""Decoders with mixtures of experts, and decoders with state-space or recurrent layers."""

from __future__ import annotations

from .hf_causal import causal, unpadded
from .hf_inputs import causal_labels, ids_labels, ids_only, tokens
from .hf_spec import Spec

_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
_STATE = {"state_size": 8, "num_hidden_layers": 8}
_EXPERTS = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "gpt_oss", "granitemoe", "granitemoeshared", "jetmoe"),
    *("llama4_text", "ernie4_5_moe", "glm4_moe", "minimax", "minimax_m2", "flex_olmo", "afmoe", "aria_text", "hy_v3"),
)

SPECS = [
    *(causal(name) for name in _EXPERTS),
    causal("deepseek_v2", **_LATENT, n_group=1, topk_group=1, first_k_dense_replace=1, num_experts_per_tok=2),
    causal("deepseek_v3", **_LATENT, n_group=2, topk_group=1, first_k_dense_replace=1),
    unpadded("mamba", **_STATE),
    unpadded("mamba2", **_STATE, num_heads=8, head_dim=8, n_groups=2, chunk_size=8),
    unpadded("falcon_mamba", **_STATE),
    causal("bamba", mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8, attn_layer_indices=[1, 5]),
    causal(
        "jamba", mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False, attn_layer_period=4, attn_layer_offset=2
    ),
    causal(
        "zamba2",
        mamba_d_state=8,
        n_mamba_heads=8,
        mamba_headdim=8,
        chunk_size=8,
        layer_types=...,
        layers_block_type=["mamba", "mamba", "mamba", "hybrid"] * 2,
    ),
    causal("falcon_h1", mamba_n_heads=4, mamba_d_head=8, mamba_d_ssm=32, mamba_d_state=8, mamba_chunk_size=8),
    causal("lfm2"),
    causal("olmo_hybrid"),
    causal(
        "qwen3_next", linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8
    ),
    unpadded("rwkv"),
    Spec("xlstm", ("AutoModel", ids_only), ("AutoModelForCausalLM", ids_labels)),
    Spec(
        "granitemoehybrid",
        ("AutoModel", tokens),
        ("AutoModelForCausalLM", causal_labels),
        {
            "layer_types": ["mamba", "mamba", "mamba", "attention"] * 2,
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
    ),
]
