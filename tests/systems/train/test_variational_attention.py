"""Latent alignments: bounds and their gaps, estimators and their gradients, and a comparison of objectives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.core.errors import OptionError, ShapeError
from foveate.ops.functional.normalizers import sample
from foveate.train.objectives.latent_alignment import kl, latent_attention_loss, marginal_decode, relaxed
from foveate.train.objectives.variational_attention import VariationalAttention
from tests.support.tensors import assert_near, gradients

T = 12


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def problem(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits of prior and posterior, and a log-likelihood of each position around -5."""
    return random(*shape, T, seed=1), random(*shape, T, seed=2), random(*shape, T, seed=3) - 5


# -- bounds ------------------------------------------------------------------------------------------------------------


def test_objectives_match_their_formulas() -> None:
    prior, post, each = problem(4, 3)
    p, q = torch.softmax(prior, -1), torch.softmax(post, -1)
    divergence = (q * (q.log() - p.log())).sum(-1)
    expected = {
        "soft": random(4, 3),
        "exact": (p * each.exp()).sum(-1).log(),
        "hard": (p * each).sum(-1),
        "elbo": (q * each).sum(-1) - divergence,
    }
    for objective, value in expected.items():
        loss = latent_attention_loss(prior, each, post_logits=post, soft_loglik=random(4, 3), objective=objective)
        assert_near(loss, -value, 1e-12, objective)
    assert_near(kl(q.log(), p.log()), divergence, 1e-12)
    assert_near(kl(p.log(), p.log()), torch.zeros(4, 3, dtype=torch.float64), 1e-12)


def test_the_bounds_gaps_are_divergences() -> None:
    prior, post, each = problem(50)

    def value(objective: str, **given) -> Tensor:
        return -latent_attention_loss(prior, each, objective=objective, **given)

    exact, hard, elbo = value("exact"), value("hard"), value("elbo", post_logits=post)
    assert (hard < exact).all()
    assert (elbo < exact).all()
    assert_near(value("elbo", post_logits=prior), hard, 1e-12, "q = p: no divergence")
    posterior = torch.log_softmax(prior, -1) + each
    assert_near(value("elbo", post_logits=posterior), exact, 1e-12, "q = the posterior: no gap")
    gap = kl(torch.log_softmax(post, -1), torch.log_softmax(posterior, -1))
    assert_near(exact - elbo, gap, 1e-10)
    assert gap.min() > 0.01
    mixed = 0.5 * (posterior + prior)
    between = value("elbo", post_logits=mixed)
    assert ((hard <= between + 1e-12) & (between <= exact)).all()


def test_all_objectives_agree_with_a_one_hot_prior() -> None:
    each = random(5, T) - 5
    at = torch.tensor([0, 3, 11, 5, 5])
    prior = torch.full((5, T), -math.inf, dtype=torch.float64).scatter(1, at[:, None], 0.0)
    expected = each.gather(1, at[:, None])[:, 0]

    def loglik(weights: Tensor) -> Tensor:
        return (weights * each).sum(-1)

    for objective in ("soft", "exact", "hard", "elbo"):
        loss = latent_attention_loss(prior, loglik, post_logits=prior, objective=objective)
        assert_near(loss, -expected, 1e-12, objective)


# -- estimators --------------------------------------------------------------------------------------------------------


def one_sample_gradients(baseline: bool, count: int = 20000) -> tuple[Tensor, Tensor]:
    """Return the gradients of the posterior's logits from single samples, and the exact gradient."""
    prior, post, each = problem()
    soft = torch.logsumexp(torch.log_softmax(prior, -1) + each, -1)
    leaf = post.expand(count, -1).clone().requires_grad_()
    loss = latent_attention_loss(
        prior.expand(count, -1), each.expand(count, -1), post_logits=leaf, soft_loglik=soft.expand(count),
        estimator="reinforce", baseline=baseline, generator=seeded(),
    )  # fmt: skip
    (found,) = torch.autograd.grad(loss.sum(), leaf)
    leaf = post.clone().requires_grad_()
    (exact,) = torch.autograd.grad(latent_attention_loss(prior, each, post_logits=leaf), leaf)
    return found, exact


