"""Measures of what heads give: the size of what they add to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from foveate.host.output_projection import TILE, projection_parts
from foveate.lens.measures import Measure


@final
@dataclass(frozen=True)
class OutputNorm(Measure):
    """The Euclidean norm of what a head adds to the residual stream: its output behind its part of the projection.

    The projection's bias, which heads share, is left out, and so is what a model does between a head and its
    projection (a gate) or behind the projection (a norm). Reduced to its mean.
    """

    name: str = field(default="output_norm", init=False)
    over: ClassVar[Literal["queries", "keys"]] = "queries"
    reads_output: ClassVar[bool] = True

    def from_output(self, out: Tensor, holder: nn.Module) -> Tensor:
        parts, _ = projection_parts(holder, out.shape[1])
        dtype = torch.promote_types(out.dtype, torch.float32)
        norms = out.new_empty(*out.shape[:3], dtype=dtype)
        step = max(1, TILE // (out.shape[0] * parts.shape[2]))
        for head, part in enumerate(parts):
            for start in range(0, out.shape[2], step):
                some = out[:, head, start : start + step].detach().to(dtype) @ part.to(dtype)
                norms[:, head, start : start + step] = torch.linalg.vector_norm(some, dim=-1)
        return norms
