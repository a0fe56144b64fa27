"""LoRA adapters: beside a model, in a folder of their own, and broken ones."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from foveate.models.base import byte_tokenizer as bytes_
from tests.corpus import gguf_files
from tests.corpus.cases import Made, case, changed, copied, options, tiny

WEIGHTS = "adapter_model.safetensors"


def adapter(folder: Path, base: Path | str, **changes: object) -> Path:
    """A LoRA adapter with weights that change the model, for the base at a path."""
    tuned = get_peft_model(tiny(**changes), LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter)
    tuned.save_pretrained(folder)
    changed(folder / "adapter_config.json", base_model_name_or_path=str(base))
    return folder


@case()
def adapter_alone(base: Path, folder: Path) -> Made:
    return options(adapter(folder / "adapter", base), base / "prompts.jsonl")


@case()
def adapter_with_a_relative_base(base: Path, folder: Path) -> Made:
    copied(base, folder)
    return options(adapter(folder / "adapter", "../model"), base / "prompts.jsonl")


@case()
def adapter_with_its_tokenizer(base: Path, folder: Path) -> Made:
    own = adapter(folder / "adapter", base)
    bytes_.build(2048).save_pretrained(own)
    return options(own, base / "prompts.jsonl")


@case()
def adapter_beside_the_model(base: Path, folder: Path) -> Made:
    model = copied(base, folder)
    adapter(model, "somebody/else")
    return options(model)


@case()
def adapter_on_a_gguf_file(base: Path, folder: Path) -> Made:
    gguf_files.write(folder / "tiny.gguf")
    return options(adapter(folder / "adapter", "../tiny.gguf"), base / "prompts.jsonl")


@case("nowhere")
def adapter_whose_base_is_gone(base: Path, folder: Path) -> Made:
    return options(adapter(folder / "adapter", folder / "nowhere"), base / "prompts.jsonl")


@case("names no base_model_name_or_path")
def adapter_without_a_base(base: Path, folder: Path) -> Made:
    own = adapter(folder / "adapter", base)
    changed(own / "adapter_config.json", base_model_name_or_path=None)
    return options(own, base / "prompts.jsonl")


@case("adapter_config.json is not")
def adapter_config_cut(base: Path, folder: Path) -> Made:
    own = adapter(folder / "adapter", base)
    (own / "adapter_config.json").write_text('{"peft_type"')
    return options(own, base / "prompts.jsonl")


@case("without adapter_model.safetensors")
def adapter_pickled(base: Path, folder: Path) -> Made:
    own = adapter(folder / "adapter", base)
    torch.save(load_file(own / WEIGHTS), own / "adapter_model.bin")
    (own / WEIGHTS).unlink()
    return options(own, base / "prompts.jsonl")


@case("not a complete safetensors file")
def adapter_cut(base: Path, folder: Path) -> Made:
    own = adapter(folder / "adapter", base)
    (own / WEIGHTS).write_bytes((own / WEIGHTS).read_bytes()[:-10])
    return options(own, base / "prompts.jsonl")


@case("does not fit its base")
def adapter_of_a_wider_model(base: Path, folder: Path) -> Made:
    return options(adapter(folder / "adapter", base, hidden_size=64), base / "prompts.jsonl")


@case("no place for")
def adapter_of_a_deeper_model(base: Path, folder: Path) -> Made:
    return options(adapter(folder / "adapter", base, num_hidden_layers=3), base / "prompts.jsonl")


@case("adapter that lacks weights")
def adapter_tensor_missing(base: Path, folder: Path) -> Made:
    own = adapter(folder / "adapter", base)
    held = load_file(own / WEIGHTS)
    save_file({name: x.clone() for name, x in held.items() if "layers.1.self_attn.v" not in name}, own / WEIGHTS)
    return options(own, base / "prompts.jsonl")


@case("adapter")
def adapter_of_prompts(base: Path, folder: Path) -> Made:
    own = folder / "adapter"
    get_peft_model(tiny(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).save_pretrained(own)
    changed(own / "adapter_config.json", base_model_name_or_path=str(base))
    return options(own, base / "prompts.jsonl")


@case("has an adapter itself")
def adapter_on_an_adapter(base: Path, folder: Path) -> Made:
    first = adapter(folder / "first", base)
    return options(adapter(folder / "second", first), base / "prompts.jsonl")
