"""A model of the library's own blocks for the recall tasks, and the baseline linear attention."""

from __future__ import annotations

from dataclasses import replace
from typing import final

from torch import Tensor, nn
from torch.nn import functional as F

from foveate.nn import Block, Layer, MultiHeadAttention
from foveate.ops import Operator
from foveate.ops.base.linear import Linear
from tests.systems.ops.recall import VOCAB


@final
class Elu(Linear):
    """Classic linear attention: features `elu + 1`, over the sum of the weights."""

    capabilities = replace(Linear.capabilities, default_scale=1.0)

    def query_features(self, q: Tensor, scale: float) -> Tensor:
        return F.elu(q * scale) + 1

    def key_features(self, k: Tensor, scale: float) -> Tensor:
        return F.elu(k) + 1


class Stack(nn.Module):
    """A network from tokens to logits, with a block for each layer."""

    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        dim = layers[0].dim
        self.embed = nn.Embedding(VOCAB, dim)
        self.blocks = nn.ModuleList([Block(layer) for layer in layers])
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, causal=True)
        return self.head(self.norm(x))


def around(*ops: Operator, dim: int = 64, heads: int = 2) -> Stack:
    """Make two or more layers of attention with a short convolution before each."""
    return Stack([MultiHeadAttention(dim, heads, op=op, conv=4) for op in ops])
