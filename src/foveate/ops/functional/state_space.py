"""Token mixers as time-varying linear systems: `h_i = Lambda_i h_(i-1) + B_i u_i`, `y_i = C_i h_i + D_i u_i`.

The framework of Understanding the differences in Foundation Models (2024), arXiv 2405.15731, and the systems of linear
attention, truncated softmax attention, S6 (Mamba), SSD (Mamba-2) and the qLSTM in it. The matrices are materialised, so
this serves to inspect, compare and test at small sizes; the operators compute the same sums cheaply.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import ShapeError
from foveate.ops.functional import linear_forms, taylor
from foveate.ops.functional.recurrence import decay_matrix


@dataclass(frozen=True)
class StateSpace:
    """A causal mixer of N tokens with a state of S numbers, from inputs of I channels to outputs of O.

    Args:
        Lambda: `(..., N, S)`, the diagonal of the transition: the factor on the state before token i is written.
        B: `(..., N, S, I)`, writes a token. C: `(..., N, O, S)`, reads the state after the write.
        D: `(..., N, O, I)` or `(O, I)`, the skip connection past the state; None for none.
    """

    Lambda: Float[Tensor, "*b n s"]
    B: Float[Tensor, "*b n s i"]
    C: Float[Tensor, "*b n o s"]
    D: Tensor | None = None

    def __post_init__(self) -> None:
        n, s = self.Lambda.shape[-2:]
        if self.B.shape[-3:-1] != (n, s) or (self.C.shape[-3], self.C.shape[-1]) != (n, s):
            got = f"Lambda {tuple(self.Lambda.shape)}, B {tuple(self.B.shape)}, C {tuple(self.C.shape)}"
            raise ShapeError(f"Lambda, B, C must be (..., N, S), (..., N, S, I), (..., N, O, S); got {got}")

    @property
    def state_size(self) -> int:
        return self.Lambda.shape[-1]

    def run(
        self, u: Float[Tensor, "*b n i"], form: Literal["recurrent", "dense"] = "recurrent"
    ) -> Float[Tensor, "*b n o"]:
        """Return the outputs, token by token with one state or by the matrix `phi`; both agree up to rounding."""
        validate.one_of("form", form, ("recurrent", "dense"))
        if u.shape[-2:] != (self.B.shape[-3], self.B.shape[-1]):
            raise ShapeError(f"u must be (..., N, I) = (..., {self.B.shape[-3]}, {self.B.shape[-1]}); got {u.shape}")
        if form == "dense":
            return torch.einsum("...iojc,...jc->...io", self.phi(), u)
        state, out = torch.zeros_like(self.Lambda[..., 0, :]), []
        for i in range(u.shape[-2]):
            state = self.Lambda[..., i, :] * state + (self.B[..., i, :, :] @ u[..., i, :, None])[..., 0]
            out.append((self.C[..., i, :, :] @ state[..., None])[..., 0])
        past = torch.stack(out, -2)
        return past if self.D is None else past + (self.D @ u[..., None])[..., 0]

    def phi(self) -> Float[Tensor, "*b n o n i"]:
        """Return the map from inputs to outputs: `Phi_ij = C_i (prod_(l = j+1..i) Lambda_l) B_j`, D on its diagonal.

        O(N² S) memory.
        """
        left = decay_matrix(self.Lambda.mT)  # (..., S, N, N)
        phi = torch.einsum("...ios,...sij,...jsc->...iojc", self.C, left, self.B)
        if self.D is None:
            return phi
        here = torch.eye(phi.shape[-2], dtype=phi.dtype, device=phi.device)
        straight = self.D.expand(*self.D.shape[:-3], phi.shape[-2], *self.D.shape[-2:])
        return phi + torch.einsum("...ioc,ij->...iojc", straight, here)


def linear(
    fq: Float[Tensor, "*b n f"], fk: Float[Tensor, "*b n f"], values: int | Float[Tensor, "e c"], *,
    gate: Tensor | None = None, eta: Float[Tensor, "*b n"] | None = None, inside: bool = False,
) -> StateSpace:  # fmt: skip
    """Return linear attention `y_i = (1 / eta_i) fq_i . sum_j fk_j v_j`, with a state of F features x E channels.

    Args:
        fq, fk: features of queries and keys.
        values: E, if the inputs are the values, or `W_V (E, C)`, if they are tokens of C channels.
        gate: the factor on the past, `(..., N)` or per feature `(..., N, F)`; None for 1.
        eta: the normalizer; None for 1.
        inside: the place of eta. False: in C, which any eta allows. True: in the recurrence, `Lambda_i = eta_(i-1) /
            eta_i` and `B_i` over `eta_i`: then normalized linear attention is an SSD with that gate.
    """
    width, f = values if isinstance(values, int) else values.shape[0], fk.shape[-1]
    value_map = torch.eye(width, dtype=fk.dtype, device=fk.device) if isinstance(values, int) else values
    identity = torch.eye(width, dtype=fk.dtype, device=fk.device)
    written = torch.einsum("...nf,ec->...nfec", fk, value_map).flatten(-3, -2)
    read = torch.einsum("...nf,oe->...nofe", fq, identity).flatten(-2)
    gate = torch.ones_like(fk) if gate is None else gate if gate.dim() == fk.dim() else gate[..., None].expand_as(fk)
    if eta is not None and inside:
        written = written / eta[..., None, None]
        gate = gate * (F.pad(eta[..., :-1], (1, 0), value=1.0) / eta)[..., None]
    elif eta is not None:
        read = read / eta[..., None, None]
    return StateSpace(gate.expand(*fk.shape[:-1], f).repeat_interleave(width, -1), written, read)


def sum_of_weights(fq: Tensor, fk: Tensor, log_decay: Tensor | None = None) -> Float[Tensor, "*b n"]:
    """Return the classic normalizer `fq_i . sum_(j <= i) fk_j`, decayed like the state."""
    return linear_forms.matrix(fq, fk, True, log_decay).sum(-1)


def softmax_taylor(
    q: Float[Tensor, "*b n d"], k: Float[Tensor, "*b n d"], values: int | Tensor, order: int, scale: float | None = None
) -> StateSpace:
    """Return softmax attention, its exponential truncated after `order`: `sum_p d^p` features, E channels for each.

    Softmax attention is the limit, whose state is infinite. An odd order may give weights below 0.
    """
    validate.count("order", order, 0)
    fq, fk = taylor.taylor_features(q * validate.scale(scale, q.shape[-1]), order), taylor.taylor_features(k, order)
    return linear(fq, fk, values, eta=sum_of_weights(fq, fk))


def s6(
    delta: Float[Tensor, "*b n e"], A: Float[Tensor, "e s"], B: Float[Tensor, "*b n s"], C: Float[Tensor, "*b n s"],
    D: Float[Tensor, " e"] | None = None,
) -> StateSpace:  # fmt: skip
    """Return the selective scan of Mamba: each of E channels has its own state, with gate `exp(-delta_i A)`.

    Args:
        delta: steps, positive: `softplus(W u_i + b)`.
        A: rates of decay, positive (Mamba stores their negative).
        B, C: write and read vectors of tokens, the same for all channels. D: the skip of each channel.
    """
    e, s = A.shape
    identity = torch.eye(e, dtype=A.dtype, device=A.device)
    written = torch.einsum("...ne,...ns,ec->...nesc", delta, B, identity).flatten(-3, -2)
    read = torch.einsum("...ns,oe->...noes", C, identity).flatten(-2)
    gate = torch.exp(-delta[..., None] * A).flatten(-2)
    return StateSpace(gate, written, read, None if D is None else torch.diag(D))


def ssd(
    gate: Float[Tensor, "*b n"], B: Float[Tensor, "*b n s"], C: Float[Tensor, "*b n s"], values: int | Tensor
) -> StateSpace:
    """Return the recurrence of Mamba-2: one gate for the whole state, which makes it gated linear attention."""
    return linear(C, B, values, gate=gate)


def qlstm(
    forget: Float[Tensor, "*b n e"], write: Float[Tensor, "*b n e"], read: Float[Tensor, "*b n e"], *,
    power: float | None = None,
) -> StateSpace:  # fmt: skip
    """Return the quasi-LSTM: `c_i = f_i c_(i-1) + sigmoid(write_i) u_i`, `y_i = sigmoid(read_i) c_i`, per channel.

    Args:
        forget, write, read: the gates before their sigmoids.
        power: None for `f = sigmoid(forget)`; A for S6's gate, `f = sigmoid(-forget)^A`. The release learns A, and adds
            a short convolution before the cell and a gate after it.
    """
    gate = torch.sigmoid(forget) if power is None else reversed_sigmoid(forget, power)
    return StateSpace(gate, torch.diag_embed(torch.sigmoid(write)), torch.diag_embed(torch.sigmoid(read)))


def reversed_sigmoid(a: Tensor, power: float = 1.0) -> Tensor:
    """Return `sigmoid(-a)^power`, computed as in S6: `exp(-softplus(a) power)`."""
    validate.at_least("power", power, 0)
    return torch.exp(-F.softplus(a) * power)
