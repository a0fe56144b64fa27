"""The common part of head schemes: positions, rates, streams and refusals, on the simplest scheme."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import foveate.nn
from foveate.core.errors import OptionError, UnsupportedPattern
from foveate.nn import Alibi, MultiHeadAttention, RelativeBias, Rotary
from foveate.nn.parts.heads import HeadScheme, Rates, activation, merge, split, width
from foveate.nn.sequence.dual_attention_transformer import SensoryHeads
from foveate.nn.sequence.dynamic_mask_attention import DynamicMaskAttention
from foveate.nn.sequence.key_driven_gqa import KeyDrivenGQA
from foveate.nn.sequence.mhe_attention import MultiHeadEmbeddingAttention
from foveate.nn.sequence.moh import MixtureOfHeadAttention
from foveate.nn.sequence.routing_self_attention import RoutingSelfAttention
from foveate.nn.sequence.super_attention import OptimisedAttention, SlimAttention
from foveate.ops import create
from foveate.ops.calls import sized
from tests.support.tensors import assert_near

DIM, HEADS, LENGTH = 16, 4, 9


class Plain(HeadScheme):
    """Multi-head attention as a scheme."""

    def __init__(self, **options) -> None:
        super().__init__(DIM, HEADS, **options)
        widths = HEADS * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.value_dim
        self.q, self.k, self.v = (nn.Linear(DIM, w, bias=self.out.bias is not None) for w in widths)

    def project(self, x: Tensor, source: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return split(self.q(x), self.heads), split(self.k(source), self.kv_heads), split(self.v(source), self.kv_heads)


def schemes(bias: bool) -> dict[str, HeadScheme]:
    """Make every head scheme of the library with `bias`."""
    return {
        "multi_head": MultiHeadAttention(DIM, HEADS, gate="silu", bias=bias),
        "moh": MixtureOfHeadAttention(DIM, HEADS, 2, 1, bias=bias),
        "kdgqa": KeyDrivenGQA(DIM, HEADS, 2, bias=bias),
        "mhe": MultiHeadEmbeddingAttention(DIM, HEADS, bias=bias),
        "optimised": OptimisedAttention(DIM, HEADS, bias=bias),
        "slim": SlimAttention(DIM, HEADS, bias=bias),
        "sensory": SensoryHeads(DIM, HEADS, HEADS, 4, bias=bias),
        "dynamic_mask": DynamicMaskAttention(DIM, HEADS, bias=bias),
        "routing": RoutingSelfAttention(DIM, HEADS, bias=bias),
    }


@pytest.mark.parametrize("bias", [False, True])
def test_bias_is_of_all_projections_in_every_scheme(bias: bool) -> None:
    made = schemes(bias)
    assert all(getattr(foveate.nn, name) for name in foveate.nn.__all__)  # loads every public module
    house = {cls for cls in HeadScheme.__subclasses__() if cls.__module__.startswith("foveate.")}
    assert house == {type(scheme) for scheme in made.values()}, "a scheme is missing here"
    for name, scheme in made.items():
        maps = {part: m for part, m in scheme.named_children() if part in ("q", "k", "v", "out", "gating")}
        assert {"q", "out"} <= maps.keys()
        assert {part for part, m in maps.items() if m.bias is not None} == (maps.keys() if bias else set()), name


def tokens(n: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randn(2, n, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(**options) -> tuple[Plain, MultiHeadAttention]:
    """Make the scheme and `MultiHeadAttention` with the same parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = Plain(**options).double()
    twin = MultiHeadAttention(DIM, HEADS, **options).double()
    twin.load_state_dict(plain.state_dict())
    return plain, twin


def table() -> RelativeBias:
    position = RelativeBias(HEADS, 3)
    nn.init.normal_(position.table, generator=torch.Generator().manual_seed(2))
    return position


