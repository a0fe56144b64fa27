"""A noisy linear system for each head, `dz = (μ + iω) z dt + noise`, which carries a measurement over a gap of time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, shown
from foveate.ops.functional import rotary

#: Decay counts down to e^-20, so that a variance without noise of its own stays above zero; and the least learned
#: measurement noise.
FLOOR, EPS = -20.0, 1e-5


@final
class Dynamics(nn.Module):
    """The linear system of each head: decay, rotation and noise, as numbers or learned."""

    def __init__(
        self, heads: int, width: int, numbers: Mapping[str, float | None], omega: str | Sequence[float], length: int,
        variant: str, generator: torch.Generator | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.fixed = {name: fixed(name, number) for name, number in numbers.items() if number is not None}
        if self.fixed.get("eta2") == self.fixed.get("gamma2") == 0:
            raise OptionError("eta2=0 and gamma2=0 give a token no variance; one must be above 0")
        free = [name for name in numbers if name not in self.fixed]
        self.raw = nn.ParameterDict({name: torch.randn(heads, generator=generator) for name in free})
        self.length, self.is_paired = length, variant == "release"
        if width % (4 if self.is_paired else 2):
            raise OptionError(f"width {width} must be a multiple of {4 if self.is_paired else 2}: channels are complex")
        count = width // (4 if self.is_paired else 2)
        if isinstance(omega, str):
            validate.one_of("omega", omega, ("rotary", "learned"))
            learned = torch.randn(heads, count, generator=generator) if omega == "learned" else None
            self.omega = rotary.rotary_frequencies(2 * count) if learned is None else nn.Parameter(learned)
        else:
            if len(omega) != width // 2 or not all(math.isfinite(rate) for rate in omega):
                raise OptionError(f"omega={shown(omega)} must be {width // 2} finite numbers")
            self.omega, self.is_paired = torch.tensor(omega, dtype=torch.float64), False

    def angles(self, t: Float[Tensor, "b _ n"]) -> Float[Tensor, "b h n c"]:
        omega = self.omega.double().to(t.device)
        if self.is_paired:
            omega = torch.stack([omega, -omega], -1).flatten(-2) * (10 * math.pi / self.length)
        return t[..., None] * (omega[:, None] if omega.dim() == 2 else omega)

    def decay(self, gap: Tensor) -> Tensor:
        """Return `exp(μ gap)`."""
        return torch.exp((self._of("mu", gap) * gap).clamp_min(FLOOR))

    def variance(self, gap: Tensor) -> Tensor:
        """Return the variance of a measurement over a gap: the Lyapunov solution plus both measurements' noise."""
        spread = self._of("sigma2", gap) * gap * mean_decay(-2 * self._of("mu", gap) * gap)
        return spread + self._of("eta2", gap) * self.decay(gap).square() + self._of("gamma2", gap)

    def _of(self, name: str, like: Tensor) -> Tensor | float:
        """Return one number per head, `(H, 1, 1)`, or one for all."""
        if name in self.fixed:
            return self.fixed[name]
        raw = self.raw[name].to(like.dtype)[:, None, None]
        if name == "mu":
            return (torch.sigmoid(raw) - 1) * 5 / self.length - EPS
        return F.softplus(raw) + (0 if name == "sigma2" else EPS)


def mean_decay(x: Tensor) -> Tensor:
    """Return `(1 - e^-x) / x`, the mean of `e^-s` for s up to x; it is 1 at 0, and near 0 it comes from a series."""
    small = x < 1e-3
    safe = torch.where(small, 1.0, x)
    return torch.where(small, 1 - x / 2 + x**2 / 6 - x**3 / 24, -torch.expm1(-safe) / safe)


def fixed(name: str, value: float) -> float:
    """Check one of the system's numbers that a caller gives: μ at most 0, ν above 0, the others at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise OptionError(f"{name}={shown(value)} must be a finite number, or None to be learned")
    valid, what = {"mu": (value <= 0, "at most 0"), "nu": (value > 0, "above 0")}.get(name, (value >= 0, "at least 0"))
    if not valid:
        raise OptionError(f"{name}={shown(value)} must be {what}")
    return float(value)
