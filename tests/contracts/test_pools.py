"""The contract that every pool has to keep."""

from __future__ import annotations

import copy

import pytest
import torch

import foveate.nn
from foveate.core.errors import OptionError, ShapeError
from foveate.nn import Pool, ProbeHead
from tests.contracts.pools import BATCH, DIM, EVERY, LENGTH, POOLS, example, real, tokens
from tests.support.tensors import assert_near, gradients


def test_every_public_pool_is_here() -> None:
    public = [getattr(foveate.nn, name) for name in dir(foveate.nn) if not name.startswith("_")]
    pools = {cls for cls in public if isinstance(cls, type) and issubclass(cls, Pool) and cls is not Pool}
    assert pools <= set(POOLS.values())
    assert {"efficient_probing", "acmil-GatedBranches", "acmil-HeadBranches", "set_transformer-PMA"} <= set(POOLS)


# -- shapes ------------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("length", [1, 2, LENGTH, 37])
def test_tokens_in_vectors_out(key: str, length: int) -> None:
    pool, x = example(key), tokens(length)
    vectors, weights = pool.read(x)
    assert vectors.shape == (BATCH, pool.slots, pool.out_dim)
    assert weights.shape == (BATCH, pool.maps, length)
    assert vectors.isfinite().all()
    assert (weights >= 0).all()
    assert_near(weights.sum(-1), torch.ones(BATCH, pool.maps), 1e-12)
    assert_near(pool(x), vectors, 1e-12)
    assert_near(pool.weights(x), weights, 0)


@EVERY
@pytest.mark.parametrize("dim", [1, 7, 24])
def test_other_widths(key: str, dim: int) -> None:
    pool = example(key, dim)
    assert pool.dim == dim
    assert pool(torch.ones(2, 5, dim, dtype=torch.float64)).shape == (2, pool.slots, pool.out_dim)


@EVERY
def test_maps_are_not_all_flat_nor_all_the_same(key: str) -> None:
    """A pool whose weights do not depend on its tokens would pass many tests below."""
    pool = example(key)
    weights = pool.weights(tokens())
    if not list(pool.parameters()):
        assert_near(weights, torch.full_like(weights, 1 / LENGTH), 1e-12)
        return
    assert weights.std(-1).min() > 1e-3
    assert (weights[0] - weights[1]).abs().max() > 1e-3
    for m in range(1, pool.maps):
        assert (weights[:, m] - weights[:, 0]).abs().max() > 1e-3


# -- masks -------------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_masked_tokens_have_no_effect(key: str, garbage: float) -> None:
    """Neither on values nor on gradients; the call is that of the real tokens alone."""
    pool, mask = example(key), real(LENGTH, 5, 1)
    found = []
    for filled in (0.0, garbage):
        x = tokens().masked_fill(~mask[..., None], filled).requires_grad_()
        vectors, weights = pool.read(x, mask)
        found.append([vectors, weights, *gradients(vectors, [x, *pool.parameters()])])
    for ours, expected in zip(found[1], found[0], strict=True):
        assert_near(ours, expected, 1e-12)
    vectors, weights, of_tokens, *_ = found[1]
    assert not weights.masked_select(~mask[:, None]).any()
    assert not of_tokens[~mask].any()
    for i, n in enumerate((LENGTH, 5, 1)):
        alone = pool.read(tokens()[i : i + 1, :n])
        assert_near(vectors[i : i + 1], alone.vectors, 1e-10)
        assert_near(weights[i : i + 1, :, :n], alone.weights, 1e-10)


