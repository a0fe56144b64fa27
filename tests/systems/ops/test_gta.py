"""GTA: attention by relative geometry through a common frame, invariant to the world's origin."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from foveate.core import masks, oracle
from foveate.core.errors import OptionError, ShapeError, UnsupportedPattern
from foveate.ops.dense.gta import GTA
from foveate.ops.dense.softmax import Softmax
from foveate.ops.functional import geometry, rotary
from foveate.ops.operator import Operator
from tests.support.tensors import assert_near, qkv

LENGTH = 12
POSES = GTA.example_input("poses", 2, 4, LENGTH)
COORDS = GTA.example_input("coords", 2, 4, LENGTH).double()

#: Every kind of channels, alone and together: head_dim, dims, further options.
BUILT = {
    "se3": (8, {"se3": 8}, {}),
    "so3": (16, {"so3": 16}, {}),
    "so2": (8, {"so2": 8}, {}),
    "t2": (6, {"t2": 6}, {}),
    "rotary": (8, {"so2": 8}, {"base": 100.0}),
    "all": (33, {"t2": 6, "triv": 3, "so2": 8, "se3": 8, "so3": 8}, {}),
    "euclid": (16, {"triv": 2, "se3": 6, "so2": 8}, {"euclid": True}),
}


def build(name: str, **more) -> tuple[int, GTA]:
    width, dims, options = BUILT[name]
    return width, GTA(width, dims, trans_coeff=0.375, **options, **more).double()


def attributes(op: GTA) -> dict[str, torch.Tensor]:
    """Make the poses and coordinates that the operator uses."""
    given = {"poses": POSES} if {"se3", "so3"} & op.dims.keys() else {}
    return given | ({"coords": COORDS} if {"so2", "t2"} & op.dims.keys() else {})


def rotation(angle: float) -> torch.Tensor:
    return torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)


def relative(op: GTA, mine: tuple, theirs: tuple) -> torch.Tensor:
    """Return the block-diagonal matrix of the group element g_i⁻¹ g_j, from poses and coordinates of two tokens."""
    pose, offset = torch.linalg.inv(mine[0]) @ theirs[0], theirs[1] - mine[1]
    shifted = pose.clone()
    shifted[:3, 3] *= 0.375
    blocks: list[torch.Tensor] = []
    for kind in ("triv", "se3", "so3", "so2", "t2"):
        width = op.dims.get(kind, 0)
        if kind == "triv":
            blocks += [torch.eye(width, dtype=torch.float64)]
        elif kind == "se3":
            blocks += [shifted] * (width // 4)
        elif kind == "so3":
            blocks += [geometry.wigner(pose[:3, :3])] * (width // 8)
        elif kind == "t2":
            blocks += [torch.tensor([[1.0, 0, 0], [0, 1, 0], [*offset, 1]], dtype=torch.float64)] * (width // 3)
        else:
            count = width // 4
            rate = [2 * math.pi * 2.0 ** (f - count) for f in range(1, count + 1)]
            rate = rate if op.base is None else [op.base ** (-f / count) for f in range(count)]
            blocks += [rotation(float(x) * w) for w in rate for x in offset]
    return torch.block_diag(*blocks)


def pairwise(op: GTA, q, k, v, causal: bool, poses=(POSES, POSES), coords=(COORDS, COORDS)) -> torch.Tensor:
    """Compute the output by the definition, with a matrix for each pair of tokens."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b in range(q.shape[0]):
        for i in range(q.shape[2]):
            last = k.shape[2] - q.shape[2] + i if causal else k.shape[2] - 1
            rho = torch.stack(
                [relative(op, (poses[0][b, i], coords[0][b, i]), (poses[1][b, j], coords[1][b, j]))
                 for j in range(last + 1)]
            )  # fmt: skip
            for h in range(q.shape[1]):
                keys, values = ((rho @ x[b, h // 2, : last + 1, :, None]).squeeze(-1) for x in (k, v))
                values = values if op.v_transform else v[b, h // 2, : last + 1]
                out[b, h, i] = (keys @ q[b, h, i] * q.shape[3] ** -0.5).softmax(0) @ values
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("v_transform", [True, False])
@pytest.mark.parametrize("name", [name for name in BUILT if name != "euclid"])
def test_the_factorised_form_is_the_pairwise_definition(name: str, v_transform: bool, causal: bool) -> None:
    width, op = build(name, v_transform=v_transform)
    q, k, v = qkv(LENGTH, width=width)
    out = op(q, k, v, causal=causal, **attributes(op))
    assert_near(out, pairwise(op, q, k, v, causal), 1e-10)
    assert op.plan(q, k, v).engine == "fused"
    if not v_transform:
        weights = op.weights(q, k, causal=causal, **attributes(op))
        assert_near(weights @ v.repeat_interleave(2, 1), out, 1e-10)


@pytest.mark.parametrize("base", [None, 10_000.0])
def test_pairs_lie_as_in_the_release(base: float | None) -> None:
    """The release stacks a matrix for each frequency and axis, axes innermost, and multiplies neighbouring channels."""
    count, axes = 3, 2
    op = GTA(2 * axes * count, {"so2": 2 * axes * count}, base=base)
    q, k, v = qkv(LENGTH, width=2 * axes * count)
    if base is None:
        rates = 2 * math.pi * 2.0 ** torch.arange(1, count + 1, dtype=torch.float64) / 2.0**count
    else:
        rates = torch.exp(torch.arange(0, 2 * count, 2, dtype=torch.float64) * -(math.log(base) / (2 * count)))
    angles = torch.stack([COORDS[..., axis, None] * rates for axis in range(axes)], -1)
    cos, sin = angles.cos(), angles.sin()
    rows = [torch.stack(row, -1) for row in ((cos, -sin), (sin, cos))]
    rho = torch.stack(rows, -2).flatten(2, 3)  # (B, N, pairs, 2, 2)

    def times(matrices: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bnpij,bhnpj->bhnpi", matrices, x.unflatten(-1, (-1, 2))).flatten(-2)

    moved = oracle.attention(*(times(rho, x) for x in (q, k, v)))
    assert_near(op(q, k, v, coords=COORDS), times(rho.mT, moved), 1e-10)


def test_the_euclidean_form() -> None:
    """Groups of three are points, and logits are squared distances in the world's frame."""
    width, op = build("euclid")
    q, k, v = qkv(LENGTH, kv_heads=4, width=width)

    def moved(x: torch.Tensor, back: bool = False) -> torch.Tensor:
        still, points, pairs = x[..., :2], x[..., 2:8].unflatten(-1, (2, 3)), x[..., 8:]
        rotation, shift = POSES[:, None, :, :3, :3], 0.375 * POSES[:, None, :, None, :3, 3]
        points = (points - shift) @ rotation if back else points @ rotation.mT + shift
        angles = (COORDS[:, None, ..., None, :] * geometry.octaves(2)[:, None]).flatten(-2) * (-1 if back else 1)
        return torch.cat([still, points.flatten(-2), rotary.rotate(pairs, angles, "interleaved")], -1)

    distance = (moved(q)[:, :, :, None] - moved(k)[:, :, None]).square().sum(-1)
    expected = moved((-0.5 * distance * width**-0.5).softmax(-1) @ moved(v), back=True)
    assert_near(op(q, k, v, **attributes(op)), expected, 1e-10)
    nobody = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    assert not op(q, k, v, mask=nobody, **attributes(op)).any()
    plain = build("euclid", v_transform=False)[1]
    assert_near(
        plain(q, k, v, causal=True, **attributes(op)), (-0.5 * distance * width**-0.5).masked_fill(~masks.causal(LENGTH,
        LENGTH), masks.NEG_INF).softmax(-1) @ v, 1e-10,
    )  # fmt: skip


@pytest.mark.parametrize("name", BUILT)
def test_moving_the_world_moves_nothing(name: str) -> None:
    width, op = build(name)
    q, k, v = qkv(LENGTH, width=width)
    given, world = attributes(op), GTA.example_input("poses", 2, 4, LENGTH + 1)[:, -1:]
    moved = {"poses": world @ POSES, "coords": COORDS + torch.tensor([0.3, -1.7])}
    out = op(q, k, v, **given)
    assert_near(op(q, k, v, **{key: moved[key] for key in given}), out, 1e-9)
    for key in given:
        assert (op(q, k, v, **{**given, key: moved[key].roll(1, 1)}) - out).abs().max() > 1e-2
    embedded = q + F.pad((world @ POSES).flatten(2)[:, None], (0, max(0, width - 16)))[..., :width]
    absolute = Softmax()(q + F.pad(POSES.flatten(2)[:, None], (0, max(0, width - 16)))[..., :width], k, v)
    assert (Softmax()(embedded, k, v) - absolute).abs().max() > 1e-2, "an absolute embedding of poses is not"


def test_without_values_it_is_rotary_attention() -> None:
    q, k, v = qkv(LENGTH)
    op = GTA(8, {"so2": 8}, axes=1, base=10000.0, v_transform=False)
    angles = rotary.rotary_angles(torch.arange(LENGTH), 8)
    expected = oracle.attention(*(rotary.rotate(x, angles, "interleaved") for x in (q, k)), v, causal=True)
    assert_near(op(q, k, v, coords=torch.arange(LENGTH)[None, :, None], causal=True), expected, 1e-12)


@pytest.mark.parametrize("name", BUILT)
def test_without_attributes_it_is_softmax_attention(name: str) -> None:
    width, op = build(name)
    q, k, v = qkv(LENGTH, width=width)
    out = op(q, k, v)
    if name == "euclid":
        k2 = k.repeat_interleave(2, 1)
        distance = (q[:, :, :, None] - k2[:, :, None]).square().sum(-1)
        expected = (-0.5 * distance * width**-0.5).softmax(-1) @ v.repeat_interleave(2, 1)
    else:
        expected = oracle.attention(q, k, v)
    assert_near(out, expected, 1e-12)


def test_the_default_is_the_papers() -> None:
    op = GTA(64)
    assert op.dims == {"se3": 32, "so2": 32}
    assert_near(op.rates, 2 * math.pi * 2.0 ** (torch.arange(1, 9, dtype=torch.float64) - 8), 1e-12)
    assert [name for name, _ in op.named_parameters()] == ["trans_coeff"]
    assert op.trans_coeff.item() == pytest.approx(0.01)
    assert not list(GTA(8, {"so2": 8}).parameters())
    assert GTA(8, {"so2": 8}, v_transform=False).capabilities.has_weights
    with pytest.raises(UnsupportedPattern, match="GTA has no matrix of weights"):
        op.weights(*qkv(3, width=64)[:2])


@pytest.mark.parametrize("causal", [False, True])
def test_queries_are_the_last_tokens_by_default(causal: bool) -> None:
    width, op = build("all")
    q, k, v = qkv(5, LENGTH, width=width)
    other = GTA.example_input("poses", 2, 4, 30)[:, -5:], GTA.example_input("coords", 2, 4, 30)[:, -5:].double()
    given = {"poses": POSES, "coords": COORDS}
    out = op(q, k, v, causal=causal, poses_q=other[0], coords_q=other[1], **given)
    assert_near(out, pairwise(op, q, k, v, causal, (other[0], POSES), (other[1], COORDS)), 1e-10)
    if causal:
        expected = pairwise(op, q, k, v, True, (POSES[:, -5:], POSES), (COORDS[:, -5:], COORDS))
        assert_near(op(q, k, v, causal=True, **given), expected, 1e-10)
        return
    for name, value in given.items():
        with pytest.raises(OptionError, match=f"{name} must come with {name}_q, since queries are other tokens"):
            op(q, k, v, **{name: value})


def test_a_query_with_a_pose_among_keys_without() -> None:
    width, op = build("all")
    q, k, v = qkv(LENGTH, width=width)
    still = torch.eye(4, dtype=torch.float64).expand(2, LENGTH, 4, 4), torch.zeros(2, LENGTH, 2, dtype=torch.float64)
    expected = pairwise(op, q, k, v, False, (POSES, still[0]), (COORDS, still[1]))
    assert_near(op(q, k, v, poses_q=POSES[:, :LENGTH], coords_q=COORDS), expected, 1e-10)


def test_a_grid_gives_places() -> None:
    q, k, v = qkv(14)
    place = torch.tensor([[(n % 6) // 3, n % 3] for n in range(14)])  # two views of 2 x 3 patches, and two patches more
    for base, sizes in ((None, torch.tensor([2.0, 3.0])), (100.0, torch.ones(2))):
        plain, on_grid = GTA(8, {"so2": 8}, base=base), GTA(8, {"so2": 8}, base=base, grid=(2, 3))
        assert_near(on_grid(q, k, v), plain(q, k, v, coords=(place / sizes)[None]), 1e-6)
        late = plain(q[:, :, 9:], k, v, causal=True, coords=(place / sizes)[None])
        assert_near(on_grid(q[:, :, 9:], k, v, causal=True), late, 1e-6)
    expected, state = on_grid(q, k, v, causal=True), on_grid.init_state(2, 4, 2, 8, 8, dtype=torch.float64)
    for at in (slice(t, t + 1) for t in range(14)):
        out, state = on_grid.step(q[:, :, at], k[:, :, at], v[:, :, at], state)
        assert_near(out, expected[:, :, at], 1e-10)
    elsewhere = COORDS[:, :1].expand(2, 14, 2)
    assert_near(on_grid(q, k, v, coords=elsewhere), plain(q, k, v), 1e-10)


@pytest.mark.parametrize("name", ["all", "euclid"])
def test_it_streams_and_prefills_with_geometry(name: str) -> None:
    width, op = build(name)
    q, k, v = qkv(LENGTH, width=width)
    given = attributes(op)
    expected = op(q, k, v, causal=True, **given)
    state = op.init_state(2, 4, 2, width, width, dtype=torch.float64)
    for t in range(LENGTH):
        at = slice(t, t + 1)
        here = {key: x[:, at] for key, x in given.items()}
        out, state = op.step(q[:, :, at], k[:, :, at], v[:, :, at], state, **here)
        assert_near(out, expected[:, :, at], 1e-10)
    first, state = op.prefill(q[:, :, :7], k[:, :, :7], v[:, :, :7], **{key: x[:, :7] for key, x in given.items()})
    assert_near(first, expected[:, :, :7], 1e-10)
    here = {key: x[:, 7:8] for key, x in given.items()}
    assert_near(op.step(*(x[:, :, 7:8] for x in (q, k, v)), state, **here)[0], expected[:, :, 7:8], 1e-10)


def test_translations_learn_their_size() -> None:
    width, op = build("se3")
    op(*qkv(LENGTH, width=width), poses=POSES).square().sum().backward()
    assert op.trans_coeff.grad.abs() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 0}, "head_dim=0"),
        ({"axes": 0}, "axes=0"),
        ({"v_transform": "yes"}, "v_transform='yes'"),
        ({"euclid": 2}, "euclid=2"),
        ({"dims": {"se4": 8}}, "dims' kind='se4' must be one of 'triv', 'se3', 'so3', 'so2', 't2'"),
        ({"dims": {"triv": -8}}, r"dims\['triv'\]=-8"),
        ({"dims": {"se3": 6, "triv": 2}}, r"dims\['se3'\]=6 must be a multiple of 4"),
        ({"dims": {"se3": 4, "triv": 4}, "euclid": True}, r"dims\['se3'\]=4 must be a multiple of 3"),
        ({"dims": {"so3": 5, "triv": 3}}, r"dims\['so3'\]=5 must be a multiple of 8"),
        ({"dims": {"so2": 6, "triv": 2}}, r"dims\['so2'\]=6 must be a multiple of 4"),
        ({"dims": {"so2": 8}, "axes": 3}, r"dims\['so2'\]=8 must be a multiple of 6"),
        ({"dims": {"t2": 8}}, r"dims\['t2'\]=8 must be a multiple of 3"),
        ({"dims": {"se3": 4}}, r"dims=\{'se3': 4\} must add up to head_dim=8"),
        ({"dims": {"t2": 6, "triv": 2}, "axes": 3}, r"t2=6 shifts by two coordinates, in dot products; got axes=3"),
        ({"dims": {"t2": 6, "triv": 2}, "euclid": True}, "euclid=True"),
        ({"grid": (2,)}, r"grid=\(2,\) must be 2 whole numbers"),
        ({"grid": (2, 0)}, r"grid=\(2, 0\)"),
        ({"grid": (2, 1.5)}, "grid="),
        ({"dims": {"so2": 8}, "base": -1.0}, r"base=-1\.0"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        GTA(**{"head_dim": 8, **options})


@pytest.mark.parametrize(
    ("dims", "given", "error", "message"),
    [
        ({"so2": 8}, {"poses": POSES}, OptionError, "poses must come with channels of se3, so3; got dims="),
        ({"se3": 8}, {"coords_q": COORDS}, OptionError, "coords_q must come with channels of so2, t2; got dims="),
        ({"se3": 8}, {"poses": POSES[:, 1:]}, ShapeError, r"poses must be .*=\(2, 12, 4, 4\); got \(2, 11, 4, 4\)"),
        ({"se3": 8}, {"poses": POSES[..., :3]}, ShapeError, "poses must be"),
        ({"se3": 8}, {"poses_q": POSES[:1].repeat(3, 1, 1, 1)}, ShapeError, "poses_q must be"),
        ({"so2": 8}, {"coords": [0.1, 0.2]}, ShapeError, r"coords must be .*; got \[0\.1, 0\.2\]"),
    ],
)
def test_bad_attributes(dims: dict, given: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GTA(8, dims)(*qkv(LENGTH), **given)


def test_other_widths_are_refused() -> None:
    with pytest.raises(ShapeError, match="built for width 8; got q of width 6"):
        GTA(8)(*qkv(5, width=6))
    with pytest.raises(ShapeError, match="built for width 8; got v of width 5"):
        GTA(8)(*qkv(5, value_width=5))
    assert GTA(8, v_transform=False)(*qkv(5, value_width=5)).shape == (2, 4, 5, 5)


class Viewer(nn.Module):
    """A query token asks for one of several points, each seen by another camera, in its own camera's frame."""

    def __init__(self, op: Operator, points: int, width: int = 32) -> None:
        super().__init__()
        self.op, self.is_geometric = op, isinstance(op, GTA)
        extra = 0 if self.is_geometric else 16
        self.q, self.kv = nn.Linear(points + extra, width), nn.Linear(4 + points + extra, 2 * width)
        self.out, self.head = nn.Linear(width, width), nn.Linear(width, 3)
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))

    def forward(self, seen: torch.Tensor, poses: torch.Tensor, query: torch.Tensor, pose: torch.Tensor) -> torch.Tensor:
        inputs = {"poses": poses, "poses_q": pose} if self.is_geometric else {}
        if not self.is_geometric:
            seen, query = torch.cat([seen, poses.flatten(2)], -1), torch.cat([query, pose.flatten(2)], -1)
        k, v = self.kv(seen)[:, None].chunk(2, -1)
        y = self.out(self.op(self.q(query)[:, None], k, v, **inputs)[:, 0, 0])
        return self.head(y + self.mlp(y))


def scene(count: int, points: int, random: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Make points in their cameras' frames (homogeneous, with names), the cameras, the query, and the answer."""
    rotation, _ = torch.linalg.qr(torch.randn(count, points + 1, 3, 3, generator=random))
    poses = torch.eye(4).repeat(count, points + 1, 1, 1)
    poses[..., :3, :3] = rotation * torch.linalg.det(rotation)[..., None, None]
    poses[..., :3, 3] = torch.randn(count, points + 1, 3, generator=random)
    world = torch.cat([torch.randn(count, points, 3, generator=random), torch.ones(count, points, 1)], -1)
    seen = (torch.linalg.inv(poses[:, 1:]) @ world[..., None]).squeeze(-1)
    query, names = torch.randint(points, (count,), generator=random), torch.eye(points)
    answer = (torch.linalg.inv(poses[:, 0]) @ world[torch.arange(count), query, :, None])[:, :3, 0]
    return torch.cat([seen, names.expand(count, -1, -1)], -1), poses[:, 1:], names[query][:, None], poses[:, :1], answer


def error(op: Operator, seed: int, steps: int = 300, points: int = 4) -> float:
    random = torch.Generator().manual_seed(seed)
    pool = scene(64 * steps // 4, points, random)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Viewer(op, points)
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    slower = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.05, steps)
    for _ in range(steps):
        batch = torch.randint(len(pool[0]), (64,), generator=random)
        *given, answer = (x[batch] for x in pool)
        optimiser.zero_grad()
        F.mse_loss(model(*given), answer).backward()
        optimiser.step()
        slower.step()
    with torch.no_grad():
        *given, answer = scene(1000, points, torch.Generator().manual_seed(999))
        return F.mse_loss(model(*given), answer).item()


SPLIT = {"triv": 16, "se3": 16}


def test_it_carries_points_from_camera_to_camera(claim) -> None:
    ours, theirs = error(GTA(32, SPLIT), 0), error(Softmax(), 0)
    claim(
        "GTA predicts a point seen by one camera in another's frame, for random poses: test error after 300 steps",
        ours=ours, baseline=theirs, better="lower", margin=0.9 * theirs,
        baseline_name="the same net that reads flattened pose matrices", seed=0,
    )  # fmt: skip


@pytest.mark.slow
def test_values_have_to_be_carried_too(claim) -> None:
    ours, theirs = (sum(error(GTA(32, SPLIT, v_transform=v), seed) for seed in range(2)) / 2 for v in (True, False))
    claim(
        "transforming values and outputs, not only scores, lowers the error on the same task: test error",
        ours=ours, baseline=theirs, better="lower", margin=0.9 * theirs,
        baseline_name="GTA with v_transform=False", seed=0,
    )  # fmt: skip
