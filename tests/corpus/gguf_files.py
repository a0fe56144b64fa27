"""GGUF files: a small sound one, and broken ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import LlamaForCausalLM

from foveate.models.base.byte_tokenizer import BOS, EOS, VOCAB, _byte_characters
from tests.corpus.cases import POINTER, Made, case, options, tiny

_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "model.layers.": "blk.", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write(
    file: Path, *, architecture: str = "llama", told: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None, **changes: Any,
) -> LlamaForCausalLM:  # fmt: skip
    """A tiny Llama as a GGUF file in 32 bits, with the byte vocabulary; gives the model itself.

    `told` and `tensors` are further metadata and tensors of the file; `changes` go to the model's configuration.
    """
    model = tiny(**changes)
    config = model.config
    out = gguf.GGUFWriter(str(file), architecture)
    out.add_name("tiny")
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_dimension_count(config.head_dim)
    out.add_vocab_size(VOCAB)
    _add_words(out)
    for key, value in (told or {}).items():
        kind = {str: out.add_string, int: out.add_uint32, float: out.add_float32}[type(value)]
        kind(f"{architecture}.{key}", value)
    for name, array in (tensors or {}).items():
        out.add_tensor(name, np.asarray(array, dtype=np.float32))
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        count = next((heads[part] for part in heads if part in name), None)
        array = tensor.float().numpy()
        if count is not None:  # llama.cpp pairs neighbouring dims where transformers pairs the halves
            array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        for ours, theirs in _NAMES.items():
            name = name.replace(ours, theirs)
        out.add_tensor(name, np.ascontiguousarray(array))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return model


def _add_words(out: gguf.GGUFWriter) -> None:
    words = [*_byte_characters(), "<bos>", "<eos>", "<pad>", "Ġa"]
    out.add_tokenizer_model("gpt2")
    out.add_token_list(words)
    out.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL])
    out.add_token_merges(["Ġ a"])
    out.add_bos_token_id(BOS)
    out.add_eos_token_id(EOS)
    out.add_add_bos_token(True)


@case()
def gguf_file(base: Path, folder: Path) -> Made:
    write(folder / "tiny.gguf")
    return options(folder / "tiny.gguf", base / "prompts.jsonl")


@case()
def gguf_in_a_folder(base: Path, folder: Path) -> Made:
    write(folder / "tiny.gguf")
    return options(folder, base / "prompts.jsonl")


@case("several GGUF files")
def gguf_files_in_a_folder(base: Path, folder: Path) -> Made:
    for name in ("a", "b"):
        (folder / f"{name}.gguf").write_bytes(b"GGUF")
    return options(folder, base / "prompts.jsonl")


@case("no GGUF file")
def gguf_missing(base: Path, folder: Path) -> Made:
    return options(folder / "tiny.gguf", base / "prompts.jsonl")


@case("does not begin as a GGUF file")
def gguf_garbage(base: Path, folder: Path) -> Made:
    (folder / "tiny.gguf").write_bytes(b"garbage" * 99)
    return options(folder / "tiny.gguf", base / "prompts.jsonl")


@case("Git LFS pointer")
def gguf_pointer(base: Path, folder: Path) -> Made:
    (folder / "tiny.gguf").write_text(POINTER)
    return options(folder / "tiny.gguf", base / "prompts.jsonl")


@case("cannot be loaded")
def gguf_cut(base: Path, folder: Path) -> Made:
    write(folder / "tiny.gguf")
    whole = (folder / "tiny.gguf").read_bytes()
    (folder / "tiny.gguf").write_bytes(whole[: len(whole) // 2])
    return options(folder / "tiny.gguf", base / "prompts.jsonl")


@case("cannot be loaded")
def gguf_header_alone(base: Path, folder: Path) -> Made:
    (folder / "tiny.gguf").write_bytes(b"GGUF\x03\0\0\0")
    return options(folder / "tiny.gguf", base / "prompts.jsonl")


@case("one part of several")
def gguf_part(base: Path, folder: Path) -> Made:
    write(folder / "tiny-00001-of-00002.gguf")
    return options(folder / "tiny-00001-of-00002.gguf", base / "prompts.jsonl")


@case("mystery")
def gguf_of_unknown_architecture(base: Path, folder: Path) -> Made:
    write(folder / "tiny.gguf", architecture="mystery")
    return options(folder / "tiny.gguf", base / "prompts.jsonl")


@case()
def gguf_stretched_by_yarn(base: Path, folder: Path) -> Made:
    told = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 512}
    write(folder / "tiny.gguf", told=told)
    return options(folder / "tiny.gguf", base / "prompts.jsonl")


@case("factors that are not Llama 3's")
def gguf_stretched_by_odd_factors(base: Path, folder: Path) -> Made:
    write(folder / "tiny.gguf", tensors={"rope_freqs.weight": [1.0, 3.0, 2.0, 8.0]})
    return options(folder / "tiny.gguf", base / "prompts.jsonl")


@case("has RoPE scaling of type 'mystery'")
def gguf_stretched_by_something(base: Path, folder: Path) -> Made:
    write(folder / "tiny.gguf", told={"rope.scaling.type": "mystery"})
    return options(folder / "tiny.gguf", base / "prompts.jsonl")
