"""Objectives for a latent alignment: soft attention, the exact marginal, and bounds on it.

Latent Alignment and Variational Attention (2018), arXiv 1807.03756; its network is in `variational_attention.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core import masks, validate
from foveate.core.errors import OptionError, shown
from foveate.ops.functional.normalizers import sample

LatentObjective = Literal["soft", "exact", "hard", "elbo"]
Estimator = Literal["enum", "reinforce", "gumbel", "wsram"]
#: `log p(y | z)` for each position, `(..., T)`, or a function of weights over positions, `(K, ..., T) -> (K, ...)`.
LogLikelihood = Tensor | Callable[[Tensor], Tensor]

ESTIMATORS = {"soft": ("enum",), "exact": ("enum",), "hard": ("enum", "reinforce", "gumbel")}
ESTIMATORS["elbo"] = (*ESTIMATORS["hard"], "wsram")


def latent_attention_loss(
    prior_logits: Float[Tensor, "... t"], loglik: LogLikelihood, *, post_logits: Float[Tensor, "... t"] | None = None,
    soft_loglik: Float[Tensor, "..."] | None = None, objective: LatentObjective = "elbo", estimator: Estimator = "enum",
    samples: int = 1, temperature: float = 1.0, baseline: bool = True, generator: torch.Generator | None = None,
) -> Float[Tensor, "..."]:  # fmt: skip
    """Return the loss of each output; its gradient is that of `estimator`.

    Args:
        prior_logits: logits of `p(z | x, query)`; -inf at padding.
        loglik: `log p(y | z)`, a tensor over all T positions or a function. "enum" evaluates all positions; sampling
            evaluates a function at `samples` weights only. Relaxed samples are exact only with a function: a tensor's
            values are averaged with their weights.
        post_logits: logits of the inference network's `q(z | x, query, y)`, for "elbo".
        soft_loglik: `log p(y | E_p[x_z])` of soft attention; computed if `loglik` is a function.
        objective: "soft"; "exact": `log sum_z p(z) p(y | z)`; "hard": `E_p log p(y | z)`, a lower bound; "elbo":
            `E_q log p(y | z) - KL(q, p)`, a bound that is tight if q is the posterior.
        estimator: of the expectations: "enum" is exact; "reinforce" weights the score function of samples by their
            log-likelihood minus that of soft attention; "gumbel" differentiates through relaxed samples; "wsram"
            weights samples by `p(z) p(y | z) / q(z)`, as in the release.
        samples: number of samples.
        temperature: temperature of the relaxed samples.
        baseline: True lets "reinforce" subtract the soft log-likelihood.
        generator: draws the samples.

    Raises:
        OptionError: if objective or estimator is unknown, they do not go together, or an argument they need is missing.
    """
    check(objective, estimator, samples, temperature)
    if objective == "elbo" and post_logits is None:
        raise OptionError('objective="elbo" needs post_logits; got None')
    if estimator != "enum" and generator is None:
        raise OptionError(f'estimator="{estimator}" needs a generator; got None')
    log_p = torch.log_softmax(prior_logits, -1)
    log_q = log_p if objective != "elbo" or post_logits is None else torch.log_softmax(post_logits, -1)
    at = loglik if callable(loglik) else lambda weights: _expected(weights, loglik)
    needs_soft = objective == "soft" or (estimator == "reinforce" and baseline)
    if needs_soft and soft_loglik is None:
        if not callable(loglik):
            raise OptionError(f'objective="{objective}", estimator="{estimator}" needs soft_loglik; got None')
        soft_loglik = at(log_p.exp()[None])[0]
    if objective == "soft":
        assert soft_loglik is not None  # given, or computed just now
        return -soft_loglik
    divergence = kl(log_q, log_p) if objective == "elbo" else 0.0
    if estimator == "enum":
        each = loglik if not callable(loglik) else _each(log_p, at)
        if objective == "exact":
            return -torch.logsumexp(log_p + each.masked_fill(log_p == masks.NEG_INF, 0.0), -1)
        return divergence - _expected(log_q.exp(), each)
    assert generator is not None  # every other estimator is refused without one
    if estimator == "wsram":
        return _wsram(log_p, log_q, at, samples, generator)
    if estimator == "reinforce":
        return divergence - _reinforce(log_q, at, soft_loglik if baseline else None, samples, generator)
    return divergence - at(relaxed(log_q, samples, temperature, generator)).mean(0)


def kl(log_q: Float[Tensor, "... t"], log_p: Float[Tensor, "... t"]) -> Float[Tensor, "..."]:
    """Return `KL(q, p)` of categorical distributions; positions with q = 0 add nothing."""
    gap = (log_q - log_p).masked_fill(log_q == masks.NEG_INF, 0.0)
    return (log_q.exp() * gap).sum(-1)


def relaxed(
    log_q: Float[Tensor, "... t"], samples: int, temperature: float, generator: torch.Generator
) -> Float[Tensor, "k ... t"]:
    """Draw Gumbel-softmax samples `softmax((log q + Gumbel noise) / temperature)`; one-hot at temperature 0."""
    uniform = _uniform((samples, *log_q.shape), log_q, generator).clamp(min=torch.finfo(log_q.dtype).tiny)
    return torch.softmax((log_q - torch.log(-torch.log(uniform))) / temperature, -1)


def marginal_decode(
    prior_logits: Float[Tensor, "... t"], loglik: Float[Tensor, "... t v"], top_k: int | None = None
) -> Float[Tensor, "... v"]:
    """Return the predictive `log sum_z p(z) p(y | z)` over all positions, or over the prior's `top_k`, renormalised."""
    if top_k is not None:
        validate.count("top_k", top_k, 1)
        prior_logits, best = prior_logits.topk(min(top_k, prior_logits.shape[-1]), -1)
        loglik = loglik.gather(-2, best[..., None].expand(*best.shape, loglik.shape[-1]))
    return torch.logsumexp(torch.log_softmax(prior_logits, -1)[..., None] + loglik, -2)


