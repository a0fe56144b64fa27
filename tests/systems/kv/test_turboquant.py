"""TurboQuant: the paper's centroids and errors, codes by its formula, and why vectors are rotated."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from foveate.core.errors import OptionError
from foveate.host import apply
from foveate.host.slots.codec import Coding
from foveate.kv import KIVI, TurboQuant
from foveate.kv.parts.bit_packing import unpack
from foveate.kv.parts.lloyd_max import centroids, distortion
from foveate.kv.parts.rotated_codec import Rotated, rotation
from tests.conftest import ClaimFixture
from tests.support.host_models import model, tokens

PAPER = {1: 0.36, 2: 0.117, 3: 0.03, 4: 0.009}


def test_centroids_are_the_papers() -> None:
    """For many dimensions: sqrt(2 / pi) at 1 bit, 0.453 and 1.51 at 2 bits, over sqrt(d)."""
    d = 4096
    assert (centroids(1, d) * math.sqrt(d)).tolist() == pytest.approx([-0.798, 0.798], abs=1e-3)
    assert (centroids(2, d) * math.sqrt(d)).tolist() == pytest.approx([-1.51, -0.453, 0.453, 1.51], abs=1e-3)
    assert centroids(2, 3).tolist() == pytest.approx([-0.75, -0.25, 0.25, 0.75], abs=1e-6)  # a uniform density


@pytest.mark.parametrize("bits", PAPER)
def test_the_error_of_a_unit_vector_is_the_papers(bits: int) -> None:
    """Computed from the density, and measured on vectors that are anything but random."""
    assert distortion(bits, 1024) == pytest.approx(PAPER[bits], rel=0.16)  # the paper rounds 0.0345 and 0.0095
    draw = torch.Generator().manual_seed(0)
    x = torch.zeros(1, 1, 4096, 64)
    x[..., :2] = torch.randn(1, 1, 4096, 2, generator=draw)  # two channels hold everything
    codec = Rotated(bits, "random", renormalise=False)
    found = codec.restore(codec.decode(codec.encode(x, {}), 64, torch.float32), {}, 64)
    relative = ((found - x).norm(dim=-1) / x.norm(dim=-1)).square().mean()
    assert float(relative) == pytest.approx(distortion(bits, 64), rel=0.15)


@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_codes_are_nearest_centroids_of_the_rotated_direction(kind: Any) -> None:
    x = torch.randn(2, 2, 8, 32, generator=torch.Generator().manual_seed(0))
    turn = rotation(32, kind, 5, torch.float32, x.device)
    torch.testing.assert_close(turn @ turn.T, torch.eye(32), atol=1e-5, rtol=0)
    codec = Rotated(3, kind, renormalise=False, seed=5)
    parts = codec.encode(x, {})
    unit = (x / x.norm(dim=-1, keepdim=True)) @ turn
    nearest = (unit[..., None] - centroids(3, 32).float()).abs().argmin(-1)
    assert torch.equal(unpack(parts["codes"], 3, 32).long(), nearest)
    expected = x.norm(dim=-1, keepdim=True) * centroids(3, 32).float()[nearest] @ turn.T
    torch.testing.assert_close(
        codec.restore(codec.decode(parts, 32, torch.float32), parts, 32), expected, atol=2e-3, rtol=2e-3
    )
    q = torch.randn(2, 2, 4, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        codec.into(q, parts) @ codec.decode(parts, 32, torch.float32).mT, q @ expected.mT, atol=0.02, rtol=0.01
    )


def test_renormalised_vectors_have_the_norm_of_the_encoded_ones() -> None:
    x = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    for renormalise in (True, False):
        codec = Rotated(2, renormalise=renormalise)
        found = codec.decode(codec.encode(x, {}), 64, torch.float32).norm(dim=-1) / x.norm(dim=-1)
        assert bool(((found - 1).abs() < 2e-3).all()) is renormalise
        if not renormalise:  # a centroid is a mean, so that the vector is shorter, by about the error
            assert float(found.square().mean()) == pytest.approx(1 - distortion(2, 64), abs=0.02)
    zero = torch.zeros(1, 1, 2, 64)
    assert not Rotated(2).decode(Rotated(2).encode(zero, {}), 64, torch.float32).any()


def test_another_seed_is_another_rotation() -> None:
    one, two = (rotation(16, "random", seed, torch.float64, torch.device("cpu")) for seed in (0, 1))
    assert not torch.allclose(one, two)
    first = rotation(16, "hadamard", 0, torch.float64, torch.device("cpu"))
    assert set(first.abs().flatten().tolist()) == {0.25} and not torch.equal(first, first.T)


@torch.no_grad()
def test_attention_is_that_of_the_decoded_cache_and_bytes_by_hand() -> None:
    llama, ids, one = model("llama"), tokens(2, 32), tokens(2, 1, seed=1)
    for values in ("uniform", "centroids"):
        cache, policy = DynamicCache(), TurboQuant(bits=3, values=values, group=8, dense=0)
        with apply(llama, policy) as run:
            llama(ids, past_key_values=cache)
            size = 3 + 2 + (3 + 4 if values == "uniform" else 3 + 2) + 4  # codes, norm, scale and zero, position
            assert run.stats.cache_bytes == 3 * 2 * 2 * 32 * size
            plain = DynamicCache()
            for number, layer in enumerate(cache.layers):
                plain.update(layer.keys.clone(), layer.values.clone(), number)
            got = llama(one, past_key_values=cache).logits
        torch.testing.assert_close(got, llama(one, past_key_values=plain).logits, atol=1e-4, rtol=1e-4)


def coding(policy: Any) -> Coding:
    found = policy.coding(5, None)
    assert found is not None
    return found


def error(policy: Any, x: Tensor) -> float:
    codec = coding(policy).keys
    parts = codec.encode(x, {})
    found = codec.restore(codec.decode(parts, x.shape[3], torch.float32), parts, x.shape[3])
    return float((found - x).square().sum() / x.square().sum())


def test_rotated_vectors_need_no_data(claim: ClaimFixture) -> None:
    """Keys whose large values stand in other channels for every token: groups along tokens have a long range."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 128, 64, generator=draw)
    large = torch.rand(1, 1, 128, 64, generator=draw) < 0.05
    x = torch.where(large, 8 * x, x)
    claim(
        "2 bits after a rotation keep keys with scattered large values that equal steps lose (share of squared error)",
        ours=error(TurboQuant(bits=2), x), baseline=error(KIVI(bits=2), x), better="lower", margin=0.05,
        baseline_name="KIVI at 2 bits and groups of 32 tokens", seed=0,
    )  # fmt: skip


def test_a_rotation_is_what_helps() -> None:
    """Without it the centroids do not fit: coordinates of one large channel are far from a sphere's density."""
    x = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    x[..., 3] *= 20
    codec = Rotated(2, "random", renormalise=False)
    turned = error(TurboQuant(bits=2, rotation="random", renormalise=False), x)
    parts = codec.encode(x @ rotation(64, "random", 0, torch.float32, x.device).T, {})  # undoes the rotation
    plain = codec.decode(parts, 64, torch.float32)
    assert turned < 0.13 < 2 * turned < float((plain - x).square().sum() / x.square().sum())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bits": 5}, "bits=5 must be one of"),
        ({"value_bits": 6}, "value_bits=6"),
        ({"values": "x"}, "values='x'"),
        ({"renormalise": 1}, "renormalise=1"),
        ({"rotation": "x"}, "rotation='x'"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        TurboQuant(**options)


def test_what_does_not_fit_a_model_is_refused() -> None:
    with pytest.raises(OptionError, match="dense=2 leaves none of the model's 3"), apply(model("llama"), TurboQuant()):
        pass
    with pytest.raises(OptionError, match="bits has 1 widths"), apply(model("llama"), TurboQuant(bits=(2,), dense=0)):
        pass
