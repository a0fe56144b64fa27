"""Load a checkpoint's weights into its model, and check that every tensor is used."""

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
from foveate.kv.conversion.compressed_keys import FIELD, load_compressed

#: Patterns that wrappers add to the names of the tensors that they save, and the wrappers.
_WRAPPED = {
    r"^module\.": "torch.nn.DataParallel", r"^_forward_module\.": "a training loop", r"(^|\.)_orig_mod\.": "compile",
    r"(^|\.)_fsdp_wrapped_module\.": "FSDP", r"(^|\.)_checkpoint_wrapped_module\.": "checkpointing",
}  # fmt: skip
#: Buffers that older releases saved and newer ones compute.
_COMPUTED = re.compile(r"(rotary_emb\.inv_freq|position_ids|(attn|attention)\.(masked_)?bias)$")


def read(source: Source, config: Any, dtype: torch.dtype, device: torch.device, trust: bool) -> PreTrainedModel:
    """Load the model with its checkpoint's weights.

    Raises:
        UnsupportedModel: if tensors are missing, unused or of another shape; the message names them.
    """
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust, "use_safetensors": True}
    quantised = quantisation_of(config)
    if quantised is not None:
        options["device_map"] = {"": device}  # quantised weights are packed for a device while they load
    names = [] if source.folder is None else tensor_names(source)
    if quantised is not None and quantised not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        known = ", ".join(sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))
        raise refused(source.name, f"is quantised by {quantised}, which must be one of {known}")
    problem = "cannot be loaded" if quantised is None else f"is quantised by {quantised} and cannot be loaded"
    with reading(source.name, problem):
        model, info = _from_pretrained(source, config, {**options, "key_mapping": unwrap_mapping(names)})
    check_report(source.name, info)
    return model if quantised is not None else model.to(device)


def tensor_names(source: Source) -> list[str]:
    """Return the names of all tensors of a local checkpoint."""
    assert source.folder is not None
    return [name for shard in files.shards(source.name, source.folder) for name in files.tensors(source.name, shard)]


def unwrap_mapping(names: list[str]) -> dict[str, str] | None:
    """Return transformers' key mapping that removes wrappers' prefixes from names; None if there are none."""
    found = {}
    for pattern in _WRAPPED:
        matching = [name for name in names if re.search(pattern, name)]
        if matching and (not pattern.startswith("^") or len(matching) == len(names)):
            found[pattern] = r"\1" if "(" in pattern else ""
    return found or None


def quantisation_of(config: Any) -> str | None:
    """Return the quantisation method of a checkpoint, or None."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    fields = settings if isinstance(settings, dict) else getattr(settings, "__dict__", {})
    method = fields.get("quant_method") or "an unnamed method"
    return str(getattr(method, "value", method))


def _from_pretrained(source: Source, config: Any, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the model and transformers' loading report, without the adapter that may be in the folder."""
    options = {**options, "config": config, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if getattr(config, FIELD, None) and source.adapter is None:
        return load_compressed(source.location, **{k: v for k, v in options.items() if k != "trust_remote_code"})
    if source.adapter is None or source.folder != source.adapter:
        return AutoModelForCausalLM.from_pretrained(source.location, **options)
    # transformers would apply the adapter itself and report only its tensors, so the weights are loaded here
    state: dict[str, torch.Tensor] = {}
    for shard in files.shards(source.name, Path(source.location)):
        state |= load_file(shard)
    kind = AutoModelForCausalLM._model_mapping[type(config)]
    del options["use_safetensors"]
    return kind.from_pretrained(None, state_dict=state, **options)


def check_report(name: str, info: dict[str, Any]) -> None:
    """Refuse a checkpoint with missing, unused or mismatched tensors."""
    if mismatched := info["mismatched_keys"]:
        tensor, stored, wanted = min(mismatched, key=str)
        shapes = f"{tensor} is {tuple(stored)} in the file and {tuple(wanted)} by config.json"
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