def _reinforce(
    log_q: Tensor, at: Callable[[Tensor], Tensor], soft_loglik: Tensor | None, samples: int, generator: torch.Generator
) -> Tensor:
    drawn = _drawn(log_q, samples, generator)
    found, score = at(drawn), _expected(drawn, log_q)
    reward = found if soft_loglik is None else found - soft_loglik
    return (found + reward * (score - score.detach())).mean(0)  # the second term is 0 and adds only a gradient


def _wsram(
    log_p: Tensor, log_q: Tensor, at: Callable[[Tensor], Tensor], samples: int, generator: torch.Generator
) -> Tensor:
    """Return the negative many-sample bound `log mean p(z) p(y | z) / q(z)`.

    Its gradients are weighted as in the release: the baseline of p is each sample's share under the prior alone, that
    of q an equal share.
    """
    drawn = _drawn(log_q, samples, generator)
    found, in_p, in_q = at(drawn), _expected(drawn, log_p), _expected(drawn, log_q)
    joint = (in_p + found - in_q).detach()
    share, prior_share = torch.softmax(joint, 0), torch.softmax((in_p - in_q).detach(), 0)
    surrogate = share * found + (share - prior_share) * in_p + (share - 1 / samples) * in_q
    bound = torch.logsumexp(joint, 0) - math.log(samples)
    return -(bound + (surrogate - surrogate.detach()).sum(0))


def _drawn(log_q: Tensor, samples: int, generator: torch.Generator) -> Float[Tensor, "k ... t"]:
    """Draw one-hot samples."""
    every = log_q.detach().expand(samples, *log_q.shape)
    return sample(every, _uniform(every.shape[:-1], log_q, generator))


def _uniform(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)


def _expected(weights: Tensor, values: Tensor) -> Tensor:
    """Return the mean under the weights; a weight of 0 ignores its value, also -inf and NaN."""
    return (weights * values.masked_fill(weights == 0, 0.0)).sum(-1)


def _each(log_p: Tensor, at: Callable[[Tensor], Tensor]) -> Float[Tensor, "... t"]:
    """Evaluate the log-likelihood at each position, with one-hot weights."""
    t = log_p.shape[-1]
    eye = torch.eye(t, dtype=log_p.dtype, device=log_p.device)
    return at(eye.view(t, *[1] * (log_p.dim() - 1), t).expand(t, *log_p.shape)).movedim(0, -1)


def check(objective: str, estimator: str, samples: int, temperature: float) -> None:
    """Refuse options that are invalid or do not go together."""
    validate.one_of("objective", objective, tuple(ESTIMATORS))
    validate.one_of("estimator", estimator, ESTIMATORS["elbo"])
    if estimator not in ESTIMATORS[objective]:
        raise OptionError(
            f'estimator="{estimator}" must be one of {", ".join(ESTIMATORS[objective])} with objective="{objective}"'
        )
    validate.count("samples", samples, 1)
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not temperature > 0:
        raise OptionError(f"temperature={shown(temperature)} must be a number above 0")
