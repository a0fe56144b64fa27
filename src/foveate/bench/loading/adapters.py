"""Adapters such as LoRA, merged into the weights of their base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from foveate.bench.loading import files
from foveate.bench.loading.refusal import reading, refused, several
from foveate.bench.loading.source import ADAPTER

WEIGHTS = "adapter_model.safetensors"


def check(name: str, folder: Path) -> None:
    """Refuse an adapter with damaged files, or without the package `peft`, before its base is read."""
    kind = files.read_object(name, folder / ADAPTER).get("peft_type", "LoRA")
    if not (folder / WEIGHTS).exists():
        raise refused(name, f"is a {kind} adapter without {WEIGHTS} (pickled weights are not loaded)")
    files.tensors(name, folder / WEIGHTS)
    try:
        import peft  # noqa: F401
    except ImportError:
        raise refused(name, f"holds a {kind} adapter; pip install 'foveate[lora]' to apply it to its base") from None


def merge(name: str, model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Merge the adapter into the model's weights; every tensor of the adapter must be used."""
    from peft import PeftModel, get_peft_model_state_dict

    with reading(name, "has an adapter that does not fit its base"):
        tuned: Any = PeftModel.from_pretrained(model, folder)
        wanted = set(get_peft_model_state_dict(tuned))
    stored = set(files.tensors(name, folder / WEIGHTS))
    if wanted - stored:
        raise refused(name, f"has an adapter that lacks weights which {ADAPTER} asks for: {several(wanted - stored)}")
    if stored - wanted:
        raise refused(name, f"has an adapter with weights that its base has no place for: {several(stored - wanted)}")
    if not hasattr(tuned.base_model, "merge_and_unload"):
        kind = str(tuned.active_peft_config.peft_type).rpartition(".")[2]
        raise refused(name, f"has an adapter of type {kind}, which cannot be merged into the weights")
    with reading(name, "has an adapter that cannot be merged"):
        return tuned.merge_and_unload()
