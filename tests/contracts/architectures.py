"""Every causal architecture of transformers, as a tiny random model built from its own configuration class.

The list and the classes are transformers' own, so that a new release brings its new architectures with it. A few rules
about names of fields make any configuration small; `OWN` adds what an architecture needs beyond them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB, WIDTH, HEADS, KV_HEADS, HEAD_DIM, LAYERS, WINDOW, LENGTH = 64, 32, 4, 2, 8, 4, 8, 128

_SIZES: tuple[tuple[int, str], ...] = (
    (VOCAB, """vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size task_type_vocab_size
        pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab audio_vocab_size"""),
    (WIDTH, """hidden_size d_model n_embd emb_dim dim word_embed_proj_dim embedding_size backbone_hidden_size
        input_embedding_size output_embedding_size lru_width attention_hidden_size dim_model_base encoder_hidden_size
        pronunciation_embed_dim shape_embed_dim cross_attention_hidden_size audio_hidden_size text_hidden_size
        embed_dim output_dim router_hidden_size hidden_size_global"""),
    (48, """intermediate_size moe_intermediate_size n_inner ffn_dim encoder_ffn_dim decoder_ffn_dim dim_ff dff d_inner
        ffn_hidden_size shared_expert_intermediate_size intermediate_size_mlp expert_ffn_hidden_size
        shared_intermediate_size dense_intermediate_size prefix_dense_intermediate_size feed_forward_size
        moe_shared_expert_intermediate_size shared_experts_intermediate_size"""),
    (HEADS, """num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads num_kv_shared_heads
        decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads
        linear_num_value_heads linear_num_heads mamba_n_heads mamba_num_heads index_n_heads num_centroids
        num_experts num_local_experts n_routed_experts moe_num_experts"""),
    (KV_HEADS, """num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads multi_query_group_num
        num_experts_per_tok moe_topk moe_k top_k_experts index_topk_blocks n_mamba_heads
        centroid_intermediate_top_k zero_expert_num"""),
    (HEAD_DIM, """head_dim swa_head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim index_head_dim d_head dim_head
        linear_key_head_dim linear_value_head_dim linear_head_dim attention_head_dim attention_head_size
        global_head_dim mamba_d_head mamba_head_dim d_rel rotary_dim"""),
    (LAYERS, """num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers encoder_layers
        num_encoder_layers"""),
        (16, """kv_lora_rank q_lora_rank o_lora_rank mamba_d_state ssm_state_size state_size laurel_rank adapter_rank
        hidden_size_per_layer_input gated_norm_rank hc_lowrank chunk_size mamba_chunk_size ple_embed_dim"""),
    (WINDOW, """sliding_window sliding_window_size attention_window_size window_size local_attention
        attention_chunk_size index_topk local_attention_window_len query_pre_attn_scalar"""),
    (LENGTH, """max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions
        context_length rel_extent"""),
    (1, "n_group topk_group num_mtp_layers num_nextn_predict_layers first_k_dense_replace num_dense_layers n_groups"),
)  # fmt: skip
SIZES = {name: size for size, names in _SIZES for name in names.split()}

#: What holds for every architecture: no token ends a text early, decoders know that they are decoders.
ALWAYS: dict[str, Any] = {
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "forced_eos_token_id": None, "is_decoder": True,
    "suppress_tokens": None, "begin_suppress_tokens": None, "decoder_start_token_id": 1,
    "use_sliding_window": True, "max_window_layers": 2, "num_codebooks": 1,
}  # fmt: skip

#: What an architecture needs beyond the rules.
_HYBRID = ["linear_attention", "full_attention"] * 2
_SHARED = ["sliding_attention", "full_attention"] * 2
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": _HYBRID},
    "bamba": {"attn_layer_indices": [1, 3], "mamba_d_head": "auto"},
    "blt": {"num_hidden_layers": LAYERS},
    "cohere_compass_text": {
        "layer_types": _SHARED,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]},
            "full_attention": None,
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": KV_HEADS, "rope_theta": 10_000.0, "clip_qkv": 8.0}},
    "dots3_note_text": {
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "head_dim": 2 * HEAD_DIM,
        "swa_v_head_dim": HEAD_DIM,
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 2 * HEAD_DIM,
        "swa_qk_nope_head_dim": HEAD_DIM,
    },
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4},
    "falcon_h1": {"mamba_d_ssm": None, "mamba_d_head": "auto"},
    "gemma3n_text": {"layer_types": _SHARED, "num_kv_shared_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": _HYBRID, "mamba_d_head": "auto"},
    "hrm_text": {"H_cycles": 2, "L_cycles": 1, "num_layers_per_stack": 1, "num_hidden_layers": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": _HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 64,
        "hc_lowrank": 8,
    },
    "reformer": {
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"] * 2,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
    },
    "xlstm": {"hidden_size": 128},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 2 * WIDTH},
    "zaya": {"num_experts_per_tok": 1},
}


def names() -> list[str]:
    """The model types that transformers builds a causal language model for; those that others registered left out."""
    return sorted(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if _is_own(name))


def _is_own(name: str) -> bool:
    return importlib.util.find_spec(f"transformers.models.{model_type_to_module_name(name)}") is not None


def tiny(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A small configuration of this class: its own defaults with every size made small."""
    fields = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    given: dict[str, Any] = {name: value for name, value in (SIZES | ALWAYS).items() if name in fields}
    given |= {name: tiny(type(part)) for name, part in _parts(kind).items()}
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        given["num_key_value_heads"] = HEADS  # a latent that is expanded for every head
    return kind(**{**given, **OWN.get(kind.model_type, {})})


def _parts(kind: type[PreTrainedConfig]) -> dict[str, PreTrainedConfig]:
    """The configurations that one of this class is composed of, as they are by default."""
    whole = kind() if kind.sub_configs else None
    parts = {name: getattr(whole, name, None) for name in kind.sub_configs}
    return {name: part for name, part in parts.items() if isinstance(part, PreTrainedConfig)}


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random model of this type, in evaluation mode."""
    kind = CONFIG_MAPPING[name]
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    if kind.sub_configs and model_class.config_class in {type(part) for part in _parts(kind).values()}:
        kind = model_class.config_class  # the language part of a composed model
    config = tiny(kind)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
        _spread(model)
    model.generation_config.pad_token_id = 0
    return model.eval()


@torch.no_grad()
def _spread(model: nn.Module) -> None:
    """Give every matrix weights of its width's size: what ships as a start (0.02) makes attention nearly uniform."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "sinks":
                parameter.normal_(0.0, 2.0)
            elif parameter.dim() >= 2 and parameter.is_floating_point():
                if isinstance(module, nn.Embedding):
                    parameter.normal_(0.0, 1.0)
                else:
                    parameter.normal_(0.0, 1.2 / math.sqrt(parameter.shape[-1]))
