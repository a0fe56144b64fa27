"""Alignment functions, which score a key for a query, in the forms of An Attentive Survey of Attention Models.

The classes hold weights per head, for queries `(B, H, Nq, D)` and keys `(B, H, Nk, D)`; `ALIGNMENTS` names them, and
`make_alignment` builds one. Systems with projections of their own take the additive form from `pair_score`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, unknown
from foveate.core.scoring import Tile
from foveate.ops.functional.additive_score import pair_score, pairs, read_out

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid, "gelu": F.gelu, "elu+1": lambda x: F.elu(x) + 1,
}  # fmt: skip


class Alignment(nn.Module):
    """Logits of queries and keys. Subclasses override `prepare` or `score`.

    `prepare` reduces a form to a plain inner product, which fused kernels compute; its keys may have fewer heads than
    its queries. `score` computes any other form, pair by pair.
    """

    #: the factor on the logits if a call gives none; None for `D ** -0.5`
    default_scale: float | None = 1.0

    def __init__(self) -> None:
        super().__init__()

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q, k

    def score(self, q: Tensor, k: Tensor, at: Tile) -> Float[Tensor, "b h q k"]:
        return q @ k.mT

    def score_macs(self, width: int) -> int:
        """Return the multiply-adds in the score of one pair of vectors of `width` numbers."""
        return width

    @final
    @property
    def is_inner_product(self) -> bool:
        return type(self).score is Alignment.score

    def check(self, q: Tensor, n_keys: int) -> None:
        """Refuse a call that the weights do not fit."""


class Dot(Alignment):
    """The inner product `q . k`."""


class ScaledDot(Alignment):
    """The scaled inner product `q . k / sqrt(D)`."""

    default_scale = None


class Similarity(Alignment):
    """The cosine of the angle between q and k."""

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1)


class Kernel(Alignment):
    """A kernel: `phi(q) . phi(k)`."""

    def __init__(self, activation: str = "elu+1") -> None:
        super().__init__()
        self.phi = _activation(activation)

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.phi(q), self.phi(k)


class Learned(Alignment):
    """An alignment with weights, for H heads of width D."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        validate.count("heads", heads, 1)
        validate.count("head_dim", head_dim, 1)
        self.heads, self.head_dim = heads, head_dim

    def check(self, q: Tensor, n_keys: int) -> None:
        if (q.shape[1], q.shape[3]) != (self.heads, self.head_dim):
            built = f"built for {self.heads} heads of width {self.head_dim}"
            raise ShapeError(f"{built}; got H={q.shape[1]}, D={q.shape[3]}")

    def weight(self, out: int, width: int) -> nn.Parameter:
        """Make a weight `(H, out, width)`, initialised like that of `nn.Linear`."""
        return nn.Parameter(torch.empty(self.heads, out, width).uniform_(-(width**-0.5), width**-0.5))

    def zeros(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(self.heads, *shape))


class General(Learned):
    """The bilinear form `q W k`."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__(heads, head_dim)
        self.w = self.weight(head_dim, head_dim)

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q @ self.w.to(q), k


class BiasedGeneral(General):
    """The bilinear form with a bias: `k (W q + b)`."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__(heads, head_dim)
        self.b = self.zeros(head_dim)

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q @ self.w.to(q).mT + self.b.to(q)[:, None], k


class ActivatedGeneral(Learned):
    """The bilinear form under an activation: `act(q W k + b)`."""

    def __init__(self, heads: int, head_dim: int, activation: str = "tanh") -> None:
        super().__init__(heads, head_dim)
        self.w, self.b, self.act = self.weight(head_dim, head_dim), self.zeros(), _activation(activation)

    def score(self, q: Tensor, k: Tensor, at: Tile) -> Tensor:
        return self.act(q @ self.w.to(q) @ k.mT + self.b.to(q)[:, None, None])


class Pairwise(Learned):
    """A vector w times `hidden` activations of each pair (D of them by default)."""

    def __init__(self, heads: int, head_dim: int, hidden: int | None = None, activation: str = "tanh") -> None:
        super().__init__(heads, head_dim)
        self.hidden = head_dim if hidden is None else hidden
        validate.count("hidden", self.hidden, 1)
        self.act, self.b = _activation(activation), self.zeros(self.hidden)
        self.w = nn.Parameter(self.weight(1, self.hidden).detach()[:, 0])

    def score_macs(self, width: int) -> int:
        return self.hidden


