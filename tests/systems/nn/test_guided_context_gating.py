"""Guided context gating: context, guide and gate by hand, its limits, and a position that says which dots count."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from foveate.core.errors import ShapeError
from foveate.nn import GuidedContextGating, SqueezeExcitation, cost
from tests.support.tensors import assert_near
from tests.systems.nn import gated
from tests.systems.nn.gated import noise, refused, stirred


def by_hand(gate: GuidedContextGating, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shares in the context and psi, `(N,)` each, of one example `(C, N)`."""
    scores = torch.stack([gate.attend.weight[0] @ x[:, p] for p in range(x.shape[1])]).exp()
    shares = scores / scores.sum() if gate.variant == "paper" else torch.ones_like(scores)
    context = sum(share * x[:, p] for p, share in enumerate(shares))
    moved = gate.transform.widen.weight @ (gate.transform.narrow.weight @ context).clamp(min=0)
    psi = []
    for p in range(x.shape[1]):
        own = (gate.of_x.weight @ x[:, p] + gate.of_x.bias).clamp(min=0)
        guide = (gate.of_guide.weight @ (x[:, p] + moved) + gate.of_guide.bias).clamp(min=0)
        met = (own + guide + gate.bias).clamp(min=0)
        centred = met - met.mean()
        met = centred / (centred.square().mean() + 1e-3).sqrt() * gate.norm.weight + gate.norm.bias
        psi.append(1 / (1 + (-(gate.psi.weight[0] @ met) - gate.psi.bias[0]).exp()))
    return shares, torch.stack(psi)


@pytest.mark.parametrize("variant", ["paper", "release"])
@pytest.mark.parametrize("size", [(1,), (7,), (3, 4), (2, 3, 2)])
def test_by_hand(variant: str, size: tuple[int, ...]) -> None:
    gate, x = stirred(GuidedContextGating(6, 2, variant=variant)), noise(2, 6, *size)
    found = gate.context_weights(x), gate.weights(x), gate(x)
    assert found[0].shape == found[1].shape == (2, 1, *size)
    for b in range(2):
        shares, psi = by_hand(gate, x[b].flatten(1))
        assert_near(found[0][b].flatten(), shares, 1e-12)
        assert_near(found[1][b].flatten(), psi, 1e-12)
        assert_near(found[2][b].flatten(1), psi * x[b].flatten(1), 1e-12)


def test_limits() -> None:
    gate, x = stirred(GuidedContextGating(6, 2)), noise(2, 6, 5, 3)
    nn.init.constant_(gate.psi.bias, 500.0)
    assert_near(gate(x), x, 1e-12)
    gate = stirred(GuidedContextGating(6, 2))
    nn.init.zeros_(gate.transform.widen.weight)
    alone = torch.cat([gate(x[..., i : i + 1, j : j + 1]) for i in range(5) for j in range(3)], -1)
    assert_near(gate(x).flatten(2), alone.flatten(2), 1e-12)  # without the context each position is on its own


def test_positions_have_no_order() -> None:
    gate, x = stirred(GuidedContextGating(6, 2)), noise(2, 6, 12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert_near(gate(x[..., order]), gate(x)[..., order], 1e-12)
    assert_near(gate.context_weights(x).sum(-1), torch.ones(2, 1), 1e-12)


def test_its_size() -> None:
    x, n = torch.zeros(2, 32, 6, 5), 30
    found = cost(GuidedContextGating(32), x)
    assert found.parameters == 32 + 2 * 32 * 4 + 2 * (32 * 32 + 32) + 32 + 2 * 32 + 33
    assert found.macs == 2 * (n * (32 + 2 * 32 * 32 + 32) + 2 * 32 * 4)
    assert GuidedContextGating(4).transform.narrow.out_features == 1


def test_refusals() -> None:
    assert "variant='code' must be one of 'paper', 'release'" in refused(lambda: GuidedContextGating(8, variant="code"))
    assert "reduction=0" in refused(lambda: GuidedContextGating(8, 0))
    for method in ("weights", "context_weights"):
        with pytest.raises(ShapeError, match="C=8 channels"):
            getattr(GuidedContextGating(8), method)(torch.zeros(2, 7, 3))


# -- which dots count --------------------------------------------------------------------------------------------------


def dots(count: int, random: torch.Generator) -> tuple[tuple[Tensor], Tensor]:
    """Draw maps with three dots of each of two kinds, and one position whose sign says which kind counts.

    All dots of a kind have its value, among noise; the target is the value of the kind that counts.
    """
    places = torch.rand(count, 36, generator=random).argsort(-1)[:, :7]
    values = torch.randn(count, 2, generator=random)
    which = torch.randint(0, 2, (count,), generator=random)
    x, every = torch.zeros(count, 5, 36), torch.arange(count)
    x[:, 0] = torch.randn(count, 36, generator=random)
    for dot in range(6):
        kind, place = dot % 2, places[:, dot]
        x[every, 0, place] = values[:, kind]
        x[every, 1 + kind, place] = 1.0
    x[every, 3, places[:, 6]] = which * 2.0 - 1
    x[every, 4, places[:, 6]] = 1.0
    return (x.unflatten(2, (6, 6)),), values[every, which][:, None]


def left_over(make: Callable[[], nn.Module]) -> float:
    def net() -> nn.Module:
        return gated.MeanOverPositions(make(), 5, 1)

    return sum(gated.unexplained(net, dots, steps=500, seed=seed) for seed in (0, 1)) / 2


class WithoutContext(nn.Module):
    def forward(self, context: Tensor) -> Tensor:
        return torch.zeros_like(context)


def unguided() -> GuidedContextGating:
    gate = GuidedContextGating(5, hidden=8)
    gate.transform = WithoutContext()
    return gate


def test_the_context_says_which_dots_count(claim) -> None:
    """psi need not be larger at the dots that count: after some seeds it was smaller. Values pass by the context."""
    ours = left_over(lambda: GuidedContextGating(5, hidden=8))
    claim(
        "a gate guided by its context reads the dots of the kind that one position names: variance left over, 2 seeds",
        ours=ours, baseline=left_over(unguided), better="lower", margin=0.2,
        baseline_name="the same gate without context", seed=0,
    )  # fmt: skip
    claim(
        "it reads them better than channels that are scaled as wholes: variance left over, 2 seeds",
        ours=ours, baseline=left_over(lambda: SqueezeExcitation(5, hidden=8)), better="lower", margin=0.2,
        baseline_name="squeeze and excitation", seed=0,
    )  # fmt: skip
