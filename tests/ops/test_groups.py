"""Geometric groups on channels: representations multiply, and actions map into a common frame and back."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.ops.functional import geometry
from tests.support.tensors import assert_near, qkv


def rotations(count: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    rotations, _ = torch.linalg.qr(torch.randn(2, count, 3, 3, generator=random, dtype=torch.float64))
    return rotations * torch.linalg.det(rotations)[..., None, None]


def poses(count: int, seed: int = 0) -> torch.Tensor:
    made = torch.eye(4, dtype=torch.float64).repeat(2, count, 1, 1)
    made[..., :3, :3] = rotations(count, seed)
    made[..., :3, 3] = torch.randn(2, count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made


def test_rigid() -> None:
    into, out = geometry.rigid(poses(5), torch.tensor(0.3, dtype=torch.float64))
    assert_near(into[..., :3, 3], 0.3 * poses(5)[..., :3, 3], 1e-12)
    assert_near(into[..., :3, :3], poses(5)[..., :3, :3], 1e-12)
    assert torch.equal(into[..., 3, :], torch.tensor([0.0, 0, 0, 1]).double().expand(2, 5, 4))
    assert_near(out, torch.linalg.inv(into), 1e-12)
    product, _ = geometry.rigid(poses(5) @ poses(5, 1), torch.tensor(0.3, dtype=torch.float64))
    assert_near(product, into @ geometry.rigid(poses(5, 1), torch.tensor(0.3, dtype=torch.float64))[0], 1e-12)


def test_wigner() -> None:
    r, s = rotations(6), rotations(6, 1)
    found = geometry.wigner(r)
    assert_near(found @ geometry.wigner(s), geometry.wigner(r @ s), 1e-12)
    assert_near(found @ found.mT, torch.eye(8).double().expand(2, 6, 8, 8), 1e-12)
    assert_near(found[..., :3, :3], r, 1e-12)
    assert not found[..., :3, 3:].any()
    assert not found[..., 3:, :3].any()
    angle = torch.arccos((r.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2)
    trace = found[..., 3:, 3:].diagonal(dim1=-2, dim2=-1).sum(-1)
    assert_near(trace, 1 + 2 * angle.cos() + 2 * (2 * angle).cos(), 1e-12)  # the trace is the character of degree 2


def test_shift_and_octaves() -> None:
    coords = torch.tensor([[[2.0, 3.0], [0.5, -1.0]]])
    assert torch.equal(geometry.shift(coords)[0, 0], torch.tensor([[1.0, 0, 0], [0, 1, 0], [2, 3, 1]]))
    assert_near(geometry.shift(coords) @ geometry.shift(-coords), torch.eye(3).expand(1, 2, 3, 3), 0.0)
    assert_near(geometry.octaves(3), 2 * math.pi * torch.tensor([0.25, 0.5, 1.0]).double(), 1e-12)


def test_by_groups() -> None:
    x, matrices = qkv(5, heads=3, kv_heads=3)[0], poses(5)
    expected = torch.empty_like(x)
    for n in range(5):
        for g in (0, 4):
            expected[:, :, n, g : g + 4] = (matrices[:, None, n] @ x[:, :, n, g : g + 4, None]).squeeze(-1)
    assert_near(geometry.by_groups(x, matrices), expected, 1e-12)
    half = geometry.by_groups(x.bfloat16(), matrices.float())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, geometry.by_groups(x.bfloat16().float(), matrices.float()).bfloat16())


@pytest.mark.parametrize("kind", ["matrices", "points", "rotation"])
def test_an_action_depends_on_the_relative_frame(kind: str) -> None:
    q, k, v = qkv(5, kv_heads=4, width=12)
    world = poses(1, 7)

    def action(at: torch.Tensor, moved: bool) -> geometry.Action:
        if kind == "rotation":
            return geometry.Rotation(at[..., :3, 3].repeat(1, 1, 2) + (0.7 if moved else 0))
        into, out = geometry.rigid(world @ at if moved else at, torch.tensor(1.0).double())
        return (geometry.Matrices if kind == "matrices" else geometry.Points)(into, out)

    results = []
    for moved in (False, True):
        mine, theirs = (action(poses(5, seed), moved) for seed in (0, 1))
        scores = mine.query(q) @ theirs.key(k).mT
        if kind == "points":
            scores = torch.cdist(mine.query(q), theirs.key(k))
        results.append((scores, mine.back(theirs.value(v)), theirs.back(theirs.value(v)), theirs.value(v)))
    for one, other in zip(results[0][:2], results[1][:2], strict=True):
        assert_near(one, other, 1e-10)
    assert_near(results[0][2], v, 1e-12)
    assert (results[0][3] - results[1][3]).abs().max() > 0.1
    assert (results[0][1] - v).abs().max() > 0.1


def test_points_are_moved() -> None:
    q, _, _ = qkv(5, width=6)
    into, out = geometry.rigid(poses(5), torch.tensor(0.5).double())
    first = poses(5)[:, None, :, :3, :3] @ q[..., :3, None] + 0.5 * poses(5)[:, None, :, :3, 3:]
    action = geometry.Points(into, out)
    assert_near(action.query(q)[..., :3], first.squeeze(-1), 1e-12)
    assert_near(action.value(q)[..., :3], first.squeeze(-1), 1e-12)
    assert_near(action.value(q)[..., 3], torch.ones(2, 4, 5).double(), 0.0)
    assert not action.back(0 * action.value(q)).any(), "what read nothing is nothing, not the origin of another frame"
