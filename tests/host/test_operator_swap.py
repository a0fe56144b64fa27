"""An operator reads the prompt, in the chosen layers only; everything else stays the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.core.errors import OptionError
from foveate.host import PrefillSwap, Site, apply
from foveate.ops import HiP, SlidingWindow
from tests.support.host_models import feed, model, padded, tokens


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Record the layer and the number of queries of each call that goes to the operator."""
    seen: list[tuple[int, int]] = []
    original = PrefillSwap._read

    def recorded(self: PrefillSwap, site: Site) -> Tensor:
        seen.append((site.layer, site.q.shape[2]))
        return original(self, site)

    monkeypatch.setattr(PrefillSwap, "_read", recorded)
    return seen


@pytest.mark.parametrize(("layers", "chosen"), [(None, [0, 1, 2]), ((0, 2), [0, 2]), ((), [])])
@torch.no_grad()
def test_the_operator_reads_the_prompt_in_the_chosen_layers(
    layers: tuple[int, ...] | None, chosen: list[int], read: list[tuple[int, int]]
) -> None:
    ids = tokens(2, 14)
    expected = feed(model("llama"), ids, torch.ones_like(ids), [12, 1, 1])
    with apply(model("llama"), PrefillSwap(HiP(keep=64), layers)):
        got = feed(model("llama"), ids, torch.ones_like(ids), [12, 1, 1])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert read == [(layer, 12) for layer in chosen], "decoding is the model's own"


@torch.no_grad()
def test_a_padded_sequence_is_read_without_its_padding(read: list[tuple[int, int]]) -> None:
    ids, mask = padded(tokens(2, 14), "left")
    swap = PrefillSwap(HiP(keep=4, block_q=2), (1,))
    with apply(model("llama"), swap):
        together = feed(model("llama"), ids, mask, [14])
        alone = feed(model("llama"), ids[:1, 4:], mask[:1, 4:], [10])
    torch.testing.assert_close(together[:10], alone, atol=1e-4, rtol=1e-4)
    assert sorted(read) == [(1, 10), (1, 10), (1, 14)]


@torch.no_grad()
def test_layers_with_a_window_or_a_mask_keep_their_attention(read: list[tuple[int, int]]) -> None:
    ids = tokens(1, 14)
    with apply(model("gemma3"), PrefillSwap(HiP(keep=4))):
        model("gemma3")(ids)
    assert read == [(1, 14)], "the layers 0 and 2 slide"
    with apply(model("llama"), PrefillSwap(HiP(keep=4))):
        model("llama")(ids, attention_mask=torch.ones(1, 1, 14, 14).tril().bool().logical_and(torch.rand(14, 14) > 0.2))
    assert read == [(1, 14)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(operator="hip"), "operator must be an Operator; got str"),
        (dict(operator=HiP(), layers=1), "layers=1 must be a tuple of layers' numbers, or None for all"),
        (dict(operator=HiP(), layers=(0, -1)), "layers=-1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        PrefillSwap(**options)
    assert message in str(caught.value)
    swap: Any = PrefillSwap(SlidingWindow(window=2), [0])  # type: ignore[arg-type]
    assert swap.layers == [0]