@EVERY
def test_real_tokens_may_stand_anywhere(key: str) -> None:
    pool, x = example(key), tokens()
    mask = torch.rand(BATCH, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.5
    assert mask.any(-1).all()
    for i in range(BATCH):
        assert_near(pool(x, mask)[i : i + 1], pool(x[i : i + 1, mask[i]]), 1e-10)


@EVERY
def test_an_example_without_real_tokens(key: str) -> None:
    pool, mask = example(key), real(LENGTH, 0, 3)
    x = tokens().masked_fill(~mask[..., None], float("nan")).requires_grad_()
    vectors, weights = pool.read(x, mask)
    assert vectors.isfinite().all()
    assert not weights[1].any()
    assert_near(weights[[0, 2]].sum(-1), torch.ones(2, pool.maps), 1e-12)
    assert_near(pool(x, mask), vectors, 1e-12)
    for grad in gradients(vectors, [x, *pool.parameters()]):
        assert grad.isfinite().all()


@EVERY
def test_a_mask_of_one_example_serves_all(key: str) -> None:
    pool, x = example(key), tokens()
    assert_near(pool(x, real(5)), pool(x, real(*[5] * BATCH)), 0)
    assert_near(pool(x, torch.ones(BATCH, LENGTH, dtype=torch.bool)), pool(x), 1e-12)


# -- order and batch ---------------------------------------------------------------------------------------------------


@EVERY
def test_order_has_no_effect(key: str) -> None:
    pool, x = example(key), tokens()
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(1))
    vectors, weights = pool.read(x)
    moved = pool.read(x[:, order])
    assert_near(moved.vectors, vectors, 1e-10)
    assert_near(moved.weights, weights[..., order], 1e-10)


@EVERY
def test_examples_are_independent(key: str) -> None:
    pool, x = example(key), tokens()
    vectors, weights = pool.read(x)
    for i in range(BATCH):
        alone = pool.read(x[i : i + 1])
        assert_near(alone.vectors, vectors[i : i + 1], 1e-12)
        assert_near(alone.weights, weights[i : i + 1], 1e-12)


@EVERY
def test_evaluation_draws_nothing(key: str) -> None:
    pool, x = example(key), tokens()
    state = torch.get_rng_state()
    first = pool(x)
    assert_near(pool(x), first, 0)
    assert torch.equal(torch.get_rng_state(), state)


@EVERY
def test_training_draws_from_the_generator_alone(key: str) -> None:
    """Two trainings from one seed agree, whatever PyTorch's own generator has been used for."""
    outs = []
    for seed in (0, 1):
        pool = example(key).train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            outs.append([pool(tokens()), pool(tokens())])
    for one, other in zip(*outs, strict=True):
        assert_near(one, other, 0)


# -- gradients, numbers, state -----------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("training", [False, True])
def test_gradients_reach_every_parameter(key: str, training: bool) -> None:
    pool, x = example(key).train(training), tokens().requires_grad_()
    names = ["x", *(name for name, _ in pool.named_parameters())]
    found = gradients(pool(x), [x, *pool.parameters()])
    assert [name for name, gradient in zip(names, found, strict=True) if not gradient.any()] == []


@EVERY
def test_gradients(key: str) -> None:
    pool, x = example(key), tokens(5).requires_grad_()
    assert torch.autograd.gradcheck(pool.read, (x,), fast_mode=True)
    toward = torch.randn(BATCH, pool.slots, pool.out_dim, generator=torch.Generator().manual_seed(5)).double()
    step = 1e-6
    for parameter in pool.parameters():
        (gradient,) = torch.autograd.grad((pool(x) * toward).sum(), parameter)
        way = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(6)).double()
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * step * way
                ends.append((pool(x) * toward).sum())
                parameter -= sign * step * way
        expected = (gradient * way).sum()
        assert_near((ends[0] - ends[1]) / (2 * step), expected, 1e-5 * (1 + expected.abs().item()))


@EVERY
def test_bfloat16(key: str) -> None:
    pool, x, mask = example(key).bfloat16(), tokens().bfloat16(), real(LENGTH, 5, 0)
    vectors, weights = pool.read(x, mask)
    wide = copy.deepcopy(pool).double().read(x.double(), mask)
    assert vectors.dtype == weights.dtype == torch.bfloat16
    assert (vectors.double() - wide.vectors).norm() < 0.05 * wide.vectors.norm()
    assert (weights.double() - wide.weights).norm() < 0.05 * wide.weights.norm()
    assert (pool(x, mask).double() - wide.vectors).norm() < 0.05 * wide.vectors.norm()


