"""Adapters such as LoRA, put on their base model and merged into its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from foveate.bench.loading import files
from foveate.bench.loading.refusal import reading, refused, several
from foveate.bench.loading.source import ADAPTER

WEIGHTS = "adapter_model.safetensors"


def check(name: str, folder: Path) -> None:
    """Refuse an adapter whose files are broken, or without `peft`, before its base is read."""
    kind = files.read_object(name, folder / ADAPTER).get("peft_type", "LoRA")
    if not (folder / WEIGHTS).exists():
        raise refused(name, f"is a {kind} adapter without {WEIGHTS} (pickled weights are not loaded)")
    files.tensors(name, folder / WEIGHTS)
    try:
        import peft  # noqa: F401
    except ImportError:
        raise refused(name, f"holds a {kind} adapter; pip install 'foveate[lora]' to put it on its base") from None


def put_on(name: str, model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with the adapter merged into its weights; every tensor of the adapter must have its place."""
    from peft import PeftModel, get_peft_model_state_dict

    with reading(name, "has an adapter that does not fit its base"):
        tuned: Any = PeftModel.from_pretrained(model, folder)
        wanted = set(get_peft_model_state_dict(tuned))
    held = set(files.tensors(name, folder / WEIGHTS))
    if wanted - held:
        raise refused(name, f"has an adapter that lacks weights which {ADAPTER} asks for: {several(wanted - held)}")
    if held - wanted:
        raise refused(name, f"has an adapter with weights that its base has no place for: {several(held - wanted)}")
    if not hasattr(tuned.base_model, "merge_and_unload"):
        kind = str(tuned.active_peft_config.peft_type).rpartition(".")[2]
        raise refused(name, f"has an adapter of type {kind}, which cannot be merged into the weights")
    with reading(name, "has an adapter that cannot be merged"):
        return tuned.merge_and_unload()
