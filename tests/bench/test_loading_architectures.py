"""Valid checkpoints of every decoder in transformers load, without false refusals."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from foveate.bench.loading import weights
from foveate.bench.loading.source import Source
from foveate.bench.loading.trial import check_causal
from foveate.core.errors import UnsupportedModel
from tests.contracts.architectures import build, names

#: Decoders that do see later tokens: within a prompt, or by permuted order.
NOT_CAUSAL = {"cpmant", "prophetnet", "xlnet"}


def round_trip(name: str, folder: Path) -> str:
    """Save and load this architecture's tiny model; return the refusal, or an empty text."""
    build(name).save_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    try:
        check_causal(name, weights.read(Source(name, str(folder)), config, torch.float32, torch.device("cpu"), False))
    except UnsupportedModel as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_every_architecture_loads() -> None:
    refusals, tried = {}, 0
    for name in names():
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = round_trip(name, Path(folder))
            except (ImportError, ValueError, StrictDataclassError):  # it needs another package, or has no tiny form
                continue
        tried += 1
        if found and "Unrecognized configuration class" not in found:  # only a part of a model
            refusals[name] = found
    assert set(refusals) == NOT_CAUSAL & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), refusals
    assert all("sees the tokens that follow" in text for text in refusals.values()) and tried >= 170
