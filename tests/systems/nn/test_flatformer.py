"""FlatFormer: its orders step by step, its groups token by token, its limits, and what equal groups save and reach."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.errors import OptionError, ShapeError
from foveate.nn import FlatFormer, FlatFormerBlock, FlatGroups, flat_groups, flat_window_order, pillar_map
from tests.support.tensors import assert_near, gradients

DIM, HEADS = 12, 3
ORDERS: tuple[tuple[Literal["x", "y"], bool], ...] = (("x", False), ("x", True), ("y", False), ("y", True))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grid(height: int, width: int, batch: int = 1) -> Tensor:
    """Return the cells of full grids, row by row."""
    return torch.cartesian_prod(*(torch.arange(side) for side in (batch, height, width)))


def scattered(counts: tuple[int, ...], height: int = 14, width: int = 17, seed: int = 0) -> Tensor:
    """Return some cells of each sample's grid, samples mixed."""
    draw = torch.Generator().manual_seed(seed)
    cells = [torch.randperm(height * width, generator=draw)[:count] for count in counts]
    found = [torch.stack([torch.full_like(at, i), at // width, at % width], 1) for i, at in enumerate(cells)]
    coords = torch.cat(found)
    return coords[torch.randperm(len(coords), generator=draw)]


def make(window: int | tuple[int, int] = 4, group_size: int = 8, **options: Any) -> FlatFormerBlock:
    """Make a block whose biases and norms have an effect."""
    torch.manual_seed(0)
    block = FlatFormerBlock(DIM, HEADS, window, group_size, **options).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return block


# -- the order ---------------------------------------------------------------------------------------------------------


def walked(coords: Tensor, window: tuple[int, int], axis: str, shift: bool) -> list[int]:
    """Walk through the windows with loops: forth and back over them, and forth and back inside them."""
    height, width = window
    down, right = (height // 2, width // 2) if shift else (0, 0)
    cells: dict[int, dict[tuple[int, int], list[int]]] = {}
    for number, (sample, row, column) in enumerate(coords.tolist()):
        place = (row + down, column + right) if axis == "x" else (column + right, row + down)
        cells.setdefault(sample, {}).setdefault(place, []).append(number)
    across, along = window if axis == "x" else (width, height)
    order = []
    for sample in sorted(cells):
        places = cells[sample]
        last = [max(place[i] for place in places) for i in (0, 1)]
        for rank in range(last[0] // across + 1):
            path = [rank * across + i for i in range(across)]
            outers = [outer * along + inner for outer in range(last[1] // along + 1) for inner in range(along)]
            for at in outers[::-1] if rank % 2 else outers:
                backward = ((at % along) % 2 == 1) != (rank % 2 == 1)
                for inside in path[::-1] if backward else path:
                    order += places.get((inside, at), [])
    return order


@pytest.mark.parametrize(("axis", "shift"), ORDERS)
@pytest.mark.parametrize("window", [(4, 4), (3, 5), (5, 2), (1, 1), (40, 40)])
def test_the_order_is_a_walk_through_windows(window: tuple[int, int], axis: Literal["x", "y"], shift: bool) -> None:
    coords = scattered((60, 1, 90))
    order = flat_window_order(coords, window, axis, shift)
    assert sorted(order.tolist()) == list(range(len(coords)))
    assert order.tolist() == walked(coords, window, axis, shift)


@pytest.mark.parametrize("axis", ["x", "y"])
def test_steps_on_a_full_grid_are_short(axis: Literal["x", "y"]) -> None:
    coords = grid(26, 26)
    path = coords[flat_window_order(coords, 13, axis)][:, 1:]
    steps = (path[1:] - path[:-1]).abs().sum(1)
    windows = path // 13
    assert (steps <= 1).float().mean() >= 0.99
    assert (windows[1:] != windows[:-1]).any(1).sum() == 3


def test_orders_move_with_the_cloud() -> None:
    """A move by two windows changes nothing, also below 0; a move by half a window is what `shift` does."""
    coords = scattered((70, 50))
    for axis, shift in ORDERS:
        order = flat_window_order(coords, (4, 6), axis, shift)
        moved = coords + torch.tensor([0, -32, 48])
        assert torch.equal(flat_window_order(moved, (4, 6), axis, shift), order)
        if shift:
            assert torch.equal(flat_window_order(coords + torch.tensor([0, 2, 3]), (4, 6), axis), order)


def test_windows_have_a_height_and_a_width() -> None:
    coords = scattered((80,))
    turned = coords[:, [0, 2, 1]]
    for shift in (False, True):
        assert torch.equal(
            flat_window_order(coords, (3, 5), "x", shift), flat_window_order(turned, (5, 3), "y", shift)
        )  # fmt: skip
    assert torch.equal(flat_window_order(coords, 5), flat_window_order(coords, (5, 5)))
    assert torch.equal(flat_window_order(coords.int(), (3, 5)), flat_window_order(coords, (3, 5)))


# -- groups ------------------------------------------------------------------------------------------------------------


def cut(coords: Tensor, order: list[int], size: int) -> dict[int, list[int]]:
    """Return, for each token, the tokens that it attends to."""
    sees: dict[int, list[int]] = {}
    for sample in coords[:, 0].unique().tolist():
        tokens = [number for number in order if coords[number, 0] == sample]
        for first in range(0, len(tokens), size):
            group = tokens[first : first + size]
            for number in group:
                sees[number] = group if len(group) == size else tokens[-size:]
    return sees


COUNTS = [(24,), (25,), (23, 40), (3, 30), (5,), (16, 1, 8)]


@pytest.mark.parametrize("counts", COUNTS)
def test_groups_token_by_token(counts: tuple[int, ...]) -> None:
    """Whole groups, a last one that takes the tokens before it in, and samples of less than a group."""
    coords = scattered(counts)
    order = flat_window_order(coords, 4)
    groups = flat_groups(coords[:, 0], order, 8)
    wanted = cut(coords, order.tolist(), 8)
    assert len(groups.tokens) == sum(-(-count // 8) for count in counts)
    flat = groups.tokens.flatten()
    assert torch.equal(flat[groups.own], torch.arange(len(coords)))
    for number, place in enumerate(groups.own.tolist()):
        row = groups.tokens[place // groups.tokens.shape[1]]
        seen = row if groups.seen is None else row[groups.seen[place // groups.tokens.shape[1]]]
        assert len(seen) == len(wanted[number]) and set(seen.tolist()) == set(wanted[number])
    assert (groups.seen is None) == (min(counts) >= min(8, sum(counts)))


def test_samples_without_cells_and_clouds_without_any() -> None:
    coords = scattered((9, 12))
    gap = coords * torch.tensor([4, 1, 1])
    block, x = make(), randn(21, DIM)
    assert_near(block(x, gap), block(x, coords), 1e-12)
    empty = torch.zeros(0, 3, dtype=torch.long)
    for net in (block, FlatFormer(DIM, HEADS).double()):
        assert net(x[:0], empty).shape == (0, DIM)
    assert pillar_map(x[:0], empty, (2, 3), 2).shape == (2, DIM, 2, 3)


# -- the block ---------------------------------------------------------------------------------------------------------


def norm(x: Tensor, by: nn.LayerNorm) -> Tensor:
    spread = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return (x - x.mean(-1, keepdim=True)) / spread * by.weight + by.bias


def waves(coords: Tensor, dim: int = DIM, temperature: float = 10_000.0) -> Tensor:
    """Return places number by number."""
    out = torch.zeros(len(coords), dim, dtype=torch.float64)
    for number, (_, row, column) in enumerate(coords.tolist()):
        for pair in range(dim // 4):
            for half, at in enumerate((column, row)):
                angle = at / temperature ** (pair / (dim // 4))
                channel = half * (dim // 4) * 2 + 2 * pair
                out[number, channel], out[number, channel + 1] = math.sin(angle), math.cos(angle)
    return out


def by_hand(block: FlatFormerBlock, x: Tensor, coords: Tensor, size: int) -> Tensor:
    """Compute one query of one head at a time."""
    place, width = waves(coords), DIM // HEADS
    window = block.window
    for (axis, shift), layer in zip(ORDERS, block.layers, strict=True):
        sees = cut(coords, walked(coords, window, axis, shift), size)
        q, k, v = layer.q(x + place), layer.k(x + place), layer.v(x)
        read = torch.zeros_like(x)
        for number, keys in sees.items():
            for head in range(HEADS):
                at = slice(head * width, (head + 1) * width)
                logits = torch.stack([q[number, at] @ k[key, at] / width**0.5 for key in keys])
                read[number, at] = logits.softmax(0) @ v[keys][:, at]
        x = norm(x + read @ layer.out.weight.mT + layer.out.bias, layer.norm)
        hidden = x @ layer.mlp[0].weight.mT + layer.mlp[0].bias
        hidden = hidden * torch.special.ndtr(hidden)
        x = norm(x + hidden @ layer.mlp[2].weight.mT + layer.mlp[2].bias, layer.mlp_norm)
    return x


@pytest.mark.parametrize("counts", COUNTS)
def test_the_block_token_by_token(counts: tuple[int, ...]) -> None:
    block, coords = make((3, 4)), scattered(counts)
    x = randn(len(coords), DIM)
    with torch.no_grad():
        assert_near(block(x, coords), by_hand(block, x, coords, 8), 1e-6)  # places are in float32


def test_places_fill_up_odd_widths() -> None:
    """Channels beyond four times the number of frequencies get no place."""
    torch.manual_seed(0)
    block, coords = FlatFormerBlock(14, 2, 4, 8, temperature=50.0).double(), scattered((20,))
    x, layer = randn(20, 14), block.layers[0]
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    block(x, coords)
    assert_near(seen[0], waves(coords, 14, 50.0), 1e-6)


@pytest.mark.parametrize("count", [5, 30])
def test_one_group_is_global_attention(count: int) -> None:
    """Also where the group is larger than the cloud; orders do not matter then."""
    block, coords = make(3, 30), scattered((count,))
    x, place = randn(count, DIM), waves(coords)
    ours = block(x, coords)
    for layer in block.layers:
        heads = [
            y.unflatten(1, (HEADS, -1)).movedim(1, 0) for y in (layer.q(x + place), layer.k(x + place), layer.v(x))
        ]
        read = F.scaled_dot_product_attention(*heads).movedim(0, 1).flatten(1)
        x = layer.norm(x + layer.out(read))
        x = layer.mlp_norm(x + layer.mlp(x))
    assert_near(ours, x, 1e-6)


def test_a_full_grid_is_window_attention() -> None:
    """Groups of a window's size are the windows, where no shift cuts them at the border."""
    block, coords = make((2, 3), 6), grid(8, 9, batch=2)
    x, layer = randn(len(coords), DIM), block.layers[0]
    groups = block.groups(coords)
    for unshifted in (groups[0], groups[2]):
        windows = coords[unshifted.tokens] // torch.tensor([1, 2, 3])
        assert (windows == windows[:, :1]).all()
    place = waves(coords)
    tokens = torch.arange(len(coords)).reshape(2, 4, 2, 3, 3).transpose(2, 3).reshape(-1, 6)
    q, k, v = (y[tokens].unflatten(2, (HEADS, -1)).transpose(1, 2) for y in (
        layer.q(x + place), layer.k(x + place), layer.v(x),
    ))  # fmt: skip
    read = torch.empty_like(x)
    read[tokens.flatten()] = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1)
    y = layer.norm(x + layer.out(read))
    assert_near(layer(x, place, groups[0]), layer.mlp_norm(y + layer.mlp(y)), 1e-10)


def test_what_fills_a_group_up_reaches_no_other_group() -> None:
    """Another choice of the tokens that fill the last group up changes that group alone."""
    block, coords = make(4, 8), scattered((29,))
    x, place = randn(29, DIM), waves(coords)
    groups, layer = block.groups(coords)[0], block.layers[0]
    tokens = groups.tokens.clone()
    assert len(set(tokens[-1].tolist())) == 8 and set(tokens[-1, 5:].tolist()) <= set(tokens[-2].tolist())
    tokens[-1, 5:] = tokens[0, :3]
    changed = layer(x, place, FlatGroups(tokens, groups.own, None)) - layer(x, place, groups)
    last = tokens[-1, :5]
    others = torch.ones(29, dtype=torch.bool)
    others[last] = False
    assert not changed[others].any() and changed[last].abs().amin(0).max() > 1e-6


def test_the_order_of_the_list_does_not_matter() -> None:
    block, coords = make(), scattered((31, 12))
    x, mix = randn(43, DIM), torch.randperm(43, generator=torch.Generator().manual_seed(3))
    assert_near(block(x[mix], coords[mix]), block(x, coords)[mix], 1e-12)


def test_samples_are_independent() -> None:
    block, coords = make(), scattered((31, 12, 4))
    x = randn(47, DIM)
    together = block(x, coords)
    for sample in range(3):
        own = coords[:, 0] == sample
        assert_near(block(x[own], coords[own] * torch.tensor([0, 1, 1])), together[own], 1e-12)


def test_blocks_share_one_sorting(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net, coords = FlatFormer(DIM, HEADS, 3, 4, 8).double(), scattered((31, 12))
    x, sorted_once = randn(43, DIM), []
    expected = x
    for block in net.blocks:
        expected = block(expected, coords)
    plain = FlatFormerBlock.groups
    monkeypatch.setattr(FlatFormerBlock, "groups", lambda *call: sorted_once.append(1) or plain(*call))
    assert_near(net(x, coords), expected, 1e-12)
    assert len(sorted_once) == 1


def test_the_map_of_a_cloud() -> None:
    coords = scattered((9, 0, 12), 5, 6)
    x = randn(21, 4).requires_grad_()
    found = pillar_map(x, coords, (5, 7), 4)
    assert found.shape == (4, 4, 5, 7)
    for number, (sample, row, column) in enumerate(coords.tolist()):
        assert torch.equal(found[sample, :, row, column], x[number])
    assert (found != 0).sum() == 21 * 4
    (grad,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(grad, torch.ones_like(x))


# -- numbers and state -------------------------------------------------------------------------------------------------


def test_gradients() -> None:
    block, coords = make(), scattered((11, 4))
    x = randn(15, DIM).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: block(y, coords), (x,))
    everywhere = gradients(block(x, coords), [x, *block.parameters()])
    names = ["x", *(name for name, _ in block.named_parameters())]
    # a softmax does not feel what the keys' bias adds to all logits
    assert all(grad.abs().max() > 1e-9 or name.endswith("k.bias") for name, grad in zip(names, everywhere, strict=True))


def test_dtypes_and_twins() -> None:
    block, coords = make(), scattered((31, 5))
    x = randn(36, DIM)
    expected = block(x, coords)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.08)):
        out = copy.deepcopy(block).to(dtype)(x.to(dtype), coords)
        assert out.dtype == dtype and (out.double() - expected).norm() < tolerance * expected.norm()
    twin = FlatFormerBlock(DIM, HEADS, 4, 8).double()
    twin.load_state_dict(block.state_dict())
    assert torch.equal(twin(x, coords), expected)


def test_first_weights_and_defaults() -> None:
    torch.manual_seed(0)
    net = FlatFormer()
    layer = net.blocks[1].layers[3]
    assert (len(net.blocks), len(net.blocks[0].layers), net.blocks[0].window, net.blocks[0].group_size) == (
        2, 4, (13, 13), 144,
    )  # fmt: skip
    assert layer.mlp[0].weight.shape == (256, 128) and layer.heads == 8
    for linear, most in ((layer.q, (6 / 512) ** 0.5), (layer.out, (6 / 256) ** 0.5), (layer.mlp[0], (6 / 384) ** 0.5)):
        assert 0.99 * most < linear.weight.abs().max().item() <= most
    assert not any(linear.bias.any() for linear in (layer.q, layer.k, layer.v, layer.out))


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [({"heads": 5}, "heads=5 must divide dim=12"), ({"dim": 2}, "dim=2"), ({"window": 0}, "window=0"),
     ({"window": (3, 0)}, "window=0"), ({"window": (3,)}, r"window=\(3,\) must be a whole number, or two of them"),
     ({"window": "13"}, "window='13' must be"), ({"group_size": 0}, "group_size=0"), ({"mlp_ratio": 0.0}, "mlp_ratio="),
     ({"temperature": 0.5}, "temperature=0.5"), ({"group_sizes": 3}, 'did you mean "group_size"')],
)  # fmt: skip
def test_bad_options(options: dict[str, Any], message: str) -> None:
    for make_one in (FlatFormerBlock, FlatFormer):
        with pytest.raises(OptionError, match=message) as caught:
            make_one(**{"dim": DIM, "heads": HEADS, **options})
        assert "\n" not in str(caught.value)


def test_bad_calls() -> None:
    block, coords, x = make(), scattered((9, 6)), randn(15, DIM)
    for bad, message in (
        ((x, coords[:, :2]), r"coords must be whole numbers \(M, 3\): sample, row, column; got Tensor \(15, 2\)"),
        ((x, coords.double()), "coords must be whole numbers"), ((x, coords.tolist()), "coords must be whole"),
        ((x[:-1], coords), r"x must be \(M=15, C=12\) beside coords \(M, 3\); got Tensor \(14, 12\)"),
        ((x[:, :-1], coords), r"x must be \(M=15, C=12\)"), ((x.long(), coords), r"x must be \(M=15, C=12\)"),
        ((x, coords - torch.tensor([1, 0, 0])), "samples are counted from 0; coords have a sample -1"),
    ):  # fmt: skip
        for net in (block, FlatFormer(DIM, HEADS).double()):
            with pytest.raises(ShapeError, match=message) as caught:
                net(*bad)
            assert "\n" not in str(caught.value)
    with pytest.raises(OptionError, match="axis='z'"):
        flat_window_order(coords, 4, "z")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="shift=1"):
        flat_window_order(coords, 4, "x", 1)  # type: ignore[arg-type]
    for size, batch in (((13, 17), 2), ((14, 16), 2), ((14, 17), 1)):
        big = torch.cat([coords, torch.tensor([[1, 13, 16]])])
        with pytest.raises(ShapeError, match=rf"coords must be .* below \({batch}, {size[0]}, {size[1]}\)"):
            pillar_map(randn(16, DIM), big, size, batch)
    with pytest.raises(ShapeError, match=r"x must be \(M=15, C\) beside"):
        pillar_map(x[:-1], coords, (14, 17), 2)
    with pytest.raises(ShapeError, match="and at least 0"):
        pillar_map(x, coords - torch.tensor([0, 20, 0]), (14, 17), 2)


def test_a_release_s_parameters_arrive() -> None:
    """Names and shapes of the release's network of two blocks."""
    shapes: dict[str, tuple[int, ...]] = {}
    for at in (f"block_list.{i}.block.{j}." for i in range(2) for j in range(4)):
        shapes |= {
            f"{at}attn.attn.in_proj_weight": (36, 12), f"{at}attn.attn.in_proj_bias": (36,),
            f"{at}attn.attn.out_proj.weight": (12, 12), f"{at}attn.attn.out_proj.bias": (12,),
            f"{at}fc1.weight": (24, 12), f"{at}fc1.bias": (24,), f"{at}fc2.weight": (12, 24), f"{at}fc2.bias": (12,),
            **{f"{at}norm{n}.{part}": (12,) for n in (1, 2) for part in ("weight", "bias")},
        }  # fmt: skip
    given = {name: randn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    net = FlatFormer(DIM, HEADS).double()
    net.load_released(given)
    assert torch.equal(net.blocks[1].layers[2].v.weight, given["block_list.1.block.2.attn.attn.in_proj_weight"][24:])
    assert torch.equal(net.blocks[0].layers[3].k.bias, given["block_list.0.block.3.attn.attn.in_proj_bias"][12:24])
    assert torch.equal(net.blocks[0].layers[1].mlp_norm.bias, given["block_list.0.block.1.norm2.bias"])
    with pytest.raises(OptionError, match="1 missing"):
        net.load_released({name: x for name, x in given.items() if name != "block_list.0.block.0.fc1.bias"})


# -- what the paper claims ---------------------------------------------------------------------------------------------


def clustered(count: int = 1200, side: int = 120, window: int = 12) -> Tensor:
    """Return cells of a cloud of which 80 % lie in 10 % of the windows."""
    draw = torch.Generator().manual_seed(0)
    rows = side // window
    dense = torch.randperm(rows * rows, generator=draw)[: rows * rows // 10]
    at = grid(side, side)
    number = at[:, 1] // window * rows + at[:, 2] // window
    inside = torch.isin(number, dense)
    many = at[inside][torch.randperm(int(inside.sum()), generator=draw)[: count * 8 // 10]]
    few = at[~inside][torch.randperm(int((~inside).sum()), generator=draw)[: count * 2 // 10]]
    return torch.cat([many, few])


def test_equal_groups_score_fewer_pairs_than_padded_windows(claim) -> None:
    """The baseline fills every window up to the fullest one, as attention in windows of equal shape has to."""
    coords = clustered()
    populations = (coords[:, 1] // 12 * 10 + coords[:, 2] // 12).unique(return_counts=True)[1]
    padded = len(populations) * int(populations.max()) ** 2
    block = FlatFormerBlock(16, 2, 12, 64)
    ours = max(each.tokens.numel() * each.tokens.shape[1] for each in block.groups(coords))
    assert populations.sort().values[-10:].sum() == 960
    claim(
        "groups of 64 score at most a third of the pairs of windows that are filled up, in a cloud with 80 % of its "
        "cells in 10 % of its windows", ours=ours, baseline=padded / 3, better="lower",
        baseline_name="a third of the pairs of padded windows of 12 x 12", seed=0,
    )  # fmt: skip


def apart(coords: Tensor, tokens: Tensor) -> float:
    """Return the mean distance between cells of one group."""
    at = coords[tokens][..., 1:].double()
    return torch.cdist(at, at).mean().item()


def test_groups_are_near_in_space(claim) -> None:
    coords = clustered()
    mixed = torch.randperm(len(coords), generator=torch.Generator().manual_seed(1))
    random = flat_groups(coords[:, 0], mixed, 64).tokens
    far = [apart(coords, each.tokens) for each in FlatFormerBlock(16, 2, 12, 64).groups(coords)]
    claim(
        "the mean distance between cells of a group is below half of that in random groups, in each of the four orders",
        ours=max(far), baseline=apart(coords, random) / 2, better="lower",
        baseline_name="half the distance in random groups", seed=0,
    )  # fmt: skip


def reached(coords: Tensor, orders: tuple[tuple[Literal["x", "y"], bool], ...], layers: int, size: int) -> float:
    """Return the share of pairs of which one cell's output depends on the other."""
    sees = torch.eye(len(coords), dtype=torch.bool)
    for number in range(layers):
        order = flat_window_order(coords, 4, *orders[number % len(orders)])
        groups = flat_groups(coords[:, 0], order, size)
        members = groups.tokens[groups.own // groups.tokens.shape[1]]
        sees = sees[members].any(1)
    return sees.float().mean().item()


def test_turns_and_shifts_reach_the_whole_cloud(claim) -> None:
    """Eight layers on a connected cloud; one order alone never leaves its groups."""
    at = grid(20, 20)
    ring = at[((at[:, 1] - 9.5) ** 2 + (at[:, 2] - 9.5) ** 2).sqrt() > 5]
    ours, alone = reached(ring, ORDERS, 8, 32), reached(ring, (("x", False),), 8, 32)
    assert ours == 1.0
    claim(
        "two blocks connect every pair of cells of a ring: share of pairs",
        ours=ours, baseline=alone, better="higher", margin=0.5, baseline_name="the same order in all layers", seed=0,
    )  # fmt: skip
