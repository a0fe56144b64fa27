"""Folders of checkpoints: sound ones in odd forms, and broken ones."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from foveate.models.base import byte_tokenizer as bytes_
from tests.corpus.cases import POINTER, Made, case, changed, copied, options, reweighted, tiny

BIG = 10_000  # bytes: enough to keep a safetensors header and cut its tensors


@case()
def plain(base: Path, folder: Path) -> Made:
    return options(copied(base, folder))


@case()
def name_with_blanks_and_umlauts(base: Path, folder: Path) -> Made:
    return options(copied(base, folder).rename(folder / "mein größtes Modell 模型"))


@case("is no folder")
def nowhere(base: Path, folder: Path) -> Made:
    return options(folder / "nowhere", base / "prompts.jsonl")


@case("is empty")
def no_name(base: Path, folder: Path) -> Made:
    return options("", base / "prompts.jsonl")


@case("name too long")
def name_of_five_thousand_letters(base: Path, folder: Path) -> Made:
    return options("m" * 5000, base / "prompts.jsonl")


@case("holds no config.json")
def empty_folder(base: Path, folder: Path) -> Made:
    return options(folder, base / "prompts.jsonl")


@case("is a file")
def weights_named_themselves(base: Path, folder: Path) -> Made:
    return options(base / "model.safetensors", base / "prompts.jsonl")


def _side(file: str, content: str | bytes):
    def make(base: Path, folder: Path) -> Made:
        model = copied(base, folder)
        (model / file).write_bytes(content.encode() if isinstance(content, str) else content)
        return options(model)

    return make


SIDES = {
    "config_empty": ("config.json", "", "config.json is not JSON"),
    "config_cut": ("config.json", '{"model_type": "llama", "hid', "config.json is not JSON"),
    "config_list": ("config.json", "[]", "config.json must be an object"),
    "config_byte_order_mark": ("config.json", b"\xef\xbb\xbf{}", "config.json is not JSON"),
    "config_binary": ("config.json", b"\xff\x00\x81", "config.json is not JSON"),
    "config_pointer": ("config.json", POINTER, "config.json is a Git LFS pointer"),
    "config_without_type": ("config.json", '{"hidden_size": 32}', "model_type"),
    "config_of_unknown_type": ("config.json", '{"model_type": "mystery"}', "mystery"),
    "config_deep": ("config.json", "[" * 100_000, "config.json is not JSON"),
    "generation_config_cut": ("generation_config.json", "{", "generation_config.json is not JSON"),
    "tokenizer_cut": ("tokenizer.json", '{"version": "1.0", "trunc', "tokenizer.json is not JSON"),
    "tokenizer_hollow": ("tokenizer.json", "{}", "tokenizer"),
    "tokenizer_pointer": ("tokenizer.json", POINTER, "tokenizer.json is a Git LFS pointer"),
    "tokenizer_config_cut": ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
    "weights_pointer": ("model.safetensors", POINTER, "model.safetensors is a Git LFS pointer"),
    "weights_empty": ("model.safetensors", b"", "not a complete safetensors file"),
    "weights_garbage": ("model.safetensors", b"garbage" * 99, "not a complete safetensors file"),
    "weights_pickled_under_another_name": ("model.safetensors", b"\x80\x04\x95" * 50, "not a complete safetensors"),
    "weights_header_too_long": ("model.safetensors", (2**60).to_bytes(8, "little"), "not a complete safetensors file"),
    "training_record_cut": ("training.json", "{", "training.json"),
    "training_record_of_nothing": ("training.json", '{"task": "poems", "sizes": {}}', "training.json"),
}  # fmt: skip
for _name, (_file, _content, _says) in SIDES.items():
    _make = _side(_file, _content)
    _make.__name__ = _name
    case(_says)(_make)


@case("Git LFS pointer")
def all_pointers(base: Path, folder: Path) -> Made:
    model = copied(base, folder)
    for file in model.glob("*.*"):
        file.write_text(POINTER)
    return options(model, base / "prompts.jsonl")


@case("no tokenizer")
def tokenizer_missing(base: Path, folder: Path) -> Made:
    model = copied(base, folder)
    for file in model.glob("tokenizer*"):
        file.unlink()
    return options(model)


@case("tokenizer")
def tokenizer_without_vocabulary(base: Path, folder: Path) -> Made:
    model = copied(base, folder)
    (model / "tokenizer.json").unlink()
    return options(model)


@case("belongs to another model")
def tokenizer_of_a_larger_model(base: Path, folder: Path) -> Made:
    model = folder / "model"
    tiny(vocab_size=100, pad_token_id=0).save_pretrained(model)
    bytes_.build(2048).save_pretrained(model)
    return options(model, base / "prompts.jsonl")


@case("ZeroDivisionError")
def sizes_that_do_not_fit(base: Path, folder: Path) -> Made:
    model = copied(base, folder)
    changed(model / "config.json", num_attention_heads=0)
    return options(model)


@case("holds no .safetensors")
def weights_missing(base: Path, folder: Path) -> Made:
    model = copied(base, folder)
    (model / "model.safetensors").unlink()
    return options(model)


@case("holds no .safetensors")
def weights_pickled(base: Path, folder: Path) -> Made:
    model = copied(base, folder)
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    return options(model)


@case("not a complete safetensors file")
def weights_cut(base: Path, folder: Path) -> Made:
    model = copied(base, folder)
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[:-BIG])
    return options(model)


@case("cannot be read|not a complete")
def weights_are_a_folder(base: Path, folder: Path) -> Made:
    model = copied(base, folder)
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").mkdir()
    return options(model)


def _sharded(base: Path, folder: Path) -> Path:
    model = copied(base, folder)
    (model / "model.safetensors").unlink()
    tiny().save_pretrained(model, max_shard_size="40KB")
    assert len(list(model.glob("model-*.safetensors"))) > 1
    return model


@case()
def shards(base: Path, folder: Path) -> Made:
    return options(_sharded(base, folder))


@case("model-00002-of-")
def shard_missing(base: Path, folder: Path) -> Made:
    model = _sharded(base, folder)
    next(model.glob("model-00002-*")).unlink()
    return options(model)


@case("not a complete safetensors file")
def shard_cut(base: Path, folder: Path) -> Made:
    model = _sharded(base, folder)
    shard = next(model.glob("model-00002-*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    return options(model)


@case("need a model.safetensors.index.json")
def shards_without_index(base: Path, folder: Path) -> Made:
    model = _sharded(base, folder)
    (model / "model.safetensors.index.json").unlink()
    return options(model)


@case("index.json is not JSON")
def index_cut(base: Path, folder: Path) -> Made:
    model = _sharded(base, folder)
    (model / "model.safetensors.index.json").write_text('{"weight_map": {')
    return options(model)


@case("weight_map")
def index_without_map(base: Path, folder: Path) -> Made:
    model = _sharded(base, folder)
    (model / "model.safetensors.index.json").write_text("{}")
    return options(model)


@case("out of the folder")
def index_points_elsewhere(base: Path, folder: Path) -> Made:
    model = _sharded(base, folder)
    index = model / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    changed(index, weight_map={name: f"../{place}" for name, place in places.items()})
    return options(model)


@case("lacks weights that its config.json asks for: model.layers.1.mlp.up_proj.weight")
def tensor_missing(base: Path, folder: Path) -> Made:
    model = copied(base, folder)
    reweighted(model, lambda held: {name: x for name, x in held.items() if "layers.1.mlp.up" not in name})
    return options(model)


@case("lacks weights that its config.json asks for: model.layers.2")
def config_has_a_layer_more(base: Path, folder: Path) -> Made:
    model = copied(base, folder)
    changed(model / "config.json", num_hidden_layers=3)
    return options(model)


@case("no place for: model.layers.1")
def config_has_a_layer_less(base: Path, folder: Path) -> Made:
    model = copied(base, folder)
    changed(model / "config.json", num_hidden_layers=1)
    return options(model)


@case("(260, 32) in the file and (300, 32) by config.json")
def vocabulary_of_another_size(base: Path, folder: Path) -> Made:
    model = copied(base, folder)
    changed(model / "config.json", vocab_size=300)
    return options(model)


@case("by config.json")
def width_of_another_size(base: Path, folder: Path) -> Made:
    model = copied(base, folder)
    changed(model / "config.json", hidden_size=64)
    return options(model)


@case("lacks weights that its config.json asks for: lm_head.weight")
def head_missing(base: Path, folder: Path) -> Made:
    model = copied(base, folder)
    reweighted(model, lambda held: {name: x for name, x in held.items() if name != "lm_head.weight"})
    return options(model)


@case("lacks weights that its config.json asks for: lm_head.weight")
def classifier_in_the_place_of_the_head(base: Path, folder: Path) -> Made:
    model = copied(base, folder)
    reweighted(
        model,
        lambda held: {name.replace("lm_head", "score"): x[:2] if "lm_head" in name else x for name, x in held.items()},
    )
    return options(model)


def _prefixed(base: Path, folder: Path, named) -> Made:
    model = copied(base, folder)
    reweighted(model, lambda held: {named(name): x for name, x in held.items()})
    return options(model)


@case()
def compiled_names(base: Path, folder: Path) -> Made:
    return _prefixed(base, folder, lambda name: f"_orig_mod.{name}")


@case()
def parallel_names(base: Path, folder: Path) -> Made:
    return _prefixed(base, folder, lambda name: f"module.{name}")


@case()
def parallel_and_compiled_names(base: Path, folder: Path) -> Made:
    return _prefixed(base, folder, lambda name: f"module._orig_mod.{name}")


@case()
def compiled_layers_names(base: Path, folder: Path) -> Made:
    return _prefixed(base, folder, lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."))


@case()
def sharded_compiled_names(base: Path, folder: Path) -> Made:
    model = copied(base, folder)
    held = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(held)
    places = {}
    for part, own in enumerate((names[::2], names[1::2]), 1):
        file = model / f"model-0000{part}-of-00002.safetensors"
        own_weights = {f"_orig_mod.{name}": held[name].clone() for name in own}
        save_file(own_weights, file, {"format": "pt"})
        places |= dict.fromkeys(own_weights, file.name)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return options(model)


@case()
def old_buffers(base: Path, folder: Path) -> Made:
    model = copied(base, folder)
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(4) for i in range(2)}
    reweighted(model, lambda held: {**held, **extra})
    return options(model)


@case()
def half_precision_weights(base: Path, folder: Path) -> Made:
    model = copied(base, folder)
    tiny().half().save_pretrained(model)
    return [*options(model), "--dtype", "float32"]


@case()
def tied_head(base: Path, folder: Path) -> Made:
    model = copied(base, folder)
    tiny(tie_word_embeddings=True).save_pretrained(model)
    assert "lm_head.weight" not in load_file(model / "model.safetensors")
    return options(model)


@case("NaN or infinite")
def weights_are_nan(base: Path, folder: Path) -> Made:
    model = copied(base, folder)
    reweighted(model, lambda held: {name: x * float("nan") if "layers.1" in name else x for name, x in held.items()})
    return options(model)


@case("NaN or infinite in float16")
def weights_too_large_for_half(base: Path, folder: Path) -> Made:
    model = copied(base, folder)
    reweighted(model, lambda held: {name: x * 1e6 if "lm_head" in name else x for name, x in held.items()})
    return [*options(model), "--dtype", "float16"]
