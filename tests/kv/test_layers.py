"""Layers that a policy names must be those of the model: others would change nothing, without a word."""

from __future__ import annotations

from typing import Any

import pytest

from foveate.core.errors import OptionError
from foveate.host import apply
from foveate.kv import KIVI, EightBit, KNorm, SnapKV, ThinK, TurboQuant
from tests.support.host_models import model


@pytest.mark.parametrize("policy", [SnapKV, KNorm, KIVI, ThinK, TurboQuant, EightBit])
@pytest.mark.parametrize("layer", [9, -1, True, 0.0, "0", 10**400])
def test_layers_that_a_model_does_not_have_are_refused(policy: Any, layer: Any) -> None:
    with pytest.raises(OptionError, match="is not among this model's layers") as caught:
        apply(model("llama"), policy(layers=(layer,))).__enter__()
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("number", [2**63, 10**400])
@pytest.mark.parametrize("name", ["sink", "recent", "limit", "every", "threshold"])
def test_numbers_that_no_tensor_holds_are_refused(name: str, number: int) -> None:
    with pytest.raises(OptionError, match=f"{name}=.* must be at most"):
        SnapKV(**{name: number})
