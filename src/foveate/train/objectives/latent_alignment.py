"""Objectives of a latent alignment: what soft attention maximises, what it stands in for, and what lies between.

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
from foveate.core.errors import OptionError
from foveate.ops.functional.normalizers import sample

Objective = Literal["soft", "exact", "hard", "elbo"]
Estimator = Literal["enum", "reinforce", "gumbel", "wsram"]
#: `log p(y | z)`: of each position `(..., T)`, or a function of weights over positions `(K, ..., T) -> (K, ...)`.
LogLikelihood = Tensor | Callable[[Tensor], Tensor]

ESTIMATORS = {"soft": ("enum",), "exact": ("enum",), "hard": ("enum", "reinforce", "gumbel")}
ESTIMATORS["elbo"] = (*ESTIMATORS["hard"], "wsram")


def latent_attention_loss(
    prior_logits: Float[Tensor, "... t"], loglik: LogLikelihood, *, post_logits: Float[Tensor, "... t"] | None = None,
    soft_loglik: Float[Tensor, "..."] | None = None, objective: Objective = "elbo", estimator: Estimator = "enum",
    samples: int = 1, temperature: float = 1.0, baseline: bool = True, generator: torch.Generator | None = None,
) -> Float[Tensor, "..."]:  # fmt: skip
    """What to minimise, for each output; its gradient is the estimator's.

    Args:
        prior_logits: of `p(z | x, query)`; -inf where there is no position.
        loglik: `log p(y | z)`. Enumerating takes all T positions; sampling asks a function for `samples` of them only,
            and relaxed samples are what a function alone can tell exactly: a tensor's values are averaged by them.
        post_logits: of the inference network's `q(z | x, query, y)`, for "elbo".
        soft_loglik: `log p(y | E_p[x_z])`, soft attention's own; asked of the function where it is one.
        objective: "soft"; "exact": `log sum_z p(z) p(y | z)`; "hard": `E_p log p(y | z)`, a lower bound; "elbo":
            `E_q log p(y | z) - KL(q, p)`, a bound that is tight where q is the posterior.
        estimator: of an expectation: "enum" is exact; "reinforce" weighs the score function of samples by their
            log-likelihood less that of soft attention; "gumbel" is differentiated through relaxed samples; "wsram"
            weighs samples by `p(z) p(y | z) / q(z)`, as the release does.
        temperature: of the relaxed samples.
        baseline: whether reinforce subtracts the soft log-likelihood.
        generator: what samples are drawn from.

    Raises:
        OptionError: an unknown objective or estimator, one that does not go with the other, or what one needs missing.
    """
    check(objective, estimator, samples, temperature)
    if objective == "elbo" and post_logits is None:
        raise OptionError('objective="elbo" needs post_logits')
    if estimator != "enum" and generator is None:
        raise OptionError(f'estimator="{estimator}" needs a generator')
    log_p = torch.log_softmax(prior_logits, -1)
    log_q = log_p if objective != "elbo" else torch.log_softmax(post_logits, -1)
    at = loglik if callable(loglik) else lambda weights: _expected(weights, loglik)
    needs_soft = objective == "soft" or (estimator == "reinforce" and baseline)
    if needs_soft and soft_loglik is None:
        if not callable(loglik):
            raise OptionError(f'objective="{objective}", estimator="{estimator}" needs soft_loglik')
        soft_loglik = at(log_p.exp()[None])[0]
    if objective == "soft":
        return -soft_loglik
    if estimator == "wsram":
        return _wsram(log_p, log_q, at, samples, generator)
    divergence = kl(log_q, log_p) if objective == "elbo" else 0.0
    if estimator == "reinforce":
        return divergence - _reinforce(log_q, at, soft_loglik if baseline else None, samples, generator)
    if estimator == "gumbel":
        return divergence - at(relaxed(log_q, samples, temperature, generator)).mean(0)
    each = loglik if not callable(loglik) else _each(log_p, at)
    if objective == "exact":
        return -torch.logsumexp(log_p + each.masked_fill(log_p == masks.NEVER, 0.0), -1)
    return divergence - _expected(log_q.exp(), each)


def kl(log_q: Float[Tensor, "... t"], log_p: Float[Tensor, "... t"]) -> Float[Tensor, "..."]:
    """`KL(q, p)` of categorical distributions; what q rules out adds nothing."""
    gap = (log_q - log_p).masked_fill(log_q == masks.NEVER, 0.0)
    return (log_q.exp() * gap).sum(-1)


def relaxed(
    log_q: Float[Tensor, "... t"], samples: int, temperature: float, generator: torch.Generator
) -> Float[Tensor, "k ... t"]:
    """Gumbel-softmax samples: `softmax((log q + Gumbel noise) / temperature)`, one-hot in the limit of 0."""
    uniform = _uniform((samples, *log_q.shape), log_q, generator).clamp(min=torch.finfo(log_q.dtype).tiny)
    return torch.softmax((log_q - torch.log(-torch.log(uniform))) / temperature, -1)


def marginal_decode(
    prior_logits: Float[Tensor, "... t"], loglik: Float[Tensor, "... t v"], top_k: int | None = None
) -> Float[Tensor, "... v"]:
    """The predictive `log sum_z p(z) p(y | z)`, over all positions or the prior's `top_k` with their shares made 1."""
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
    return (found + reward * (score - score.detach())).mean(0)  # the second term is a gradient alone


