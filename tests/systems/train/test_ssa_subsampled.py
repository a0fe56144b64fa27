"""Subsampled attention: its draws by hand and by their law, its limits, hosts, and its claims on a few digits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from foveate.core import engines, masks, oracle
from foveate.core.errors import FoveateError, OptionError, ShapeError
from foveate.nn import MultiHeadAttention
from foveate.ops.functional import subsampled_attention
from foveate.train import SubsampledAttention, self_ensemble
from tests.conftest import ClaimFixture
from tests.support.host_models import model, tokens
from tests.support.tensors import assert_near, gradients, qkv
from tests.systems.nn import digits

N = 16


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seen(count: int = 1, n: int = N, seed: int = 0, **options: Any) -> Tensor:
    """Return which tokens each query sees in `count` sequences, `(count, H, N, N)`: their values are one-hot."""
    q, k = torch.randn(2, count, 2, n, 4, generator=draw(9)).unbind()
    v = torch.eye(n).expand(count, 2, -1, -1)
    return subsampled_attention(q, k, v, **{"generator": draw(seed), **options}) > 0


# -- the law of the draws ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keep", [0.05, 0.25, 0.6])
def test_queries_share_the_drawn_keys_and_see_themselves(keep: float, causal: bool) -> None:
    found, own = seen(6, keep=keep, causal=causal), torch.eye(N, dtype=torch.bool)
    assert (found & own).any(-1).all()
    assert torch.equal(found[:, 0], found[:, 1]), "heads share the draw"
    size = max(1, round(keep * N))
    for each in found[:, 0]:
        shared = (each & ~own).any(0)
        assert int(shared.sum()) <= size
        wanted = shared.expand(N, -1) | own
        assert torch.equal(each, wanted & masks.causal(N, N) if causal else wanted)
    counts = (found & ~own).any(2).sum(-1)
    assert causal or (counts == size).all()
    assert len({tuple(row.flatten().tolist()) for row in found[:, 0]}) > 3, "sequences draw for themselves"


@pytest.mark.parametrize("keep", [0.25, 0.5])
def test_every_token_is_drawn_equally_often(keep: float) -> None:
    """Over 2000 draws, and without the tokens themselves, each inclusion is within three standard errors."""
    found = seen(2000, keep=keep)[:, 0].double().mean(0)
    error = 3 * (keep * (1 - keep) / 2000) ** 0.5
    others = found[~torch.eye(N, dtype=torch.bool)]
    assert float((others - keep).abs().max()) < 1.4 * error, "of 240 that are nearly 16"
    assert float(others.mean()) == pytest.approx(keep, abs=error)


def test_local_draws_prefer_near_tokens() -> None:
    found = seen(2000, keep=0.25, mode="local", sigma=0.25)[:, 0].double().mean(0)
    distance = (torch.arange(N)[:, None] - torch.arange(N)).abs()
    rates = [float(found[distance == d].mean()) for d in range(N)]
    assert rates[0] == 1.0
    assert all(one >= other for one, other in pairwise(rates[:10]))
    assert rates[1] > 1.5 * rates[4] > 3 * rates[8]
    assert rates[14] == 0.0
    wide = seen(2000, keep=0.25, mode="local", sigma=50.0)[:, 0].double().mean(0)
    rates = [float(wide[distance == d].mean()) for d in range(1, N)]
    assert max(rates) - min(rates) < 0.06
    assert rates[0] == pytest.approx(3 / 15, abs=0.02)


@pytest.mark.parametrize("keep", [0.25, 0.3])
def test_local_draws_are_windows_that_partition_the_tokens(keep: float) -> None:
    for each in seen(5, keep=keep, mode="local", sigma=0.5)[:, 0]:
        assert torch.equal(each, each.T)
        assert torch.equal(each, (each.double() @ each.double()) > 0)
        sizes = each.sum(-1)
        assert int(sizes.max()) == round(keep * N)
        assert int((sizes == round(keep * N)).sum()) >= N - N % round(keep * N)


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["unbiased", "local"])
@pytest.mark.parametrize("causal", [False, True])
def test_with_all_keys_it_is_full_attention(mode: Any, causal: bool) -> None:
    q, k, v = qkv(N, heads=4, kv_heads=2)
    out = subsampled_attention(q, k, v, 1.0, mode, causal)
    assert_near(out, oracle.attention(q, k, v, causal=causal), 1e-12)


@pytest.mark.parametrize(("n", "size"), [(16, 4), (15, 4), (9, 2)])
@pytest.mark.parametrize("causal", [False, True])
def test_without_shifts_it_is_attention_inside_windows(n: int, size: int, causal: bool) -> None:
    q, k, v = qkv(n, heads=4, kv_heads=2)
    place = torch.arange(n) // size
    mask = place[:, None] == place
    expected = oracle.attention(q, k, v, mask=mask, causal=causal)
    assert_near(subsampled_attention(q, k, v, size / n, "local", causal, sigma=0.0), expected, 1e-12)


@pytest.mark.parametrize("mode", ["unbiased", "local"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "keys", "pairs", "bias"])
def test_the_output_and_its_gradients_are_those_of_a_masked_softmax(mode: Any, causal: bool, kind: str) -> None:
    q, k, v = qkv(N, heads=4, kv_heads=2, grad=True)
    options = {"keep": 0.3, "mode": mode, "causal": causal, "sigma": 0.4}
    one_hot = torch.eye(N, dtype=q.dtype).expand(2, 2, -1, -1)
    drawn = subsampled_attention(q, k, one_hot, **options, generator=draw(1)) > 0
    mask: Tensor | None = None
    if kind != "none":
        shape = (2, 1, 1, N) if kind == "keys" else (2, 4, N, N)
        mask = torch.rand(shape, generator=draw(2)) < 0.8
    if kind == "bias" and mask is not None:
        bias = torch.randn(mask.shape, generator=draw(3), dtype=q.dtype)
        mask = bias.masked_fill(~mask, -torch.inf)
    out = subsampled_attention(q, k, v, **options, generator=draw(1), mask=mask)
    expected = oracle.attention(q, k, v, mask=masks.combine(mask, drawn))
    assert_near(out, expected, 1e-10)
    toward = torch.randn(out.shape, generator=draw(4), dtype=q.dtype)
    for one, other in zip(
        gradients((out * toward).sum(), [q, k, v]), gradients((expected * toward).sum(), [q, k, v]), strict=True
    ):
        assert_near(one, other, 1e-10)


@pytest.mark.parametrize("mode", ["unbiased", "local"])
def test_hidden_garbage_has_no_effect_and_blind_queries_give_zeros(mode: Any) -> None:
    q, k, v = qkv(N, heads=4, kv_heads=2)
    mask = torch.ones(2, 1, 1, N, dtype=torch.bool)
    mask[0, ..., 11:], mask[1] = False, False
    found = []
    for garbage in (torch.nan, 5.0):
        k[0, :, 11:], v[0, :, 11:] = garbage, garbage
        found.append(subsampled_attention(q, k, v, 0.5, mode, generator=draw(), mask=mask))
    assert torch.equal(*found)
    assert found[0][0, :, :11].any()
    assert not found[0][1].any()


def test_an_eighth_of_the_keys_takes_an_eighth_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    n, d = 512, 32
    q, k, v = (torch.randn(1, 2, n, d, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        subsampled_attention(q, k, v, 0.125, generator=draw()).sum().backward()
    assert counter.get_total_flops() == 6 * 2 * 2 * n * (n // 8) * d, "six products, forward and backward"
    calls, run = [], engines.run
    monkeypatch.setattr(engines, "run", lambda call: (calls.append(call), run(call))[1])
    subsampled_attention(q, k, v, 0.125, "local", generator=draw())
    assert [call.q.shape[0] * call.n_queries * call.n_keys for call in calls] == [n * (n // 8)]


def test_malformed_calls_are_refused() -> None:
    q, k, v = qkv(8)
    for options, says in (
        (dict(keep=0.0), "keep=0.0 must be over 0"),
        (dict(keep=1.5), "keep=1.5 must be in"),
        (dict(mode="global"), "mode='global' must be one of 'unbiased', 'local'"),
        (dict(sigma=-1.0), "sigma=-1.0 must be at least 0"),
        (dict(generator=None), "generator must be a torch.Generator"),
    ):
        with pytest.raises(OptionError, match=says):
            subsampled_attention(q, k, v, **{"generator": draw(), **options})
    with pytest.raises(ShapeError, match="Nq=3, Nk=8"):
        subsampled_attention(q[:, :, :3], k, v, generator=draw())
    with pytest.raises(OptionError, match="must have a layer of softmax attention"):
        SubsampledAttention(nn.Linear(2, 2), generator=draw()).__enter__()
    with pytest.raises(OptionError, match="generator=0 must be"):
        SubsampledAttention(nn.Linear(2, 2), generator=0)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="average='median' must be one of"):
        self_ensemble(vit(), torch.zeros(1, 8, 8), generator=draw(), average="median")  # type: ignore[arg-type]
    with pytest.raises(FoveateError, match="samples=0"):
        self_ensemble(vit(), torch.zeros(1, 8, 8), 0, generator=draw())


# -- in a model --------------------------------------------------------------------------------------------------------


def vit(seed: int = 0) -> nn.Module:
    return digits.vit(MultiHeadAttention, seed=seed)


@torch.no_grad()
def test_a_network_draws_while_it_trains_and_is_as_before_afterwards() -> None:
    net, images = vit().eval(), digits.data()[0][:4]
    ops, plain = [block.mixer.op for block in net.blocks], net(images)
    with SubsampledAttention(net, 0.25, generator=draw()):
        assert torch.equal(net(images), plain), "in evaluation mode it sees all"
        net.train()
        drawn = net(images), net(images)
        assert not torch.allclose(drawn[0], drawn[1])
        assert not torch.allclose(drawn[0], plain)
    net.train()
    assert torch.equal(net(images), plain)
    assert [block.mixer.op for block in net.blocks] == ops
    with pytest.raises(RuntimeError, match="stop"), SubsampledAttention(net, 0.25, generator=draw()):
        raise RuntimeError("stop")
    assert [block.mixer.op for block in net.blocks] == ops
    with SubsampledAttention(net, 1.0, generator=draw()):
        assert_near(net(images), plain, 1e-5)
        assert net.state_dict().keys() == vit().state_dict().keys()


def test_layers_draw_independently_and_a_seed_repeats_them() -> None:
    found: list[list[Tensor]] = []
    net, x = [MultiHeadAttention(16, 2) for _ in range(2)], torch.randn(1, N, 16, generator=draw())
    stack = nn.Sequential(*net)
    for _ in range(2):
        with torch.no_grad(), SubsampledAttention(stack, 0.25, generator=draw(5), always=True):
            found.append([layer(x) for layer in net])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    net[1].load_state_dict(net[0].state_dict())
    with torch.no_grad(), SubsampledAttention(stack, 0.25, generator=draw(5), always=True):
        assert not torch.allclose(net[0](x), net[1](x))


@pytest.mark.parametrize("name", ["llama", "vit", "bert"])
@pytest.mark.parametrize("mode", ["unbiased", "local"])
def test_transformers_models_draw_too(name: str, mode: Any) -> None:
    """A padded decoder, an image encoder and a text encoder; with all keys they are as they were."""
    net = model(name)
    given: dict[str, Any] = {"pixel_values": torch.randn(2, 3, 16, 16, generator=draw())}
    if name != "vit":
        given = {"input_ids": tokens(2, 14), "attention_mask": torch.ones(2, 14, dtype=torch.long)}
        given["attention_mask"][0, :3] = 0
    elif net.config.image_size != 16:
        given = {"pixel_values": torch.randn(2, net.config.num_channels, net.config.image_size, net.config.image_size)}
    plain = net(**given).logits
    with SubsampledAttention(net, 1.0, mode, generator=draw(), always=True):
        whole = net(**given).logits
    real = given["attention_mask"].bool() if name != "vit" else ...
    assert_near(whole[real], plain[real], 1e-5)
    with SubsampledAttention(net, 0.3, mode, generator=draw()):
        assert torch.equal(net(**given).logits, plain), "in evaluation mode"
    with SubsampledAttention(net, 0.3, mode, generator=draw(), always=True):
        drawn = net(**given).logits
        assert drawn[real].isfinite().all()
        assert float((drawn[real] - plain[real]).abs().max()) > 1e-3
        drawn[real].square().mean().backward()
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    assert grads and all(grad.isfinite().all() for grad in grads)
    net.zero_grad()
    assert torch.equal(net(**given).logits, plain)


@torch.no_grad()
def test_an_ensemble_is_the_mean_of_its_draws() -> None:
    net, images, random = vit().eval(), digits.data()[0][:4], draw(3)
    with SubsampledAttention(net, 0.25, generator=random, always=True):
        drawn = torch.stack([net(images) for _ in range(3)])
    probs = self_ensemble(net, images, 3, 0.25, generator=draw(3))
    assert_near(probs, drawn.softmax(-1).mean(0), 1e-6)
    logits = self_ensemble(net, images, 3, 0.25, generator=draw(3), average="logits")
    assert_near(logits, drawn.mean(0).softmax(-1), 1e-6)
    assert not net.training


# -- the claims --------------------------------------------------------------------------------------------------------

EPOCHS, EXAMPLES = 60, 300


@cache
def trained(how: str, seed: int) -> nn.Module:
    net = vit(seed)
    if how == "full":
        return digits.fit(net, seed, EPOCHS, examples=EXAMPLES)
    with SubsampledAttention(net, 0.25, generator=draw(seed)):
        digits.fit(net, seed, EPOCHS * 9 // 10, examples=EXAMPLES)
    if how == "drawn":
        return net
    return digits.fit(net, seed, EPOCHS // 10, lr=3e-4, examples=EXAMPLES)


@torch.no_grad()
def log_loss(net: nn.Module, samples: int, seed: int) -> float:
    _, _, images, labels = digits.data()
    return float(F.nll_loss(self_ensemble(net, images, samples, 0.5, generator=draw(seed)).log(), labels))


def mean(of: Callable[[int], float], seeds: list[int]) -> float:
    return sum(map(of, seeds)) / len(seeds)


def check_claim(claim: ClaimFixture, seeds: list[int]) -> None:
    claim(
        f"300 digits, a quarter of the keys and then full attention for a tenth of the epochs, {len(seeds)} seeds: "
        "accuracy",
        ours=mean(lambda s: digits.accuracy(trained("ours", s)), seeds), better="higher", margin=0.01,
        baseline=mean(lambda s: digits.accuracy(trained("full", s)), seeds), baseline_name="full attention",
        seed=seeds[0],
    )  # fmt: skip
    losses = [mean(lambda s, n=n: log_loss(trained("ours", s), n, s), seeds) for n in (1, 2, 8)]
    assert losses[0] > losses[1] > losses[2]
    claim(
        f"300 digits, {len(seeds)} seeds: log-loss of an ensemble of 8 draws of half of the keys",
        ours=losses[2], baseline=losses[0], better="lower", baseline_name="one draw", seed=seeds[0],
    )  # fmt: skip


def test_draws_regularise_and_average_to_more(claim: ClaimFixture) -> None:
    check_claim(claim, [0])


@pytest.mark.slow
def test_draws_regularise_and_average_to_more_over_three_seeds(claim: ClaimFixture) -> None:
    check_claim(claim, [0, 1, 2])