def test_reinforce_is_unbiased_and_its_baseline_lowers_its_variance(claim) -> None:
    found, exact = one_sample_gradients(True)
    assert F.cosine_similarity(found.mean(0), exact, dim=0) > 0.98
    assert (found.mean(0) - exact).abs().max() < 0.02
    bare, _ = one_sample_gradients(False)
    claim(
        "soft attention's log-likelihood is a baseline that takes variance from the score-function gradient",
        ours=found.var(0).sum().item(), baseline=bare.var(0).sum().item(), better="lower",
        margin=0.5 * bare.var(0).sum().item(), baseline_name="no baseline", seed=0,
    )  # fmt: skip


@pytest.mark.parametrize("objective", ["hard", "elbo"])
@pytest.mark.parametrize("baseline", [True, False])
def test_reinforce_matches_its_formula(objective: str, baseline: bool) -> None:
    """The value is the mean over the samples, and the gradients agree with the exact ones on average."""
    prior, post, each = (x.requires_grad_() for x in problem(2))
    soft = torch.full((2,), -4.0, dtype=torch.float64, requires_grad=True)
    options = dict(post_logits=post, objective=objective, soft_loglik=soft)
    loss = latent_attention_loss(
        prior, each, estimator="reinforce", samples=20000, baseline=baseline, generator=seeded(), **options
    )
    q = torch.softmax(post if objective == "elbo" else prior, -1)
    drawn = sample(q.log().expand(20000, 2, T), torch.rand(20000, 2, generator=seeded(), dtype=torch.float64))
    value = (drawn * each).sum(-1).mean(0) - (kl(q.log(), torch.log_softmax(prior, -1)) if objective == "elbo" else 0)
    assert_near(loss, -value, 1e-10)
    expected = gradients(latent_attention_loss(prior, each, **options), [prior, post, each, soft])
    for one, other in zip(gradients(loss, [prior, post, each, soft]), expected, strict=True):
        assert_near(one, other, 0.03 if baseline else 0.1)


def test_relaxed_samples_follow_the_distribution() -> None:
    q = torch.log_softmax(random(5), -1)
    cold, warm = (relaxed(q, 20000, temperature, seeded()) for temperature in (0.05, 1.0))
    assert_near(cold.sum(-1), torch.ones(20000, dtype=torch.float64), 1e-12)
    assert cold.max(-1).values.mean() > 0.95, "near one-hot"
    assert warm.max(-1).values.mean() < 0.9
    for drawn in (cold, warm):
        frequencies = F.one_hot(drawn.argmax(-1), 5).double().mean(0)
        assert (frequencies - q.exp()).abs().sum() / 2 < 0.02
    uniform = torch.rand(3, 5, generator=seeded(), dtype=torch.float64)
    by_hand = torch.softmax((q - (-uniform.log()).log()) / 0.7, -1)
    assert_near(relaxed(q, 3, 0.7, seeded()), by_hand, 1e-12)


def test_gumbel_matches_its_formula() -> None:
    prior, post, each = (x.requires_grad_() for x in problem(2))
    for objective in ("hard", "elbo"):
        options = dict(post_logits=post, objective=objective)
        loss = latent_attention_loss(
            prior, each, estimator="gumbel", samples=50, temperature=0.5, generator=seeded(), **options
        )
        q = torch.log_softmax(post if objective == "elbo" else prior, -1)
        drawn = relaxed(q, 50, 0.5, seeded())
        value = (drawn * each).sum(-1).mean(0)
        value = value - kl(q, torch.log_softmax(prior, -1)) if objective == "elbo" else value
        assert_near(loss, -value, 1e-12)
        for one, other in zip(
            gradients(loss, [prior, post, each]), gradients(-value, [prior, post, each]), strict=True
        ):
            assert_near(one, other, 1e-12)
    cold = latent_attention_loss(
        prior, each, post_logits=post, estimator="gumbel", samples=20000, temperature=0.1, generator=seeded()
    )
    assert_near(cold, latent_attention_loss(prior, each, post_logits=post), 0.02)