class Summed(Pairwise, ABC):
    """A pairwise form whose activations are of a sum: one summand of the query's, one of the key's."""

    @abstractmethod
    def project(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return the query's and the key's summand of the activation's argument."""

    def score(self, q: Tensor, k: Tensor, at: Tile) -> Tensor:
        return pair_score(*self.project(q, k), self.w.to(q), self.act)


class Additive(Summed):
    """The additive form `w . act(W_q q + W_k k + b)`."""

    def __init__(self, heads: int, head_dim: int, hidden: int | None = None, activation: str = "tanh") -> None:
        super().__init__(heads, head_dim, hidden, activation)
        self.w_q, self.w_k = self.weight(self.hidden, head_dim), self.weight(self.hidden, head_dim)

    def project(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q @ self.w_q.to(q).mT + self.b.to(q)[:, None], k @ self.w_k.to(k).mT


class Concat(Summed):
    """`w . act(W [q; k] + b)`: the additive form with one matrix for both."""

    def __init__(self, heads: int, head_dim: int, hidden: int | None = None, activation: str = "tanh") -> None:
        super().__init__(heads, head_dim, hidden, activation)
        self.w_both = self.weight(self.hidden, 2 * head_dim)

    def project(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        w_q, w_k = self.w_both.to(q).chunk(2, -1)
        return q @ w_q.mT + self.b.to(q)[:, None], k @ w_k.mT


class Deep(Additive):
    """The additive form with `depth` hidden layers in place of one."""

    def __init__(
        self, heads: int, head_dim: int, hidden: int | None = None, depth: int = 2, activation: str = "tanh"
    ) -> None:
        super().__init__(heads, head_dim, hidden, activation)
        validate.count("depth", depth, 1)
        self.layers = nn.ParameterList([self.weight(self.hidden, self.hidden) for _ in range(depth - 1)])
        self.biases = nn.ParameterList([self.zeros(self.hidden) for _ in range(depth - 1)])
        self.b_out = self.zeros()

    def score(self, q: Tensor, k: Tensor, at: Tile) -> Tensor:
        hidden = self.act(pairs(*self.project(q, k)))
        for w, b in zip(self.layers, self.biases, strict=True):
            hidden = self.act(hidden @ w.to(q).mT[:, None] + b.to(q)[:, None, None])
        return read_out(hidden, self.w.to(q)) + self.b_out.to(q)[:, None, None]

    def score_macs(self, width: int) -> int:
        return self.hidden * (1 + len(self.layers) * self.hidden)


class Location(Learned):
    """A score by position: `(W q)_j` for the key at position j, whatever its content; W covers `positions` keys."""

    def __init__(self, heads: int, head_dim: int, positions: int) -> None:
        super().__init__(heads, head_dim)
        validate.count("positions", positions, 1)
        self.w = self.weight(positions, head_dim)

    def check(self, q: Tensor, n_keys: int) -> None:
        super().check(q, n_keys)
        if n_keys > self.w.shape[1]:
            raise ShapeError(f"built for positions={self.w.shape[1]}; got Nk={n_keys}")

    def score(self, q: Tensor, k: Tensor, at: Tile) -> Tensor:
        return q @ self.w[:, at.cols].to(q).mT


class Feature(Pairwise):
    """A score of the key alone: `w . act(W k + b)`. The query has no influence."""

    def __init__(self, heads: int, head_dim: int, hidden: int | None = None, activation: str = "tanh") -> None:
        super().__init__(heads, head_dim, hidden, activation)
        self.w_k = self.weight(self.hidden, head_dim)

    def own(self, k: Tensor) -> Float[Tensor, "b h k"]:
        """Return each key's logit."""
        return (self.act(k @ self.w_k.to(k).mT + self.b.to(k)[:, None]) @ self.w.to(k)[:, :, None]).squeeze(-1)

    def score(self, q: Tensor, k: Tensor, at: Tile) -> Tensor:
        return self.own(k)[:, :, None].expand(-1, -1, q.shape[2], -1)

    def score_macs(self, width: int) -> int:
        return 0  # compute each key's logit once


ALIGNMENTS: dict[str, type[Alignment]] = {
    "similarity": Similarity, "dot": Dot, "scaled_dot": ScaledDot, "general": General, "biased_general": BiasedGeneral,
    "activated_general": ActivatedGeneral, "kernel": Kernel, "concat": Concat, "additive": Additive, "deep": Deep,
    "location": Location, "feature": Feature,
}  # fmt: skip


def make_alignment(name: str, *, heads: int | None = None, head_dim: int | None = None, **options: Any) -> Alignment:
    """Make the alignment of this name. Options that are None count as not given; alignments with weights need sizes.

    Raises:
        OptionError: an option that the alignment lacks, or one that it needs and did not get.
    """
    if name not in ALIGNMENTS:
        raise OptionError(str(unknown("alignment", name, ALIGNMENTS)))
    takes = signature(ALIGNMENTS[name]).parameters
    given = {key: value for key, value in options.items() if value is not None}
    if extra := sorted(given.keys() - takes.keys()):
        raise OptionError(f'alignment="{name}" takes no {", ".join(extra)}')
    sizes = {"heads": heads, "head_dim": head_dim}
    given |= {key: value for key, value in sizes.items() if value is not None and key in takes}
    needed = [key for key, parameter in takes.items() if parameter.default is Parameter.empty]
    if missing := [key for key in needed if key not in given]:
        raise OptionError(f'alignment="{name}" needs {" and ".join(missing)}')
    return ALIGNMENTS[name](**given)


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    validate.one_of("activation", name, tuple(ACTIVATIONS))
    return ACTIVATIONS[name]
