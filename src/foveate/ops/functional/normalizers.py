"""Distribution functions, which turn logits into weights, in the forms of An Attentive Survey of Attention Models.

All of them work over the last axis, give weight 0 to a logit of -inf, and zeros to a row of only -inf.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from foveate.core import masks, validate
from foveate.core.errors import OptionError, shown
from foveate.core.scoring import safe_softmax
from foveate.ops.functional import local_window


def entmax(logits: Float[Tensor, "... k"], alpha: float = 1.5) -> Float[Tensor, "... k"]:
    """Return alpha-entmax: the distribution p that maximises `p . logits` plus the Tsallis entropy of order alpha.

    `p = max(0, (alpha - 1) logits - tau) ** (1 / (alpha - 1))`, with the tau for which it sums to 1. alpha = 1 is the
    softmax; above it, weights can be 0, and a larger alpha gives more zeros. One sort makes alpha = 2 (sparsemax) and
    1.5 exact; other values bisect tau. (Peters, Niculae, Martins 2019; Martins, Astudillo 2016.)
    """
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 1 <= alpha < math.inf:
        raise OptionError(f"alpha={shown(alpha)} must be a finite number, at least 1")
    return safe_softmax(logits) if alpha == 1 else _Entmax.apply(logits, float(alpha))[0]


def sparsemax(logits: Float[Tensor, "... k"]) -> Float[Tensor, "... k"]:
    """Return the Euclidean projection of the logits onto the simplex: entmax with alpha = 2."""
    return entmax(logits, 2.0)


def argmax(logits: Float[Tensor, "... k"]) -> Float[Tensor, "... k"]:
    """Put all weight on the largest logit, the first of equals. No gradient."""
    best = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    return best.masked_fill(logits == masks.NEG_INF, 0.0)


def sample(logits: Float[Tensor, "... k"], uniform: Float[Tensor, "..."]) -> Float[Tensor, "... k"]:
    """Put all weight on one key, drawn from the softmax by a number in [0, 1) for each row. No gradient."""
    heights = safe_softmax(logits.detach().double()).cumsum(-1)
    drawn = (heights <= uniform.double()[..., None] * heights[..., -1:]).sum(-1).clamp(max=logits.shape[-1] - 1)
    one = torch.nn.functional.one_hot(drawn, logits.shape[-1]).to(logits.dtype)
    return one.masked_fill(logits == masks.NEG_INF, 0.0)


#: Distributions that need only logits.
DISTRIBUTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": safe_softmax,
    "sparsemax": sparsemax,
    "sigmoid": torch.sigmoid,
    "argmax": argmax,
}


class LocalWindow(nn.Module):
    """The window of local-p attention: each query predicts the centre of its window.

    The centre is `p = S sigmoid(v . tanh(W q))` for S visible keys at positions counted from 0; keys within `window` of
    it are seen, and their weights are multiplied by `exp(-(s - p)^2 / (2 sigma^2))`, without another normalization.

    Args:
        heads, head_dim: H and D.
        window: keys to either side, Luong's D; may be infinite.
        sigma: the width of the Gaussian; None for half of the window.
    """

    def __init__(self, heads: int, head_dim: int, window: float, sigma: float | None = None) -> None:
        super().__init__()
        validate.count("heads", heads, 1)
        validate.count("head_dim", head_dim, 1)
        validate.at_least("window", window, 1)
        sigma = window / 2 if sigma is None else sigma
        if isinstance(sigma, bool) or not isinstance(sigma, int | float) or not sigma > 0:
            raise OptionError(f"sigma={shown(sigma)} must be a number above 0")
        self.window, self.sigma = window, sigma
        bound = head_dim**-0.5
        self.w = nn.Parameter(torch.empty(heads, head_dim, head_dim).uniform_(-bound, bound))
        self.v = nn.Parameter(torch.empty(heads, head_dim).uniform_(-bound, bound))

    def centre(self, q: Float[Tensor, "b h q d"], seen: Tensor) -> Float[Tensor, "b h q"]:
        """Return each query's centre; `seen (Nq,)` is the number of keys that it may see."""
        return local_window.predicted(q, self.w.mT, self.v, seen.expand(q.shape[2])[:, None]).squeeze(-1)

    def cut(self, logits: Tensor, centre: Tensor, keys: Tensor) -> Float[Tensor, "b h q k"]:
        """Set logits outside of the window to -inf."""
        return local_window.cut(logits, keys, centre[..., None], self.window)

    def dampen(self, weights: Tensor, centre: Tensor, keys: Tensor) -> Float[Tensor, "b h q k"]:
        """Multiply weights by the Gaussian."""
        return weights * local_window.log_bell(keys, centre[..., None], self.sigma).exp().to(weights.dtype)


class _Entmax(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor]) -> None:
        ctx.alpha = inputs[1]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def forward(logits: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        """Return the weights, and a copy in the dtype of the computation."""
        empty = (logits == masks.NEG_INF).all(-1, keepdim=True)
        x = logits.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(empty, 0.0)
        x = (alpha - 1) * (x - x.amax(-1, keepdim=True))
        tau = {1.5: _tau_one_and_a_half, 2.0: _tau_two}.get(alpha, _tau_bisected)(x, alpha).clamp(
            min=-1.0
        )  # a logit 1 below the largest has no weight
        weights = (x - tau).clamp(min=0.0) ** (1 / (alpha - 1))
        weights = (weights / weights.sum(-1, keepdim=True)).masked_fill(empty, 0.0)
        return weights.to(logits.dtype), weights.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        slope = torch.where(weights > 0, weights, 1.0) ** (2 - ctx.alpha) * (weights > 0)
        total = slope.sum(-1, keepdim=True).clamp(min=torch.finfo(slope.dtype).tiny)
        wide = grad.to(slope.dtype)
        mean = (wide * slope).sum(-1, keepdim=True) / total
        return (slope * (wide - mean)).to(grad.dtype), None


def _tau_two(x: Tensor, alpha: float) -> Tensor:
    """Return the threshold of the longest leading run of sorted logits that all stay above their own threshold."""
    top = x.sort(-1, descending=True).values
    count = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
    tau = (top.cumsum(-1) - 1) / count
    return _last(tau, tau < top)


def _tau_one_and_a_half(x: Tensor, alpha: float) -> Tensor:
    """Return the threshold as `_tau_two` does; that of a run solves a quadratic equation."""
    top = x.sort(-1, descending=True).values
    count = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
    mean, square = top.cumsum(-1) / count, (top**2).cumsum(-1) / count
    tau = mean - (1 / count - (square - mean**2)).clamp(min=0.0).sqrt()
    return _last(tau, tau <= top)


def _last(tau: Tensor, above: Tensor) -> Tensor:
    """Return the threshold of the longest run; a row that holds NaN gives NaN."""
    return tau.gather(-1, (above.sum(-1, keepdim=True) - 1).clamp(min=0))


def _tau_bisected(x: Tensor, alpha: float) -> Tensor:
    low = torch.full_like(x[..., :1], -1.0)  # at this tau the largest logit alone has a weight of 1 or more
    width = low.new_tensor(1 - x.shape[-1] ** (1 - alpha))
    for _ in range(60 if x.dtype == torch.float64 else 30):
        width = width / 2
        heavy = ((x - low - width).clamp(min=0.0) ** (1 / (alpha - 1))).sum(-1, keepdim=True) >= 1
        low = torch.where(heavy, low + width, low)
    return low
