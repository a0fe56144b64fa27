"""Measures of a model's heads over many texts: the mean of each, its spread and its interval.

    survey = foveate.lens.look_over(model, (tokenizer(text, return_tensors="pt") for text in texts))
    survey.table()                     # a row for each layer, head and measure: mean, spread, low, high, texts

Each text counts once, whatever its length. Only sums are kept, so that memory does not grow with the texts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, final

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import OptionError, ShapeError
from foveate.host.entry import apply
from foveate.host.hf.model import Host, host, plain_call
from foveate.lens.circuits.next_logits import next_logits
from foveate.lens.html_table import layer_head_tables
from foveate.lens.lens import Lens
from foveate.lens.measures import Measure
from foveate.lens.parts.student import t_quantile
from foveate.lens.registry import named

#: A measure that takes a pass of its own, which no lens sees: what heads add to the logit of the next token.
NEXT_LOGIT = "next_logit"

#: The inputs of a run: token ids, or a tokenizer's mapping.
Inputs = Tensor | Mapping[str, Any]


@final
@dataclass(frozen=True, eq=False)
class Survey:
    """Sums of measures over texts, in float64.

    Args:
        names: the measures.
        count: the texts that count for each measure, layer and head: some measures have no value on some texts.
        mean: the means over these texts.
        squares: the sums of squared distances from the means.
        texts: the number of texts.
        unseen: reasons by layer, for layers that a lens cannot see.
    """

    names: tuple[str, ...]
    count: Float[Tensor, "m l h"]
    mean: Float[Tensor, "m l h"]
    squares: Float[Tensor, "m l h"]
    texts: int = 0
    unseen: Mapping[int, str] | None = None

    @classmethod
    def empty(cls, names: Sequence[str], layers: int, heads: int) -> Self:
        """Return the survey of no text."""
        zeros = torch.zeros(len(names), layers, heads, dtype=torch.float64)
        return cls(tuple(names), zeros, zeros, zeros)

    def with_texts(self, values: Float[Tensor, "m t l h"]) -> Survey:
        """Return the survey with some texts more; NaN where a measure has no value.

        Sums are joined as in Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample
        Variances (1979), so that nothing cancels.
        """
        if values.ndim != 4 or values[:, 0].shape != self.mean.shape:
            raise ShapeError(f"values must be (M, texts, L, H) for {tuple(self.mean.shape)}; got {tuple(values.shape)}")
        given = values.detach().double().cpu()
        known = given.isfinite()
        count, filled = known.double().sum(1), torch.where(known, given, 0.0)
        mean = filled.sum(1) / count.clamp_min(1)
        squares = torch.where(known, (given - mean[:, None]).square(), 0.0).sum(1)
        total, gap = self.count + count, mean - self.mean
        share = count / total.clamp_min(1)
        return replace(
            self,
            count=total,
            mean=self.mean + gap * share,
            squares=self.squares + squares + gap.square() * self.count * share,
            texts=self.texts + given.shape[1],
        )

    @property
    def value(self) -> Float[Tensor, "m l h"]:
        """The means; NaN without a text that counts."""
        return torch.where(self.count > 0, self.mean, math.nan)

    @property
    def spread(self) -> Float[Tensor, "m l h"]:
        """The standard deviation over texts; NaN with fewer than two."""
        return torch.where(self.count > 1, (self.squares / (self.count - 1).clamp_min(1)).sqrt(), math.nan)

    def interval(self, level: float = 0.95) -> tuple[Float[Tensor, "m l h"], Float[Tensor, "m l h"]]:
        """Return the interval of each mean by Student's t, if texts are drawn at random; NaN with fewer than two."""
        if not 0.0 < level < 1.0:
            raise OptionError(f"level={level} must be above 0 and under 1")
        wide = torch.full_like(self.mean, math.nan)
        for count in self.count[self.count > 1].unique().tolist():
            wide[self.count == count] = t_quantile(0.5 + level / 2, int(count) - 1)
        half = wide * self.spread / self.count.clamp_min(1).sqrt()
        return self.value - half, self.value + half

    def table(self) -> list[dict[str, Any]]:
        """Return a row for each layer, head and measure: `value` is the mean, `low` and `high` its 95 %."""
        low, high = self.interval()
        columns = {"value": self.value, "spread": self.spread, "low": low, "high": high, "texts": self.count.long()}
        lists = {name: column.tolist() for name, column in columns.items()}
        return [
            {"layer": layer, "head": head, "measure": measure, **{name: x[m][layer][head] for name, x in lists.items()}}
            for m, measure in enumerate(self.names)
            for layer in range(self.mean.shape[1])
            for head in range(self.mean.shape[2])
        ]

    def _repr_html_(self) -> str:
        """Return a coloured table of layers and heads for each measure, which notebooks show."""
        return layer_head_tables(self.table())


