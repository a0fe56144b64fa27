"""The digest that calibrations and recipes belong to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from foveate import load, save
from foveate.core.errors import OptionError
from foveate.kv import SnapKV
from foveate.kv.parts.calibration_store import model_digest
from tests.support.host_models import model


def changed(**options: object) -> LlamaForCausalLM:
    """The same weights under another configuration."""
    own = model("llama")
    config = type(own.config)(**{**own.config.to_dict(), **options})
    other = LlamaForCausalLM(config).eval()
    other.load_state_dict(own.state_dict())
    return other


def test_it_is_that_of_the_weights_in_every_precision() -> None:
    digest = model_digest(model("llama"))
    assert model_digest(changed()) == digest == model_digest(changed().to(torch.bfloat16))
    assert model_digest(changed(use_cache=False, max_position_embeddings=999)) == digest


@pytest.mark.parametrize(
    "option", [{"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}, {"hidden_act": "relu"}]
)
def test_positions_and_the_like_are_part_of_it(option: dict[str, object]) -> None:
    assert model_digest(changed(**option)) != model_digest(model("llama"))


def test_a_recipe_of_a_model_with_other_positions_is_refused(tmp_path: Path) -> None:
    save([SnapKV(share=0.5)], tmp_path / "r.json", model=model("llama"))
    with pytest.raises(OptionError, match="another model"):
        load(tmp_path / "r.json", changed(rope_parameters={"rope_type": "default", "rope_theta": 5e6}))
