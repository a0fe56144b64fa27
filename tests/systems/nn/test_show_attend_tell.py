"""Show, Attend and Tell: a look at a part of an image before each word, softly or at one place."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.errors import OptionError, ShapeError
from foveate.nn import VisualAttentionLSTM, doubly_stochastic_penalty
from foveate.train import HardAttentionLoss
from tests.support.tensors import assert_near, gradients
from tests.systems.nn import digits

D, N, V = 6, 5, 7

Image = tuple[Tensor, Tensor, Tensor]  # vectors, tokens and labels of one image


def built(mode: str = "soft", gate: bool = True, seed: int = 0, **options) -> VisualAttentionLSTM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VisualAttentionLSTM(D, N, V, mode, gate, embed=4, attn_dim=3, **options).double()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.7)
    return model


def a_batch(batch: int = 3, places: int = 4, steps: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    vectors = torch.randn(batch, places, D, generator=random, dtype=torch.float64)
    tokens = torch.randint(V, (batch, steps), generator=random)
    tokens[:, 0] = -1
    return vectors, tokens


# -- the formulas ------------------------------------------------------------------------------------------------------


def affine(layer: nn.Linear, x: Tensor) -> Tensor:
    return layer.weight @ x + (0 if layer.bias is None else layer.bias)


def by_hand(model: VisualAttentionLSTM, vectors: Tensor, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Compute the paper's formulas for one image `(L, D)`, number by number."""
    mean = vectors.mean(0)
    h, c = torch.tanh(affine(model.first_h, mean)), torch.tanh(affine(model.first_c, mean))
    logits, looks = [], []
    for token in tokens:
        e = torch.stack([model.v @ torch.tanh(affine(model.w_a, a) + affine(model.w_h, h)) for a in vectors])
        alpha = e.exp() / e.exp().sum()
        chosen = alpha if model.mode == "soft" else F.one_hot(e.argmax(), len(e)).double()
        z = sum(weight * a for weight, a in zip(chosen, vectors, strict=True))
        if model.gate is not None:
            z = torch.sigmoid(affine(model.gate, h)) * z
        word = torch.zeros(4, dtype=torch.float64) if token < 0 else model.embed.weight[token]
        cell = model.cell
        pre = cell.weight_ih @ torch.cat([word, z]) + cell.bias_ih + cell.weight_hh @ h + cell.bias_hh
        i, f, g, o = pre.chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        mixed = word + affine(model.out_h, h) + affine(model.out_z, z)
        logits.append(affine(model.out, torch.tanh(mixed) if model.variant == "release" else mixed))
        looks.append(alpha)
    return torch.stack(logits), torch.stack(looks)


@pytest.mark.parametrize("mode", ["soft", "hard"])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("variant", ["paper", "release"])
def test_by_hand(mode: str, gate: bool, variant: str) -> None:
    model, (vectors, tokens) = built(mode, gate, variant=variant), a_batch()
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 0]]).bool()
    logits, weights = model(vectors, tokens, mask)
    for b, seen in enumerate(mask):
        expected, alpha = by_hand(model, vectors[b, seen], tokens[b].tolist())
        assert_near(logits[b], expected, 1e-12)
        assert_near(weights[b][:, seen], alpha, 1e-12)


def test_sizes_and_biases() -> None:
    model = VisualAttentionLSTM(512, 64, 100)
    assert model.embed.weight.shape == (100, 64)
    assert model.w_a.weight.shape == (512, 512)
    assert model.w_h.bias is None
    assert [model.out_h.bias, model.out_z.bias, model.out.bias] == [None] * 3
    assert VisualAttentionLSTM(8, 6, 5, variant="release").out.bias is not None
    assert model.gate is not None
    assert model.gate.weight.shape == (1, 64), "a number, not a vector"


def contexts(model: VisualAttentionLSTM, vectors: Tensor, tokens: Tensor) -> Tensor:
    """Return what the LSTM reads of the image at each step."""
    seen = []
    hook = model.cell.register_forward_pre_hook(lambda cell, given: seen.append(given[0][:, 4:]))
    model(vectors, tokens)
    hook.remove()
    return torch.stack(seen, 1)