def look_over(
    model: object,
    inputs: Iterable[Inputs],
    *,
    measures: Sequence[str | Measure] = ("entropy", "sink_mass", "received_mass"),
    layers: Iterable[int] | None = None,
    survey: Survey | None = None,
    **more: Any,
) -> Survey:
    """Run a model on many inputs under a `Lens`, and return the mean and the spread of its measures over texts.

    Args:
        model: any model that `foveate.look` takes.
        inputs: token ids `(B, N)` or tokenizer's mappings, one after another; a batch holds B texts. Padding is marked
            by "attention_mask".
        measures: see `Lens`; also "next_logit", the mean of `next_logits` over a text's tokens, for decoders.
        layers: see `Lens`; the values of other layers are NaN.
        survey: an earlier survey of the same measures, to go on with.
        more: keyword arguments for every call of the model.
    """
    found = survey
    for each in surveys(model, inputs, measures=measures, layers=layers, survey=survey, **more):
        found = each
    if found is None or not found.texts:
        raise OptionError("inputs must hold at least one text; got none")
    return found


def surveys(
    model: object, inputs: Iterable[Inputs], *, measures: Sequence[str | Measure], layers: Iterable[int] | None = None,
    survey: Survey | None = None, **more: Any,
) -> Iterator[Survey]:  # fmt: skip
    """Yield the survey after each input, for a caller that keeps them; see `look_over`."""
    run = host(model)
    names = [measure if measure == NEXT_LOGIT else named(measure).name for measure in measures]
    lens = Lens([measure for measure in measures if measure != NEXT_LOGIT], layers, phase="all")
    found = Survey.empty(names, run.layers, run.heads) if survey is None else survey
    if found.names != tuple(names) or found.mean.shape[1:] != (run.layers, run.heads):
        raise OptionError(f"survey has {list(found.names)} for another model or other measures than {names}")
    more = {**plain_call(run.model), **more}
    for given in inputs:
        call = {run.model.main_input_name: given} if isinstance(given, Tensor) else dict(given)
        values = _values(run, lens, names, call, more)
        found = replace(found.with_texts(values), unseen=dict(lens.unseen) or None)
        lens.clear()
        yield found


def _values(
    run: Host, lens: Lens, names: Sequence[str], call: dict[str, Any], more: dict[str, Any]
) -> Float[Tensor, "m t l h"]:
    """Run the model on one input, and return the measures of its texts."""
    if lens.measures:
        with torch.no_grad(), apply(run.model, lens):
            run.model(**{**call, **more})
        lens.check()
    parts = []
    for name in names:
        if name == NEXT_LOGIT:
            parts.append(next_logits(run.model, call).reduced().double().cpu())
            continue
        by_layer = {layer: value.double().cpu() for layer, value in lens.reduced(_measure_of(lens, name)).items()}
        if not by_layer:
            raise OptionError("the lens saw no attention in this call, so that there is nothing to measure")
        texts = next(iter(by_layer.values())).shape[0]
        whole = torch.full((texts, run.layers, run.heads), math.nan, dtype=torch.float64)
        for layer, value in by_layer.items():
            whole[:, layer, : value.shape[1]] = value
        parts.append(whole)
    return torch.stack(parts)


def _measure_of(lens: Lens, name: str) -> Measure:
    """Return the measure of a lens that has this name."""
    return next(measure for measure in map(named, lens.measures) if measure.name == name)
