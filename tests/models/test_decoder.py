"""The small decoder: its initial weights, its learned positions, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from foveate.core.errors import OptionError, ShapeError, UnsupportedPattern
from foveate.models.base.decoder import Decoder
from foveate.nn import MultiHeadAttention
from tests.support.tensors import assert_near


def decoder(**options: Any) -> Decoder:
    torch.manual_seed(0)
    return Decoder(200, [MultiHeadAttention(32, 2), MultiHeadAttention(32, 2)], **options)


def test_embeddings_begin_small_where_the_head_shares_them() -> None:
    net = decoder(places=100)
    assert net.head.weight is net.embed.weight
    assert net.embed.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert net.places is not None and net.places.weight.std().item() == pytest.approx(0.02, rel=0.05)
    apart = decoder(tied=False)
    assert apart.places is None and apart.head.weight is not apart.embed.weight
    assert apart.embed.weight.std().item() == pytest.approx(1.0, rel=0.05)


def test_each_position_adds_its_own_embedding() -> None:
    net = decoder(places=9)
    tokens = torch.randint(200, (2, 5), generator=torch.Generator().manual_seed(0))
    assert net.places is not None
    assert torch.equal(net.embedded(tokens, 3), net.embed(tokens) + net.places.weight[3:8])
    state, out = net.init_state(2), []
    for at in range(5):
        logits, state = net.step(tokens[:, at : at + 1], state, at)
        out.append(logits)
    assert_near(torch.cat(out, 1), net(tokens), 1e-5)


def test_positions_end_with_the_last_embedding() -> None:
    net = decoder(places=4)
    assert net(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 4, 200)
    with pytest.raises(ShapeError, match="places=4 positions; got N=5"):
        net(torch.zeros(1, 5, dtype=torch.long))


def test_what_makes_no_decoder_is_refused() -> None:
    with pytest.raises(OptionError, match=r"layers of one width; got widths \[32, 16\]"):
        Decoder(8, [MultiHeadAttention(32, 2), MultiHeadAttention(16, 2)])
    with pytest.raises(OptionError, match=r"layers of one width; got widths \[\]"):
        Decoder(8, [])
    with pytest.raises(UnsupportedPattern, match="a decoder's layers are causal"):
        Decoder(8, [MultiHeadAttention(32, 2, op="efficient_attention")])
    wrong: tuple[dict[str, Any], ...] = (dict(vocabulary=0), dict(vocabulary=8, places=-1))
    for options in wrong:
        with pytest.raises(OptionError, match=list(options)[-1]):
            Decoder(mixers=[MultiHeadAttention(32, 2)], **options)
