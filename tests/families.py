"""Tiny models whose layers differ from one another, or keep more than keys and values, by model type."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests import tiny

_WIDTHS: Mapping[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": tiny.CONTEXT,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
_EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
_LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
_TURNS = {"layer_types": ["linear_attention", "full_attention"] * 2}
_HISTORIES = (
    *("sliding_attention", "heavily_compressed_attention"),
    *("sliding_attention", "compressed_sparse_attention"),
)

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "mistral": _GROUPED | {"sliding_window": 16},
    "cohere2": {"num_key_value_heads": 2, "sliding_window": 16},
    "gpt_oss": _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    "gemma3n_text": _GROUPED
    | {
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": tiny.VOCABULARY,
        "laurel_rank": 8,
        "activation_sparsity_pattern": None,
    },
    "gpt_neo": {
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 16,
    },
    "glm_moe_dsa": _LATENT
    | _EXPERTS
    | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "index_topk": 8, "index_head_dim": 16}
    | {"index_n_heads": 4, "num_key_value_heads": 4, "first_k_dense_replace": 1},
    "deepseek_v4": _EXPERTS
    | {"head_dim": 16, "q_lora_rank": 16, "o_lora_rank": 16, "n_routed_experts": 4, "index_topk": 8}
    | {"index_head_dim": 16, "index_n_heads": 4, "sliding_window": 16, "num_nextn_predict_layers": 0}
    | {"layer_types": list(_HISTORIES)},
    "glm4_moe_lite": _LATENT
    | _EXPERTS
    | {"n_routed_experts": 4, "num_key_value_heads": 4, "mlp_layer_types": ["dense"] + ["sparse"] * 3},
    "kimi_linear": _LATENT
    | _TURNS
    | {"moe_intermediate_size": 32, "num_experts_per_token": 2, "num_experts": 4, "first_k_dense_replace": 1}
    | {"num_key_value_heads": 4, "linear_head_dim": 16, "linear_num_heads": 4},
    "qwen3_5_text": _GROUPED
    | _TURNS
    | {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    | {"linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "lfm2": {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"] * 2},
    "nemotron_h": _GROUPED
    | _EXPERTS
    | {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "n_routed_experts": 4}
    | {"ssm_state_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1, "chunk_size": 16}
    | {"moe_shared_expert_intermediate_size": 32},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 2,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
        "mamba_d_state": 8,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_chunk_size": 16,
    },
    "falcon_h1": _GROUPED
    | {
        "mamba_d_ssm": 128,
        "mamba_d_state": 8,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_chunk_size": 16,
    },
    "minimax": _GROUPED
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 16, "sliding_window": 16}
    | {"layer_types": ["full_attention", "linear_attention"] * 2},
    "inkling_text": _GROUPED
    | _EXPERTS
    | {"n_routed_experts": 4, "n_shared_experts": 1, "mlp_layer_types": ["sparse"] * 4, "num_mtp_layers": 0}
    | {"layer_types": ["hybrid_sliding", "hybrid"] * 2, "sliding_window_size": 16, "swa_head_dim": 16}
    | {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "d_rel": 8, "rel_extent": 64}
    | {"unpadded_vocab_size": tiny.VOCABULARY},
    "cpmant": {"dim_head": 16, "dim_ff": 128, "init_std": 0.2},
}
"""What each model's configuration says beside the usual widths."""


def save(name: str, folder: Path, **own: Any) -> Path:
    """A model of one of the families, or of another with ``own`` settings, in float32, with a tokenizer."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[name](**{**_WIDTHS, **FAMILIES.get(name, {}), **own}, dtype="float32")
    return tiny._save(AutoModelForCausalLM.from_config, config, folder)