def test_wsram_matches_its_formula() -> None:
    """Few samples match the formula; many give the exact gradients, and move q towards the posterior."""
    prior, post, each = (x.requires_grad_() for x in problem())
    leaves = [prior, post, each]
    loss = latent_attention_loss(prior, each, post_logits=post, estimator="wsram", samples=4, generator=seeded())
    p, q = torch.log_softmax(prior, -1), torch.log_softmax(post, -1)
    z = sample(q.detach().expand(4, T), torch.rand(4, generator=seeded(), dtype=torch.float64)).argmax(-1).tolist()
    weights = [(p[i] + each[i] - q[i]).exp().item() for i in z]
    prior_share = [(p[i] - q[i]).exp().item() for i in z]
    surrogate = sum(
        w / sum(weights) * each[i]
        + (w / sum(weights) - b / sum(prior_share)) * p[i]
        + (w / sum(weights) - 1 / 4) * q[i]
        for i, w, b in zip(z, weights, prior_share, strict=True)
    )
    assert abs(loss.item() + math.log(sum(weights) / 4)) < 1e-10
    for one, other in zip(gradients(loss, leaves), gradients(-surrogate, leaves), strict=True):
        assert_near(one, other, 1e-12)
    many = latent_attention_loss(prior, each, post_logits=post, estimator="wsram", samples=200000, generator=seeded())
    exact = latent_attention_loss(prior, each, objective="exact")
    assert_near(many, exact, 0.01)
    posterior = torch.softmax(torch.log_softmax(prior, -1) + each, -1).detach()
    expected = gradients(exact - (posterior * torch.log_softmax(post, -1)).sum(), leaves)
    for one, other in zip(gradients(many, leaves), expected, strict=True):
        assert_near(one, other, 0.02)


# -- evaluations of the likelihood ------------------------------------------------------------------------------------


def test_a_likelihood_function_is_evaluated_only_as_needed() -> None:
    prior, post, each = problem(2)
    evaluated: list[Tensor] = []

    def loglik(weights: Tensor) -> Tensor:
        evaluated.append(weights)
        return (weights * each).sum(-1)

    def evaluate(**options) -> tuple[Tensor, list[tuple[int, ...]]]:
        evaluated.clear()
        loss = latent_attention_loss(prior, loglik, post_logits=post, **options)
        return loss, [tuple(x.shape) for x in evaluated]

    for objective in ("exact", "hard", "elbo"):
        loss, shapes = evaluate(objective=objective)
        assert_near(loss, latent_attention_loss(prior, each, post_logits=post, objective=objective), 1e-12)
        assert shapes == [(T, 2, T)]
        assert torch.equal(evaluated[0][:, 1], torch.eye(T, dtype=torch.float64))
    loss, shapes = evaluate(objective="soft")
    assert shapes == [(1, 2, T)]
    assert_near(loss, -(torch.softmax(prior, -1) * each).sum(-1), 1e-12)
    _, shapes = evaluate(estimator="reinforce", samples=3, generator=seeded())
    assert shapes == [(1, 2, T), (3, 2, T)], "the baseline, and the samples"
    assert_near(evaluated[0][0], torch.softmax(prior, -1), 1e-12)
    _, shapes = evaluate(estimator="reinforce", samples=3, baseline=False, generator=seeded())
    assert shapes == [(3, 2, T)]
    assert (evaluated[0].sum(-1) == 1).all() and (evaluated[0].max(-1).values == 1).all()
    for estimator in ("gumbel", "wsram"):
        _, shapes = evaluate(estimator=estimator, samples=3, generator=seeded())
        assert shapes == [(3, 2, T)]


