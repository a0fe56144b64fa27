"""FreeSwim: the inward window by hand, the two branches by hand, and the paper's claim on a small network."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.errors import FoveateError
from foveate.steer.diffusion import inward_window
from foveate.steer.diffusion.free_swim import FreeSwim
from foveate.steer.diffusion.inward_window import inward_window_attention, inward_window_mask
from tests.conftest import ClaimFixture

GRIDS = [((2, 6, 7), (1, 2)), ((1, 9, 5), (3, 0)), ((3, 4, 8), (3, 1)), ((1, 1, 12), (0, 2)), ((2, 5, 5), (2, 2))]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the window --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "half"), GRIDS)
def test_the_window_is_the_papers(grid: tuple[int, int, int], half: tuple[int, int]) -> None:
    """Rows from y - d - max(0, y + d - H + 1) to y + d + max(0, d - y), columns alike, all frames."""
    frames, height, width = grid
    mask = inward_window_mask(*grid, *half).view(*grid, *grid)
    for y in range(height):
        for x in range(width):
            seen = torch.zeros(height, width, dtype=torch.bool)
            for row in range(height):
                for column in range(width):
                    d, e = half
                    is_row = y - d - max(0, y + d - height + 1) <= row <= y + d + max(0, d - y)
                    is_column = x - e - max(0, x + e - width + 1) <= column <= x + e + max(0, e - x)
                    seen[row, column] = is_row and is_column
            assert torch.equal(mask[:, y, x], seen.expand(frames, frames, height, width))
    count = frames * min(height, 2 * half[0] + 1) * min(width, 2 * half[1] + 1)
    assert bool((mask.flatten(0, 2).flatten(1).sum(-1) == count).all())


@pytest.mark.parametrize(("grid", "half"), GRIDS)
@pytest.mark.parametrize("tile", [1, 1 << 22])
def test_tiles_are_the_mask(grid: Any, half: Any, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inward_window, "TILE", tile)
    q, k, v = noise(3, 2, 4, math.prod(grid), 8)
    mask = inward_window_mask(*grid, *half)
    for scale in (None, 0.7):
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        torch.testing.assert_close(inward_window_attention(q, k, v, grid, half, scale), expected)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    inward_window_attention(*inputs, grid, half).square().sum().backward()
    twins = [x.clone().requires_grad_() for x in (q, k, v)]
    F.scaled_dot_product_attention(*twins, attn_mask=mask).square().sum().backward()
    for a, b in zip(inputs, twins, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_window_over_the_grid_is_full_attention() -> None:
    q, k, v = noise(3, 1, 2, 2 * 6 * 7, 8)
    for half in ((5, 6), (3, 3), (9, 9)):
        assert torch.equal(inward_window_attention(q, k, v, (2, 6, 7), half), F.scaled_dot_product_attention(q, k, v))


def test_one_row_is_a_window_of_one_axis() -> None:
    """In the middle of a row the window is the usual one; a cut window would see fewer keys at the ends."""
    mask = inward_window_mask(1, 1, 12, 0, 2)
    usual = (torch.arange(12)[:, None] - torch.arange(12)).abs() <= 2
    assert torch.equal(mask[2:-2], usual[2:-2])
    assert mask[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4] and int(usual[0].sum()) == 3


# -- the branches ------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Attention of the usual kind, to its own tokens or to others."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim, dtype=torch.float64) for _ in range(4))
        self.heads = heads

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        q, k, v = (
            make(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for make, y in ((self.q, x), (self.k, source), (self.v, source))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(dim, heads), Attention(dim, heads)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.attn1(x, x)
        return x + self.attn2(x, text)


class Transformer(nn.Module):
    def __init__(self, dim: int = 16, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, text)
        return x


GRID, BASE = (2, 6, 7), (2, 4)
X, TEXT, OTHER = noise(1, 84, 16), noise(1, 5, 16, seed=1), noise(1, 84, 16, seed=2)


def by_hand(model: Transformer, x: Tensor, text: Tensor, mask: Tensor | None, crossed: list[Tensor] | None) -> Any:
    """Return a branch's output, and what its cross-attention gave, in float64 with masks."""
    scale, given = math.sqrt(math.log(16, 8) / 8), []
    for number, block in enumerate(model.blocks):
        own = block.attn1
        q, k, v = (make(x).unflatten(-1, (2, 8)).transpose(1, 2) for make in (own.q, own.k, own.v))
        logits = scale * q @ k.mT
        logits = logits if mask is None else logits.masked_fill(~mask, float("-inf"))
        x = x + own.out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        given.append(block.attn2(x, text) if crossed is None else crossed[number])
        x = x + given[-1]
    return x, given


