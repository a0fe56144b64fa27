"""Attention as inference: the expected value under the posterior of a latent edge.

Attention: Marginal Probability is All You Need? (2023), arXiv 2304.04556.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, Self, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from foveate.core import masks, validate
from foveate.core.call import AttentionCall
from foveate.core.errors import OptionError, ShapeError
from foveate.core.scoring import SOFTMAX, Tile, dot_product
from foveate.ops.base.kv_cached import Cached
from foveate.ops.functional import normalizers

#: The most joint states that `enumerate_edges` visits.
STATES = 1 << 16


@final
class MarginalAttention(Cached):
    """`E[v_phi]` with `p(phi = j) ∝ prior_j psi(q, k_j)`: soft, hard, masked, biased, graph and slot attention in one.

    The log prior is the call's float mask: -inf forbids an edge, distances give a relative bias, and log adjacencies
    give graph attention. With axis "key" every query has one edge, and the cost is that of softmax attention, on fused
    kernels. With axis "slot" every key has one edge, to the query that explains it: slot attention, and EM if iterated;
    it holds all Nq x Nk logits. It serves to relate mechanisms to each other; the wrong choice for a mechanism that has
    its own class here.

    Args:
        potential: log psi: "dot" is `scale · q k`, "gaussian" `-scale / 2 |q - k|²`, whose variance is 1 / scale. The
            two agree if all keys have the same norm.
        estimate: the posterior's "mean", its most probable edge ("map"), or one "sample" of it. Hard edges pass
            gradients only to the values.
        axis: "key": a query's edge is to one of the keys; "slot": a key's edge is to one of the queries, and a query
            reads the mean of its keys, weighted by responsibility. Not causal, as later queries compete for keys.
        generator: the generator of "sample".

    The paper is conceptual: the list of instances, and enumeration as their oracle, are reconstructed from it.

    Raises:
        OptionError: an unknown option, a sample without a generator or a generator without a sample.
    """

    def __init__(
        self, potential: Literal["dot", "gaussian"] = "dot", estimate: Literal["mean", "map", "sample"] = "mean", *,
        axis: Literal["key", "slot"] = "key", generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        validate.one_of("potential", potential, ("dot", "gaussian"))
        validate.one_of("estimate", estimate, ("mean", "map", "sample"))
        validate.one_of("axis", axis, ("key", "slot"))
        if (generator is None) == (estimate == "sample"):
            raise OptionError(
                f'generator must come with estimate="sample", and only with it; got estimate="{estimate}"'
            )
        self.potential, self.estimate, self.axis, self.generator = potential, estimate, axis, generator
        if axis == "slot":
            self._declare(patterns=frozenset({"self", "cross"}), streaming=None)
        elif estimate == "sample":
            self._declare(streaming="own")

    def _prepared(self, call: AttentionCall) -> AttentionCall:
        q, k = self._joined(call.q, masks.without_hidden(call.k, call.mask))
        if self.axis == "key":
            drawn = None if self.estimate != "sample" else self._uniform(q.shape[:3], q.device)
            scoring = SOFTMAX if self.estimate == "mean" else _HardKeys(drawn)
            return replace(call, q=q, k=k, scoring=scoring)
        logits = _logits(q, k, call.mask, call.scale)
        if self.estimate == "mean":  # the keys' shares of slots, a softmax over slots, enter as a bias on the keys
            return replace(call, q=q, k=k, mask=masks.combine(call.mask, -_evidence(logits, -2)))
        columns = logits.mT
        if self.estimate == "map":
            chosen = columns.argmax(-1)
        else:
            chosen = normalizers.sample(columns, self._uniform(columns.shape[:3], q.device)).argmax(-1)
        allowed = None if call.mask is None else masks.allowed(call.mask)
        return replace(call, q=q, k=k, mask=allowed, scoring=_HardSlots(chosen))

    def selection_macs(self, q: Tensor, k: Tensor, causal: bool) -> int:
        """Count the scores of all pairs, which axis "slot" needs before any query reads."""
        width = q.shape[3] + (0 if self.potential == "dot" else 2)
        return q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * width if self.axis == "slot" else 0

    def evidence(
        self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], *,
        mask: Tensor | None = None, scale: float | None = None,
    ) -> Float[Tensor, "b h n"]:  # fmt: skip
        """Return `log sum prior psi` over each query's edges, or each key's for axis "slot"; 0 for none."""
        call = self._call(q, k, k, mask, False, scale)
        logits = _logits(*self._joined(q, masks.without_hidden(k, mask)), mask, call.scale)
        dim = -1 if self.axis == "key" else -2
        return _evidence(logits, dim).squeeze(dim)

    def _joined(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return q and k whose dot product is log psi, up to the scale; a Gaussian's norms are two more channels."""
        if self.potential == "dot":
            return q, k
        q_norm, k_norm = (-0.5 * (x * x).sum(-1, keepdim=True) for x in (q, k))
        return torch.cat([q, q_norm, torch.ones_like(q_norm)], -1), torch.cat([k, torch.ones_like(k_norm), k_norm], -1)

    def _uniform(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        assert self.generator is not None  # the constructor refuses "sample" without one
        return torch.rand(shape, generator=self.generator, device=self.generator.device).to(device)

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls("gaussian")

    @classmethod
    def exact(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls()


def _logits(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Float[Tensor, "b h q k"]:
    """Return all logits, with the log prior added."""
    logits = dot_product(q, k.repeat_interleave(q.shape[1] // k.shape[1], 1), scale)
    return logits if mask is None else logits + masks.as_bias(mask, logits.dtype)


def _evidence(logits: Float[Tensor, "b h q k"], dim: int) -> Tensor:
    """Return the log-sum-exp along `dim`, which is kept; 0 for a row of only -inf."""
    empty = (logits == masks.NEG_INF).all(dim, keepdim=True)
    return torch.logsumexp(logits.masked_fill(empty, 0.0), dim, keepdim=True).masked_fill(empty, 0.0)


@dataclass(frozen=True)
class _HardKeys:
    """One key for each query: the most probable, or a drawn one."""

    uniform: Float[Tensor, "b h q"] | None
    is_softmax = False

    def parameters(self) -> Iterator[Tensor]:
        return iter(())

    def logits(self, q: Tensor, k: Tensor, scale: float, at: Tile) -> Float[Tensor, "b h q k"]:
        return dot_product(q, k, scale)

    def normalize(self, logits: Tensor, at: Tile) -> Float[Tensor, "b h q k"]:
        if self.uniform is None:
            return normalizers.argmax(logits)
        return normalizers.sample(logits, self.uniform[:, :, at.rows - (at.n_keys - at.n_queries)])

    def score_macs(self, width: int) -> int:
        return width


@dataclass(frozen=True)
class _HardSlots:
    """One query for each key; the keys of a query have equal weight."""

    chosen: Tensor  # (B, H, Nk)
    is_softmax = True

    def parameters(self) -> Iterator[Tensor]:
        return iter(())

    def logits(self, q: Tensor, k: Tensor, scale: float, at: Tile) -> Float[Tensor, "b h q k"]:
        slots = at.rows - (at.n_keys - at.n_queries)
        mine = self.chosen[:, :, None, at.cols] == slots[:, None]
        return torch.zeros(mine.shape, dtype=q.dtype, device=q.device).masked_fill(~mine, masks.NEG_INF)

    def normalize(self, logits: Tensor, at: Tile) -> Float[Tensor, "b h q k"]:
        return SOFTMAX.normalize(logits, at)

    def score_macs(self, width: int) -> int:
        return 0  # see `selection_macs`


def expectation_maximisation(
    op: MarginalAttention, slots: Float[Tensor, "b h s d"], nodes: Float[Tensor, "b h n d"], steps: int, *,
    mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Float[Tensor, "b h s d"], Float[Tensor, " {steps}+1"]]:  # fmt: skip
    """Move slots to the mean of the nodes that they explain, repeatedly: EM for a mixture of the potential.

    Returns:
        The slots, and the evidence of all nodes before each step and after the last; it never falls for Gaussians.
    """
    validate.count("steps", steps, 1)
    if op.axis != "slot":
        raise OptionError(f'axis="{op.axis}" must be "slot", since slots compete for nodes')
    evidence = [op.evidence(slots, nodes, mask=mask, scale=scale).sum()]
    for _ in range(steps):
        slots = op(slots, nodes, nodes, mask=mask, scale=scale)
        evidence.append(op.evidence(slots, nodes, mask=mask, scale=scale).sum())
    return slots, torch.stack(evidence)


def enumerate_edges(
    score: Float[Tensor, "... n m"], log_prior: Float[Tensor, "... n m"] | None = None
) -> Float[Tensor, "... n m"]:
    """Return the marginals `p(phi_i = j)` from all `M ** N` joint assignments of N edges: the oracle."""
    logits = score if log_prior is None else score + log_prior
    n, m = logits.shape[-2:]
    if m**n > STATES:
        raise ShapeError(f"score must have at most {STATES} joint states; got {m} ** {n} = {m**n}")
    states = torch.cartesian_prod(*[torch.arange(m, device=score.device)] * n).reshape(-1, n)
    joint = logits[..., torch.arange(n, device=score.device), states].sum(-1)
    taken = F.one_hot(states, m).to(logits.dtype)
    return torch.einsum("...s,snm->...nm", torch.softmax(joint, -1), taken)


def collapsed_gradient(
    y: Float[Tensor, "..."], log_psi: Callable[[Tensor], Float[Tensor, " m"]], log_prior: Tensor | None = None
) -> Float[Tensor, "..."]:
    """Return the gradient of `log sum_j prior_j psi_j(y)`, which predictive coding descends.

    It is attention: the posterior mean of the gradients of each log psi_j."""
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        logits = log_psi(y)
    posterior = torch.softmax(logits if log_prior is None else logits + log_prior, -1)
    return torch.autograd.grad(logits, y, posterior.detach())[0]
