"""Kinds of models that compare does not run, or runs with care: encoders, quantised ones, code of their own."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import BertConfig, BertLMHeadModel, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from foveate.models.base import byte_tokenizer as bytes_
from tests.corpus.cases import Made, case, changed, copied, options, tiny


@case("decoder")
def encoder(base: Path, folder: Path) -> Made:
    model = folder / "model"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertLMHeadModel(BertConfig(vocab_size=bytes_.VOCAB, **sizes)).save_pretrained(model)
    bytes_.build(512).save_pretrained(model)
    return options(model, base / "prompts.jsonl")


@case("t5; it must be a decoder")
def encoder_and_decoder(base: Path, folder: Path) -> Made:
    model = folder / "model"
    T5ForConditionalGeneration(
        T5Config(vocab_size=bytes_.VOCAB, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    ).save_pretrained(model)
    bytes_.build(512).save_pretrained(model)
    return options(model, base / "prompts.jsonl")


@case("llava; it must be a decoder")
def vision_language(base: Path, folder: Path) -> Made:
    model = copied(base, folder)
    inner = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": inner}))
    return options(model)


@case("vit; it must be a decoder")
def images(base: Path, folder: Path) -> Made:
    model = copied(base, folder)
    (model / "config.json").write_text('{"model_type": "vit", "hidden_size": 32}')
    return options(model)


def _quantised(base: Path, folder: Path, **settings: object) -> Made:
    model = copied(base, folder)
    changed(model / "config.json", quantization_config=settings)
    return options(model)


@case("quantised by gptq")
def quantised_by_gptq(base: Path, folder: Path) -> Made:
    return _quantised(base, folder, quant_method="gptq", bits=4, group_size=128)


@case("quantised by awq")
def quantised_by_awq(base: Path, folder: Path) -> Made:
    return _quantised(base, folder, quant_method="awq", bits=4, group_size=128, version="gemm")


@case("quantised by bitsandbytes")
def quantised_by_bitsandbytes(base: Path, folder: Path) -> Made:
    return _quantised(base, folder, quant_method="bitsandbytes", load_in_4bit=True)


@case("has no attribute 'to_dict'")
def quantised_by_a_word(base: Path, folder: Path) -> Made:
    model = copied(base, folder)
    changed(model / "config.json", quantization_config="4bit")
    return options(model)


@case("quantised by mystery")
def quantised_by_something(base: Path, folder: Path) -> Made:
    return _quantised(base, folder, quant_method="mystery")


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).write_text("ran")
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def _own_code(base: Path, folder: Path, kind: str) -> Path:
    model = copied(base, folder)
    (model / "own.py").write_text(CODE.format(marker=str(folder / "ran")))
    places = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    changed(model / "config.json", model_type=kind, auto_map=places)
    return model


@case("runs code of its own, which --trust-remote-code allows")
def code_of_its_own(base: Path, folder: Path) -> Made:
    return options(_own_code(base, folder, "own"))


@case()
def code_of_its_own_that_may_run(base: Path, folder: Path) -> Made:
    return [*options(_own_code(base, folder, "own")), "--trust-remote-code"]


@case()
def code_of_its_own_beside_a_known_type(base: Path, folder: Path) -> Made:
    return options(_own_code(base, folder, "llama"))


@case("has a tokenizer that cannot be loaded: it runs code of its own")
def tokenizer_of_its_own_code(base: Path, folder: Path) -> Made:
    model = copied(base, folder)
    (model / "own.py").write_text(CODE.format(marker=str(folder / "ran")))
    (model / "tokenizer.json").unlink()
    places = {"AutoTokenizer": ["own.OwnTokenizer", None]}
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "OwnTokenizer", "auto_map": places}))
    return options(model)


@case()
def body_alone_with_a_tied_head(base: Path, folder: Path) -> Made:
    model = copied(base, folder)
    whole: LlamaForCausalLM = tiny(tie_word_embeddings=True)
    whole.model.save_pretrained(model)  # names without "model.", as embedding models have them
    return options(model)
