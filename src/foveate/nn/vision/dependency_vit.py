"""DependencyViT's layer: tokens that send to their parents, and the tree that this draws.

Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention (2023), arXiv 2304.03282.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.core import masks, validate
from foveate.core.errors import OptionError, ShapeError
from foveate.nn.base.layer import Layer
from foveate.ops.dense.reversed_attention import ReversedAttention


class Sent(NamedTuple):
    """What a layer gives.

    Args:
        out: `(B, N, C)`.
        message: how loudly each token sends, after this layer, `(B, N)`: the next layer's input.
        received: shares that reached each token, `(B, N)`; over all tokens they add up to the messages.
    """

    out: Float[Tensor, "b n c"]
    message: Float[Tensor, "b n"]
    received: Float[Tensor, "b n"]


@final
class DependencyAttention(Layer):
    """Each token (child) picks parents by a softmax and sends them `p_h m v`: `foveate.ops`' `ReversedAttention`.

    Which of its heads a child uses is a softmax as well (`p`, sharp), and `m` in (0, 1), which falls from layer to
    layer, says how loudly it speaks: pass each layer's `send(...).message` on to the next. `dependency_tree` reads a
    tree off the layers' `dependency`, and `prune` drops tokens that say or receive little. Cost O(N² C). The wrong
    choice for text (a child sees all parents), or where every token needs an output of its own.

    Args:
        dim, heads: C and H; the paper has 12 heads at every size.
        temperature: of the softmax over heads.

    Input:
        message: `(B, N)`, what the layers before have left of each token's voice; ones where there is none.

    The official repository holds no code. Biases (an output bias, and no others) and the message's hidden layer of
    `C / 2` follow an unmerged port to timm; its author was unsure of them, and trained nothing.
    """

    capabilities = replace(
        Layer.capabilities, patterns=frozenset({"self"}), masks=frozenset({"keys"}), inputs=frozenset({"message"})
    )

    def __init__(self, dim: int, heads: int = 12, *, temperature: float = 0.1) -> None:
        super().__init__(dim, heads)
        if dim % heads:
            raise OptionError(f"heads={heads} must divide dim={dim}")
        validate.between("temperature", temperature, 1e-3, 1e3)
        self.temperature = temperature
        self.op = ReversedAttention()
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.selector = nn.Linear(dim, heads, bias=False)
        hidden = max(1, dim // 2)
        self.controller = nn.Sequential(nn.Linear(dim, hidden, bias=False), nn.GELU(), nn.Linear(hidden, 1, bias=False))

    def send(
        self, x: Float[Tensor, "b n c"], message: Float[Tensor, "b n"] | None = None, mask: Tensor | None = None
    ) -> Sent:
        """The layer's output, and what a network of such layers passes on; `mask` is of kind "keys"."""
        self._check(x, None, mask, False, None, {})
        x, there = _there(x, mask)
        heard = self._heard(x, message)
        children, parents, v = self._heads(x)
        voice = (self._heads_chosen(x) * heard[..., None]).mT[..., None]
        # a column of ones rides along: what becomes of it is what each parent received
        sent = self.op(parents, children, torch.cat([v, torch.ones_like(v[..., :1])], -1) * voice, mask=there)
        out = self.out(sent[..., :-1].transpose(1, 2).flatten(2))
        return Sent(out, heard, sent[..., -1].sum(1))

    def dependency(
        self, x: Float[Tensor, "b n c"], message: Float[Tensor, "b n"] | None = None, mask: Tensor | None = None
    ) -> Float[Tensor, "b n n"]:
        """The soft dependency mask: row j, column i is what parent j gets of child i, over all heads. O(N²) memory."""
        self._check(x, None, mask, False, None, {})
        x, there = _there(x, mask)
        children, parents, _ = self._heads(x)
        shares = self.op.weights(parents, children, mask=there)
        return (shares * self._heads_chosen(x).mT[:, :, None]).sum(1) * self._heard(x, message)[:, None]

    def _mix(self, x: Tensor, memory: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        return self.send(x, inputs.get("message"), mask).out

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the children, keys of the parents, values: `(B, H, N, D)` each."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def _heads_chosen(self, x: Tensor) -> Tensor:
        """How much each child uses each head, `(B, N, H)`, adding up to 1."""
        return torch.softmax(self.selector(x) / self.temperature, -1)

    def _heard(self, x: Tensor, message: Tensor | None) -> Tensor:
        """The message after this layer: it can only fall."""
        heard = torch.sigmoid(self.controller(x)[..., 0])
        if message is None:
            return heard
        if message.shape != heard.shape:
            raise ShapeError(f"message must be (B, N)={tuple(heard.shape)}; got {tuple(message.shape)}")
        return message * heard

    @classmethod
    def example_inputs(cls, batch: int, length: int) -> dict[str, Any]:
        random = torch.Generator().manual_seed(0)
        return {"message": torch.rand(batch, length, generator=random, dtype=torch.float64)}


class Tree(NamedTuple):
    """Each token's parent `(B, N)` (the root is its own), and the roots `(B,)`."""

    parent: Int[Tensor, "b n"]
    root: Int[Tensor, " b"]


def dependency_tree(dependencies: Sequence[Float[Tensor, "b n n"]]) -> Tree:
    """The tree that the layers' dependency masks, first to last, draw together.

    A layer passes on what a token keeps (1) and what it sends (its column), scaled to a sum of 1, and layers follow
    each other as a product. The root receives most. Every other token's parent is the one that gets most of it among
    those that receive more than itself do, so that there are no cycles. The product and its residual are
    reconstructed, as is the order by what is received.
    """
    if not dependencies:
        raise OptionError("dependencies must hold at least one layer's mask; got none")
    n = dependencies[0].shape[-1]
    total = torch.eye(n, dtype=dependencies[0].dtype, device=dependencies[0].device)
    for mask in dependencies:
        flow = mask + torch.eye(n, dtype=mask.dtype, device=mask.device)
        total = flow / flow.sum(-2, keepdim=True) @ total
    order = total.sum(-1).argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(-1)
    above = rank[:, :, None] < rank[:, None]  # row j receives more than column i
    parent = total.masked_fill(~above, masks.NEVER).argmax(-2)
    root = order[:, 0]
    return Tree(parent.scatter(1, root[:, None], root[:, None]), root)


def prune(scores: Float[Tensor, "b n"], ratio: float = 0.16, time: int = 1) -> Int[Tensor, "b kept"]:
    """The tokens that stay, in their order: those of the highest scores.

    Args:
        scores: of a layer, `Sent.message` or `Sent.received`.
        ratio: share of the first number of tokens that goes each time.
        time: the how-manieth time this is, from 1: `(1 - ratio time) / (1 - ratio (time - 1))` of the present stay.
    """
    validate.count("time", time, 1)
    validate.between("ratio", ratio, 0, 1)
    if ratio * time >= 1:
        raise OptionError(f"ratio={ratio} leaves no token the time={time}; ratio * time must be under 1")
    share = (1 - ratio * time) / (1 - ratio * (time - 1))
    keep = max(1, math.floor(share * scores.shape[1] + 1e-9))
    return scores.topk(keep, -1).indices.sort(-1).values


def _there(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Tokens without what is hidden, and a mask by which hidden tokens neither send nor receive."""
    if mask is None:
        return x, None
    seen = masks.keys_of(mask, x.shape[0], x.shape[1])
    return x.masked_fill(~seen[..., None], 0.0), (seen[:, :, None] & seen[:, None])[:, None]
