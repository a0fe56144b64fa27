"""The two losses of Sparsifiner: predicted maps against a teacher's attention, then a student against its teacher.

Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers (2023), arXiv 2303.13755.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.nn.vision.sparsifiner import AttentionMaps, SparsifinerAttention
from foveate.train.base.objective import Loss


@dataclass(frozen=True)
class SparsifinerReading:
    """The results of a network on a batch.

    Args:
        logits: `(B, classes)`; needed for the second phase.
        tokens: tokens of the last layer `(B, N, C)`; needed for the second phase.
        maps: maps of each layer, as `recorded_maps` collects them; needed for the first phase.
    """

    logits: Float[Tensor, "b c"] | None = None
    tokens: Float[Tensor, "b n d"] | None = None
    maps: Sequence[AttentionMaps] = field(default_factory=tuple)


def sparsifiner_loss(
    student: SparsifinerReading, teacher: SparsifinerReading, labels: Int[Tensor, " b"] | None = None,
    phase: Literal["recon", "distil"] = "recon", *, weights: tuple[float, float, float, float] = (0.01, 1.0, 0.5, 0.5),
) -> Loss:  # fmt: skip
    """Return the loss of a phase of training.

    "recon": the squared differences of the student's predicted maps and the teacher's full attention, summed over all
    entries of the batch and averaged over layers. "distil": the cross entropy of the labels, the divergence
    `KL(teacher || student)` of the classes per image, and the mean squared difference of the last layer's tokens.
    Nothing flows into the teacher.

    Args:
        student, teacher: readings of the same images.
        labels: the classes; needed for "distil".
        phase: "recon" after `learn_connectivity()`, "distil" after `learn_connectivity(False)`.
        weights: of the four parts in this order; those of the release's configuration.

    Raises:
        OptionError: a reading lacks what the phase needs.
    """
    validate.one_of("phase", phase, ("recon", "distil"))
    if phase == "recon":
        if not student.maps or len(student.maps) != len(teacher.maps):
            raise OptionError(
                f"student and teacher must have maps of the same layers; got {len(student.maps)} and "
                f"{len(teacher.maps)}: run both inside recorded_maps(net)"
            )
        pairs = zip(student.maps, teacher.maps, strict=True)
        errors = [(ours.predicted - theirs.full.detach()).square().sum() for ours, theirs in pairs]
        return Loss.of(recon=weights[0] * torch.stack(errors).mean())
    if labels is None or any(x is None for r in (student, teacher) for x in (r.logits, r.tokens)):
        raise OptionError('phase="distil" needs labels, and logits and tokens of student and teacher')
    assert student.logits is not None and student.tokens is not None
    assert teacher.logits is not None and teacher.tokens is not None
    ours, theirs = student.logits.log_softmax(-1), teacher.logits.detach().log_softmax(-1)
    return Loss.of(
        labels=weights[1] * F.cross_entropy(student.logits, labels),
        logits=weights[2] * F.kl_div(ours, theirs, reduction="batchmean", log_target=True),
        tokens=weights[3] * F.mse_loss(student.tokens, teacher.tokens.detach()),
    )


@contextmanager
def recorded_maps(net: nn.Module) -> Iterator[list[AttentionMaps]]:
    """Collect the maps of all `SparsifinerAttention` layers while the network runs, in the order of their calls."""
    found: list[AttentionMaps] = []

    def collect(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, SparsifinerAttention)
        found.append(layer.maps(given[0]))

    layers = [layer for layer in net.modules() if isinstance(layer, SparsifinerAttention)]
    handles = [layer.register_forward_pre_hook(collect) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
