"""Thresholds of SALE for the heads of a pretrained model, and the methods that read a prompt with them.

SALE : Low-bit Estimation for Efficient Sparse Attention in Long-context LLM Prefilling (2025), arXiv 2505.24179.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core import engines, validate
from foveate.core.call import AttentionCall
from foveate.core.errors import OptionError, ShapeError
from foveate.host.hf.layout import layout
from foveate.host.hf.model import host
from foveate.host.method import Method
from foveate.host.operator_swap import PrefillSwap
from foveate.host.probing import read
from foveate.host.site import Site
from foveate.ops.sparse.sale import SALE


@final
@dataclass(eq=False)
class _Thresholds(Method):
    """Halves each head's threshold until SALE is near the model's own attention, which the model then goes on with."""

    start: float
    eps: float
    floor: float
    options: dict[str, Any]
    found: dict[int, Tensor] = field(default_factory=dict)

    def at(self, site: Site) -> bool:
        return site.phase == "prefill" and site.is_causal and site.is_plain_causal

    def attend(self, site: Site) -> Tensor:
        dense = engines.run(AttentionCall(site.q, site.k, site.v, site.scale, causal=True), "fused")
        threshold = torch.full((site.q.shape[1],), self.start, device=site.q.device)
        while True:
            ours = SALE(threshold, **self.options)(site.q, site.k, site.v, causal=True, scale=site.scale)
            error = (ours.float() - dense.float()).abs().sum((0, 2, 3))
            wrong = (error > self.eps * site.q.shape[2]) & (threshold > 0)
            if not wrong.any():
                break
            threshold = torch.where(wrong, threshold / 2, threshold)
            threshold = threshold.masked_fill(threshold < self.floor, 0.0)
        self.found[site.layer] = threshold.cpu()
        return dense


def sale_calibrate(
    model: object, sample: Int[Tensor, "1 n"], *, start: float = 0.008, eps: float = 0.4, floor: float = 1e-4,
    **options: int,
) -> Float[Tensor, "layers heads"]:  # fmt: skip
    """Return a threshold of SALE for each layer and query head, from one text; the model stays as it is.

    A head begins at `start`. Where the absolute differences between SALE's output and the exact one sum to more than
    `eps` for each token of the text, the threshold is halved; below `floor` it is 0, and the head dense. Each layer
    gets the exact output of the layers before. Layers that are not plainly causal (sliding windows) have zeros.

    >>> thresholds = foveate.kv.sale_calibrate(model, ids, dense=0)
    >>> with foveate.apply(model, *foveate.kv.sale_prefill(model, thresholds)):
    ...     logits = model(ids).logits

    Args:
        model: a decoder.
        sample: the tokens of one text without padding that makes the model retrieve; longer than SALE's `dense`.
        start: first threshold.
        eps: largest mean difference of a token's output, summed over its channels: 0.4 in the release's notes, 1 as the
            default of its script.
        floor: smallest threshold above 0.
        options: of `SALE`, such as `local=256`.
    """
    for name, value in (("start", start), ("eps", eps), ("floor", floor)):
        validate.between(name, value, 0.0, float("inf"))
    validate.tensor("sample", sample)
    least = SALE(start, **options).dense + 1
    if sample.dim() != 2 or len(sample) != 1 or sample.shape[1] < least:
        raise ShapeError(f"sample must be (1, N) with N={least} or more, else all is dense; got {tuple(sample.shape)}")
    calibrated = host(model)
    method = _Thresholds(start, eps, floor, options)
    read(calibrated, sample, method)
    found = layout(calibrated)
    table = torch.zeros(len(found), found.heads)
    for row, layer in enumerate(found.layers):
        if layer.layer in method.found:
            table[row, : layer.heads] = method.found[layer.layer]
    return table


def sale_prefill(
    model: object, thresholds: Float[Tensor, "layers heads"], **options: int
) -> tuple[PrefillSwap, ...]:  # fmt: skip
    """Return the methods for `foveate.apply`: SALE with its own thresholds for each layer, without those of zeros.

    Args:
        model: the decoder that was calibrated.
        thresholds: from `sale_calibrate`.
        options: of `SALE`, as in the calibration.
    """
    validate.tensor("thresholds", thresholds)
    found = layout(host(model))
    if tuple(thresholds.shape) != (len(found), found.heads):
        raise ShapeError(
            f"thresholds must be (layers, heads)=({len(found)}, {found.heads}); got {tuple(thresholds.shape)}"
        )
    rows = [(layer, row[: layer.heads]) for layer, row in zip(found.layers, thresholds, strict=True) if row.any()]
    if not rows:
        raise OptionError("thresholds must not all be 0: every layer would be dense; calibrate with a larger eps")
    return tuple(PrefillSwap(SALE(row, **options), (layer.layer,)) for layer, row in rows)
