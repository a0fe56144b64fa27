"""ConViT: an image classifier whose first layers begin as soft convolutions.

ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases (2021), arXiv 2103.10697.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.models.base import network
from foveate.nn.parts.blocks import Block, gelu_mlp, stacked
from foveate.nn.parts.grid import to_tokens
from foveate.nn.parts.linear_maps import start_small
from foveate.nn.parts.multi_head import MultiHeadAttention
from foveate.nn.vision.gpsa import GatedPositionalAttention


@final
class ConViT(network.Network):
    """A classifier from images `(B, channels, image, image)` to `(B, classes)`.

    Patches get learned positions; `local_up_to` blocks of `GatedPositionalAttention` follow, and then blocks of plain
    attention with a class token, from which the classes are read. The defaults are ConViT-Ti; `ConViT.of_size("small")`
    and "base" are the larger ones.

    Args:
        dim, heads, depth: width, heads and number of blocks. Heads are best a square, k² for a k x k convolution.
        local_up_to: number of first blocks with gated positional attention, less than `depth`.
        image, patch: sides of an image and of a patch in pixels.
        channels, classes: number of channels and of classes.
        locality: see `GatedPositionalAttention`.
        mlp_ratio: hidden width of the MLPs over `dim`.

    The release's dropout and stochastic depth are left out, and the bias of its positions, which cancels.
    """

    sizes: ClassVar = {
        name: network.Size({"dim": 48 * heads, "heads": heads})
        for name, heads in (("tiny", 4), ("small", 9), ("base", 16))
    }
    released_names: ClassVar = (
        (r".*\.(rel_indices|pos_proj\.bias)$", ""),
        (r"^patch_embed\.proj\.", "embed."),
        (r"^pos_embed$", "place"),
        (r"^cls_token$", "class_token"),
        (r"\.norm1\.", ".norm."),
        (r"\.norm2\.", ".mlp_norm."),
        (r"\.mlp\.fc1\.", ".mlp.0."),
        (r"\.mlp\.fc2\.", ".mlp.2."),
        (r"\.attn\.gating_param$", ".mixer.gate"),
        (r"\.attn\.pos_proj\.weight$", ".mixer.place"),
        (r"\.attn\.proj\.", ".mixer.out."),
        (r"\.attn\.", ".mixer."),
    )
    released_parts: ClassVar = ((r"\bqkv\b", ("q", "k", "v")), (r"\bqk\b", ("q", "k")))

    def __init__(
        self, dim: int = 192, heads: int = 4, depth: int = 12, local_up_to: int = 10, *, image: int = 224,
        patch: int = 16, channels: int = 3, classes: int = 1000, locality: float = 1.0, mlp_ratio: float = 4.0,
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = {"depth": depth, "image": image, "patch": patch, "channels": channels, "classes": classes}
        for name, value in sizes.items():
            validate.count(name, value, 1)
        validate.count("local_up_to", local_up_to, 0)
        if image % patch or local_up_to >= depth:
            raise OptionError(f"{patch=} must divide {image=}, and {local_up_to=} must be less than {depth=}")
        self.channels, self.image, self.side, self.local_up_to = channels, image, image // patch, local_up_to
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.embed = nn.Conv2d(channels, dim, patch, patch)
        self.place = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, self.side**2, dim), std=0.02))
        self.class_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        local = (GatedPositionalAttention(dim, heads) for _ in range(local_up_to))
        plain = (MultiHeadAttention(dim, heads, out_bias=True) for _ in range(depth - local_up_to))
        self.blocks = nn.ModuleList(Block(mixer, gelu_mlp(dim, mlp_ratio), norm) for mixer in (*local, *plain))
        self.norm, self.head = norm(dim), nn.Linear(dim, classes)
        self.apply(start_small)
        for block in stacked(self.blocks)[:local_up_to]:
            assert isinstance(block.mixer, GatedPositionalAttention)
            block.mixer.look_at_offsets(locality)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        wanted = (self.channels, self.image, self.image)
        if not isinstance(images, Tensor) or images.dim() != 4 or tuple(images.shape[1:]) != wanted:
            raise ShapeError(f"images must be (B, {', '.join(map(str, wanted))}); got {shown(images)}")
        x = to_tokens(self.embed(images)) + self.place
        for block in stacked(self.blocks)[: self.local_up_to]:
            x = block(x, size=(self.side, self.side))
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)
        for block in stacked(self.blocks)[self.local_up_to :]:
            x = block(x)
        return self.head(self.norm(x)[:, 0])

    @classmethod
    def example(cls) -> Self:
        return cls(12, 4, 3, 2, image=12, patch=3, channels=2, classes=5)

    @classmethod
    def example_inputs(cls, batch: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, 2, 12, 12, generator=torch.Generator().manual_seed(0)),)
