"""Attention sinks of a model: where they stand, since which layer, and how strong they are.

When Attention Sink Emerges in Language Models: An Empirical View (2024), arXiv 2410.10781. A key's importance is the
mean attention that it receives from the queries that see it; it is a sink of a head if that is above a threshold. The
paper finds that sinks appear during training, in all models with softmax, that a learnt key takes their part, and that
there are none where weights need not sum to one; `KernelAttention` has its variants.

The metric follows the release. The paper reports one rate for the first token; `SinkReport` also looks for the place
and the layer, by rules of this project. The release reads whole matrices; here `foveate.look` measures importance in
O(N) memory, beside the model's fused kernel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, UnsupportedModel
from foveate.host.entry import apply
from foveate.host.fused_statistics import grouped
from foveate.host.method import Method
from foveate.host.site import Site
from foveate.lens.lens import look
from foveate.lens.measures import ReceivedMass


def key_importance(attention: Float[Tensor, "... t t"]) -> Float[Tensor, "... t"]:
    """Return the mean attention that each key receives from itself and later queries, from causal weights."""
    t = attention.shape[-1]
    if attention.ndim < 2 or attention.shape[-2] != t:
        raise ShapeError(f"attention must be (..., T, T); got {tuple(attention.shape)}")
    return attention.sum(-2) / torch.arange(t, 0, -1, device=attention.device)


def sink_profile(attention: Float[Tensor, "b l h t t"], eps: float = 0.3) -> Float[Tensor, " t"]:
    """Return the share of texts, layers and heads in which each position is a sink: its importance is above `eps`."""
    validate.between("eps", eps, 0.0, 1.0)
    return (key_importance(attention) > eps).double().flatten(0, -2).mean(0)


def sink_rate(attention: Float[Tensor, "b l h t t"], k: int = 0, eps: float = 0.3) -> float:
    """Return the share of texts, layers and heads in which position `k` is a sink."""
    validate.count("k", k)
    if k >= attention.shape[-1]:
        raise OptionError(f"k={k} must be a position in 0..{attention.shape[-1] - 1}")
    return float(sink_profile(attention, eps)[k])


@final
@dataclass(frozen=True, eq=False)
class SinkReport:
    """The sinks of a model on texts of one length.

    Args:
        importance: each key's importance, a mean over texts, `(L, H, T)`.
        rates: the share of texts in which each key is a sink of each head, `(L, H, T)`.
    """

    importance: Float[Tensor, "l h t"]
    rates: Float[Tensor, "l h t"]

    def rate(self, k: int = 0) -> float:
        """Return the paper's metric of a position, its share of texts, layers and heads; times 100 it is in percent."""
        return float(self.rates[..., k].mean())

    @property
    def place(self) -> int:
        """The position of the strongest sink: the highest rate, and of equal ones the highest importance.

        Keys that fewer than half of the queries see do not count: the last ones receive little but their own.
        """
        t = self.rates.shape[-1]
        seen = slice(0, t // 2 + 1)
        rates, importance = (x[..., seen].double().mean((0, 1)) for x in (self.rates, self.importance))
        return int((rates + 1e-6 * importance).argmax())

    def since(self, k: int | None = None, share: float = 0.5) -> int | None:
        """Return the first layer in which at least `share` of heads and texts have a sink; None if there is none.

        Args:
            k: the sink's position; None is `place`.
            share: of heads and texts.
        """
        validate.between("share", share, 0.0, 1.0)
        layers = (self.rates[..., self.place if k is None else k].mean(1) >= share).nonzero()
        return int(layers[0]) if len(layers) else None

    def strength(self, k: int | None = None) -> Float[Tensor, " l"]:
        """Return the mean importance of a position in each layer; None is `place`."""
        return self.importance[..., self.place if k is None else k].mean(1)


def sink_report(model: object, texts: Iterable[Int[Tensor, "b t"]], eps: float = 0.3) -> SinkReport:
    """Measure the sinks of a decoder while its fused kernel runs; no weight matrix is held.

    The paper takes 100 texts of 64 tokens, natural or random.

    Args:
        model: a decoder with one stack of layers.
        texts: batches of token ids, all of one length, without padding.
        eps: the importance above which a key is a sink.
    """
    validate.between("eps", eps, 0.0, 1.0)
    importance: list[Tensor] = []
    for ids in texts:
        if ids.ndim != 2 or (importance and ids.shape[1] != importance[0].shape[-1]):
            raise ShapeError(f"texts must hold ids (B, T) of one length; got {tuple(ids.shape)}")
        seen = look(model, ids, measures=(ReceivedMass(per_row=True),))
        for layer, reason in seen.lens.unseen.items():
            raise UnsupportedModel(f"layer {layer} has no weights: {reason}")
        importance.append(torch.stack(list(seen.values("received_mean").values()), 1).double())
    if not importance:
        raise OptionError("texts must hold at least one batch; got none")
    found = torch.cat(importance)
    return SinkReport(found.mean(0), (found > eps).double().mean(0))


@final
@dataclass(frozen=True, eq=False)
class TokenNorms:
    """The facts that set a sink apart from other tokens, means over texts and heads.

    Args:
        hidden: the length of each token's state before each layer and after the last, `(L + 1, T)`.
        keys, values: the lengths of its keys and values, `(L, T)`.
        cosine: the mean cosine between its key and the queries that see it, `(L, T)`.
    """

    hidden: Float[Tensor, "l1 t"]
    keys: Float[Tensor, "l t"]
    values: Float[Tensor, "l t"]
    cosine: Float[Tensor, "l t"]


@torch.no_grad()
def token_norms(model: object, ids: Int[Tensor, "b t"]) -> TokenNorms:
    """Measure the norms of hidden states, keys and values, and the angle to the queries, in O(N) memory.

    Args:
        model: a causal decoder with one stack of layers.
        ids: token ids without padding.
    """
    record = _Norms()
    with apply(model, record) as run:
        out = run.host.model(ids, use_cache=False, output_hidden_states=True)
    hidden = torch.stack([state.float().norm(dim=-1).mean(0) for state in out.hidden_states])
    layers = [record.found[layer] for layer in sorted(record.found)]
    return TokenNorms(hidden, *(torch.stack(parts) for parts in zip(*layers, strict=True)))


@final
class _Norms(Method):
    """Record the norms of keys and values, and the keys' mean cosine with later queries."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def read(self, site: Site, out: Tensor) -> None:
        if not site.is_causal or site.k.shape[2] != site.q.shape[2]:
            raise UnsupportedModel(f"{type(site.module).__name__} is not causal over one text; token_norms needs that")
        q, k, v = site.q.float(), site.k.float(), site.v.float()
        unit = F.normalize(q, dim=-1).flip(2).cumsum(2).flip(2)  # the sum over a key's own and later queries
        later = unit / torch.arange(q.shape[2], 0, -1, device=q.device)[:, None]
        cosine = (later * grouped(F.normalize(k, dim=-1), q.shape[1])).sum(-1)
        self.found[site.layer] = k.norm(dim=-1).mean((0, 1)), v.norm(dim=-1).mean((0, 1)), cosine.mean((0, 1))