def _wsram(
    log_p: Tensor, log_q: Tensor, at: Callable[[Tensor], Tensor], samples: int, generator: torch.Generator
) -> Tensor:
    """The value is the many-sample bound `log mean p(z) p(y | z) / q(z)`; the gradients are weighted as in the release,
    with the samples' shares under p alone, and equal shares, as baselines for p and q."""
    drawn = _drawn(log_q, samples, generator)
    found, of_p, of_q = at(drawn), _expected(drawn, log_p), _expected(drawn, log_q)
    joint = (of_p + found - of_q).detach()
    share, of_prior = torch.softmax(joint, 0), torch.softmax((of_p - of_q).detach(), 0)
    towards = share * found + (share - of_prior) * of_p + (share - 1 / samples) * of_q
    bound = torch.logsumexp(joint, 0) - math.log(samples)
    return -(bound + (towards - towards.detach()).sum(0))


def _drawn(log_q: Tensor, samples: int, generator: torch.Generator) -> Float[Tensor, "k ... t"]:
    """One-hot samples."""
    every = log_q.detach().expand(samples, *log_q.shape)
    return sample(every, _uniform(every.shape[:-1], log_q, generator))


def _uniform(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)


def _expected(weights: Tensor, values: Tensor) -> Tensor:
    """The mean under the weights; a weight of 0 takes nothing, also from -inf and NaN."""
    return (weights * values.masked_fill(weights == 0, 0.0)).sum(-1)


def _each(log_p: Tensor, at: Callable[[Tensor], Tensor]) -> Float[Tensor, "... t"]:
    """The log-likelihood of each position, asked one-hot."""
    t = log_p.shape[-1]
    eye = torch.eye(t, dtype=log_p.dtype, device=log_p.device)
    return at(eye.view(t, *[1] * (log_p.dim() - 1), t).expand(t, *log_p.shape)).movedim(0, -1)


def check(objective: str, estimator: str, samples: int, temperature: float) -> None:
    validate.one_of("objective", objective, tuple(ESTIMATORS))
    validate.one_of("estimator", estimator, ESTIMATORS["elbo"])
    if estimator not in ESTIMATORS[objective]:
        raise OptionError(
            f'estimator="{estimator}" is none of objective="{objective}": {", ".join(ESTIMATORS[objective])}'
        )
    validate.count("samples", samples, 1)
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not temperature > 0:
        raise OptionError(f"temperature={temperature!r} must be a number above 0")
