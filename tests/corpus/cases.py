"""The list of cases, and the tiny model that all of them are made from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from foveate.models.base import byte_tokenizer as bytes_

Made = list[str]  # what comes after `foveate compare`
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
ROWS = [{"prompt": "the red fox and the key is", "answer": " ab"}, {"prompt": "a blue whale", "answer": "c"}]


@dataclass(frozen=True)
class Case:
    """One thing to try.

    Args:
        name: its folder's.
        make: writes it into an empty folder, from a folder with the sound model; gives the options to run it with.
        says: what the one line on stderr must hold; None where it must run.
        expected: the accepted answers that must come out; None for those of `ROWS`.
        prompts: the prompts as the model must read them; None where the case does not say.
    """

    name: str
    make: Callable[[Path, Path], Made]
    says: str | None = None
    expected: list[str] | None = None
    prompts: list[str] | None = None


CASES: dict[str, Case] = {}


def case(says: str | None = None, **expects: Any) -> Callable[[Callable[[Path, Path], Made]], Callable[..., Made]]:
    """Register the decorated function, under its name, as a case."""

    def add(make: Callable[[Path, Path], Made]) -> Callable[[Path, Path], Made]:
        CASES[make.__name__] = Case(make.__name__, make, says, **expects)
        return make

    return add


def tiny(**changes: Any) -> LlamaForCausalLM:
    """Two layers of random weights, large enough that its answers differ."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": bytes_.VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 2048,
        "bos_token_id": bytes_.BOS, "eos_token_id": bytes_.EOS, "pad_token_id": bytes_.PAD, "initializer_range": 0.3,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


def sound(folder: Path) -> Path:
    """The model that nothing is wrong with, and its prompts."""
    tiny().save_pretrained(folder)
    bytes_.build(2048).save_pretrained(folder)
    lines(folder / "prompts.jsonl", ROWS)
    return folder


def lines(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def copied(base: Path, folder: Path) -> Path:
    """A copy of the sound model under `folder`."""
    target = folder / "model"
    shutil.copytree(base, target)
    return target


def options(model: Path | str, prompts: Path | str | None = None) -> Made:
    """The options that run a model on prompts; those of the sound model's folder where none are named."""
    own = Path(model) / "prompts.jsonl"
    return ["--model", str(model), "--task", str(prompts or own)]


def on_rows(base: Path, file: Path, *more: str) -> Made:
    """The options that run the sound model on a file."""
    return ["--model", str(base), "--task", str(file), *more]


def changed(file: Path, **changes: Any) -> None:
    """Set fields of a JSON object; None takes one out."""
    content = {**json.loads(file.read_text("utf-8")), **changes}
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}), "utf-8")


def reweighted(model: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Save a model's weights again, after an edit."""
    file = model / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in edit(load_file(file)).items()}
    save_file(tensors, file, {"format": "pt"})
