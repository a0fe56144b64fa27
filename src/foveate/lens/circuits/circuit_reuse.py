"""Path patching, the overlap of two circuits, and the repair of a circuit by set attention.

Circuit Component Reuse Across Tasks in Transformer Language Models (2023), arXiv 2310.08744. Path patching measures
what one head does to another along the direct path between them:

    movers = path_patch(model, clean, corrupt, answers)                                    # into the logits
    inhibitors = path_patch(model, clean, corrupt, answers, receivers=movers.top(0.02), component="q")

The patching, its single position and its normalisation follow the official release. The release holds neither the
repair nor the thresholds of a circuit: these are reconstructed. `top` keeps the 2% of heads with the largest effects,
as the paper's figure does; the overlap is that of sets; `SetAttention` takes any weights, since the paper's row for its
negative mover head is not known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.host.hf.model import Host, host
from foveate.host.method import Method
from foveate.lens.circuits.head_inputs import HeadInputs, replaced_inputs
from foveate.lens.circuits.interventions import Head, Patch, checked_heads, head_outputs
from foveate.lens.circuits.mlp_outputs import mlp_outputs, patched_mlps
from foveate.lens.circuits.patching import LogitDifference, measured
from foveate.lens.circuits.residual_stream import trace

#: The end of a path at a head: its queries, keys or values, or its output.
Component = Literal["q", "k", "v", "z"]


@final
@dataclass(frozen=True, eq=False)
class PathEffects:
    """The effects of heads along their direct paths to some receivers.

    Args:
        changes: the change of the mean logit difference when one head's path carries its corrupted value.
        clean, corrupt: the mean logit difference of the clean and of the corrupted texts.
    """

    changes: Float[Tensor, "l h"]
    clean: float
    corrupt: float

    @property
    def effects(self) -> Float[Tensor, "l h"]:
        """The changes as shares of the whole change: 0 is no effect, 1 is that of the corrupted text."""
        gap, least = self.corrupt - self.clean, 1e-6 * max(1.0, abs(self.clean))
        if abs(gap) > least:
            return self.changes / gap
        if bool((self.changes.abs() <= least).all()):
            return torch.zeros_like(self.changes)
        raise OptionError("clean and corrupt have the same mean logit difference, so that effects have no unit")

    def top(self, share: float = 0.02) -> list[Head]:
        """Return the share of all heads with the largest effects in size, at least one, the largest first."""
        validate.between("share", share, 0.0, 1.0)
        count = max(1, math.ceil(share * self.changes.numel()))
        found = self.effects.abs().flatten().topk(count).indices.tolist()
        return [divmod(number, self.changes.shape[1]) for number in found]


def path_patch(
    model: object,
    clean: Int[Tensor, "b n"],
    corrupt: Int[Tensor, "b n"],
    answers: Int[Tensor, "b 2"],
    *,
    receivers: Iterable[Head] | None = None,
    component: Component = "q",
    position: int = -1,
    positions: Literal["one", "all"] = "one",
    freeze_mlps: bool = False,
    attention_mask: Int[Tensor, "b n"] | None = None,
) -> PathEffects:
    """Return the effect of every head on the receivers, and through them on the answers.

    For each head, the clean texts are read with this head's output that of the corrupted texts, and all other heads'
    outputs their clean ones. What then arrives at the receivers is put into a second run of the clean texts, in which
    nothing else changes. Only heads of layers below the lowest receiver have an effect.

    Args:
        model: a decoder with a language-model head.
        clean, corrupt: texts and their counterfactuals, token by token of the same form; the last token predicts.
        answers: the answer and the distractor of each text; their logit difference is the statistic.
        receivers: heads; None is the residual stream in front of the final norm.
        component: what the receivers' path ends in: queries, keys, values, or "z" for their outputs.
        position: where outputs are replaced and frozen and receivers patched; negative ones count from the end.
        positions: "one" is that position alone, as in the release; heads elsewhere stay free. "all" is every position,
            which paths over two tokens need, such as those into keys.
        freeze_mlps: also keep the MLPs' outputs at their clean values.
        attention_mask: for texts that are padded on the left.
    """
    run = host(model)
    heads = None if receivers is None else checked_heads(receivers)
    place = _checked(run, clean, corrupt, answers, heads, component, position, positions)
    more = {} if attention_mask is None else {"attention_mask": attention_mask}
    patching = _Patching(run, {"input_ids": clean, **more}, answers, None if positions == "all" else [place])
    if freeze_mlps:
        patching.freeze_mlps()
    altered = {"input_ids": corrupt, **more}
    sent, start = head_outputs(model, altered), patching.difference()
    changes = torch.zeros(run.layers, run.heads, dtype=torch.float64)
    for layer in range(run.layers if heads is None else min(layer for layer, _ in heads)):
        for head in range(sent[layer].shape[1]):
            change = patching.along((layer, head), sent[layer][:, head], heads, component)
            changes[layer, head] = change - start
    return PathEffects(changes, start, patching.difference(inputs=altered))


class _Patching:
    """Runs of a model on clean texts with some values replaced, at some places or all.

    Args:
        run: the model.
        clean: the texts.
        answers: the answer and the distractor of each text.
        places: the positions at which values are replaced; None for all.
    """

    def __init__(self, run: Host, clean: dict[str, Tensor], answers: Tensor, places: list[int] | None) -> None:
        self.host, self.clean, self.metric, self.places = run, clean, LogitDifference(answers), places
        self.outputs = head_outputs(run.model, clean)
        self.modules: list[nn.Module] = []
        self.mlps: dict[int, Tensor] = {}

    def freeze_mlps(self) -> None:
        """Keep the outputs of MLPs at their clean values while a head's path is followed."""
        self.modules = trace(self.host.model, self.clean).mlps
        self.mlps = mlp_outputs(self.host.model, self.modules, self.clean)

    def along(
        self,
        sender: Head,
        value: Float[Tensor, "b n dv"],
        receivers: list[Head] | None,
        component: Component,
    ) -> float:
        """Return the logit difference if the path from a sender to the receivers carries another output of it."""
        later = [(layer, head) for layer, z in self.outputs.items() for head in range(z.shape[1]) if layer >= sender[0]]
        frozen = {(layer, head): self.outputs[layer][:, head] for layer, head in later}
        arrived = HeadInputs(receivers or [])  # in front of the patch, so that it reads what is then replaced
        with patched_mlps(self.modules, self.mlps, self.places):
            found = self.difference(arrived, Patch(frozen | {sender: value}, self.places))
        if receivers is None:
            return found
        values = {head: arrived.found[component, head] for head in receivers}
        if component == "z":
            return self.difference(Patch(values, self.places))
        chosen = None if self.places is None else torch.tensor(self.places)
        return self.difference(replaced_inputs(values, component, chosen))

    def difference(self, *methods: Method, inputs: dict[str, Tensor] | None = None) -> float:
        """Return the mean logit difference of answers and distractors at the last token."""
        return measured(self.host, inputs or self.clean, self.metric, *methods)