OPTIONS = [
    {}, {"kv_heads": 2, "head_dim": 6, "value_dim": 5, "bias": True}, {"position": Rotary()},
    {"position": Alibi(HEADS)}, {"position": table()}, {"op": "titans"},
    {"op": "hedgehog", "position": Rotary()}, {"op": "sliding_window"},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_equals_multi_head_attention(options: dict) -> None:
    plain, twin = pair(**options)
    assert plain.capabilities == twin.capabilities
    x, other = tokens(), tokens(5, seed=3)
    for pattern in sorted(plain.capabilities.patterns):
        causal, source = pattern.startswith("causal"), other if "cross" in pattern else None
        assert_near(plain(x, source, causal=causal), twin(x, source, causal=causal), 1e-12)
        if source is None and "pairs" in plain.capabilities.masks:
            mask = (torch.rand(LENGTH, LENGTH, generator=torch.Generator().manual_seed(4)) > 0.3) | torch.eye(
                LENGTH
            ).bool()
            for given in (mask, torch.zeros(LENGTH, LENGTH).double().masked_fill(~mask, -torch.inf)):
                if given.dtype == torch.bool or "bias" in plain.capabilities.masks:
                    assert_near(plain(x, mask=given, causal=causal), twin(x, mask=given, causal=causal), 1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_streams(options: dict) -> None:
    plain, _ = pair(**options)
    x = tokens()
    if plain.capabilities.streaming is None:
        with pytest.raises(UnsupportedPattern, match="one token at a time"):
            plain.init_state(2)
        return
    expected = plain(x, causal=True)
    state, out = plain.init_state(2, dtype=torch.float64), []
    for t in range(LENGTH):
        y, state = plain.step(x[:, t : t + 1], state)
        out.append(y)
    assert_near(torch.cat(out, 1), expected, 1e-10)
    assert state.seen == LENGTH
    first, state = plain.prefill(x[:, :4])
    assert state.seen == 4
    assert_near(first, expected[:, :4], 1e-10)
    assert_near(plain.step(x[:, 4:5], state)[0], expected[:, 4:5], 1e-10)


@pytest.mark.parametrize("position", [Rotary(), table()])
def test_the_last_queries_are_at_the_last_keys(position) -> None:
    plain, _ = pair(position=position)
    x = tokens()
    q, k, v = plain.project(x, x, None)
    last = plain.attend(q[:, :, -3:], k, v, x[:, -3:], None, True)
    assert_near(last, plain(x, causal=True)[:, -3:], 1e-12)


def test_split_and_merge() -> None:
    x = torch.arange(12.0).reshape(1, 2, 6)
    assert split(x, 3)[0, :, 1].tolist() == [[6, 7], [8, 9], [10, 11]]
    assert_near(merge(split(x, 3)), x, 0)


def test_rates() -> None:
    op, x = sized("titans", HEADS, 4, 4), tokens().float()
    rates = Rates(DIM, HEADS, op)
    assert set(rates) == op.capabilities.inputs & set(op.capabilities.gates) != set()
    for name, rate in rates(x).items():
        assert_near(rate, activation(rates[name](x), op.capabilities.gates[name].activation).transpose(1, 2), 0)
        assert rates[name].bias.unique().tolist() == pytest.approx([op.capabilities.gates[name].bias])
    assert Rates(DIM, HEADS, create("softmax"))(x) == {}


def test_rates_come_from_the_query_or_from_the_key() -> None:
    x, source = tokens().float(), 2 * tokens().float()
    for key, of in (("dsf", x), ("titans", source)):
        rates = Rates(DIM, HEADS, sized(key, HEADS, 4, 4))
        given, own = rates(x, source), rates(of)
        assert given.keys() == own.keys() != set()
        for name, rate in given.items():
            assert_near(rate, own[name], 0)


def test_activations() -> None:
    x = torch.tensor([-1.0, 0.5])
    expected = {
        "sigmoid": 1 / (1 + (-x).exp()), "softplus": (1 + x.exp()).log(), "exp": x.exp(),
        "logsigmoid": -(1 + (-x).exp()).log(), "silu": x / (1 + (-x).exp()), None: x,
    }  # fmt: skip
    for how, value in expected.items():
        assert_near(activation(x, how), value, 1e-6)


def test_widths() -> None:
    assert width(12, 3, None) == 4
    assert width(12, 5, 7) == 7
    assert Plain(out_dim=3)(tokens().float()).shape == (2, LENGTH, 3)
    for options, message in (
        (dict(head_dim=0), "head_dim=0"), (dict(value_dim=0), "value_dim=0"), (dict(kv_heads=0), "kv_heads=0"),
        (dict(kv_heads=3), "kv_heads=3 must divide heads=4"), (dict(position=Alibi(3)), "position is for 3 heads"),
        (dict(op="titans", position=Alibi(4)), "position=Alibi adds a bias; Titans takes none"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=message):
            Plain(**options)
    with pytest.raises(OptionError, match="heads=5 must divide dim=12, unless head_dim is given"):
        width(12, 5, None)
    with pytest.raises(OptionError, match="heads=0"):
        width(12, 0, None)
