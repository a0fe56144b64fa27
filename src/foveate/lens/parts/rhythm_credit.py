"""Credit for tokens by the rhythm of a response: an advantage is amplified at preplan tokens, at anchors, or at both.

See `foveate.lens.heads.preplan_anchor` for the measures, and for what the paper leaves open.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown

#: The rounding of a share of some things to a whole number of them, which is at least 1.
Rounding = Literal["floor", "round", "ceil"]

_ROUND: dict[str, Callable[[float], int]] = {"floor": math.floor, "round": round, "ceil": math.ceil}


class Coupling(NamedTuple):
    """The share of anchors at or just after a preplan peak, and the share if anchors were anywhere."""

    share: float
    chance: float


def rhythm_credit(
    advantages: Float[Tensor, "b n"], waad: Float[Tensor, "b n"], fai: Float[Tensor, "b n"],
    response: Bool[Tensor, "b n"] | None = None, kind: Literal["local", "global", "coupled"] = "coupled", *,
    gain: float = 1.5, share: float = 0.4, rounding: Rounding = "floor", back: float = 0.5, reach: int = 3,
    calm: float = 0.5, jump: float = 0.6, penalties: bool = False,
) -> Float[Tensor, "b n"]:  # fmt: skip
    """Return advantages with more credit at the tokens that carry a response's rhythm. Other tokens keep theirs.

    A token's turn is |waad of it - waad of the next token|. "local" amplifies the tokens with the largest turns,
    "global" those with the largest influence, the anchors. "coupled" amplifies anchors too; an anchor that its local
    context decides gives a part of its bonus to the token that introduced it. Such an anchor has a low distance, and
    a large turn within the `reach` tokens before it; the largest of these turns marks the introduction.

    Args:
        advantages: of each token.
        waad, fai: see `preplan_anchor`; no gradient goes through them.
        response: the tokens that take part; None for all.
        kind: what is amplified.
        gain: the factor of an amplified advantage; 1 changes nothing.
        share, rounding: how many of a response's tokens are amplified, at least 1.
        back: the part of its bonus that such an anchor gives away.
        reach: how many tokens before an anchor can introduce it.
        calm: the quantile of a response's distances up to which a distance is low.
        jump: the quantile of its turns from which a turn is large.
        penalties: True also amplifies negative advantages.
    """
    validate.one_of("kind", kind, ("local", "global", "coupled"))
    validate.at_least("gain", gain, 0.0)
    for name, value in (("share", share), ("back", back), ("calm", calm), ("jump", jump)):
        validate.between(name, value, 0.0, 1.0)
    validate.count("reach", reach, 1)
    if advantages.ndim != 2 or not advantages.shape == waad.shape == fai.shape:
        raise ShapeError(
            f"advantages, waad and fai must have one shape (B, N); got {shown(advantages)}, {shown(waad)}, {shown(fai)}"
        )
    takes_part = torch.ones_like(advantages, dtype=torch.bool) if response is None else response
    bonus = torch.zeros_like(advantages)
    for row, places in enumerate(takes_part):
        if not bool(places.any()):
            continue
        distance, influence = (x[row, places].detach().double() for x in (waad, fai))
        turns = turn(distance)
        chosen = _top(turns if kind == "local" else influence, share, rounding)
        part = chosen.double()
        if kind == "coupled":
            part = _hand_back(chosen, distance, turns, back, reach, calm, jump)
        bonus[row, places] = part.to(bonus)
    amplified = advantages * (1.0 + (gain - 1.0) * bonus)
    return amplified if penalties else torch.where(advantages >= 0, amplified, advantages)


def turn(waad: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return the absolute difference of each token's distance to its successor's; 0 for the last token."""
    return torch.cat([waad.diff().abs(), waad.new_zeros(1)])


def _hand_back(
    anchors: Bool[Tensor, " n"], distance: Tensor, turns: Tensor, back: float, reach: int, calm: float, jump: float
) -> Float[Tensor, " n"]:
    """Return each token's share of a bonus, after the anchors that local context decides have given theirs away."""
    n = len(turns)
    padded = torch.cat([turns.new_full((reach,), -math.inf), turns])
    earlier = torch.stack([padded[reach - step : reach - step + n] for step in range(1, reach + 1)])
    largest, steps = earlier.max(0)  # of equal turns, the nearest introduces
    decided = anchors & (distance <= distance.quantile(calm)) & (largest >= turns.quantile(jump))
    introduces = torch.zeros_like(anchors)
    introduces[(torch.arange(n, device=turns.device) - 1 - steps)[decided]] = True
    return (anchors & ~decided) + (1.0 - back) * decided + back * introduces


def coupling(
    waad: Float[Tensor, " n"], fai: Float[Tensor, " n"], *, reach: int = 1, share: float = 0.4,
    rounding: Rounding = "floor",
) -> Coupling:  # fmt: skip
    """Return how often an anchor peak is at a preplan peak or up to `reach` tokens after one, and how often by chance.

    Chance is what shuffling the anchors' places gives on average: the share of all tokens that are so placed.

    Args:
        waad, fai: the measures of one response.
        reach: how far behind a preplan peak an anchor may be.
        share, rounding: a peak is in this top share, larger than its predecessor (the first token than its
            successor) and not smaller than its successor.
    """
    validate.count("reach", reach)
    if waad.ndim != 1 or len(waad) < 2 or waad.shape != fai.shape:
        raise ShapeError(
            f"waad and fai must be of one response of two tokens at least, (N,); got {shown(waad)} and {shown(fai)}"
        )
    preplans, anchors = (_peaks(x, share, rounding) for x in (waad, fai))
    if not bool(preplans.any()) or not bool(anchors.any()):
        raise OptionError("waad and fai must both have a peak; a response that short or that flat has none")
    near = torch.zeros_like(preplans)
    for step in range(reach + 1):
        near[step:] |= preplans[: len(preplans) - step]
    return Coupling(float(near[anchors].double().mean()), float(near.double().mean()))


def _peaks(x: Float[Tensor, " n"], share: float, rounding: Rounding) -> Bool[Tensor, " n"]:
    before, after = torch.cat([x[1:2], x[:-1]]), torch.cat([x[1:], x.new_full((1,), -math.inf)])
    return _top(x, share, rounding) & (x > before) & (x >= after)


def _top(x: Float[Tensor, " n"], share: float, rounding: Rounding) -> Bool[Tensor, " n"]:
    """Mark the largest values; of equal ones the first."""
    chosen = torch.zeros_like(x, dtype=torch.bool)
    chosen[x.argsort(descending=True, stable=True)[: share_of(share, len(x), rounding)]] = True
    return chosen


def share_of(share: float, total: int, rounding: Rounding) -> int:
    """Return a share of a number of things, rounded to a whole number that is at least 1."""
    validate.one_of("rounding", rounding, tuple(_ROUND))
    return max(1, _ROUND[rounding](round(share * total, 9)))
