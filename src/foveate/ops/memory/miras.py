"""Miras: test-time memories by four choices, here with a linear memory.

It's All Connected: A Journey Through Test-Time Memorization, Attentional Bias, Retention, and Online Optimization
(2025), arXiv 2504.13173.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, final

import torch
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.ops.memory import learner
from foveate.ops.memory.fast import Layer, Outer, Weights
from foveate.ops.memory.memory import Memory
from foveate.ops.operator import Gate

Bias = Literal["dot", "l2", "lp", "huber", "huber_norm", "huber_channel"]
Retention = Literal["none", "l2", "lq", "kl"]
Slices = Literal["rows", "columns", "matrix"]


@final
class Miras(Memory):
    """A linear memory `W k` with a choice of what it minimises (`bias`) and of how it keeps what it has (`retention`).

    Cost O(N D Dv), and a state of 3 D Dv numbers per head. "dot" without retention is linear attention, "l2" the delta
    rule; the Huber losses, and "lp" with p below 2, give way less to outliers among the values; "lq" and "kl" bound the
    weights. The presets `moneta`, `yaad` and `memora` are the paper's three. The wrong choice where plain sums or the
    delta rule will do: those are cheaper in the linear family.

    With `e = W k - v`, the gradients are, times `kᵀ` each:
        "dot": `-v`. "l2": `e`. "lp": `p sign(e) |e|^(p-1)`.
        "huber": `e` where `|e|₂ <= delta`, else `delta sign(e)`, as the paper's model has it: at the threshold the step
        grows about `sqrt(Dv)` times. "huber_norm": there `delta e / |e|₂`, without that leap. "huber_channel": `e` with
        each channel clamped to delta.
    With M the decayed sum of the steps (see `Memory`), the weights are:
        "none" and "l2": M itself, "none" without any decay.
        "lq": `M / |M|_q^(q-2)`.
        "kl": `mass * softmax(M)` over each slice, which is `softmax((1 - alpha) log W - theta u)`: not negative, and
        each slice sums to `mass`. It starts uniform: an empty memory does not answer 0.

    Args:
        bias, retention: as above.
        p: of "lp", at least 1. q: of "lq", at least 1.
        delta: of "huber"; a call may bring a tensor `(B, H, Nk)`.
        mass, slices: of "kl". Which slices sum to `mass` is not settled by the paper: "rows" (the weights of one value
            channel), "columns" (those of one key channel), or the whole "matrix".
        smooth: added to `e²` under the root wherever a sign or a power of `|e|` is taken: a gradient exists at 0.
        alpha: forgetting, 1 minus the paper's alpha; eta: momentum; theta: the step, the paper's eta. As in `Memory`.
        chunk: tokens whose gradients are taken at the same weights; 1 is the exact rule.
        unit: scale queries and keys to length 1, as the paper does.

    Departures: rates are one number per token and head, where the paper has one per channel; "lq" and "kl" weights are
    made anew for every token that reads, where the paper does so at the ends of chunks (the same for `chunk=1`); the
    paper's own models have an MLP for a memory. There is no official code: the rules are checked at their limits.

    Raises:
        OptionError: an option out of range, or a decay together with retention="none".
    """

    inputs: ClassVar[frozenset[str]] = frozenset({"alpha", "eta", "theta", "delta"})
    gates: ClassVar[Mapping[str, Gate]] = {**Memory.gates, "delta": Gate("softplus", 0.0)}

    def __init__(
        self, bias: Bias = "l2", retention: Retention = "l2", *, p: float = 3.0, q: float = 4.0, delta: float = 1.0,
        mass: float = 1.0, slices: Slices = "rows", smooth: float = 1e-6, alpha: float = 0.0, eta: float = 0.0,
        theta: float = 0.1, chunk: int = 16, unit: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(alpha=alpha, eta=eta, theta=theta, chunk=chunk, unit=unit, delta=delta)
        validate.one_of("bias", bias, ("dot", "l2", "lp", "huber", "huber_norm", "huber_channel"))
        validate.one_of("retention", retention, ("none", "l2", "lq", "kl"))
        validate.one_of("slices", slices, ("rows", "columns", "matrix"))
        for name, value in (("p", p), ("q", q)):
            validate.at_least(name, value, 1)
        for name, value in (("delta", delta), ("mass", mass), ("smooth", smooth)):
            validate.at_least(name, value, 0)
        if retention == "none" and alpha:
            raise OptionError(f'alpha={alpha} decays, and retention="none" does not; use retention="l2"')
        if retention == "none":
            self.inputs = self.inputs - {"alpha"}  # type: ignore[misc]  # this one takes no decay from a call either
        self.linked = retention == "kl" or (retention == "lq" and q != 2)
        self.bias, self.retention = bias, retention
        self.p, self.q, self.mass, self.slices, self.smooth = p, q, mass, slices, smooth

    @classmethod
    def moneta(cls, p: float = 3.0, q: float = 4.0, **options: Any) -> Self:
        """The l_p objective with l_q retention."""
        return cls("lp", "lq", p=p, q=q, **options)

    @classmethod
    def yaad(cls, delta: float = 1.0, bias: Bias = "huber", **options: Any) -> Self:
        """A Huber objective with decay. In training end to end, "huber_norm" went well where "huber" did not."""
        return cls(bias, "l2", delta=delta, **options)

    @classmethod
    def memora(cls, **options: Any) -> Self:
        """The l_2 objective with weights on a simplex."""
        return cls("l2", "kl", **options)

    def initial(self, heads: int, key_dim: int, value_dim: int, like: Tensor) -> Weights:
        return (like.new_zeros(heads, value_dim, key_dim),)

    def read(self, layers: Sequence[Layer], q: Tensor) -> Tensor:
        return learner.read(layers, q)

    def surprise(self, weights: Weights, k: Tensor, v: Tensor, rates: Mapping[str, Tensor]) -> tuple[Outer, ...]:
        return learner.gradients(weights, k, lambda read: self._slope(read, v, rates["delta"][..., None]))

    def _slope(self, read: Tensor, v: Tensor, delta: Tensor) -> Tensor:
        if self.bias == "dot":
            return -v
        error = read - v
        if self.bias == "l2":
            return error
        if self.bias == "lp":
            return self.p * error * (error.square() + self.smooth) ** (self.p / 2 - 1)
        return self._huber(error, delta)

    def _huber(self, error: Tensor, delta: Tensor) -> Tensor:
        if self.bias == "huber_channel":
            return torch.minimum(torch.maximum(error, -delta), delta)
        total = error.square().sum(-1, keepdim=True)
        near = total <= delta.square()
        # delta goes to 0 where it is not asked for: an infinite one would make NaN of a gradient of 0
        reach = torch.where(near, 0.0, delta)
        length = error.square() if self.bias == "huber" else total
        return torch.where(near, error, reach * error / (length + self.smooth).sqrt())

    def link(self, memory: Tensor) -> Tensor:
        if self.retention == "kl":
            if self.slices == "matrix":
                return self.mass * memory.flatten(-2).softmax(-1).unflatten(-1, memory.shape[-2:])
            return self.mass * memory.softmax(-1 if self.slices == "rows" else -2)
        if self.retention == "lq" and self.linked:
            total = memory.abs().pow(self.q).sum((-2, -1), keepdim=True)
            return memory / torch.where(total > 0, total, 1.0) ** ((self.q - 2) / self.q)
        return memory

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls.yaad(chunk=max(1, min(4, length // 2)), alpha=0.05)
