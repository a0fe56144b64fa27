"""Rotary positions: scores depend only on offsets, in both layouts of pairs."""

from __future__ import annotations

import cmath

import pytest
import torch

from foveate.core.errors import OptionError, ShapeError
from foveate.ops.functional import rotary
from tests.support.tensors import assert_near, qkv


def test_frequencies_and_angles() -> None:
    assert rotary.rotary_frequencies(4).tolist() == [1.0, 0.01]
    assert rotary.rotary_frequencies(6, 64.0).tolist() == pytest.approx([1.0, 1 / 4, 1 / 16])
    positions = torch.tensor([[0.0, 1.5], [2.0, -3.0]])
    found = rotary.rotary_angles(positions, 4, 100.0)
    assert found.dtype == torch.float64
    assert_near(found, positions.double()[..., None] * torch.tensor([1.0, 0.1], dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("width", [8, 6])
def test_pairs_rotate_as_complex_numbers(width: int) -> None:
    x = qkv(5, width=8)[0]
    angles = rotary.rotary_angles(torch.arange(5), width, 50.0)
    for layout in ("half", "interleaved"):
        expected = x.clone()
        for n in range(5):
            for c in range(width // 2):
                one, other = (c, c + width // 2) if layout == "half" else (2 * c, 2 * c + 1)
                rotation = cmath.exp(1j * n * 50.0 ** (-2 * c / width))
                for at in ((b, h) for b in range(2) for h in range(4)):
                    z = complex(x[(*at, n, one)], x[(*at, n, other)]) * rotation
                    expected[(*at, n, one)], expected[(*at, n, other)] = z.real, z.imag
        assert_near(rotary.rotate(x, angles, layout), expected, 1e-12)
    assert_near(rotary.rotate(x, angles), rotary.rotate(x, angles, "half"), 0.0)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_only_offsets_count(layout: rotary.Layout) -> None:
    q, k, _ = qkv(7, kv_heads=4)
    near, far = (rotary.rotary_angles(torch.arange(7) + start, 8) for start in (0, 100_000))
    logits, moved = (rotary.rotate(q, angles, layout) @ rotary.rotate(k, angles, layout).mT for angles in (near, far))
    assert_near(moved, logits, 1e-9)
    apart = rotary.rotate(q, far, layout) @ rotary.rotate(k, near, layout).mT
    assert (apart - logits).abs().max() > 0.1
    assert_near(rotary.rotate(rotary.rotate(q, near, layout), -near, layout), q, 1e-12)


def test_parity_with_llama() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=16)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 20, 300]])
    q, k, _ = qkv(5, width=16, dtype=torch.float32)
    theirs = llama.apply_rotary_pos_emb(q, k, *llama.LlamaRotaryEmbedding(config)(q, positions))
    angles = rotary.rotary_angles(positions[:, None], 16, 500.0)
    for x, expected in zip((q, k), theirs, strict=True):
        assert_near(rotary.rotate(x, angles), expected, 1e-4)


def test_half_precision_rotates_in_float32() -> None:
    x = qkv(9, width=64)[0].bfloat16()
    angles = rotary.rotary_angles(torch.arange(9), 64)
    out = rotary.rotate(x, angles)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, rotary.rotate(x.float(), angles).bfloat16())


def test_refusals() -> None:
    positions, x = torch.arange(3), torch.zeros(1, 1, 3, 4)
    for dim, message in ((3, "dim=3 must be even"), (0, "dim=0"), (2.0, r"dim=2\.0")):
        with pytest.raises(OptionError, match=message):
            rotary.rotary_angles(positions, dim)
    for base in (0.0, -1.0, True):
        with pytest.raises(OptionError, match="base="):
            rotary.rotary_angles(positions, 4, base)
    with pytest.raises(OptionError, match="layout='neox'"):
        rotary.rotate(x, rotary.rotary_angles(positions, 4), "neox")
    with pytest.raises(ShapeError, match="angles must rotate at most D=4 channels; got 6"):
        rotary.rotate(x, rotary.rotary_angles(positions, 6))
