"""Gaussian adaptive attention against its authors' package, `gaussian-adaptive-attention`.

What it does with padding is `variant="release"` here; without padding and with narrow Gaussians, the floor under the
sum of densities is out of sight and the paper's variant is the same.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

from foveate.nn.channel.gaam import GaussianAdaptiveAttention, GaussianBlock
from tests.parity import peers
from tests.support.tensors import assert_near

peer = pytest.importorskip("gaussian_adaptive_attention", reason=peers.MISSING)

PADDING = -1.0
LAYERS, HEADS, GAUSSIANS = 2, 3, 4


def tokens(padded: bool) -> Tensor:
    x = peers.leaf(2, 5, 11, seed=1).detach()
    if padded:
        x[0, :, 9:], x[1, 2:] = PADDING, PADDING
    return x.requires_grad_()


def blocks(axis: int, variant: Any, padding: float | None) -> tuple[Any, Any, dict[str, Tensor]]:
    ours = GaussianBlock(LAYERS, HEADS, GAUSSIANS, axis, padding, variant=variant).double()
    theirs = peer.GaussianBlock([axis] * LAYERS, [HEADS] * LAYERS, [GAUSSIANS] * LAYERS, LAYERS, padding).double()
    return ours, theirs, peers.weights(ours)


def narrow(spread: Tensor) -> Tensor:
    """Spreads at which densities are far above the floor under their sum, if offsets are small."""
    return (0.7 + 0.2 * spread.detach().sigmoid()).requires_grad_()


def small(offset: Tensor) -> Tensor:
    """Offsets are divided by the deviation, which may be small too."""
    return (0.1 * offset.detach()).requires_grad_()


def converted(w: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        f"layers.{layer}.attention_heads.{head}.{theirs}": w[f"layers.{layer}.{ours}"][head]
        for layer in range(LAYERS)
        for head in range(HEADS)
        for ours, theirs in (("offsets", "mean_offsets"), ("spreads", "c"))
    }


@pytest.mark.parametrize("axis", [-1, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_blocks_with_the_releases_padding(axis: int, padded: bool) -> None:
    """Eleven features for three heads: the last one takes what is left over."""
    ours, theirs, w = blocks(axis, "release", PADDING if padded else None)
    x = tokens(padded)
    peers.agree(lambda: peers.call(ours, w, x), lambda: peers.call(theirs, converted(w), x), {"x": x, **w}, 1e-12)


def test_along_time() -> None:
    ours, theirs, w = blocks(1, "release", None)
    x = peers.leaf(2, 8, 3, seed=1)
    peers.agree(lambda: peers.call(ours, w, x), lambda: peers.call(theirs, converted(w), x), {"x": x, **w}, 1e-12)


def test_the_papers_variant_without_padding() -> None:
    ours, theirs, w = blocks(-1, "paper", None)
    w = {name: small(p) if name.endswith("offsets") else narrow(p) for name, p in w.items()}
    x = tokens(False)
    peers.agree(lambda: peers.call(ours, w, x), lambda: peers.call(theirs, converted(w), x), {"x": x, **w}, 1e-6)


def test_weights_and_where_the_papers_variant_parts_from_the_release() -> None:
    """With padding, theirs counts it as zeros in mean and variance, and gives it weight."""
    x = tokens(True).detach()
    theirs = peer.MultiHeadGaussianAdaptiveAttention(-1, HEADS, GAUSSIANS, PADDING).double()
    for module in theirs.attention_heads:
        module.c = nn.Parameter(narrow(module.c))
    made = {}
    for variant in ("paper", "release"):
        ours = GaussianAdaptiveAttention(HEADS, GAUSSIANS, -1, PADDING, variant=variant).double()
        for head, module in enumerate(theirs.attention_heads):
            ours.offsets.data[head], ours.spreads.data[head] = module.mean_offsets.data, module.c.data
        made[variant] = ours.weights(x)
    _, expected = theirs(x, return_attention_details=True)
    assert_near(made["release"], expected, 1e-12)
    real = x != PADDING
    assert (expected[0, :, -5:][~real[0, :, -5:]] > 1e-3).any()
    assert not made["paper"][~real].any()
