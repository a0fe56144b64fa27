"""Additive angular margin: a softmax over classes in which the right class has to win by an angle.

ArcFace: Additive Angular Margin Loss for Deep Face Recognition (2018), arXiv 1801.07698, as
ECAPA-TDNN (2020), arXiv 2005.07143, trains with it.
"""

from __future__ import annotations

import math
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.checked import Checked
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.core.readable import known


@final
class AAMSoftmax(Checked, nn.Module):
    """The cross-entropy of `scale * cos(angle)` to each class, with `cos(angle + margin)` for the right one.

    It trains embeddings that are compared by their cosine. Classes are learned directions, which are thrown away
    afterwards; there have to be enough examples of each.

    Args:
        dim: width of the embeddings.
        classes: number of classes, of training speakers.
        margin: in radians, below a right angle.
        scale: of the cosines.

    Past the angle `pi - margin` the right class gets `cos(angle) - margin sin(margin)`, so that the loss still grows
    with the angle, as in SpeechBrain.
    """

    def __init__(self, dim: int, classes: int, margin: float = 0.2, scale: float = 30.0) -> None:
        super().__init__()
        validate.count("dim", dim, 1)
        validate.count("classes", classes, 2)
        if not 0 <= margin < math.pi / 2:
            raise OptionError(f"margin={margin} must be at least 0 and below pi/2, a right angle")
        if not 0 < scale < math.inf:
            raise OptionError(f"scale={scale} must be a finite number above 0")
        self.margin, self.scale = margin, scale
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(classes, dim)))

    def forward(self, embeddings: Float[Tensor, "b d"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """Return the mean loss of a batch."""
        cosines = self.cosines(embeddings)
        self._check(labels, len(embeddings))
        right = F.one_hot(labels, len(self.weight)).bool()
        return F.cross_entropy(self.scale * torch.where(right, self._with_margin(cosines), cosines), labels)

    def cosines(self, embeddings: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        """Return the cosine of each embedding with each class."""
        if not isinstance(embeddings, Tensor) or embeddings.dim() != 2 or embeddings.shape[1] != self.weight.shape[1]:
            raise ShapeError(f"embeddings must be (B, D={self.weight.shape[1]}); got {shown(embeddings)}")
        return F.normalize(embeddings, dim=-1) @ F.normalize(self.weight, dim=-1).mT

    def _with_margin(self, cosines: Tensor) -> Tensor:
        """Return `cos(angle + margin)`, which falls with the angle all the way."""
        least = torch.finfo(cosines.dtype).tiny  # the root has no gradient at 0
        sines = (1 - cosines.square()).clamp_min(least).sqrt()
        turned = cosines * math.cos(self.margin) - sines * math.sin(self.margin)
        return torch.where(cosines > -math.cos(self.margin), turned, cosines - self.margin * math.sin(self.margin))

    def _check(self, labels: Tensor, batch: int) -> None:
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or tuple(labels.shape) != (batch,):
            raise ShapeError(f"labels must be whole numbers (B,)=({batch},) of int64; got {shown(labels)}")
        if known(((labels < 0) | (labels >= len(self.weight))).any()):
            lowest, highest = int(labels.min()), int(labels.max())
            raise OptionError(f"labels must be in 0..{len(self.weight) - 1}; got {lowest}..{highest}")
