"""A checkpoint's weights put into its model, every tensor accounted for by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from foveate.bench.loading import files
from foveate.bench.loading.refusal import reading, refused, several
from foveate.bench.loading.source import Source

#: What wrappers put before, or into, the names of the tensors that they save.
_WRAPPED = {
    r"^module\.": "torch.nn.DataParallel", r"^_forward_module\.": "a training loop", r"(^|\.)_orig_mod\.": "compile",
    r"(^|\.)_fsdp_wrapped_module\.": "FSDP", r"(^|\.)_checkpoint_wrapped_module\.": "checkpointing",
}  # fmt: skip
#: Buffers that older releases saved and that newer ones compute.
_COMPUTED = re.compile(r"(rotary_emb\.inv_freq|position_ids|(attn|attention)\.(masked_)?bias)$")


def read(source: Source, config: Any, dtype: torch.dtype, where: torch.device, trust: bool) -> PreTrainedModel:
    """The model with its checkpoint's weights.

    Raises:
        UnsupportedModel: with the names of tensors that are missing, left over or of another shape.
    """
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust, "use_safetensors": True}
    quantised = method_of(config)
    if quantised is not None:
        options["device_map"] = {"": where}  # such weights are packed for a device when they are read
    names = [] if source.folder is None else tensor_names(source)
    if quantised is not None and quantised not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        known = ", ".join(sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))
        raise refused(source.name, f"is quantised by {quantised}, which transformers does not know; it knows {known}")
    what = "cannot be loaded" if quantised is None else f"is quantised by {quantised} and cannot be loaded"
    with reading(source.name, what):
        model, info = _from_pretrained(source, config, {**options, "key_mapping": unwrapping(names)})
    account(source.name, info)
    return model if quantised is not None else model.to(where)


def tensor_names(source: Source) -> list[str]:
    """The names of all tensors of a local checkpoint."""
    assert source.folder is not None
    return [name for shard in files.shards(source.name, source.folder) for name in files.tensors(source.name, shard)]


def unwrapping(names: list[str]) -> dict[str, str] | None:
    """A mapping, for transformers, that takes off what wrappers put onto names; None where there is nothing."""
    found = {}
    for pattern in _WRAPPED:
        touched = [name for name in names if re.search(pattern, name)]
        if touched and (not pattern.startswith("^") or len(touched) == len(names)):
            found[pattern] = r"\1" if "(" in pattern else ""
    return found or None


def method_of(config: Any) -> str | None:
    """How a checkpoint is quantised; None where it is not."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    told = settings if isinstance(settings, dict) else getattr(settings, "__dict__", {})
    method = told.get("quant_method") or "an unnamed method"
    return str(getattr(method, "value", method))


def _from_pretrained(source: Source, config: Any, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model and what transformers says of its tensors; an adapter in the folder is left for later."""
    options = {**options, "config": config, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if source.adapter is None or source.folder != source.adapter:
        return AutoModelForCausalLM.from_pretrained(source.place, **options)
    # transformers would put the adapter on by itself and then tell of its tensors only, so the weights go by hand
    state: dict[str, torch.Tensor] = {}
    for shard in files.shards(source.name, Path(source.place)):
        state |= load_file(shard)
    kind = AutoModelForCausalLM._model_mapping[type(config)]
    del options["use_safetensors"]
    return kind.from_pretrained(None, state_dict=state, **options)


def account(name: str, info: dict[str, Any]) -> None:
    """Refuse a checkpoint that does not fill its model, or holds more than the model takes."""
    if mismatched := info["mismatched_keys"]:
        tensor, held, wanted = min(mismatched, key=str)
        shapes = f"{tensor} is {tuple(held)} in the file and {tuple(wanted)} by config.json"
        raise refused(name, f"cannot be loaded: {shapes}" + _more(len(mismatched)))
    if errors := info.get("error_msgs"):
        text = errors[0] if isinstance(errors, list) else str(errors)
        raise refused(name, f"cannot be loaded: {text.strip().splitlines()[0]}")
    if missing := info["missing_keys"]:
        raise refused(name, f"lacks weights that its config.json asks for: {several(missing)}")
    if extra := {tensor for tensor in info["unexpected_keys"] if not _COMPUTED.search(tensor)}:
        raise refused(name, f"holds weights that its config.json has no place for: {several(extra)}")


def _more(count: int) -> str:
    return f", and {count - 1} more tensors differ" if count > 1 else ""