def test_even_attention_is_mean_pooling() -> None:
    """The exact limit: without a score, soft attention reads the mean of the vectors."""
    model, (vectors, tokens) = built(gate=False), a_batch()
    nn.init.zeros_(model.v)
    assert_near(model(vectors, tokens).weights, torch.full((3, 4, 4), 0.25, dtype=torch.float64), 1e-12)
    assert_near(contexts(model, vectors, tokens), vectors.mean(1, keepdim=True).expand(-1, 4, -1), 1e-12)


def test_one_location_is_the_same_softly_and_hard() -> None:
    model, (vectors, tokens) = built(gate=False), a_batch()
    nn.init.constant_(model.v, 1e4)
    soft, read = model(vectors, tokens), contexts(model, vectors, tokens)
    assert soft.weights.amax(-1).min() > 1 - 1e-9
    at = soft.weights.argmax(-1)
    assert len(at.unique()) > 1
    picked = vectors.gather(1, at[..., None].expand(-1, -1, D))
    assert_near(read, picked, 1e-6)
    model.mode = "hard"
    assert_near(contexts(model, vectors, tokens), picked, 1e-12)
    assert_near(model(vectors, tokens).logits, soft.logits, 1e-6)


def test_looks_are_the_callers_choice() -> None:
    model, (vectors, tokens) = built(), a_batch()
    looked, plain = model.look(vectors, tokens, lambda weights: weights), model(vectors, tokens)
    assert_near(looked.logits, plain.logits, 1e-12)
    assert torch.equal(looked.chosen, looked.weights)
    last = torch.zeros(3, 4, dtype=torch.float64)
    last[:, -1] = 1
    there = model.look(vectors, tokens, lambda weights: last)
    only = model.look(vectors[:, -1:].expand(-1, 4, -1), tokens, lambda weights: weights)
    assert not torch.allclose(there.logits, plain.logits)
    assert torch.equal(there.chosen, last[:, None].expand(-1, 4, -1))
    assert_near(model.look(vectors, tokens[:, :1], lambda weights: last).weights, plain.weights[:, :1], 1e-12)
    assert only.logits.shape == there.logits.shape


# -- the penalty -------------------------------------------------------------------------------------------------------


def test_the_penalty() -> None:
    weights = torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = sum((1 - weights[b, :, i].sum()) ** 2 for b in range(2) for i in range(3)) / 2
    assert_near(doubly_stochastic_penalty(weights), expected, 1e-12)
    assert_near(doubly_stochastic_penalty(weights, 0.3), 0.3 * expected, 1e-12)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    written = torch.tensor([[True] * 5, [True, True, False, False, False]])
    some = ((1 - weights[0, :, :2].sum(0)) ** 2).sum() + ((1 - weights[1, :2].sum(0)) ** 2).sum()
    assert_near(doubly_stochastic_penalty(weights, mask=mask, written=written), some / 2, 1e-12)


def test_the_penalty_is_zero_only_if_each_location_gets_one() -> None:
    even = torch.eye(4, dtype=torch.float64)[torch.tensor([2, 0, 3, 1])][None]
    assert doubly_stochastic_penalty(even) == 0
    assert doubly_stochastic_penalty(torch.full((1, 4, 4), 0.25, dtype=torch.float64)) == 0
    one = torch.eye(4, dtype=torch.float64)[torch.tensor([2, 2, 2, 2])][None]
    assert doubly_stochastic_penalty(one) == 3**2 + 3


# -- hard attention ----------------------------------------------------------------------------------------------------


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def forced(sequence: tuple[int, ...], places: int):
    """Return a choice that looks at these places, one a step."""
    at = iter(sequence)
    return lambda weights: F.one_hot(torch.tensor(next(at)), places).to(weights).expand(len(weights), -1)