@torch.no_grad()
def test_the_full_branchs_cross_attention_replaces_the_windows() -> None:
    model, mask = Transformer(), inward_window_mask(*GRID, 1, 2)
    swim = FreeSwim(model, BASE, cache_every=1)
    full, crossed = by_hand(model, X, TEXT, None, None)
    torch.testing.assert_close(swim(GRID, X, TEXT), by_hand(model, X, TEXT, mask, crossed)[0])
    plain = by_hand(model, X, TEXT, mask, None)[0]
    torch.testing.assert_close(swim(GRID, X, TEXT, conditional=False), plain)
    torch.testing.assert_close(FreeSwim(model, BASE, override=False)(GRID, X, TEXT), plain)
    assert not torch.allclose(plain, full) and not torch.allclose(swim(GRID, X, TEXT), plain)


@torch.no_grad()
def test_overriding_by_the_windows_own_output_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, attend = Transformer(), FreeSwim.attend
    plain = FreeSwim(model, BASE, override=False)(GRID, X, TEXT)
    monkeypatch.setattr(FreeSwim, "attend", lambda self, q, k, v, branch, grid: attend(self, q, k, v, "window", grid))
    assert torch.equal(FreeSwim(model, BASE)(GRID, X, TEXT), plain)


@torch.no_grad()
def test_the_full_branch_runs_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between full passes the stored outputs serve; calls without a prompt neither run it nor count."""
    model, branches, attend = Transformer(), [], FreeSwim.attend

    def spy(self: FreeSwim, q: Tensor, k: Tensor, v: Tensor, branch: Any, grid: Any) -> Tensor:
        branches.append(branch)
        return attend(self, q, k, v, branch, grid)

    monkeypatch.setattr(FreeSwim, "attend", spy)
    mask, swim = inward_window_mask(*GRID, 1, 2), FreeSwim(model, BASE, cache_every=3)
    crossed = by_hand(model, X, TEXT, None, None)[1]
    for step, x in enumerate([X, OTHER, X + OTHER, OTHER]):
        branches.clear()
        stored = crossed if step < 3 else by_hand(model, x, TEXT, None, None)[1]
        torch.testing.assert_close(swim(GRID, x, TEXT), by_hand(model, x, TEXT, mask, stored)[0])
        assert branches == (["full"] * 2 if step % 3 == 0 else []) + ["window"] * 2
        branches.clear()
        swim(GRID, x, TEXT, conditional=False)
        assert branches == ["window"] * 2
    swim.reset()
    branches.clear()
    swim(GRID, X, TEXT)
    assert branches[0] == "full"
    every = FreeSwim(model, BASE, cache_every=1)
    for x in (X, OTHER):
        fresh = FreeSwim(model, BASE)
        assert torch.equal(every(GRID, x, TEXT), fresh(GRID, x, TEXT))


@torch.no_grad()
def test_the_softmax_is_sharper_by_the_tokens_in_sight() -> None:
    assert FreeSwim(Transformer(), (30, 52)).sharpness == pytest.approx(math.log(3120) / math.log(1560))
    plain = FreeSwim(Transformer(), BASE, window_tokens=8, override=False)
    expected = Transformer()(X, TEXT)
    torch.testing.assert_close(FreeSwim(Transformer(), (12, 14), window_tokens=168)(GRID, X, TEXT), expected)
    assert plain.sharpness == pytest.approx(1.0)


@torch.no_grad()
def test_the_model_is_as_before_also_after_an_error() -> None:
    model = Transformer()
    before = model(X, TEXT)
    swim = FreeSwim(model, BASE)
    swim(GRID, X, TEXT)
    with pytest.raises(FoveateError, match="grid"):
        swim((2, 6, 6), X, TEXT)
    assert torch.equal(model(X, TEXT), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# -- what the paper claims ---------------------------------------------------------------------------------------------


def test_the_whole_decides_what_and_windows_decide_how(claim: ClaimFixture) -> None:
    """One token of a 16 x 16 image says which text it shows, and a trained 8 x 8 window does not reach it from afar.

    Self-attention looks for such a token and carries what it says; cross-attention then looks up the text. With windows
    alone, places far from that token get the text that the prompt names by default: the content drifts.
    """
    says, got, shows, flag, one, dim = slice(0, 2), slice(2, 4), slice(4, 7), 7, 8, 16
    block, eye = Block(dim, 1), torch.eye(16, dtype=torch.float64)
    text = torch.zeros(1, 3, dim, dtype=torch.float64)
    text[0, :, shows] = torch.eye(3)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        block.attn1.q.weight[0, one], block.attn1.k.weight[0, flag] = 60.0, 1.0
        block.attn1.v.weight[says], block.attn1.out.weight[got, says] = eye[says], torch.eye(2)
        block.attn2.q.weight[0:2, got], block.attn2.q.weight[2, one] = 80.0 * torch.eye(2), 20.0
        block.attn2.k.weight[0:3, shows], block.attn2.v.weight[0:3, shows] = torch.eye(3), torch.eye(3)
        block.attn2.out.weight[shows, 0:3] = torch.eye(3)
    draw, right = torch.Generator().manual_seed(0), {True: 0.0, False: 0.0}
    for _ in range(32):
        x = torch.zeros(1, 256, dim, dtype=torch.float64)
        place, said = (int(torch.randint(n, (), generator=draw)) for n in (256, 2))
        x[0, :, one], x[0, place, flag], x[0, place, said] = 1.0, 1.0, 1.0
        for override in right:
            with torch.no_grad():
                out = FreeSwim(block, (8, 8), override=override)((1, 16, 16), x, text)
            right[override] += float((out[0, :, shows].argmax(-1) == said).double().mean()) / 32
    assert right[True] == 1.0
    claim(
        "the full branch's cross-attention gives every place of a 16 x 16 grid the text that one token names: share",
        ours=right[True], baseline=right[False], better="higher", margin=0.3,
        baseline_name="windows of 8 x 8 alone", seed=0,
    )  # fmt: skip


# -- bad calls ---------------------------------------------------------------------------------------------------------


class Eager(nn.Module):
    """A model whose self-attention makes its own matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = nn.Linear(16, 16, dtype=torch.float64), nn.Identity()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return self.attn2(self.attn1(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: FreeSwim(m, (8,)), "base=(8,) must be (height, width)"),
        (lambda m: FreeSwim(m, (8, 0)), "base=0 must be a whole number, at least 1"),
        (lambda m: FreeSwim(m, (1, 1)), "base=(1, 1) must hold at least two tokens"),
        (lambda m: FreeSwim(m, BASE, cache_every=0), "cache_every=0 must be a whole number, at least 1"),
        (lambda m: FreeSwim(m, BASE, override=1), "override=1 must be True or False"),
        (lambda m: FreeSwim(m, BASE, window_tokens=1), "window_tokens=1 must be a whole number, at least 2"),
        (lambda m: FreeSwim(m, BASE, self_attention="own"), "self_attention='own' must end the name of a module"),
        (lambda m: FreeSwim(m, BASE, cross_attention="x"), "cross_attention='x' must end the name of a module"),
        (lambda m: FreeSwim(m, BASE)((2, 6, 8), X, TEXT, conditional=False), "a token for each place of grid=(2, 6,"),
        (lambda m: FreeSwim(Eager(), BASE)(GRID, X, TEXT), "self-attention attn1 does not call"),
        (lambda m: inward_window_mask(1, 2, 3, -1, 0), "half=-1 must be a whole number, at least 0"),
        (lambda m: inward_window_attention(X[None], X[None], X[None], (84,), (1, 1)), "grid=(84,) must be 3"),
    ],
)  # fmt: skip
@torch.no_grad()
def test_bad_calls_are_refused(make: Any, message: str) -> None:
    with pytest.raises(FoveateError) as caught:
        make(Transformer())
    assert message in str(caught.value) and "\n" not in str(caught.value)


@torch.no_grad()
def test_another_sample_needs_a_reset() -> None:
    swim = FreeSwim(Transformer(), BASE)
    swim(GRID, X, TEXT)
    with pytest.raises(FoveateError, match="call reset"):
        swim((1, 6, 7), X[:, :42], TEXT)
    swim.reset()
    swim((1, 6, 7), X[:, :42], TEXT)
