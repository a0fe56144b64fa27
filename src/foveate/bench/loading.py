"""From names on a command line to a model and its tokenizer, refusing what would not work later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from foveate.core import validate
from foveate.core.errors import OptionError, UnsupportedModel
from foveate.labs import LABS
from foveate.models import pretrained  # noqa: F401  makes the model type "foveate" known
from foveate.tasks.drill import Drill
from foveate.train import checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(model: str | None, device: str = "cpu", dtype: str = "float32") -> tuple[PreTrainedModel, Any, Path | None]:
    """A decoder, its tokenizer, and the folder it came from (None for one from the hub).

    Args:
        model: folder or hub id; None is the lab model.
        device: a torch device.
        dtype: "float32", "bfloat16" or "float16".

    Weights load from safetensors only, and no code of the checkpoint is run.
    """
    validate.one_of("dtype", dtype, tuple(DTYPES))
    where = torch_device(device)
    folder = LABS["lm"].path if model is None else Path(model)
    local = folder.is_dir()
    if model is not None and not local and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise UnsupportedModel(f"model={model!r} is no folder")
    name = str(folder) if local else str(model)
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModel(f"model={name!r} is a {config.model_type}; compare needs a decoder language model")
        if local and not list(folder.glob("*.safetensors")):
            raise UnsupportedModel(f"model={name!r} holds no .safetensors weights (pickled ones are not loaded)")
        tokenizer = AutoTokenizer.from_pretrained(name)
        with _quiet():
            loaded = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[dtype], use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedModel(f"model={name!r} cannot be loaded: {first}") from None
    if not getattr(loaded.config, "is_decoder", True) and config.model_type in ("bert", "roberta", "electra"):
        raise UnsupportedModel(f"model={name!r} is an encoder; compare needs a decoder language model")
    return loaded.to(where).eval(), tokenizer, folder if local else None


def trained_on(model: str | None) -> Drill | None:
    """The task that a folder of `foveate train` was trained on; None for any other model."""
    return None if model is None else checkpoint.task_of(Path(model))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own progress bar, which would run into ours."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def torch_device(device: str) -> torch.device:
    """The device by name, checked to be there."""
    try:
        where = torch.device(device)
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError(f"device={device!r} is not usable here: {str(error).splitlines()[0]}") from None
    if where.type == "meta":
        raise OptionError(f"device={device!r} holds no numbers; use cpu or cuda")
    return where
