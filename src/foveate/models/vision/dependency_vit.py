"""DependencyViT: an image classifier whose tokens send messages to their parents, and its pruned form.

Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention (2023), arXiv 2304.03282.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal, Self, cast, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.models.base.network import Network, Size
from foveate.nn.parts.grid import to_tokens
from foveate.nn.vision.dependency_vit import DependencyAttention, Sent, Tree, dependency_tree, prune


@final
class DependencyViT(Network):
    """A classifier from `(B, channels, side, side)` to `(B, classes)`: `DependencyAttention` blocks on patches.

    The class is read from the mean over tokens, each weighted by its message.

    Args:
        side, patch: side of the image and of a patch, in pixels.
        channels, classes: number of channels and of classes.
        dim, depth, heads: width, blocks and heads.
        mlp_ratio: hidden width of the MLPs, as a multiple of `dim`.
        layer_scale: initial value of the learned factor on a block's output. 1e-6 follows the port named in
            `DependencyAttention`; small networks need 1.
        prune_after: blocks, counted from 1, after whose attention tokens are pruned: (2, 5, 8, 11) is the paper's Lite.
        ratio: share of all tokens that is pruned each time.
        score: the tokens that are pruned: those with the smallest "message", as in the abstract, or those that
            "received" least, as in the port.
    """

    sizes: ClassVar = {"tiny": Size({"dim": 192}), "small": Size({"dim": 384})}

    def __init__(
        self, side: int = 224, patch: int = 16, *, channels: int = 3, classes: int = 1000, dim: int = 192,
        depth: int = 12, heads: int = 12, mlp_ratio: float = 4.0, layer_scale: float = 1e-6,
        prune_after: Sequence[int] = (), ratio: float = 0.16, score: Literal["message", "received"] = "message",
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = {"side": side, "patch": patch, "channels": channels, "classes": classes, "depth": depth}
        for name, value in sizes.items():
            validate.count(name, value, 1)
        if side % patch:
            raise OptionError(f"patch={patch} must divide side={side}")
        if any(at not in range(1, depth + 1) for at in prune_after) or ratio * len(set(prune_after)) >= 1:
            given = shown(prune_after)
            raise OptionError(f"prune_after={given} must be blocks of 1..{depth}, fewer than 1 / ratio of them")
        validate.one_of("score", score, ("message", "received"))
        self.side, self.channels, self.score = side, channels, score
        self.prune_after, self.ratio = sorted(set(prune_after)), ratio
        self.embed = nn.Conv2d(channels, dim, patch, stride=patch)
        self.places = nn.Parameter(0.02 * torch.randn((side // patch) ** 2, dim))
        self.blocks = nn.ModuleList(DependencyBlock(dim, heads, mlp_ratio, layer_scale) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        x = self._embedded(images)
        message = x.new_ones(x.shape[:2])
        for place, block in enumerate(self._blocks(), start=1):
            x, message, received = block.send(x, message)
            if place in self.prune_after:
                scores = message if self.score == "message" else received
                kept = prune(scores, self.ratio, 1 + self.prune_after.index(place))
                x, message = x.gather(1, kept[..., None].expand(-1, -1, x.shape[2])), message.gather(1, kept)
            x = block.channels(x)
        return self.head((self.norm(x) * message[..., None]).mean(1))

    @classmethod
    def example(cls) -> Self:
        return cls(6, 2, channels=2, classes=5, dim=12, depth=3, heads=3, layer_scale=0.7, prune_after=(1,), ratio=0.3)

    @classmethod
    def example_inputs(cls, batch: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, 2, 6, 6, generator=torch.Generator().manual_seed(0)),)

    @torch.no_grad()
    def tree(self, images: Float[Tensor, "b c h w"]) -> Tree:
        """Return the dependency tree of all patches; none is pruned."""
        x, found = self._embedded(images), []
        message = x.new_ones(x.shape[:2])
        for block in self._blocks():
            found.append(block.attention.dependency(block.norm(x), message))
            x, message, _ = block.send(x, message)
            x = block.channels(x)
        return dependency_tree(found)

    def _blocks(self) -> Iterator[DependencyBlock]:
        return cast("Iterator[DependencyBlock]", iter(self.blocks))

    def _embedded(self, images: Tensor) -> Tensor:
        if images.dim() != 4 or images.shape[1:] != (self.channels, self.side, self.side):
            expected = f"(B, {self.channels}, {self.side}, {self.side})"
            raise ShapeError(f"images must be {expected}; got {tuple(images.shape)}")
        return to_tokens(self.embed(images)) + self.places


@final
class DependencyBlock(nn.Module):
    """A block: `x + s attention(norm(x))`, and after the pruning `x + s' MLP(norm(x))`."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, layer_scale: float) -> None:
        super().__init__()
        validate.at_least("mlp_ratio", mlp_ratio, 1 / dim)
        validate.at_least("layer_scale", layer_scale, 0)
        hidden = int(dim * mlp_ratio)
        self.attention = DependencyAttention(dim, heads)
        self.norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.scale = nn.Parameter(torch.full((dim,), float(layer_scale)))
        self.mlp_scale = nn.Parameter(torch.full((dim,), float(layer_scale)))

    def send(self, x: Float[Tensor, "b n c"], message: Float[Tensor, "b n"] | None) -> Sent:
        sent = self.attention.send(self.norm(x), message)
        return sent._replace(out=x + self.scale * sent.out)

    def channels(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return x + self.mlp_scale * self.mlp(self.mlp_norm(x))
