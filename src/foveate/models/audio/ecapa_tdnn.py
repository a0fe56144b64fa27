"""ECAPA-TDNN: the voice of a recording as one vector.

ECAPA-TDNN: Emphasized Channel Attention, Propagation and Aggregation in TDNN Based Speaker Verification (2020),
arXiv 2005.07143.

    net, loss = ECAPATDNN.of_size("C=512"), AAMSoftmax(192, classes=1211)
    loss(net(frames), speakers).backward()                                    # frames (B, T, 80)
    F.cosine_similarity(net(one), net(other))                                 # higher for one speaker
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Self, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.models.base.network import Network, Size
from foveate.nn.parts.tdnn import TDNN, SERes2Block1d, check_lengths
from foveate.nn.pool.attentive_stats import AttentiveStatsPool

KERNEL = 5

_SOURCE = "parameters: the paper's table of systems; multiply-adds: WeSpeaker's table, two seconds of 100 frames"


@final
class ECAPATDNN(Network):
    """An embedding `(B, E)` of frames `(B, T, F)`: SE-Res2 blocks, whose outputs are joined and pooled over time.

    Cost O(T C²). Cosines of embeddings tell speakers apart once it is trained with `foveate.train.AAMSoftmax`, on
    crops of two seconds and with noise added. The wrong choice for what is said, which the pooling drops.

    Args:
        input_dim: F, such as 80 filterbank energies or MFCC of each frame.
        channels: C, the width of the blocks.
        embed_dim: E.
        dilations: dilation of each block.
        scale, se: see `SERes2Block1d`.
        aggregate: width of the frames that are pooled, made of the outputs of all blocks.
        attention_channels, global_context: see `AttentiveStatsPool`.
        variant: "release" is SpeechBrain's, whose weights `load_released` takes: without the BatchNorm on the
            embedding, and with a ReLU and a BatchNorm more inside the pooling.

    In both variants convolutions read frames that are mirrored at the ends of a recording, as in the release; the paper
    does not say. The release's convolutions also see padding. Here an example gives in a padded batch what it gives
    alone, in eval mode.

    Raises:
        OptionError: an option out of range.
    """

    sizes: ClassVar = {
        "C=512": Size({"channels": 512}, 6.2e6, 1.04e9, ((200, 80),), _SOURCE),
        "C=1024": Size({"channels": 1024}, 14.7e6, 2.65e9, ((200, 80),), _SOURCE),
        "speechbrain": Size(
            {"channels": 1024, "aggregate": 3072, "variant": "release"}, source="SpeechBrain's train_ecapa_tdnn.yaml"
        ),
    }
    released_names: ClassVar = ((r"\b(conv|norm|conv1|conv2|shortcut|asp_bn|fc)\.(conv|norm)\.", r"\1."),)

    def __init__(
        self, input_dim: int = 80, channels: int = 512, embed_dim: int = 192, *,
        dilations: Sequence[int] = (2, 3, 4), scale: int = 8, se: int = 128, aggregate: int = 1536,
        attention_channels: int = 128, global_context: bool = True, variant: Literal["paper", "release"] = "paper",
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = {"input_dim": input_dim, "channels": channels, "embed_dim": embed_dim, "aggregate": aggregate}
        for name, value in [*sizes.items(), *(("dilations", each) for each in dilations)]:
            validate.count(name, value, 1)
        if not dilations:
            raise OptionError("dilations must be one number or more, one for each block; got none")
        self.input_dim, self.least = input_dim, 1 + max(KERNEL // 2, *dilations)
        blocks = (SERes2Block1d(channels, dilation, scale=scale, se=se) for dilation in dilations)
        self.blocks = nn.ModuleList([TDNN(input_dim, channels, KERNEL), *blocks])
        self.mfa = TDNN(len(dilations) * channels, aggregate)
        self.asp = AttentiveStatsPool(aggregate, attention_channels, global_context=global_context, variant=variant)
        self.asp_bn = nn.BatchNorm1d(2 * aggregate)
        self.fc = nn.Conv1d(2 * aggregate, embed_dim, 1)
        self.fc_bn = nn.BatchNorm1d(embed_dim) if variant == "paper" else None

    def forward(self, x: Float[Tensor, "b t f"], lengths: Int[Tensor, " b"] | None = None) -> Float[Tensor, "b e"]:
        """Return the embeddings.

        Args:
            x: frames, at least 5 with the paper's dilations.
            lengths: number of real frames in each example, if some end early; others have no effect.
        """
        pooled = self.asp_bn(self.asp(self.frames(x, lengths), lengths))
        embedding = self.fc(pooled[..., None])[..., 0]
        return embedding if self.fc_bn is None else self.fc_bn(embedding)

    def frames(self, x: Float[Tensor, "b t f"], lengths: Int[Tensor, " b"] | None = None) -> Float[Tensor, "b c t"]:
        """Return the frames that are pooled; `net.asp.weights` of them are the weights of channels and frames."""
        self._check(x, lengths)
        first, *blocks = self.blocks
        y, outputs = first(x.mT, lengths), list[Tensor]()
        for block in blocks:
            y = block(y, lengths)
            outputs.append(y)
        return self.mfa(torch.cat(outputs, 1))

    def _check(self, x: Tensor, lengths: Tensor | None) -> None:
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[2] != self.input_dim or x.shape[1] < self.least:
            expected = f"(B, T, F={self.input_dim}) with T >= {self.least}"
            raise ShapeError(f"x must be frames {expected}; got {shown(x)}")
        check_lengths(lengths, x.shape[0], x.shape[1], self.least)

    @classmethod
    def example(cls) -> Self:
        return cls(6, 16, 5, scale=4, se=4, aggregate=12, attention_channels=4)

    @classmethod
    def example_inputs(cls, batch: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, 23, 6, generator=torch.Generator().manual_seed(0)),)

    @classmethod
    def odd_inputs(cls, batch: int) -> tuple[tuple[Tensor, ...], ...]:
        (x,) = cls.example_inputs(batch)
        return (x[:, :5],), (x[:, :16],), (x, 5 + 3 * torch.arange(batch))
