"""DependencyViT's layer: tokens send values to their parents, and a tree follows from the weights.

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
    """The output of a layer.

    Args:
        out: `(B, N, C)`.
        message: the factor on each token's value after this layer, `(B, N)`: the next layer's input.
        received: the sum of shares that reached each token, `(B, N)`; over all tokens they add up to the messages.
    """

    out: Float[Tensor, "b n c"]
    message: Float[Tensor, "b n"]
    received: Float[Tensor, "b n"]


@final
class DependencyAttention(Layer):
    """A token (child) picks parents by a softmax and sends them `p_h m v`; see `foveate.ops.ReversedAttention`.

    A second, sharp softmax `p` weighs the child's heads. The message `m` in (0, 1) scales its values and falls from
    layer to layer: pass each layer's `send(...).message` on to the next. `dependency_tree` derives a tree from the
    layers' `dependency`, and `prune` drops tokens that send or receive little. Cost O(N² C). The wrong choice for text
    (a child sees all parents), or if every token needs its own output.

    Args:
        dim, heads: C and H; the paper has 12 heads at every size.
        temperature: the temperature of the softmax over heads.

    Input:
        message: `(B, N)`, the message after the layer before; ones by default.

    The official repository holds no code. Biases (only an output bias) and the message's hidden layer of `C / 2` follow
    an unmerged port to timm, whose author was unsure of them and trained nothing.
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
        """Return the output and the message for the next layer; `mask` is of kind "keys"."""
        self._check(x, None, mask, False, None, {})
        x, visible = _without_hidden(x, mask)
        passed = self._message(x, message)
        children, parents, v = self._heads(x)
        factor = (self._heads_chosen(x) * passed[..., None]).mT[..., None]
        # an added column of ones sums up the shares that each parent receives
        sent = self.op(parents, children, torch.cat([v, torch.ones_like(v[..., :1])], -1) * factor, mask=visible)
        out = self.out(sent[..., :-1].transpose(1, 2).flatten(2))
        return Sent(out, passed, sent[..., -1].sum(1))

    def dependency(
        self, x: Float[Tensor, "b n c"], message: Float[Tensor, "b n"] | None = None, mask: Tensor | None = None
    ) -> Float[Tensor, "b n n"]:
        """Return the soft dependency mask: row j, column i is parent j's share of child i over all heads, O(N²)."""
        self._check(x, None, mask, False, None, {})
        x, visible = _without_hidden(x, mask)
        children, parents, _ = self._heads(x)
        shares = self.op.weights(parents, children, mask=visible)
        return (shares * self._heads_chosen(x).mT[:, :, None]).sum(1) * self._message(x, message)[:, None]

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        return self.send(x, inputs.get("message"), mask).out

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries of the children, keys of the parents, and values: `(B, H, N, D)` each."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def _heads_chosen(self, x: Tensor) -> Tensor:
        """Return each child's weights over heads, `(B, N, H)`, which add up to 1."""
        return torch.softmax(self.selector(x) / self.temperature, -1)

    def _message(self, x: Tensor, message: Tensor | None) -> Tensor:
        """Return the message after this layer, which is never larger than before."""
        own = torch.sigmoid(self.controller(x)[..., 0])
        if message is None:
            return own
        if message.shape != own.shape:
            raise ShapeError(f"message must be (B, N)={tuple(own.shape)}; got {tuple(message.shape)}")
        return message * own

    @classmethod
    def example_inputs(cls, batch: int, length: int) -> dict[str, Any]:
        random = torch.Generator().manual_seed(0)
        return {"message": torch.rand(batch, length, generator=random, dtype=torch.float64)}


class Tree(NamedTuple):
    """The parent of each token `(B, N)` (the root is its own), and the roots `(B,)`."""

    parent: Int[Tensor, "b n"]
    root: Int[Tensor, " b"]


def dependency_tree(dependencies: Sequence[Float[Tensor, "b n n"]]) -> Tree:
    """Return the tree that follows from the layers' dependency masks, first to last.

    A layer's matrix adds the identity (the residual) to its dependency mask, with columns scaled to a sum of 1, and the
    layers' matrices are multiplied. The root receives most. Every other token's parent is the one that gets the largest
    share of it among the tokens that receive more than the token itself, so there are no cycles. The product, its
    residual and this order are reconstructed.
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
    parent = total.masked_fill(~above, masks.NEG_INF).argmax(-2)
    root = order[:, 0]
    return Tree(parent.scatter(1, root[:, None], root[:, None]), root)


def prune(scores: Float[Tensor, "b n"], ratio: float = 0.16, time: int = 1) -> Int[Tensor, "b kept"]:
    """Return the tokens of the highest scores, in their order.

    Args:
        scores: a layer's `Sent.message` or `Sent.received`.
        ratio: share of the original tokens that each pruning drops.
        time: number of this pruning, from 1: the share `(1 - ratio time) / (1 - ratio (time - 1))` of the present
            stays.
    """
    validate.count("time", time, 1)
    validate.between("ratio", ratio, 0, 1)
    if ratio * time >= 1:
        raise OptionError(f"ratio={ratio} times time={time} must be below 1, so that a token stays")
    share = (1 - ratio * time) / (1 - ratio * (time - 1))
    keep = max(1, math.floor(share * scores.shape[1] + 1e-9))
    return scores.topk(keep, -1).indices.sort(-1).values


def _without_hidden(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return tokens with hidden ones zeroed, and a mask by which hidden tokens neither send nor receive."""
    if mask is None:
        return x, None
    seen = masks.keys_of(mask, x.shape[0], x.shape[1])
    return x.masked_fill(~seen[..., None], 0.0), (seen[:, :, None] & seen[:, None])[:, None]
