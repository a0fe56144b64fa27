"""The multi-dimensional damped moving average of Mega: every channel has averages at several rates.

Mega: Moving Average Equipped Gated Attention (2022), arXiv 2209.10655.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.readable import is_clean
from foveate.ops.functional import causal
from foveate.ops.functional.heads import accumulating


class DampedEMA(nn.Module):
    """`h_t = p beta x_t + q h_(t-1)`, `y_t = gamma h_t / sqrt(n)`, `(B, N, C) -> (B, N, C)`, channel by channel.

    `p = sigmoid(alpha)` weighs the input and `q = 1 - p sigmoid(delta)` the state: delta damps the decay, so that the
    two need not add up to 1 as in a plain moving average. Every channel has n such averages, and adds `omega x_t`. It
    is a linear state with a diagonal transition: C n numbers for any length.

    Forms, equal up to rounding: "fft", a convolution with the kernel `sum_n gamma p beta q^lag / sqrt(n)`, in
    O(B C N log N) and O(C n N) for the kernel; "recurrent", token by token. The transform carries rounding errors of a
    late token to early outputs, but not NaN and inf.

    Args:
        dim: C.
        states: n, averages per channel.
        bidirectional: True adds a second set of averages from the last token to the first. Both include the token.
    """

    def __init__(self, dim: int, states: int = 16, *, bidirectional: bool = False) -> None:
        super().__init__()
        validate.count("dim", dim, 1)
        validate.count("states", states, 1)
        self.dim, self.states, self.ways = dim, states, 1 + bidirectional
        shape = self.ways, dim, states
        self.alpha = nn.Parameter(torch.randn(shape) * 0.2)
        self.delta = nn.Parameter(torch.randn(shape) * 0.2)
        # with alternating signs, averages of different rates are compared, not only added
        self.beta = nn.Parameter(torch.randn(shape) * 0.02 + 1.0 - 2.0 * (torch.arange(states) % 2))
        self.gamma, self.omega = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(dim))

    def forward(
        self, x: Float[Tensor, "b n c"], seen: Tensor | None = None, form: str = "fft"
    ) -> Float[Tensor, "b n c"]:
        """Average tokens; those with False in `seen (B, N)` enter no average, but get their own `omega x`."""
        validate.one_of("form", form, ("fft", "recurrent"))
        past = self._entering(x, seen)
        run = self._convolved if form == "fft" else self._by_token
        y = run(past, 0)
        if self.ways == 2:
            y = y + run(past.flip(1), 1).flip(1)
        return y.to(x.dtype) + self.omega * x

    def kernel(self, length: int, way: int = 0) -> Float[Tensor, "c n"]:
        """Return the impulse response: the output after 0, 1, ... tokens to an input of 1."""
        enters, stays, leaves = self._rates(way)
        lag = torch.arange(length, device=stays.device)
        return ((enters * leaves)[:, None] @ stays[..., None] ** lag).squeeze(1)

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "b c states"]:
        return torch.zeros(batch, self.dim, self.states, dtype=accumulating(dtype), device=device)

    def step(self, x: Float[Tensor, "b 1 c"], state: Tensor) -> tuple[Float[Tensor, "b 1 c"], Tensor]:
        """Process the next token; one direction only."""
        y, state = self._token(x[:, 0].to(state.dtype), state, self._rates(0))
        return y[:, None].to(x.dtype) + self.omega * x, state

    def state_after(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b c states"]:
        """Return the averages after all these tokens."""
        enters, stays, _ = self._rates(0)
        lag = torch.arange(x.shape[1] - 1, -1, -1, device=x.device)
        return enters * torch.einsum("btc,cnt->bcn", x.to(enters.dtype), stays[..., None] ** lag)

    def _entering(self, x: Tensor, seen: Tensor | None) -> Tensor:
        x = x.to(accumulating(x.dtype))
        if seen is None:
            return x
        validate.bool_mask("seen", seen, "B, N", tuple(x.shape[:2]), x.device)
        return x.masked_fill(~seen[..., None], 0.0)

    def _rates(self, way: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the input, decay and output factors of each average, `(C, n)`."""
        wide = accumulating(self.alpha.dtype)
        alpha, delta, beta, gamma = (t[way].to(wide) for t in (self.alpha, self.delta, self.beta, self.gamma))
        p = torch.sigmoid(alpha)
        return p * beta, 1 - p * torch.sigmoid(delta), gamma * self.states**-0.5

    def _convolved(self, x: Tensor, way: int) -> Tensor:
        n = x.shape[1]
        if n == 0:
            return x
        if not is_clean(x):  # the transform would spread NaN over all tokens
            bad = ~torch.isfinite(x)
            return self._convolved(x.masked_fill(bad, 0.0), way) + causal.poison(bad).to(x.dtype)
        # twice the length: the convolution must not wrap around
        spectrum = torch.fft.rfft(x, 2 * n, dim=1) * torch.fft.rfft(self.kernel(n, way).mT, 2 * n, dim=0)
        return torch.fft.irfft(spectrum, 2 * n, dim=1)[:, :n]

    def _by_token(self, x: Tensor, way: int) -> Tensor:
        rates, state, out = self._rates(way), self.init_state(x.shape[0], x.dtype, x.device), []
        for token in x.unbind(1):
            y, state = self._token(token, state, rates)
            out.append(y)
        return torch.stack(out, 1) if out else x

    def _token(self, x: Tensor, state: Tensor, rates: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        enters, stays, leaves = rates
        state = enters * x[..., None] + stays * state
        return (leaves * state).sum(-1), state
