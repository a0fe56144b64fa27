"""Adaptive filter attention (AFA): keys and values are noisy measurements of a linear system, weighed by precision.

Attention as an Adaptive Filter (2025), arXiv 2509.04154.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, Self, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError
from foveate.core.scoring import Scoring, Tile, safe_softmax
from foveate.ops.base.framed import Framed, FramedTokens
from foveate.ops.functional import rotary
from foveate.ops.functional.heads import per_query_head
from foveate.ops.functional.linear_sde import EPS, Dynamics, fixed
from foveate.ops.operator import CAUSAL_PATTERNS


@final
class AdaptiveFilterAttention(Framed):
    """A linear system `dz = (μ + iω) z dt + noise` carries each past key to the query's time; its precision weighs it.

    With `E = exp(μ |t_i - t_j|)`, and keys and values rotated back by their times (`k̃ = e^{-iωt} k`):

        R = ‖q̃_i‖² + E² ‖k̃_j‖² - 2 E Re(q̃_i* k̃_j)                 squared residual
        V = σ² (1 - E²) / (-2μ) + η² E² + γ²                        variance at the query's time
        logit = τ² (-log V - log(1 + R / (ν d V)))                  robust; or -log V - R / (ν d V)
        out_i = e^{iωt_i} Σ_j softmax_j(logit) E ṽ_j

    This is the isotropic form: one μ and one noise for all channels of a head. Cost O(Nq Nk D) time and O(N) memory, as
    for softmax attention, without fused kernels. It suits sequences from a noisy linear system, at regular or irregular
    times, with outliers; dot products with rotary positions are its limit μ = σ² = 0.

    Channels are complex: 2c and 2c + 1 are real and imaginary part, so D is even and d = D / 2.

    Inputs of a call:
        t: times `(B, 1, Nk)`, or `(B, Hq, Nk)` for each head; queries are the last tokens. By default 0, 1, 2, ...

    Args:
        heads, head_dim: Hq and D of the calls to come.
        value_dim: Dv; None for `head_dim`. Another width needs `separate`.
        robust: True uses the logarithm, under which outliers lose influence; False gives Gaussian logits.
        rotate_values: False does not rotate values and outputs, so that weights over keys exist as a matrix.
        residual: False keeps only the dot product of R, an option of the release; Gaussian logits only.
        separate: True gives values their own dynamics (μ, ω, noise), for E of the output and V in `-log V`.
        mu, sigma2, eta2, gamma2, nu, tau: a fixed number; None learns one per head, from the release's initial values.
        omega: "rotary" (`10000^{-c/d}`), "learned" (per head, from a normal distribution), or d numbers.
        length: L, the time span that bounds a learned μ (within `-5/L`), and ω in variant "release".
        variant: "release" has frequencies for pairs of complex channels, `+ω` and `-ω`, in units of `10π / L`.
        generator: for the initial values.

    Noise passes a softplus. The bounds on μ and the initial values are those of the author's code
    (PCR-git/Adaptive-Filter-Attention), whose gates, norms and inner residual belong to layers. Anisotropic filters are
    not implemented.

    Raises:
        OptionError: options out of range, or that contradict each other.
        ShapeError: a call of another size, or times of another shape.
    """

    capabilities = replace(Framed.capabilities, patterns=CAUSAL_PATTERNS, default_scale=1.0, inputs=frozenset({"t"}))

    def __init__(
        self, heads: int, head_dim: int, value_dim: int | None = None, *, robust: bool = True,
        rotate_values: bool = True, residual: bool = True, separate: bool = False, mu: float | None = None,
        omega: Literal["rotary", "learned"] | Sequence[float] = "rotary", sigma2: float | None = None,
        eta2: float | None = None, gamma2: float | None = None, nu: float | None = None, tau: float | None = None,
        length: int = 1024, variant: Literal["paper", "release"] = "paper", generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        value_dim = head_dim if value_dim is None else value_dim
        for name, value in (("heads", heads), ("head_dim", head_dim), ("value_dim", value_dim), ("length", length)):
            validate.count(name, value, 1)
        flags = {"robust": robust, "rotate_values": rotate_values, "residual": residual, "separate": separate}
        for name, flag in flags.items():
            validate.one_of(name, flag, (True, False))
        validate.one_of("variant", variant, ("paper", "release"))
        if robust and not residual:
            raise OptionError("residual=False must come with robust=False: a dot product is no distance")
        if value_dim != head_dim and not separate:
            raise OptionError(f"value_dim={value_dim} must be head_dim={head_dim} unless separate=True")
        self.heads, self.head_dim, self.value_dim = heads, head_dim, value_dim
        self.robust, self.residual, self.rotate_values = robust, residual, rotate_values
        self._declare(has_weights=not rotate_values)
        numbers = {"mu": mu, "sigma2": sigma2, "eta2": eta2, "gamma2": gamma2}
        own = (omega, length, variant, generator)
        self.key_dynamics = Dynamics(heads, head_dim, numbers, *own)
        self.own_dynamics = Dynamics(heads, value_dim, numbers, *own) if separate else None
        self.nu = nn.Parameter(torch.ones(heads)) if nu is None else fixed("nu", nu)
        self.tau = nn.Parameter(torch.ones(heads)) if tau is None else fixed("tau", tau)

    def frames(self, tokens: FramedTokens, inputs: Mapping[str, Tensor]) -> tuple[_Moment, _Moment]:
        q, k, v = tokens.q, tokens.k, tokens.v
        for name, expected, found in (("Hq", self.heads, q.shape[1]), ("D", self.head_dim, q.shape[3])):
            if found != expected:
                raise ShapeError(f"AdaptiveFilterAttention was built for {name}={expected}; got {found}")
        if self.rotate_values and v.shape[3] != self.value_dim:
            raise ShapeError(f"AdaptiveFilterAttention was built for Dv={self.value_dim}; got {v.shape[3]}")
        t = inputs.get("t", tokens.key_positions[None, None])
        shapes = [(batch, heads, k.shape[2]) for batch in (1, q.shape[0]) for heads in (1, q.shape[1])]
        if not isinstance(t, Tensor) or t.shape not in shapes:
            got = tuple(t.shape) if isinstance(t, Tensor) else t
            raise ShapeError(f"t must be (B, 1 or Hq, Nk)={shapes[-1]}; got {got}")
        t = t.to(torch.promote_types(t.dtype, torch.promote_types(q.dtype, torch.float32)))
        return _Moment(self, t[..., k.shape[2] - q.shape[2] :]), _Moment(self, t)

    @property
    def value_dynamics(self) -> Dynamics:
        """The dynamics of values."""
        return self.key_dynamics if self.own_dynamics is None else self.own_dynamics

    def scoring(self, marks: Tensor | None) -> Scoring:
        assert marks is not None
        return _Filter(self, marks)

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        random = torch.Generator().manual_seed(0)
        return cls(heads, head_dim, separate=True, omega="learned", length=length, generator=random)

    @classmethod
    def exact(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(
            heads, head_dim, robust=False, residual=False, mu=0.0, sigma2=0.0, omega=[0.0] * (head_dim // 2),
            eta2=3 / head_dim, gamma2=1 / head_dim, nu=1.0, tau=1.0,
        )  # fmt: skip


@final
class _Moment:
    """The times of tokens: they rotate vectors back to time 0, keys and values once for each query head."""

    def __init__(self, op: AdaptiveFilterAttention, t: Tensor) -> None:
        self.op, self.marks = op, t

    def query(self, q: Tensor) -> Tensor:
        return rotary.rotate(q, -self.op.key_dynamics.angles(self.marks), "interleaved")

    def key(self, k: Tensor) -> Tensor:
        return self.query(per_query_head(k, self.op.heads))

    def value(self, v: Tensor) -> Tensor:
        return self._rotated(per_query_head(v, self.op.heads), -1)

    def back(self, out: Tensor) -> Tensor:
        return self._rotated(out, 1)

    def _rotated(self, x: Tensor, sign: int) -> Tensor:
        if not self.op.rotate_values:
            return x
        return rotary.rotate(x, sign * self.op.value_dynamics.angles(self.marks), "interleaved")


@final
class _Filter:
    """The scoring: logits and weights from residuals and variances."""

    is_softmax = False

    def __init__(self, op: AdaptiveFilterAttention, t: Tensor) -> None:
        self.op, self.t = op, t

    def parameters(self) -> tuple[Tensor, ...]:
        return (*self.op.parameters(), self.t)

    def logits(self, q: Tensor, k: Tensor, scale: float, at: Tile) -> Tensor:
        q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
        gap = self._gap(at).to(q.dtype)
        decay, variance = self.op.key_dynamics.decay(gap), self.op.key_dynamics.variance(gap)
        residual = -2 * decay * (q @ k.mT)
        if self.op.residual:
            norms = q.square().sum(-1)[..., None], k.square().sum(-1)[..., None, :]
            residual = (residual + norms[0] + decay.square() * norms[1]).clamp_min(0.0)
        nu, tau = self._per_head(self.op.nu, q), self._per_head(self.op.tau, q)
        nu = nu if isinstance(nu, float) else F.softplus(nu) + EPS
        misfit = residual / (nu * (self.op.head_dim // 2) * variance)
        misfit = torch.log1p(misfit) if self.op.robust else misfit
        prior = self.op.value_dynamics.variance(gap).log()
        return scale * tau**2 * (-prior - misfit)

    def normalize(self, logits: Tensor, at: Tile) -> Tensor:
        return safe_softmax(logits) * self.op.value_dynamics.decay(self._gap(at).to(logits.dtype))

    def score_macs(self, width: int) -> int:
        return width

    def _gap(self, at: Tile) -> Tensor:
        """Return `|t_i - t_j|` of a tile; queries are the last tokens."""
        return (self.t[..., at.rows, None] - self.t[..., None, at.cols]).abs()

    def _per_head(self, value: Tensor | float, like: Tensor) -> Tensor | float:
        return value if isinstance(value, float) else value.to(like.dtype)[:, None, None]
