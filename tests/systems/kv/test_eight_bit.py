"""Eight-bit caches: numbers by hand, bytes, batches, and that a float format suits channels of unequal size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from foveate.core.errors import OptionError
from foveate.host import apply
from foveate.host.hf.model import host
from foveate.kv import EightBit
from foveate.kv.parts.scaled_codec import Scaled
from tests.conftest import ClaimFixture
from tests.contracts.policies import PADDINGS, batch_error, subject
from tests.support.host_models import model, tokens

FORMATS = ("e4m3", "e5m2", "int8")


def test_numbers_by_hand() -> None:
    x = torch.tensor([[[[127.0, -63.6, 0.4, 0.0], [0.0, 0.0, 0.0, 0.0]]]])
    parts = Scaled("int8").encode(x, {})
    assert parts["codes"].view(torch.int8).flatten().tolist() == [127, -64, 0, 0, 0, 0, 0, 0]
    assert parts["scale"].flatten().tolist() == [1.0, 0.0]
    x = torch.tensor([[[[448.0, 1.0625, -300.0, 0.001]]]])  # 3 bits of fraction, least number 2 ** -9
    decoded = Scaled("e4m3").decode(Scaled("e4m3").encode(x, {}), 4, torch.float32)
    assert decoded.flatten().tolist() == [448.0, 1.0, -288.0, 0.001953125]
    x = torch.tensor([[[[57344.0, 1.125, -300.0, 1e-6]]]])  # 2 bits of fraction, a wide range
    decoded = Scaled("e5m2").decode(Scaled("e5m2").encode(x, {}), 4, torch.float32)
    assert decoded.flatten().tolist() == [57344.0, 1.0, -320.0, 0.0]


@pytest.mark.parametrize("form", FORMATS)
def test_the_error_is_that_of_the_format(form: Any) -> None:
    x = torch.randn(2, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    off = Scaled(form).decode(Scaled(form).encode(x, {}), 64, torch.float32) - x
    share = float(off.square().sum() / x.square().sum())
    assert (
        {"e4m3": 6e-4, "e5m2": 3e-3, "int8": 5e-5}[form]
        < 1.5 * share
        < {"e4m3": 2e-3, "e5m2": 8e-3, "int8": 2e-4}[form]
    )


def test_a_floating_point_format_suits_channels_of_unequal_size(claim: ClaimFixture) -> None:
    """Whole numbers lose small channels beside a large one."""
    x = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    x[..., 0] = 300.0
    off = {form: Scaled(form).decode(Scaled(form).encode(x, {}), 64, torch.float32) - x for form in FORMATS}  # type: ignore[arg-type]
    small = {form: float(x[..., 1:].square().sum()) / float(y[..., 1:].square().sum()) for form, y in off.items()}
    assert small["e4m3"] > small["e5m2"]
    claim(
        "Eight-bit floating-point numbers keep small channels beside a large one (signal over error)",
        ours=small["e4m3"], baseline=small["int8"], better="higher", margin=49 * small["int8"],
        baseline_name="int8 with the same scale", seed=0,
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
@torch.no_grad()
def test_bytes_and_attention(form: Any) -> None:
    llama, cache, one = model("llama"), DynamicCache(), tokens(2, 1, seed=1)
    with apply(llama, EightBit(format=form, group=8)) as run:
        llama(tokens(2, 40), past_key_values=cache)
        assert run.stats.cache_bytes == 3 * 2 * 2 * 40 * (2 * (8 + 4) + 4)
        plain = DynamicCache()
        for number, layer in enumerate(cache.layers):
            plain.update(layer.keys.clone(), layer.values.clone(), number)
        got = llama(one, past_key_values=cache).logits
    torch.testing.assert_close(got, llama(one, past_key_values=plain).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side, pieces", PADDINGS)
def test_a_sequence_gets_the_same_result_in_a_batch_and_alone(side: str, pieces: str) -> None:
    off, _ = batch_error(subject("llama"), side, pieces, lambda: apply(subject("llama"), EightBit(group=4)))
    assert off < 1e-5


def test_budgets_and_options() -> None:
    found = host(subject("llama"))
    assert EightBit.at_budget(1.0, found, 100).layers == () and EightBit.at_budget(0.5, found, 1000).layers is None
    with pytest.raises(OptionError, match=r"^budget=0.1 is less than the"):
        EightBit.at_budget(0.1, found, 1000)
    with pytest.raises(OptionError, match="format='fp8' must be one of"):
        EightBit(format="fp8")  # type: ignore[arg-type]
