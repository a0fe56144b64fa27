"""Load a model and its tokenizer from a folder, a file or a hub, and check with one short run that it works."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import foveate.models.base.hf_checkpoint  # noqa: F401  (tells transformers of the type that `foveate train` saves)
from foveate.bench.loading import adapters, files, gguf, hub, weights
from foveate.bench.loading.device import DTYPES, torch_device
from foveate.bench.loading.refusal import reading, refused
from foveate.bench.loading.source import Source, find
from foveate.bench.loading.trial import check_causal, check_words
from foveate.core import validate
from foveate.core.errors import FoveateError
from foveate.tasks.base.training_task import TrainingTask
from foveate.train.loop import checkpoint


def load(
    model: str | None,
    device: str = "cpu",
    dtype: str = "float32",
    *,
    trust_remote_code: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[PreTrainedModel, Any, Path | None]:
    """Load a decoder and its tokenizer; return them with the model's folder (None for a hub or a GGUF file).

    The model's attribute `tokenizer` is the tokenizer too: methods may put words of their own before it.

    Weights load from safetensors and GGUF only.

    Args:
        model: folder, GGUF file, folder of an adapter, or hub id; None is the lab model.
        device: a torch device.
        dtype: "float32", "bfloat16" or "float16".
        trust_remote_code: True lets code from the model's folder or repository run.
        note: called with a message before each slow step.

    Raises:
        UnsupportedModel: if it is not a complete decoder; the message is one line.
    """
    validate.one_of("dtype", dtype, tuple(DTYPES))
    target = torch_device(device)
    source = find(model)
    hub.check(source)
    folder = None if source.gguf else source.folder
    if source.adapter is not None:
        adapters.check(source.name, source.adapter)
        folder = source.adapter
    loaded, tokenizer = _base(source, target, DTYPES[dtype], trust_remote_code, note)
    if source.adapter is not None:
        loaded = adapters.merge(source.name, loaded, source.adapter)
    check_causal(source.name, loaded)
    loaded.tokenizer = tokenizer
    return loaded.eval(), tokenizer, folder


def trained_on(model: str | None) -> TrainingTask | None:
    """Return the task that a folder of `foveate train` was trained on; None for other models."""
    source = find(model)
    if model is None or source.folder is None or source.gguf is not None:
        return None
    try:
        return checkpoint.task_of(source.folder)
    except FoveateError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise refused(model, f"has a {checkpoint.RECORD} that cannot be read ({why})") from None


def _base(
    source: Source, device: torch.device, dtype: torch.dtype, trust: bool, note: Callable[[str], None]
) -> tuple[PreTrainedModel, Any]:
    """Return the model without its adapter, and the tokenizer."""
    if source.gguf is not None:
        return gguf.read(source, dtype, device, note)
    if source.folder is not None:
        files.check(source.name, source.folder)
    config = _config(source, trust)
    tokenizer = _tokenizer(source, trust)
    check_words(source.name, tokenizer)
    return weights.read(source, config, dtype, device, trust), tokenizer


def _config(source: Source, trust: bool) -> Any:
    with reading(source.name):
        config = AutoConfig.from_pretrained(source.location, trust_remote_code=trust)
    own_code = trust and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    decoder = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or own_code
    if not decoder or getattr(config, "is_encoder_decoder", False):
        raise refused(source.name, f"is a {config.model_type}; it must be a decoder language model")
    return config


def _tokenizer(source: Source, trust: bool) -> Any:
    """Return the adapter's tokenizer if it has one, else the model's."""
    adapter = source.adapter
    own = adapter is not None and any((adapter / file).is_file() for file in ("tokenizer.json", "tokenizer.model"))
    with reading(source.name, "has a tokenizer that cannot be loaded"):
        return AutoTokenizer.from_pretrained(str(adapter) if own else source.location, trust_remote_code=trust)
