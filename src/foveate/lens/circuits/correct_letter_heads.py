"""The circuit behind multiple-choice answers: direct and total effects, kinds of heads, and low-rank heads.

Does Circuit Analysis Interpretability Scale? Evidence from Multiple Choice Capabilities in Chinchilla (2023),
arXiv 2307.09458. A few late heads and MLPs carry most of the correct letter's logit. Correct-letter heads attend from
the last token to the correct label; three directions of their queries and keys suffice for that on usual prompts.

    report = letter_head_report(model, prompts)
    report.kinds()                                          # {(layer, head): "correct letter", ...}
    total = activation_patch(model, prompts, others)        # the same question with another correct letter
    data = letter_inputs(model, prompts, head)
    low = compress_head(head, q=Subspace.fit(data.q, 3), k=Subspace.fit(data.k, 3))

There is no release. The statistic, the frozen norm and the low-rank projections are the paper's. The thresholds between
the kinds of heads are reconstructed, so that they are arguments, and so is the name of each kind where the paper shows
examples alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError
from foveate.host.entry import apply
from foveate.host.hf.model import host
from foveate.host.method import Method
from foveate.host.site import Site
from foveate.host.weight_tiles import weight_tile
from foveate.lens.circuits.direct_effects import direct_effects
from foveate.lens.circuits.interventions import Head, Patch, head_outputs
from foveate.lens.circuits.letter_prompts import LetterPrompts
from foveate.lens.circuits.mlp_outputs import mlp_outputs, patched_mlps
from foveate.lens.circuits.patching import measured
from foveate.lens.circuits.residual_stream import trace

#: Kinds of heads; see `LetterReport.kinds`.
Kind = Literal["correct letter", "single letter", "constant letter", "amplification", "content gatherer"]


@final
@dataclass(frozen=True, eq=False)
class LetterReport:
    """The work of heads and MLPs at the last token of multiple-choice prompts.

    Args:
        heads, mlps: the mean net direct effect: on the correct letter's logit, less the mean over the other letters.
        rises: by correct option, the mean direct effect of a head on each option's logit, less the vocabulary's mean.
        attention: by correct option, the mean attention to each label.
        contents: the same to each option's content; zeros if unknown.
        end: the mean attention to the tokens behind the last label or content.
        statistic: the mean of the correct logit less those of the other letters.
        accuracy: share of prompts whose correct letter has the largest logit of the letters.
    """

    heads: Float[Tensor, "l h"]
    mlps: Float[Tensor, " l"]
    rises: Float[Tensor, "l h c c"]
    attention: Float[Tensor, "l h c c"]
    contents: Float[Tensor, "l h c c"]
    end: Float[Tensor, "l h"]
    statistic: float
    accuracy: float

    @property
    def preference(self) -> Float[Tensor, "l h c"]:
        """The attention to each label when it is correct, less that when it is not."""
        return _when_correct(self.attention)

    def output_nodes(self, share: float = 0.8) -> list[tuple[int, int | None]]:
        """Return the fewest heads and MLPs whose net direct effects add up to a share of the statistic.

        An MLP has None in place of its head. The largest come first; all with a positive effect, if they do not reach
        the share.
        """
        validate.between("share", share, 0.0, 1.0)
        both = torch.cat([self.heads, self.mlps[:, None]], 1)
        order = both.flatten().argsort(descending=True)
        sums = both.flatten()[order].cumsum(0)
        count = min(int((sums < share * self.statistic).sum()) + 1, int((both > 0).sum()))
        found = (divmod(number, both.shape[1]) for number in order[:count].tolist())
        return [(layer, None if head == self.heads.shape[1] else head) for layer, head in found]

    def kinds(self, attention: float = 0.1, mass: float = 0.5, effect: float = 0.02) -> dict[Head, Kind]:
        """Return the kind of each head that has one.

        - correct letter: attends more to at least two labels when they are correct, and raises the correct letter.
        - single letter: does so for one label alone.
        - constant letter: attends to the labels whichever is correct, and raises all letters.
        - amplification: attends to the end of the prompt, and raises the correct letter.
        - content gatherer: attends more to the contents of an option when it is correct.

        Args:
            attention: the least difference in attention, correct or not.
            mass: the least attention to all labels of a constant letter head, and to the end of an amplification head.
            effect: the least net effect, as a share of the statistic.
        """
        least, found = effect * abs(self.statistic), dict[Head, Kind]()
        prefers = (self.preference >= attention).sum(-1)
        raises, raises_all = self.heads >= least, self.rises.mean((-2, -1)) >= least
        gathers = _when_correct(self.contents).mean(-1) >= attention
        rules: list[tuple[Kind, Tensor]] = [
            ("correct letter", (prefers > 1) & raises),
            ("single letter", (prefers == 1) & raises),
            ("constant letter", (prefers == 0) & (self.attention.sum(-1).mean(-1) >= mass) & raises_all),
            ("amplification", (self.end >= mass) & raises),
            ("content gatherer", gathers),
        ]
        for kind, fits in rules:
            for layer, head in fits.nonzero().tolist():
                found.setdefault((layer, head), kind)
        return found


def letter_head_report(model: object, prompts: LetterPrompts) -> LetterReport:
    """Return what the heads and MLPs of a decoder do at the last token of multiple-choice prompts."""
    effects = direct_effects(model, prompts.inputs, prompts.letters, positions=-1, centred=True)
    watch = _LastRow()
    with torch.no_grad(), apply(model, watch, on="decoder") as run:
        run.host.model(**prompts.inputs, use_cache=False)
    weights = torch.stack([watch.found[layer] for layer in sorted(watch.found)], 1)  # (B, L, H, N)
    contents = prompts.labels.new_zeros(0) if prompts.contents is None else prompts.contents
    last = torch.cat([prompts.labels, contents.view(len(prompts.ids), -1)], 1).amax(1)
    behind = torch.arange(prompts.ids.shape[1]) > last[:, None]
    found = _by_option(_at(weights, contents), prompts) if prompts.contents is not None else None
    attention = _by_option(_at(weights, prompts.labels), prompts)
    logits = effects.logits
    correct = prompts.correct.to(logits.device)
    return LetterReport(
        prompts.lead(effects.heads).mean(0), prompts.lead(effects.mlps).mean(0), _by_option(effects.heads, prompts),
        attention, torch.zeros_like(attention) if found is None else found,
        (weights * behind[:, None, None].to(weights)).sum(-1).mean(0), float(prompts.lead(logits).mean()),
        float((logits.argmax(-1) == correct).double().mean()),
    )  # fmt: skip


@final
@dataclass(frozen=True, eq=False)
class TotalEffects:
    """The change of the statistic when one node's activation is that of other prompts.

    Args:
        heads, mlps: the change by node.
        clean, corrupt: the statistic of the prompts, and the same statistic of the other prompts' logits.
    """

    heads: Float[Tensor, "l h"]
    mlps: Float[Tensor, " l"]
    clean: float
    corrupt: float


def activation_patch(
    model: object, prompts: LetterPrompts, corrupt: LetterPrompts, positions: Iterable[int] | None = (-1,)
) -> TotalEffects:
    """Return the total effect of every head and MLP: through later layers too, unlike the direct effect.

    Args:
        model: a decoder with a language-model head.
        prompts: the prompts; the statistic is of their letters and their correct option.
        corrupt: prompts of the same form with other correct options.
        positions: the tokens at which activations are exchanged; None for all.
    """
    if prompts.ids.shape != corrupt.ids.shape:
        raise ShapeError(
            f"prompts and corrupt must be alike; got {tuple(prompts.ids.shape)}, {tuple(corrupt.ids.shape)}"
        )
    run, chosen = host(model), None if positions is None else tuple(positions)
    modules = trace(model, prompts.inputs).mlps
    heads, mlps = head_outputs(model, corrupt.inputs), mlp_outputs(model, modules, corrupt.inputs)

    def statistic(logits: Tensor) -> Tensor:
        last = logits[:, -1].double()
        return prompts.lead(last.gather(1, prompts.letters.to(last.device))).mean()

    clean = measured(run, prompts.inputs, statistic)
    by_head, by_mlp = torch.zeros(run.layers, run.heads), torch.zeros(run.layers)
    for layer in range(run.layers):
        for head in range(heads[layer].shape[1]):
            patch = Patch({(layer, head): heads[layer][:, head]}, chosen)
            by_head[layer, head] = measured(run, prompts.inputs, statistic, patch) - clean
        with patched_mlps(modules, {layer: mlps[layer]}, chosen):
            by_mlp[layer] = measured(run, prompts.inputs, statistic) - clean
    return TotalEffects(by_head, by_mlp, clean, measured(run, corrupt.inputs, statistic))


class _LastRow(Method):
    """A method that reads the weights of the last query of each text, by layer."""

    def __init__(self) -> None:
        self.found: dict[int, Tensor] = {}

    def read(self, site: Site, out: Tensor) -> None:
        last = site.q.shape[2] - 1
        tile = weight_tile(site, slice(last, last + 1))
        whole = tile.weights.new_zeros(*tile.weights.shape[:2], site.k.shape[2])
        whole[..., tile.keys] = tile.weights[:, :, 0]
        self.found[site.layer] = whole


def _at(weights: Float[Tensor, "b l h n"], positions: Int[Tensor, "b c"]) -> Float[Tensor, "b l h c"]:
    places = positions.to(weights.device)[:, None, None].expand(*weights.shape[:3], -1)
    return weights.gather(-1, places)


def _by_option(values: Float[Tensor, "b l h c"], prompts: LetterPrompts) -> Float[Tensor, "l h c c"]:
    """Return the mean of values over the prompts of each correct option; refuse prompts that leave an option out."""
    correct = prompts.correct.to(values.device)
    counts = correct.bincount(minlength=prompts.options)
    if not bool(counts.all()):
        raise OptionError(
            f"each option must be correct in at least one prompt; got {counts.tolist()} prompts by option"
        )
    return torch.stack([values[correct == option].mean(0) for option in range(prompts.options)], -2)


def _when_correct(table: Float[Tensor, "l h c c"]) -> Float[Tensor, "l h c"]:
    """Return each option's value when it is correct, less its mean when another is."""
    own = table.diagonal(dim1=-2, dim2=-1)
    return own - (table.sum(-2) - own) / (table.shape[-1] - 1)
