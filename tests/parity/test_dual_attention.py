"""Dual attention against its authors' package, `dual-attention`: layers, relations, and the three kinds of symbols."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from foveate.nn import Rotary
from foveate.nn.parts.symbols import PositionalSymbols, RelativeSymbols, SymbolicAttention
from foveate.nn.sequence.dual_attention_transformer import DualAttention
from tests.parity import peers

peer = pytest.importorskip("dual_attention.dual_attention", reason=peers.MISSING)
peer_symbols = pytest.importorskip("dual_attention.symbol_retrieval", reason=peers.MISSING)
peer_utils = pytest.importorskip("dual_attention.attention_utils", reason=peers.MISSING)

DIM, N, SYMBOLS, REACH = 24, 7, 5, 3
SENSORY = {"q": "wq", "k": "wk", "v": "wv", "out": "wo"}
RELATIONAL = {
    "q": "wq_attn", "k": "wk_attn", "rel_q": "wq_rel", "rel_k": "wk_rel", "from_symbols": "wv", "out": "wo",
}  # fmt: skip


def pair(sensory: int, relational: int, *, kind: str = "attended", group: int = 1, **options: Any) -> tuple:
    """Ours, theirs, their source of symbols, and leaves for all of it."""
    symbols: Any = {
        "attended": lambda: SymbolicAttention(DIM, 2, SYMBOLS),
        "positions": lambda: PositionalSymbols(DIM, N + 2),
        "distances": lambda: RelativeSymbols(DIM, REACH),
    }[kind]()
    ours = DualAttention(DIM, sensory, relational, symbols, group=group, **options).double()
    told = {
        "n_relations": options.get("relations"), "symmetric_rels": options.get("symmetric", False),
        "rel_activation": options.get("rel_act", "identity"), "n_kv_heads": relational // group,
        "use_relative_positional_symbols": kind == "distances",
    }  # fmt: skip
    sa = {"n_kv_heads": sensory // group}
    theirs = peer.DualAttention(DIM, sensory, relational, 0.0, sa_kwargs=sa, ra_kwargs=told).double()
    retriever = {
        "attended": lambda: peer_symbols.SymbolicAttention(DIM, 2, SYMBOLS),
        "positions": lambda: peer_symbols.PositionalSymbolRetriever(DIM, N + 2),
        "distances": lambda: peer_symbols.PositionRelativeSymbolRetriever(DIM, REACH),
    }[kind]()
    return ours, theirs, retriever.double(), peers.weights(ours)


def converted(w: dict[str, Tensor], order: Any = lambda weight: weight) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of the layer, those of its symbols; `order` is for queries and keys that positions turn."""
    layer, symbols = {}, {}
    for name, value in w.items():
        part, _, rest = name.partition(".")
        if part == "symbols":
            named = {"q.weight": "q_proj.weight", "q.bias": "q_proj.bias", "templates": "template_features"}
            library = {1: "symbol_library", 2: "symbol_library.weight", 3: "rel_pos_enc.rel_pos_embeddings"}
            kind = 1 if "symbols.q.weight" in w else 3 if len(value) == 2 * REACH + 1 else 2
            symbols[named.get(rest) or library[kind]] = value
        elif rest == "from_relations":
            layer["relational_attention.wr"] = value
        else:
            names, inner = (SENSORY, "self") if part == "sensory" else (RELATIONAL, "relational")
            which = rest.removesuffix(".weight")
            layer[f"{inner}_attention.{names[which]}.weight"] = order(value) if which in "qk" else value
    return layer, symbols


def check(
    made: tuple, mine: dict[str, Any], other: dict[str, Any], order: Any = None, tolerance: float = 1e-12
) -> None:
    ours, theirs, retriever, w = made
    x = peers.leaf(2, N, DIM, seed=1)

    def theirs_of_x() -> Tensor:
        layer, symbols = converted(w, order or (lambda weight: weight))
        told = peers.call(retriever, symbols, x) if symbols else None
        return peers.call(theirs, layer, x, told, **other)[0]

    peers.agree(lambda: peers.call(ours, w, x, **mine), theirs_of_x, {"x": x, **w}, tolerance)


@pytest.mark.parametrize("kind", ["attended", "positions", "distances"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("act", ["identity", "relu", "sigmoid", "tanh", "silu", "gelu"])
def test_symbols_and_relations(kind: str, causal: bool, act: str) -> None:
    made = pair(2, 4, kind=kind, rel_act=act)
    check(made, {"causal": causal}, {"is_causal": causal})


@pytest.mark.parametrize("heads", [(0, 4), (4, 0), (3, 1)])
def test_kinds_of_heads(heads: tuple[int, int]) -> None:
    check(pair(*heads), {"causal": True}, {"is_causal": True})


@pytest.mark.parametrize("options", [{"relations": 2}, {"relations": 8}, {"symmetric": True}, {"group": 2}])
@pytest.mark.parametrize("act", ["identity", "tanh"])
def test_options(options: dict[str, Any], act: str) -> None:
    made = pair(2, 4, rel_act=act, **options)
    check(made, {}, {})


@pytest.mark.parametrize("act", ["identity", "tanh"])
def test_masks_of_pairs(act: str) -> None:
    random = torch.Generator().manual_seed(4)
    seen = (torch.rand(N, N, generator=random) < 0.5) | torch.eye(N, dtype=torch.bool)
    check(pair(2, 4, rel_act=act), {"mask": seen}, {"attn_mask": seen})


@pytest.mark.parametrize("act", ["identity", "tanh"])
def test_rotary_positions_turn_attention_and_not_relations(act: str) -> None:
    """Their pairs are neighbouring channels, and turned in float32."""
    made = pair(2, 4, rel_act=act, position=Rotary())
    cos, sin = peer_utils.precompute_freqs_cis(DIM // 6, N)

    def order(weight: Tensor) -> Tensor:
        return rearrange(weight, "(h two c) i -> (h c two) i", two=2, c=DIM // 12)

    check(made, {"causal": True}, {"is_causal": True, "freqs_cos": cos, "freqs_sin": sin}, order, 2e-6)