@pytest.mark.parametrize("objective", ["exact", "hard", "elbo"])
@pytest.mark.parametrize("estimator", ["enum", "reinforce", "gumbel", "wsram"])
def test_padding_does_not_matter(objective: str, estimator: str) -> None:
    if estimator != "enum" and (objective == "exact" or (objective, estimator) == ("hard", "wsram")):
        with pytest.raises(
            OptionError, match=f'estimator="{estimator}" must be one of .* with objective="{objective}"'
        ):
            latent_attention_loss(*problem()[:2], objective=objective, estimator=estimator)
        return
    prior, post, each = problem(2)
    hidden = torch.arange(T) >= 7
    padded = [x.masked_fill(hidden, -math.inf).requires_grad_() for x in (prior, post)]
    padded.append(each.masked_fill(hidden, math.nan).requires_grad_())
    drawn = {} if estimator == "enum" else {"generator": seeded(), "samples": 5}
    options = dict(objective=objective, estimator=estimator, soft_loglik=torch.zeros(2))
    loss = latent_attention_loss(padded[0], padded[2], post_logits=padded[1], **options, **drawn)
    for grad in gradients(loss, padded):
        assert grad.isfinite().all()
        assert not grad[:, 7:].any()
    if estimator in ("enum", "reinforce"):
        again = {} if estimator == "enum" else {"generator": seeded(), "samples": 5}
        short = latent_attention_loss(prior[:, :7], each[:, :7], post_logits=post[:, :7], **options, **again)
        assert_near(loss, short, 1e-10)


def test_marginal_decoding_matches_its_formula() -> None:
    prior, each = random(3, 4, T), torch.log_softmax(random(3, 4, T, 5), -1)
    p = torch.softmax(prior, -1)
    whole = (p[..., None] * each.exp()).sum(-2).log()
    assert_near(marginal_decode(prior, each), whole, 1e-12)
    assert_near(marginal_decode(prior, each, T), whole, 1e-12)
    assert_near(marginal_decode(prior, each, 99), whole, 1e-12)
    ours = marginal_decode(prior, each, 3)
    assert_near(ours.exp().sum(-1), torch.ones(3, 4, dtype=torch.float64), 1e-12)
    best = p[1, 2].argsort(descending=True)[:3]
    by_hand = sum(p[1, 2, i] * each[1, 2, i].exp() for i in best) / p[1, 2, best].sum()
    assert_near(ours[1, 2], by_hand.log(), 1e-12)
    assert_near(marginal_decode(prior, each, 1)[1, 2], each[1, 2, best[0]], 1e-12)
    with pytest.raises(OptionError, match="top_k=0"):
        marginal_decode(prior, each, 0)


# -- the module --------------------------------------------------------------------------------------------------------