def circuit_overlap(
    first: Iterable[Head] | Mapping[str, Iterable[Head]],
    second: Iterable[Head] | Mapping[str, Iterable[Head]],
    of: Literal["union", "first"] = "union",
) -> float:
    """Return the share of heads that two circuits have in common.

    Args:
        first, second: the heads of a circuit, or the heads by role; then only heads of the same role are common.
        of: the heads that the share counts: those of either circuit, or those of the first.
    """
    validate.one_of("of", of, ("union", "first"))
    if isinstance(first, Mapping) != isinstance(second, Mapping):
        raise OptionError("first and second must both be heads, or both heads by role")
    one, other = ({(role, head) for role, heads in _roles(each) for head in heads} for each in (first, second))
    whole = one | other if of == "union" else one
    if not whole:
        raise OptionError("first and second must hold at least one head")
    return len(one & other) / len(whole)


def _roles(circuit: Iterable[Head] | Mapping[str, Iterable[Head]]) -> list[tuple[str, list[Head]]]:
    if isinstance(circuit, Mapping):
        return [(role, checked_heads(heads)) for role, heads in circuit.items()]
    return [("", checked_heads(circuit))]


def _checked(
    run: Host, clean: Tensor, corrupt: Tensor, answers: Tensor, heads: list[Head] | None, component: str,
    position: int, positions: str,
) -> int:  # fmt: skip
    """Return the position, counted from the first; refuse what does not fit."""
    validate.one_of("component", component, ("q", "k", "v", "z"))
    validate.one_of("positions", positions, ("one", "all"))
    if clean.ndim != 2 or clean.shape != corrupt.shape:
        raise ShapeError(f"clean and corrupt must be (B, N) alike; got {tuple(clean.shape)}, {tuple(corrupt.shape)}")
    batch, n = clean.shape
    if answers.shape != (batch, 2) or answers.dtype != torch.long:
        raise ShapeError(f"answers must be token ids ({batch}, 2): answer and distractor; got {shown(answers)}")
    if type(position) is not int or position not in range(-n, n):
        raise OptionError(f"position={shown(position)} must be in {-n}..{n - 1}")
    if heads is None:
        if positions == "one" and position % n != n - 1:
            raise OptionError(f"position={position} must be -1 if receivers is None: the last token gives the logits")
    else:
        if not heads:
            raise OptionError("receivers must hold at least one head, or be None")
        run.check_heads(heads)
    return position % n