@EVERY
def test_a_state_dict_makes_a_twin(key: str) -> None:
    pool, x = example(key), tokens()
    twin = copy.deepcopy(pool)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    twin.load_state_dict(pool.state_dict())
    assert_near(twin(x), pool(x), 0)


@EVERY
def test_a_copy_is_of_its_own(key: str) -> None:
    pool, x = example(key), tokens()
    before = pool(x)
    twin = copy.deepcopy(pool).train()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    trained = copy.deepcopy(pool).train()(x)
    assert_near(pool(x), before, 0)
    assert_near(pool.train()(x), trained, 0)


@EVERY
def test_it_goes_into_a_probe(key: str) -> None:
    """Every pool works under the one head that the literature compares probes with."""
    torch.manual_seed(0)
    pool = example(key)
    probe = ProbeHead(pool, 5).double()
    x, mask = tokens().requires_grad_(), real(LENGTH, 5, 3)
    logits = probe.train()(x, mask)
    assert logits.shape == (BATCH, 5)
    assert gradients(logits, [x])[0][mask].any()
    probe.eval()
    flat = pool(x, mask).flatten(1)
    normed = (flat - probe.norm.running_mean) / (probe.norm.running_var + 1e-6).sqrt()
    assert_near(probe(x, mask), normed @ probe.head.weight.mT + probe.head.bias, 1e-10)


# -- refusals ----------------------------------------------------------------------------------------------------------


def refused(pool: Pool, x: object, mask: object = None) -> str:
    """Return the error that all three calls have in common."""
    messages = set()
    for call in (pool, pool.read, pool.weights):
        with pytest.raises(ShapeError) as error:
            call(x, mask)
        messages.add(str(error.value))
    (message,) = messages
    assert "\n" not in message
    return message


@EVERY
def test_malformed_calls(key: str) -> None:
    pool, x = example(key), tokens()
    for bad in (x[0], x[..., 1:], x[:, :0], x[None], "tokens"):
        assert refused(pool, bad).startswith(f"x must be (B, N, C={DIM}) with N > 0; got ")
    assert refused(pool, x.long()) == "x must be floating point; got torch.int64"
    given: list[tuple[object, str]] = [
        (real(LENGTH, 5, 3)[:, :-1], f"({BATCH}, {LENGTH - 1})"),
        (real(LENGTH, 5, 3)[:2], f"(2, {LENGTH})"),
        (real(LENGTH, 5, 3).long(), f"Tensor ({BATCH}, {LENGTH}) int64"),
        (real(LENGTH, 5, 3)[:, None, None], f"({BATCH}, 1, 1, {LENGTH}); a mask of keys is (B, N)"),
    ]
    for mask, got in given:
        message = refused(pool, x, mask)
        assert message.startswith(f"mask must be bool (B, N)=({BATCH}, {LENGTH})")
        assert message.endswith(f"got {got}")


@EVERY
def test_bad_widths_are_refused(key: str) -> None:
    for dim in (0, -1, 1.5, "wide"):
        with pytest.raises(OptionError) as error:
            POOLS[key](dim, **needed(key))
        assert str(error.value).startswith(f"dim={dim!r} must be ")


def needed(key: str) -> dict[str, int]:
    """Return the options without a default."""
    return {"heads": 1} if key == "set_transformer-PMA" else {}


def test_a_probe_refuses_what_it_cannot_take() -> None:
    pool = example("mean")
    with pytest.raises(OptionError, match=r"pool='mean' must be a foveate.nn.Pool"):
        ProbeHead("mean", 3)
    with pytest.raises(OptionError, match="classes=0"):
        ProbeHead(pool, 0)
    probe, x = ProbeHead(pool, 3).double(), tokens(batch=1)
    with pytest.raises(ShapeError, match=r"x must have B > 1 in training"):
        probe(x)
    assert probe.eval()(x).shape == (1, 3)


def test_a_class_without_a_mechanism_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Pool(4)  # type: ignore[abstract]
