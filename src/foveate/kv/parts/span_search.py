"""Search for attention spans by head: an integer programme over rules of how a span grows with the text.

MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression (2024), arXiv 2406.14909, section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError

_SECONDS = 60.0  # for one programme; its best plan so far is then taken
_GAP = 1e-4
_SLACK = 1e-9  # a span that is a whole number of blocks, up to rounding, needs no further block


def spans(rules: Float[Tensor, "... 2"], length: int | Int[Tensor, "..."], block: int) -> Int[Tensor, "..."]:
    """Return the tokens that a head keeps of a text, its sinks included: `alpha + beta · length`.

    Rounded up to whole blocks, at least two blocks, at most the text.
    """
    wanted = rules[..., 0].double() + rules[..., 1].double() * length
    whole = ((wanted / block - _SLACK).ceil().clamp_min(2) * block).long()
    return torch.minimum(whole, torch.as_tensor(length, device=whole.device).long())


def span(rule: tuple[float, float], length: int, block: int) -> int:
    """Return `spans` of one rule as a number."""
    return min(length, max(2, math.ceil((rule[0] + rule[1] * length) / block - _SLACK)) * block)


def candidates(
    shortest: int, longest: int, alphas: Sequence[float] | None = None, betas: Sequence[float] | None = None,
    steps: int = 8,
) -> Float[Tensor, "c 2"]:  # fmt: skip
    """Return the rules `(alpha, beta)` whose span is above 0 and at most the text at both lengths.

    By default beta takes 9 values in 0..1, and alpha a grid from `-shortest` to `longest` with a step of
    `longest / steps` (the paper's 1,024 for 8k).
    """
    step = longest / steps
    if alphas is None:
        first = -int(shortest // step)
        alphas = [step * each for each in range(first, steps + 1)]
    betas = [each / 8 for each in range(9)] if betas is None else betas
    every = torch.tensor([(alpha, beta) for beta in betas for alpha in alphas], dtype=torch.float64)
    ends = torch.stack([every[:, 0] + every[:, 1] * length for length in (shortest, longest)])
    fits = (ends > 1e-9).all(0) & (ends[0] <= shortest + 1e-9) & (ends[1] <= longest + 1e-9)
    if not bool(fits.any()):
        raise OptionError("alphas and betas must hold a rule whose span is above 0 and at most the text")
    return every[fits]


@dataclass(frozen=True, eq=False)
class SpanSearch:
    """The spans that cost least by their influence, such that the mean share of the text that heads keep is bounded.

    Args:
        influence: what removing a distance costs, `(layers, kv_heads, N)`, by length N; see `span_influence`.
        rules: the rules to choose from.
        table: True for the entries that are heads.
        windows: the tokens that each layer can see; None for all.
        block: tokens to which spans are rounded.
        rules_per_layer: the most different rules in a layer; None for any number.
    """

    influence: Mapping[int, Float[Tensor, "l hkv n"]]
    rules: Float[Tensor, "c 2"]
    table: Bool[Tensor, "l hkv"]
    windows: tuple[int | None, ...]
    block: int = 64
    rules_per_layer: int | None = None

    def costs(self, length: int) -> Float[Tensor, "heads c"]:
        """Return the loss of each head under each rule, at a profiled length."""
        lost = self.influence[length][self.table].double()
        behind = torch.nn.functional.pad(lost.flip(-1).cumsum(-1).flip(-1), (0, 1))  # the sum from each distance on
        return behind[:, spans(self.rules, length, self.block)]

    def shares(self, length: int) -> Float[Tensor, "heads c"]:
        """Return the share of a text that each head keeps under each rule."""
        kept = spans(self.rules, length, self.block)
        rows = [kept.clamp(max=length if window is None else window) for window in self.windows]
        each = torch.stack(rows)[:, None].expand(-1, self.table.shape[1], -1)
        return each[self.table] / length

    def plans(self, density: float, lengths: Sequence[int], least: float = 0.0) -> list[Float[Tensor, "l hkv 2"]]:
        """Return some plans of which none dominates another: each has the rules of all heads.

        One programme minimises the sum over the lengths, each in units of its largest cost; where there are several
        lengths, one more for each of them alone. The paper searches the whole front.

        Args:
            density: bound of the mean share, at each of `lengths`.
            lengths: see there.
            least: bound of the mean share from below, at the last of `lengths`.
        """
        costs = {length: self.costs(length) for length in self.influence}
        scaled = [cost / cost.abs().amax().clamp_min(1e-300) for cost in costs.values()]
        aims = [torch.stack(scaled).sum(0), *(scaled if len(scaled) > 1 else [])]
        # each length alone leaves ties, which the sum breaks
        chosen = [self._solved(aim + 1e-3 * aims[0], density, lengths, least) for aim in aims]
        totals = [[float(cost.gather(1, one[:, None]).sum()) for cost in costs.values()] for one in chosen]
        best = [at for at, mine in enumerate(totals) if not any(_dominates(other, mine) for other in totals)]
        return [self._plan(chosen[at]) for at in best]

    def _plan(self, chosen: Int[Tensor, " heads"]) -> Float[Tensor, "l hkv 2"]:
        out = torch.zeros(*self.table.shape, 2)
        out[..., 1] = 1.0
        out[self.table] = self.rules[chosen].float()
        return out

    def _solved(self, aim: Tensor, density: float, lengths: Sequence[int], least: float) -> Int[Tensor, " heads"]:
        """Solve one programme: a binary variable for each head and rule, one rule for each head."""
        optimize, sparse, numpy = _scipy()
        heads, count = aim.shape
        rows = [sparse.kron(sparse.identity(heads), numpy.ones((1, count)))]
        lows, highs = [numpy.ones(heads)], [numpy.ones(heads)]
        for length in lengths:
            rows.append(sparse.csr_matrix(self.shares(length).reshape(1, -1).numpy() / heads))
            lows.append(numpy.array([least if length == lengths[-1] else 0.0]))
            highs.append(numpy.array([density + 1e-9]))
        extra, values = 0, aim.flatten().numpy()
        if self.rules_per_layer is not None:
            extra, more = self._few_rules(sparse, numpy, heads, count)
            rows = [sparse.hstack([row, sparse.csr_matrix((row.shape[0], extra))]) for row in rows]
            rows.append(more)
            lows.append(numpy.full(more.shape[0], -numpy.inf))
            highs.append(numpy.r_[numpy.zeros(heads * count), numpy.full(len(self.windows), self.rules_per_layer)])
            values = numpy.r_[values, numpy.zeros(extra)]
        found = optimize.milp(
            values, integrality=numpy.ones_like(values), bounds=optimize.Bounds(0, 1),
            constraints=optimize.LinearConstraint(
                sparse.vstack(rows).tocsc(), numpy.concatenate(lows), numpy.concatenate(highs)
            ),
            options={"time_limit": _SECONDS, "mip_rel_gap": _GAP},
        )  # fmt: skip
        if found.x is None:
            if least:
                return self._solved(aim, density, lengths, 0.0)
            raise OptionError(
                f"density={density:g} cannot be held at {', '.join(map(str, lengths))} tokens with spans of at least "
                f"{2 * self.block}; take smaller blocks or more of the cache"
            )
        return torch.from_numpy(found.x[: heads * count]).view(heads, count).argmax(1)

    def _few_rules(self, sparse: Any, numpy: Any, heads: int, count: int) -> tuple[int, Any]:
        """Return one more variable for each layer and rule, and the rows that bound the rules in use."""
        layers = self.table.shape[0]
        owner = torch.arange(layers)[:, None].expand_as(self.table)[self.table].numpy()
        use = sparse.kron(
            sparse.csr_matrix((-numpy.ones(heads), (numpy.arange(heads), owner)), shape=(heads, layers)),
            sparse.identity(count),
        )
        chosen = sparse.hstack([sparse.identity(heads * count), use])
        bound = sparse.hstack([
            sparse.csr_matrix((layers, heads * count)),
            sparse.kron(sparse.identity(layers), numpy.ones((1, count))),
        ])  # fmt: skip
        return layers * count, sparse.vstack([chosen, bound])


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and list(one) != list(other)


def _scipy() -> tuple[Any, Any, Any]:
    try:
        from scipy import optimize, sparse
    except ImportError:
        raise OptionError("the search for spans needs scipy: pip install 'foveate[search]'") from None
    import numpy

    return optimize, sparse, numpy


def moa_search(
    influence: Mapping[int, Float[Tensor, "l hkv n"]], density: float = 0.5, *, lengths: Sequence[int] = (),
    alphas: Sequence[float] | None = None, betas: Sequence[float] | None = None, block: int = 64, least: float = 0.0,
    rules_per_layer: int | None = None, table: Bool[Tensor, "l hkv"] | None = None,
    windows: Sequence[int | None] | None = None, judge: Callable[[Tensor], float] | None = None,
) -> Float[Tensor, "l hkv 2"]:  # fmt: skip
    """Return a rule `(alpha, beta)` for each head: it keeps `alpha + beta · N` tokens of a text of N.

    Args:
        influence: from `moa_influence`, by length.
        density: the mean share of the text that heads may keep.
        lengths: the lengths at which `density` holds; none given means all profiled ones.
        alphas, betas: the grid of rules; see `candidates`. By default its steps are finer for a density below 0.5.
        block: tokens to which spans are rounded.
        least: the mean share that heads keep at least, at the longest of `lengths`, if any plan does.
        rules_per_layer: the most different rules in a layer (2 suits kernels); None for any number.
        table: True for the entries of `influence` that are heads; None for all.
        windows: the tokens that each layer can see; None for all.
        judge: measures the loss of a plan on a longer text than any profiled one, which chooses between equally good
            plans, as in the paper; None takes the loss that is predicted for the longest profiled text.
    """
    validate.between("density", density, 0.0, 1.0)
    validate.count("block", block, 1)
    if rules_per_layer is not None:
        validate.count("rules_per_layer", rules_per_layer, 1)
    if not influence:
        raise OptionError("influence must hold at least one length; got none")
    first = next(iter(influence.values()))
    table = torch.ones(first.shape[:2], dtype=torch.bool) if table is None else table
    held = sorted(lengths or influence)
    ends = [*held, *influence]
    steps = max(8, math.ceil(4 / max(density, 1 / 64)))
    rules = candidates(min(ends), max(ends), alphas, betas, steps)
    seen = tuple(windows or [None] * first.shape[0])
    search = SpanSearch(influence, rules, table, seen, block, rules_per_layer)
    plans = search.plans(density, held, least)
    if len(plans) == 1:
        return plans[0]
    return min(plans, key=judge if judge is not None else lambda plan: predicted(plan, influence, block))


def predicted(plan: Float[Tensor, "l hkv 2"], influence: Mapping[int, Tensor], block: int) -> float:
    """Return the loss that a plan's spans add at the longest profiled length, to first order."""
    longest = max(influence)
    lost = influence[longest].double()
    behind = torch.nn.functional.pad(lost.flip(-1).cumsum(-1).flip(-1), (0, 1))
    return float(behind.gather(-1, spans(plan, longest, block)[..., None]).sum())
