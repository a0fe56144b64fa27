"""A text classifier of one attention layer, small enough to derive its explanations in closed form.

Attention Meets Post-hoc Interpretability: A Mathematical Perspective (2024), arXiv 2402.03485.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.core.scoring import dot_product
from foveate.models.base.network import TextNetwork


@final
@dataclass(frozen=True, eq=False)
class ClsHeads:
    """The heads of a `ClsAttentionClassifier` in one run.

    Args:
        q: queries of the class token.
        k, v: keys and values of all tokens.
        weights: attention of the class token.
    """

    q: Float[Tensor, "b h d"]
    k: Float[Tensor, "b h t d"]
    v: Float[Tensor, "b h t dv"]
    weights: Float[Tensor, "b h t"]


@final
class ClsAttentionClassifier(TextNetwork):
    """`f(x) = 1/H sum_h w_h sum_t a_ht v_ht`: the class token attends to a text, and a linear map reads each head.

    Only the class token queries, so that a text costs O(T). There are no biases, norms or residual connections. As a
    model of text it has little use beyond the study of explanations.

    Args:
        vocabulary: number of tokens; the first two are the class token 0 and the unknown token 1.
        classes: number of classes.
        dim: C.
        heads: H.
        head_dim, value_dim: D of queries and keys, and Dv; None is D.
        length: the longest text, class token included. The paper fills texts up to 256 tokens with the unknown token,
            which is attended to as any other; see `padded`.
        scale: of the logits; None is D ** -0.5.

    Positions are sinusoids that are added to the embeddings. As in the authors' code, the maps start uniform in
    -0.1..0.1 and the embeddings normal.
    """

    cls = 0
    unknown = 1
    positions: Float[Tensor, "n c"]

    def __init__(
        self, vocabulary: int, classes: int = 2, *, dim: int = 128, heads: int = 6, head_dim: int = 64,
        value_dim: int | None = None, length: int = 256, scale: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        value_dim = head_dim if value_dim is None else value_dim
        sizes = dict(classes=classes, dim=dim, heads=heads, head_dim=head_dim, value_dim=value_dim, length=length)
        validate.count("vocabulary", vocabulary, 3)
        for name, value in sizes.items():
            validate.count(name, value, 1)
        if dim % 2:
            raise OptionError(f"dim={dim} must be even, for pairs of sine and cosine")
        self.vocabulary, self.heads, self.length = vocabulary, heads, length
        self.scale = validate.scale(scale, head_dim)
        self.embedding = nn.Embedding(vocabulary, dim)
        self.q, self.k = (nn.Linear(dim, heads * head_dim, bias=False) for _ in range(2))
        self.v = nn.Linear(dim, heads * value_dim, bias=False)
        self.out = nn.Linear(heads * value_dim, classes, bias=False)
        for linear in (self.q, self.k, self.v, self.out):
            nn.init.uniform_(linear.weight, -0.1, 0.1)
        self.register_buffer("positions", _sinusoids(length, dim), persistent=False)

    def forward(self, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b classes"]:
        """Return the classes' scores of texts whose first token is the class token."""
        return self.read(self.embed(ids))

    def embed(self, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t c"]:
        """Return tokens' embeddings with their positions."""
        if not isinstance(ids, Tensor) or ids.dtype != torch.long or ids.dim() != 2 or not 0 < ids.shape[1]:
            raise ShapeError(f"ids must be token ids (B, T); got {shown(ids)}")
        if ids.shape[1] > self.length:
            raise ShapeError(f"ids must be at most length={self.length} tokens long; got {ids.shape[1]}")
        return self.embedding(ids) + self.positions[: ids.shape[1]]

    def read(self, embedded: Float[Tensor, "b t c"]) -> Float[Tensor, "b classes"]:
        """Return the classes' scores of embedded texts."""
        found = self.attend(embedded)
        mixed = torch.einsum("bht,bhtd->bhd", found.weights, found.v)
        return self.out(mixed.flatten(1)) / self.heads

    def attend(self, embedded: Float[Tensor, "b t c"]) -> ClsHeads:
        """Return the heads' queries, keys, values and weights."""
        k, v = (self._split(linear(embedded)) for linear in (self.k, self.v))
        q = self._split(self.q(embedded[:, :1]))
        weights = dot_product(q, k, self.scale).softmax(-1)
        return ClsHeads(q[:, :, 0], k, v, weights[:, :, 0])

    def padded(self, ids: Int[Tensor, " n"]) -> Int[Tensor, " t"]:
        """Return a text with the class token in front, cut or filled with the unknown token to the full length."""
        whole = torch.full((self.length,), self.unknown, dtype=torch.long, device=ids.device)
        whole[0] = self.cls
        whole[1 : len(ids) + 1] = ids[: self.length - 1]
        return whole

    @classmethod
    def example(cls) -> Self:
        return cls(11, 3, dim=8, heads=2, head_dim=4, length=16)

    @classmethod
    def example_inputs(cls, batch: int) -> tuple[Tensor, ...]:
        ids = torch.randint(1, 11, (batch, 12), generator=torch.Generator().manual_seed(0))
        ids[:, 0] = 0
        return (ids,)

    def _split(self, x: Float[Tensor, "b t hd"]) -> Float[Tensor, "b h t d"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _sinusoids(length: int, dim: int) -> Float[Tensor, "n c"]:
    """Return the encodings of positions: pairs of sine and cosine of falling frequency."""
    angles = torch.arange(length)[:, None] * 10_000.0 ** (-torch.arange(0, dim, 2) / dim)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