def built(objective: str = "elbo", estimator: str = "enum", **options) -> VariationalAttention:
    generator = {} if estimator == "enum" else {"generator": seeded()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VariationalAttention(
            3, 4, 5, 6, objective=objective, estimator=estimator, **generator, **options
        ).double()


def call() -> dict[str, Tensor]:
    target = torch.tensor([[0, 3, 5], [2, 2, 1]])
    return {"query": random(2, 3, 4), "memory": random(2, 7, 3, seed=1), "target": target}


LENGTHS, ENDS = torch.tensor([7, 4]), torch.tensor([2, 3])


@pytest.mark.parametrize("objective", ["soft", "exact", "hard", "elbo"])
@pytest.mark.parametrize("score", ["mlp", "general"])
def test_the_module_matches_its_formulas(objective: str, score: str) -> None:
    net, given = built(objective, score=score), call()
    ours = net(**given, lengths=LENGTHS, target_lengths=ENDS)
    for b, n in enumerate(LENGTHS.tolist()):
        post = None
        if objective == "elbo":
            q = net.inference
            source = q.source(given["memory"][b : b + 1, :n])[0][0]
            target = q.target(q.embed(given["target"][b : b + 1, : ENDS[b]]))[0][0]
            post = torch.einsum("sa,ab,tb->st", target, q.w.weight.mT, source)
        for s in range(3):
            if s >= ENDS[b]:
                assert ours[b, s] == 0
                continue
            h, x = given["query"][b, s], given["memory"][b, :n]
            if score == "mlp":
                prior = torch.stack([net.v @ torch.tanh(net.query.weight @ h + net.memory.weight @ each) for each in x])
            else:
                prior = torch.stack([torch.dot(net.query.weight @ h, each) for each in x])

            def words(read: Tensor) -> Tensor:
                hidden = torch.tanh(net.join.weight @ torch.cat([h, read]) + net.join.bias)  # noqa: B023
                return torch.log_softmax(net.words(hidden), -1)

            each = torch.stack([words(one)[given["target"][b, s]] for one in x])
            soft = words(torch.softmax(prior, -1) @ x)
            expected = latent_attention_loss(
                prior, each, post_logits=None if post is None else post[s], objective=objective,
                soft_loglik=soft[given["target"][b, s]],
            )  # fmt: skip
            assert_near(ours[b, s], expected, 1e-10)
            predicted = net.predict(given["query"], given["memory"], lengths=LENGTHS)
            marginal = (torch.softmax(prior, -1)[:, None] * torch.stack([words(one) for one in x]).exp()).sum(0).log()
            assert_near(predicted[b, s], soft if objective == "soft" else marginal, 1e-10)
            read = net.context(given["query"], given["memory"], LENGTHS)
            assert_near(read[b, s], torch.softmax(prior, -1) @ x, 1e-10)


def test_predictions_can_use_few_positions() -> None:
    net, given = built("exact"), call()
    del given["target"]
    whole, few = net.predict(**given, lengths=LENGTHS), net.predict(**given, lengths=LENGTHS, top_k=2)
    assert_near(few.exp().sum(-1), torch.ones(2, 3, dtype=torch.float64), 1e-12)
    assert not torch.allclose(whole, few)
    for top_k in (7, 50):
        assert_near(net.predict(**given, lengths=LENGTHS, top_k=top_k), whole, 1e-12)
    prior = net.prior_logits(given["query"], given["memory"], LENGTHS)
    each = net.log_probs(given["query"][:, :, None], given["memory"][:, None].expand(-1, 3, -1, -1))
    assert_near(few, marginal_decode(prior, each, 2), 1e-12)


@pytest.mark.parametrize(
    ("objective", "estimator"),
    [("soft", "enum"), ("exact", "enum"), ("hard", "reinforce"), ("elbo", "enum"), ("elbo", "reinforce"),
     ("elbo", "gumbel"), ("elbo", "wsram")],
)  # fmt: skip
def test_garbage_in_padding_does_not_leak(objective: str, estimator: str) -> None:
    found = []
    for garbage in (float("nan"), 3.0):
        net, given = built(objective, estimator), call()
        given["memory"][1, 4:] = garbage
        given["target"][0, 2] = 0 if math.isnan(garbage) else 5
        loss = net(**given, lengths=LENGTHS, target_lengths=ENDS)
        found.append((loss, *gradients(loss, list(net.parameters()))))
    for one, other in zip(*found, strict=True):
        assert_near(one, other, 1e-10)
    assert any(grad.any() for grad in found[0][1:])


def test_samples_come_from_the_generator() -> None:
    first, same, other = built(estimator="reinforce"), built(estimator="reinforce"), built(estimator="reinforce")
    other.options["generator"].manual_seed(5)
    losses = [net(**call()) for net in (first, same, other)]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


def test_only_a_bound_has_an_inference_network() -> None:
    assert {o for o in ("soft", "exact", "hard", "elbo") if built(o).inference is not None} == {"elbo"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "vi"}, "objective='vi'"),
        ({"estimator": "sgd"}, "estimator='sgd'"),
        ({"objective": "exact", "estimator": "reinforce", "generator": seeded()}, "must be one of enum with objective"),
        ({"samples": 0}, "samples=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": True}, "temperature=True"),
        ({"score": "dot"}, "score='dot'"),
        ({"estimator": "gumbel"}, "generator must be given with estimator="),
        ({"generator": seeded()}, "generator must be None with estimator="),
        ({"src_dim": 0}, "src_dim=0"),
        ({"vocab": 0}, "vocab=0"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        VariationalAttention(**{"src_dim": 3, "tgt_dim": 4, "attn_dim": 5, "vocab": 6, **options})


def test_bad_calls_are_refused() -> None:
    prior, post, each = problem()
    for options, message in (
        ({}, 'objective="elbo" needs post_logits'),
        ({"post_logits": post, "estimator": "gumbel"}, 'estimator="gumbel" needs a generator'),
        ({"objective": "soft"}, "needs soft_loglik"),
        ({"post_logits": post, "estimator": "reinforce", "generator": seeded()}, "needs soft_loglik"),
    ):
        with pytest.raises(OptionError, match=message):
            latent_attention_loss(prior, each, **options)
    given = call()
    for wrong, message in (
        ({"query": random(2, 3, 5)}, r"query must be \(B, N, 4\)"),
        ({"memory": random(7, 3)}, r"memory must be \(B, N, 3\)"),
        ({"target": given["target"][:, :2]}, r"target must be \(2, 3\); got \(2, 2\)"),
    ):
        with pytest.raises(ShapeError, match=message):
            built()(**{**given, **wrong})
    with pytest.raises(ShapeError, match="query must be"):
        built("soft").context(random(2, 3, 5), given["memory"])
    with pytest.raises(OptionError, match="top_k=0"):
        built().predict(given["query"], given["memory"], top_k=0)
    with pytest.raises(ShapeError, match="query must be"):
        built("soft").predict(random(2, 3, 5), given["memory"])


# -- a dictionary with ambiguous alignments ----------------------------------------------------------------------------


class Dictionary:
    """A translation task with ambiguous alignments.

    Each of eight words has one of three labels. A query names a label, and the answer is the translation of one of the
    words with that label; one answer in ten is random.
    """

    def __init__(self, seed: int, words: int = 20, width: int = 6) -> None:
        self.random, self.count = seeded(seed), words
        self.vectors = torch.randn(words, width, generator=self.random)
        self.translation = torch.randperm(words, generator=self.random)

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        word, mark = (torch.randint(count, (size, 8), generator=self.random) for count in (self.count, 3))
        source = torch.randint(8, (size, 1), generator=self.random)
        random_answer = torch.rand(size, 1, generator=self.random) < 0.1
        noise = torch.randint(self.count, (size, 1), generator=self.random)
        answer = torch.where(random_answer, noise, self.translation[word.gather(1, source)])
        memory = torch.cat([self.vectors[word], 3.0 * F.one_hot(mark, 3)], -1)
        query = 3.0 * F.one_hot(mark.gather(1, source), 32)
        return query, memory, answer


def log_likelihood(seed: int, objective: str, estimator: str = "enum", steps: int = 450) -> float:
    """Train, and return the mean log-likelihood of held-out answers."""
    task = Dictionary(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        generator = None if estimator == "enum" else seeded(seed)
        net = VariationalAttention(9, 32, 32, 20, objective=objective, estimator=estimator, generator=generator)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        net(*task.batch(64)).mean().backward()
        optimiser.step()
        schedule.step()
    task.random.manual_seed(10_000)
    query, memory, answer = task.batch(4000)
    with torch.no_grad():
        return net.predict(query, memory).gather(-1, answer[..., None]).mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_exact_and_variational_training_beat_soft_attention(seed: int, claim) -> None:
    soft, exact, hard = (log_likelihood(seed, objective) for objective in ("soft", "exact", "hard"))
    elbo = log_likelihood(seed, "elbo", "reinforce")
    setting = f"held-out log-likelihood in a dictionary with ambiguous alignments (seed {seed})"
    claim(
        f"exact marginal training: {setting}",
        ours=exact, baseline=soft, better="higher", margin=0.3, baseline_name="soft attention", seed=seed,
    )  # fmt: skip
    claim(
        f"variational training with one sample keeps most of that: {setting}",
        ours=elbo, baseline=soft, better="higher", margin=0.5 * (exact - soft), baseline_name="soft attention",
        seed=seed,
    )  # fmt: skip
    claim(
        f"variational training with one sample: {setting}",
        ours=elbo, baseline=hard, better="higher", margin=0.3, baseline_name="hard attention, enumerated", seed=seed,
    )  # fmt: skip
    assert exact >= elbo
