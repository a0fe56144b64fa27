"""Miras: test-time memories from four choices.

It's All Connected: A Journey Through Test-Time Memorization, Attentional Bias, Retention, and Online Optimization
(2025), arXiv 2504.13173.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Self, final

import torch
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.ops.base.test_time import Memory
from foveate.ops.functional import inner_mlp
from foveate.ops.functional.fast_weights import Layer, Outer, Weights
from foveate.ops.operator import Gate

Architecture = Literal["linear", "mlp", "plain_mlp"]
Bias = Literal["dot", "l2", "lp", "huber", "huber_norm", "huber_channel"]
Retention = Literal["none", "l2", "lq", "kl"]
Slices = Literal["rows", "columns", "matrix"]


@final
class Miras(Memory):
    """A learner with a choice of its objective (`bias`) and of its regularisation towards the past (`retention`).

    Cost O(N P) for P weights per head, and a state of 3 P numbers; P is D Dv for a linear memory, 8 D² for the paper's
    MLP. "dot" without retention is linear attention, "l2" the delta rule, "l2" with momentum and `memory="plain_mlp"`
    Titans. The Huber losses, and "lp" with p below 2, are less sensitive to outliers among the values. "lq" and "kl"
    bound the weights, and cost `chunk` times the memory. The presets `moneta`, `yaad` and `memora` are the paper's
    three. The wrong choice if plain sums or the delta rule suffice: those are cheaper in the linear family.

    Memories: "linear", `W k`; "mlp", `k + norm(W_1 gelu(W_2 k))` with 4 D hidden units, for values as wide as the keys;
    "plain_mlp", `W_1 silu(W_2 k)`.

    With `e = M(k) - v`, the slopes of the objectives are (a linear memory's gradient is the slope times `kᵀ`):
        "dot": `-v`. "l2": `e`. "lp": `p sign(e) |e|^(p-1)`.
        "huber": `e` where `|e|₂ <= delta`, else `delta sign(e)`, as in the paper's model: at the threshold the step
        grows about `sqrt(Dv)` times. "huber_norm": `delta e / |e|₂` there, without that jump. "huber_channel": `e` with
        each channel clamped to delta.
    With M the decayed sum of the steps of one matrix (see `Memory`), its weights are:
        "none" and "l2": M itself, "none" without any decay.
        "lq": `M / |M|_q^(q-2)`.
        "kl": `mass * softmax(M)` over each slice, which is `softmax((1 - alpha) log W - theta u)`: not negative, and
        each slice sums to `mass`. A linear memory starts uniform, so an empty one does not answer 0.

    Args:
        bias, retention: as above.
        p: the order of "lp", at least 1. q: the order of "lq", at least 1.
        delta: the threshold of "huber"; a call may bring a tensor `(B, H, Nk)`.
        mass, slices: for "kl". The paper does not settle which slices sum to `mass`: "rows" (the weights of one value
            channel), "columns" (those of one key channel), or the whole "matrix".
        smooth: added to `e²` under the root of every sign or power of `|e|`, so that a gradient exists at 0.
        alpha: forgetting, 1 minus the paper's alpha; eta: momentum; theta: the step, the paper's eta. See `Memory`.
        chunk: tokens whose gradients are taken at the same weights; 1 is the exact rule.
        unit: scale queries and keys to length 1, as the paper does.
        memory: as above; the presets use "mlp".
        heads, head_dim, value_dim: Hq, D and Dv of the calls to come; MLPs need them.
        max_grad_norm: as in `foveate.ops.Titans`; None, as in the paper, sets no bound.
        generator: for an MLP's first weights, which are parameters, as are gain and shift of its norm.

    Departures: rates are one number per token and head; the paper has one per channel, and does not specify which
    channels of an MLP's matrices. "lq" and "kl" weights are recomputed for every token that reads; the paper does so at
    the ends of chunks (the same for `chunk=1`). There is no official code, so tests check the rules at their limits.
    Reconstructed: the first weights, and a norm that only the outer loop trains.

    Raises:
        OptionError: an option out of range, a decay together with retention="none", or an MLP of unknown size.
        ShapeError: a call to an MLP with other heads or widths.
        DivergedError: the memory's weights have grown until an answer is NaN or inf.
    """

    capabilities = replace(
        Memory.capabilities,
        inputs=frozenset({"alpha", "eta", "theta", "delta"}),
        gates={**Memory.capabilities.gates, "delta": Gate("softplus", 0.0)},
    )

    def __init__(
        self, bias: Bias = "l2", retention: Retention = "l2", *, p: float = 3.0, q: float = 4.0, delta: float = 1.0,
        mass: float = 1.0, slices: Slices = "rows", smooth: float = 1e-6, alpha: float = 0.0, eta: float = 0.0,
        theta: float = 0.1, chunk: int = 16, unit: bool = True, memory: Architecture = "linear",
        heads: int | None = None, head_dim: int | None = None, value_dim: int | None = None,
        max_grad_norm: float | None = None, generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            alpha=alpha, eta=eta, theta=theta, chunk=chunk, unit=unit, max_grad_norm=max_grad_norm, delta=delta
        )
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
            self._declare(inputs=self.capabilities.inputs - {"alpha"})  # a call may not bring a decay either
        if not bias.startswith("huber"):  # delta has no effect, so a layer must not train it
            gates = {name: gate for name, gate in self.capabilities.gates.items() if name != "delta"}
            self._declare(inputs=self.capabilities.inputs - {"delta"}, gates=gates)
        self.linked = retention == "kl" or (retention == "lq" and q != 2)
        self.bias, self.retention = bias, retention
        self.p, self.q, self.mass, self.slices, self.smooth = p, q, mass, slices, smooth
        validate.one_of("memory", memory, ("linear", "mlp", "plain_mlp"))
        self.memory = memory
        if memory != "linear":
            self._build(heads, head_dim, value_dim, generator)

    def _build(
        self, heads: int | None, head_dim: int | None, value_dim: int | None, generator: torch.Generator | None
    ) -> None:
        """Make first weights of an MLP whose answers move about as far in one step as those of a linear memory."""
        if heads is None or head_dim is None:
            raise OptionError(f'memory="{self.memory}" must come with heads and head_dim; got {heads} and {head_dim}')
        value_dim = head_dim if value_dim is None else value_dim
        for name, value in (("heads", heads), ("head_dim", head_dim), ("value_dim", value_dim)):
            validate.count(name, value, 1)
        hidden, out = (heads, 4 * head_dim, head_dim), (heads, value_dim, 4 * head_dim)
        enter = torch.randn(hidden, generator=generator)
        if not self.unit or self.memory == "plain_mlp":
            enter = enter * head_dim**-0.5
        if self.memory == "plain_mlp":
            self.first = nn.ParameterList([enter, torch.zeros(out)])
            return
        if value_dim != head_dim:
            raise OptionError(f'value_dim={value_dim} must be head_dim={head_dim} for memory="mlp"')
        self.first = nn.ParameterList([enter, torch.randn(out, generator=generator)])
        self.gain = nn.Parameter(torch.ones(heads, 1, head_dim))
        self.shift = nn.Parameter(torch.zeros(heads, 1, head_dim))

    @classmethod
    def moneta(cls, p: float = 3.0, q: float = 4.0, memory: Architecture = "mlp", **options: Any) -> Self:
        """Make Moneta: the l_p objective with l_q retention."""
        return cls("lp", "lq", p=p, q=q, memory=memory, **options)

    @classmethod
    def yaad(
        cls, delta: float = 1.0, bias: Bias = "huber", memory: Architecture = "mlp", **options: Any
    ) -> Self:  # fmt: skip
        """Make Yaad: a Huber objective with decay. End-to-end training works with "huber_norm" and not with "huber"."""
        return cls(bias, "l2", delta=delta, memory=memory, **options)

    @classmethod
    def memora(cls, memory: Architecture = "mlp", **options: Any) -> Self:
        """Make Memora: the l_2 objective with weights on a simplex."""
        return cls("l2", "kl", memory=memory, **options)

    def initial(self, heads: int, key_dim: int, value_dim: int, like: Tensor) -> Weights:
        if self.memory == "linear":
            return (like.new_zeros(heads, value_dim, key_dim),)
        return inner_mlp.first(self.name, self.first, (heads, key_dim, value_dim), like)

    def read(self, layers: Sequence[Layer], q: Tensor) -> Tensor:
        return inner_mlp.read(layers, q, *self._form())

    def surprise(self, weights: Weights, k: Tensor, v: Tensor, rates: Mapping[str, Tensor]) -> tuple[Outer, ...]:
        def slope(read: Tensor) -> Tensor:
            return self._slope(read, v, rates["delta"][..., None])

        return inner_mlp.gradients(weights, k, slope, *self._form())

    def _form(self) -> tuple[inner_mlp.Activation, inner_mlp.Around | None]:
        if self.memory == "mlp":
            return inner_mlp.GELU, inner_mlp.Around(self.gain, self.shift)
        return inner_mlp.SILU, None

    def _slope(self, read: Tensor, v: Tensor, delta: Tensor) -> Tensor:
        if self.bias == "dot":
            return -v
        error = read - v
        if self.bias == "l2":
            return error
        if self.bias == "lp":
            return self.p * error * _power(error.square() + self.smooth, self.p / 2 - 1)
        return self._huber(error, delta)

    def _huber(self, error: Tensor, delta: Tensor) -> Tensor:
        if self.bias == "huber_channel":
            return torch.minimum(torch.maximum(error, -delta), delta)
        total = error.square().sum(-1, keepdim=True)
        near = total <= delta.square()
        # an infinite delta is replaced by 0 where it has no effect, since it would turn a gradient of 0 into NaN
        reach = torch.where(near, 0.0, delta)
        length = error.square() if self.bias == "huber" else total
        return torch.where(near, error, reach * error * _power(length + self.smooth, -0.5))

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
        sizes: dict[str, Any] = {"heads": heads, "head_dim": head_dim, "generator": torch.Generator().manual_seed(0)}
        return cls.yaad(chunk=max(1, min(4, length // 2)), alpha=0.05, **sizes)


def _power(x: Tensor, exponent: float) -> Tensor:
    """Return `x ** exponent`, and 0 with a gradient of 0 where x is 0, since an error of exactly 0 writes nothing."""
    some = x > 0
    return torch.where(some, torch.where(some, x, 1.0) ** exponent, 0.0)