def bound(model: VisualAttentionLSTM, vectors: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
    """Return `sum_s p(s) log p(y | s)` of one image, over all sequences of locations."""
    places, steps = vectors.shape[1], tokens.shape[1]
    found = torch.zeros((), dtype=torch.float64)
    for sequence in itertools.product(range(places), repeat=steps):
        looked = model.look(vectors, tokens, forced(sequence, places))
        log_y = looked.logits.log_softmax(-1).gather(-1, labels[..., None]).sum()
        prob = (looked.weights * looked.chosen).sum(-1).prod()
        found = found + prob * log_y
    return found


def scores_of(model: VisualAttentionLSTM) -> list[Tensor]:
    return [model.v, model.w_a.weight, model.w_a.bias, model.w_h.weight]


def flat(grads: list[Tensor]) -> Tensor:
    return torch.cat([grad.flatten() for grad in grads])


def sampled_gradient(model: VisualAttentionLSTM, loss: HardAttentionLoss, image: Image, copies: int) -> Tensor:
    """Return the gradient of the scores from one sample for each of so many copies of an image."""
    batch = dict(zip(("memory", "tokens", "labels"), (x.expand(copies, *x.shape[1:]) for x in image), strict=True))
    return flat(list(torch.autograd.grad(loss(model, batch).total, scores_of(model))))


def exact_gradient(model: VisualAttentionLSTM, image: Image) -> Tensor:
    return -flat(list(torch.autograd.grad(bound(model, *image), scores_of(model))))


def an_image(steps: int, seed: int = 0) -> Image:
    vectors, tokens = a_batch(1, 4, steps, seed)
    return vectors, tokens, torch.randint(V, (1, steps), generator=random(seed))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_gradient_of_samples_is_that_of_the_bound(seed: int) -> None:
    """Signs agree with the enumerated gradient for most coordinates with 2000 samples, and means up to their error."""
    model, image = built("hard", seed=seed), an_image(2, seed)
    exact, loss = exact_gradient(model, image), HardAttentionLoss(random(seed), expectation=0.0)
    sampled_gradient(model, loss, image, 200)
    found = torch.stack([sampled_gradient(model, loss, image, 50) for _ in range(40)])
    assert (found.mean(0).sign() == exact.sign()).double().mean() > 0.8
    error = (found.mean(0) - exact) / (found.std(0) / 40**0.5)
    assert error.square().mean().sqrt() < 2, "in standard errors"


def test_the_bound_is_below_the_likelihood() -> None:
    model, (vectors, tokens) = built("hard"), a_batch(1, 4, 2)
    labels = torch.tensor([[1, 4]])
    exact = torch.zeros((), dtype=torch.float64)
    for sequence in itertools.product(range(4), repeat=2):
        looked = model.look(vectors, tokens, forced(sequence, 4))
        each = looked.logits.softmax(-1).gather(-1, labels[..., None]).prod()
        exact = exact + (looked.weights * looked.chosen).sum(-1).prod() * each
    assert bound(model, vectors, tokens, labels) < exact.log()


def test_the_baseline_lowers_the_variance(claim) -> None:
    model, image = built("hard"), an_image(3)
    exact, errors = exact_gradient(model, image), []
    for has_baseline in (True, False):
        loss = HardAttentionLoss(random(1), expectation=0.0)
        for _ in range(30):
            sampled_gradient(model, loss, image, 20)
        loss.baseline *= has_baseline
        loss.eval()
        found = [sampled_gradient(model, loss, image, 10) - exact for _ in range(40)]
        errors.append(torch.stack(found).square().sum(-1).mean().item())
    claim(
        "a moving average as the baseline of REINFORCE brings its gradient nearer to the exact one: squared error",
        ours=errors[0], baseline=0.5 * errors[1], better="lower", baseline_name="half of that without a baseline",
        seed=0,
    )  # fmt: skip


def test_the_baseline_is_a_moving_average() -> None:
    model, (vectors, tokens) = built("hard"), a_batch()
    labels = tokens.roll(-1, 1).clamp(min=0)
    batch = {"memory": vectors, "tokens": tokens, "labels": labels}
    loss, expected = HardAttentionLoss(random()), 0.0
    for _ in range(3):
        found = loss(model, batch)
        expected = 0.9 * expected - 0.1 * found.parts["words"].item()
        assert loss.baseline.item() == pytest.approx(expected, rel=1e-5)
    loss.eval()
    loss(model, batch)
    assert loss.baseline.item() == pytest.approx(expected, rel=1e-5)
    twin = HardAttentionLoss(random())
    twin.load_state_dict(loss.state_dict())
    assert torch.equal(twin.baseline, loss.baseline)


def test_the_loss_by_hand() -> None:
    """The gradient is that of `-log p(y|s) - 2 (log p(y|s) - b) log p(s) - 0.3 H`, with s and the reward held."""
    model, (vectors, tokens) = built("hard"), a_batch(4)
    labels = torch.randint(V, (4, 4), generator=random(3))
    labels[1, 2:], labels[2, 3:] = -100, -100
    loss = HardAttentionLoss(random(5), 2.0, 0.3)
    loss.baseline.fill_(-3.0)
    found = loss(model, {"memory": vectors, "tokens": tokens, "labels": labels})
    looked, total = found.outputs, torch.zeros((), dtype=torch.float64)
    soft = [torch.equal(looked.chosen[b], looked.weights[b]) for b in range(4)]
    assert 0 < sum(soft) < 4
    values = torch.zeros((), dtype=torch.float64)
    for b in range(4):
        steps = [t for t in range(4) if labels[b, t] >= 0]
        log_y = sum(looked.logits[b, t].log_softmax(-1)[labels[b, t]] for t in steps)
        log_s = 0.0 if soft[b] else sum(looked.weights[b, t, looked.chosen[b, t].argmax()].log() for t in steps)
        spread = sum(-(looked.weights[b, t] * looked.weights[b, t].log()).sum() for t in steps)
        total = total - (log_y + 2 * (log_y.detach() + 3) * log_s + 0.3 * spread) / 4
        values = values - (log_y + 0.3 * spread) / 4
    assert_near(found.total, values, 1e-6)
    assert found.parts["locations"] == 0, "the reward has a gradient only"
    parameters = list(model.parameters())
    ours, theirs = (torch.autograd.grad(x, parameters, retain_graph=True) for x in (found.total, total))
    for one, other in zip(ours, theirs, strict=True):
        assert_near(one, other, 1e-6)


def test_half_of_the_captions_read_the_expectation() -> None:
    model, (vectors, tokens) = built("hard"), a_batch(1)
    labels = tokens.clamp(min=0)
    big = {"memory": vectors.expand(400, -1, -1), "tokens": tokens.expand(400, -1), "labels": labels.expand(400, -1)}
    looked = HardAttentionLoss(random())(model, big).outputs
    soft = (looked.chosen == looked.weights).all(-1)
    assert (soft.all(1) | ~soft.any(1)).all(), "one draw a caption"
    assert 160 < soft.all(1).sum() < 240
    first = looked.chosen[~soft.all(1), 0]
    assert ((first == 0) | (first == 1)).all()
    assert (first.mean(0) - looked.weights[0, 0]).abs().max() < 0.12, "samples of alpha"
    always = HardAttentionLoss(random(), expectation=1.0)(model, big)
    model.mode = "soft"
    assert_near(always.total, F.cross_entropy(model(vectors, tokens).logits[0], labels[0]) * 4, 1e-6)


def test_the_same_seed_draws_the_same() -> None:
    model, (vectors, tokens) = built("hard"), a_batch()
    batch = {"memory": vectors, "tokens": tokens, "labels": tokens.clamp(min=0)}
    found = [HardAttentionLoss(random(seed))(model, batch).outputs.chosen for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_hidden_locations_are_never_drawn() -> None:
    model, (vectors, tokens) = built("hard"), a_batch()
    mask = torch.tensor([[1, 1, 0, 1]] * 3).bool()
    found = []
    for garbage in (0.0, float("nan")):
        given = vectors.masked_fill(~mask[..., None], garbage)
        loss = HardAttentionLoss(random(), entropy=0.1)
        batch = {"memory": given, "tokens": tokens, "labels": tokens.clamp(min=0), "mask": mask}
        made = loss(model, batch)
        assert not made.outputs.chosen[..., 2].any()
        found.append([made.total, *gradients(made.total, list(model.parameters()))])
    for one, other in zip(*found, strict=True):
        assert_near(one, other, 1e-12)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feat_dim": 0}, "dim=0 must be a whole number, at least 1"),
        ({"hidden": 0}, "hidden=0 must be"),
        ({"vocab": 0}, "vocab=0 must be"),
        ({"mode": "sampled"}, "mode='sampled' must be one of 'soft', 'hard'"),
        ({"gate": 2}, "gate=2 must be True or False"),
        ({"embed": 0}, "embed=0 must be"),
        ({"attn_dim": 0}, "attn_dim=0 must be"),
        ({"variant": "theano"}, "variant='theano' must be one of 'paper', 'release'"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        VisualAttentionLSTM(**{"feat_dim": D, "hidden": N, "vocab": V, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generator": 0}, "generator=0 must be a torch.Generator"),
        ({"reward": -1.0}, r"reward=-1\.0 must be at least 0"),
        ({"entropy": -1.0}, r"entropy=-1\.0 must be at least 0"),
        ({"expectation": 1.5}, r"expectation=1\.5 must be in 0\.\.1"),
        ({"decay": 2.0}, r"decay=2\.0 must be in 0\.\.1"),
    ],
)
def test_bad_losses(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        HardAttentionLoss(**{"generator": random(), **options})


def test_bad_calls() -> None:
    vectors, tokens = a_batch()
    with pytest.raises(ShapeError, match=r"labels must be as the tokens, Tensor \(3, 4\) int64; got Tensor \(3, 3\)"):
        HardAttentionLoss(random())(built(), {"memory": vectors, "tokens": tokens, "labels": tokens[:, 1:]})
    with pytest.raises(ShapeError, match=r"weights must be \(B, T, S\); got"):
        doubly_stochastic_penalty(torch.zeros(3, 4))
    with pytest.raises(OptionError, match=r"lam=-1\.0 must be at least 0"):
        doubly_stochastic_penalty(torch.zeros(3, 4, 5), -1.0)
    with pytest.raises(ShapeError, match=r"written must be bool \(B, T\)"):
        doubly_stochastic_penalty(torch.zeros(3, 4, 5), written=torch.ones(3, 5, dtype=torch.bool))


# -- captions of collages: four digits, named in reading order ---------------------------------------------------------

#: The corners of a 3 x 3 grid of half-overlapping windows are the four digits, in reading order.
CORNERS = torch.tensor([0, 2, 6, 8])


def collages(count: int, source: torch.Generator, test: bool = False) -> tuple[Tensor, Tensor]:
    """Make annotation vectors `(B, 9, 73)` of collages, 64 pixels and a position each, and the four labels."""
    images, labels = digits.data()[2:] if test else digits.data()[:2]
    drawn = torch.randint(len(images), (count, 4), generator=source)
    four = images[drawn].view(count, 2, 2, 8, 8)
    collage = four.transpose(2, 3).reshape(count, 16, 16)
    pixels = collage.unfold(1, 8, 4).unfold(2, 8, 4).reshape(count, 9, 64)
    place = 2 * torch.eye(9).expand(count, -1, -1)
    return torch.cat([pixels, place], -1), labels[drawn]


def start_and(labels: Tensor) -> Tensor:
    return F.pad(labels[:, :-1], (1, 0), value=-1)


def captioner(mode: str = "soft", blind: bool = False, seed: int = 0) -> VisualAttentionLSTM:
    """Make a network; `blind` reads the mean of the vectors at every step."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VisualAttentionLSTM(73, 64, 10, mode, embed=32, attn_dim=32)
    if blind:
        nn.init.zeros_(model.v.requires_grad_(False))
    return model


def fitted(model: VisualAttentionLSTM, steps: int, loss, seed: int = 0, lr: float = 1e-2) -> VisualAttentionLSTM:
    """Train in place on `steps` batches of 32; `loss(model, batch)` returns a scalar."""
    source = random(seed)
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(wanted, lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps)
    for _ in range(steps):
        vectors, labels = collages(32, source)
        optimiser.zero_grad()
        loss(model, {"memory": vectors, "tokens": start_and(labels), "labels": labels}).backward()
        nn.utils.clip_grad_norm_(wanted, 5.0)
        optimiser.step()
        schedule.step()
    return model.eval()


def words(lam: float = 0.0):
    """Return the loss of soft attention."""

    def loss(model: VisualAttentionLSTM, batch: dict[str, Tensor]) -> Tensor:
        logits, weights = model(batch["memory"], batch["tokens"])
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()) * 4 + doubly_stochastic_penalty(
            weights, lam
        )

    return loss


@torch.no_grad()
def measured(model: VisualAttentionLSTM) -> dict[str, float]:
    """Return the share of tokens that are right, of looks at the named digit, and the mean largest imbalance."""
    vectors, labels = collages(300, random(99), test=True)
    logits, weights = model(vectors, start_and(labels))
    made = model.generate(vectors, None, 4).tokens
    return {
        "tokens": (logits.argmax(-1) == labels).float().mean().item(),
        "made": (made == labels).float().mean().item(),
        "looks": (weights.argmax(-1) == CORNERS).float().mean().item(),
        "imbalance": (1 - weights.sum(1)).abs().amax(-1).mean().item(),
    }


def test_collages() -> None:
    vectors, labels = collages(5, random())
    assert vectors.shape == (5, 9, 73)
    images, digit = digits.data()[:2]
    drawn = torch.randint(len(images), (5, 4), generator=random())
    assert torch.equal(vectors[:, CORNERS, :64], images[drawn].flatten(2))
    assert torch.equal(labels, digit[drawn])


@cache
def softly(steps: int, lam: float = 0.0, blind: bool = False) -> dict[str, float]:
    return measured(fitted(captioner(blind=blind), steps, words(lam)))


def test_it_looks_at_the_digit_that_it_names(claim) -> None:
    ours, blind = softly(100), softly(100, blind=True)
    claim(
        "soft attention names the digits of a collage in order after 100 steps: share of tokens right",
        ours=ours["tokens"], baseline=blind["tokens"], better="higher", margin=0.25,
        baseline_name="the same LSTM with the mean of the vectors", seed=0,
    )  # fmt: skip
    assert ours["looks"] > 0.7, "the largest weight is on the named digit"


@pytest.mark.slow
def test_it_names_nine_of_ten_digits(claim) -> None:
    ours, blind = softly(500), softly(500, blind=True)
    claim(
        "soft attention names the digits of a collage in order after 500 steps: share of tokens right, generated",
        ours=ours["made"], baseline=blind["made"], better="higher", margin=0.15,
        baseline_name="the same LSTM with the mean of the vectors", seed=0,
    )  # fmt: skip
    assert ours["tokens"] > 0.9
    assert ours["looks"] > 0.7


def test_the_penalty_spreads_attention_over_the_locations(claim) -> None:
    with_it, without = softly(100, 1.0), softly(100)
    claim(
        "the doubly stochastic penalty brings what each location gets nearer to 1: largest distance over locations",
        ours=with_it["imbalance"], baseline=without["imbalance"], better="lower", margin=0.2,
        baseline_name="the same run without it", seed=0,
    )  # fmt: skip
    assert with_it["looks"] > 0.7, "it still looks at the named digit"


def on_the_first_digit(reward: float) -> float:
    """Train by samples alone to name the first of four digits; return the probability of a look at it."""
    sampled = HardAttentionLoss(random(1), reward, expectation=0.0)

    def loss(model: VisualAttentionLSTM, batch: dict[str, Tensor]) -> Tensor:
        memory, tokens, labels = batch["memory"][:, CORNERS], batch["tokens"][:, :1], batch["labels"][:, :1]
        return sampled(model, {"memory": memory, "tokens": tokens, "labels": labels}).total

    model = fitted(captioner("hard"), 200, loss)
    vectors, labels = collages(300, random(99), test=True)
    return model(vectors[:, CORNERS], start_and(labels)[:, :1]).weights[..., 0].mean().item()


def test_reinforce_teaches_where_to_look(claim) -> None:
    claim(
        "samples and their reward teach hard attention where to look: probability of the digit that is asked for",
        ours=on_the_first_digit(1.0), baseline=on_the_first_digit(0.0), better="higher", margin=0.4,
        baseline_name="the same without a reward", seed=0,
    )  # fmt: skip


@pytest.mark.slow
def test_hard_attention_names_the_digits(claim) -> None:
    """Half of the captions read the expectation, as in the paper; at test time each word reads one window."""
    sampled = HardAttentionLoss(random(1), 0.1)
    found = measured(fitted(captioner("hard"), 300, lambda model, batch: sampled(model, batch).total))
    claim(
        "hard attention names the digits of a collage from one window a word: share of tokens right, generated",
        ours=found["made"], baseline=softly(500, blind=True)["made"], better="higher", margin=0.3,
        baseline_name="the same LSTM with the mean of the vectors", seed=0,
    )  # fmt: skip
    assert found["looks"] > 0.7
