"""Head pursuit: find the heads that write a concept, by a sparse code of their outputs in rows of the unembedding.

Head Pursuit: Probing Attention Specialization in Multimodal Transformers (2025), arXiv 2510.21518. The logit lens reads
one output of a head as the token whose unembedding it is most like. Simultaneous orthogonal matching pursuit (SOMP)
reads many outputs together: it picks tokens one at a time, and fits all outputs to the tokens picked so far. A head
belongs to a concept if the concept's tokens alone explain much of its outputs. Scaling about one head in a hundred then
suppresses or enhances the concept.

    scores = head_pursuit(model, prompts, colours)                       # (layers, heads)
    with foveate.apply(model, scale_heads(top_heads(scores, 8), -1.0, scores.shape)):
        model.generate(ids)

The paper states neither a normalisation of the dictionary nor centred outputs, so that both are arguments, off by
default. The stop where nothing is left to explain is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, UnsupportedModel, shown
from foveate.host import host
from foveate.lens.circuits.interventions import Head, Scale, checked_heads
from foveate.lens.parts.head_writes import Averaged, head_writes

#: Token ids of prompts `(B, N)`, or a mapping of a model's inputs.
Prompts = Tensor | Mapping[str, Any]


@final
@dataclass(frozen=True, eq=False)
class Pursuit:
    """The result of `somp`.

    Args:
        atoms: rows of the dictionary in the order of selection.
        coefficients: of the atoms, for each output.
        explained: the share of the outputs' squared length that the first 1, 2, ... atoms explain.
    """

    atoms: Int[Tensor, " k"]
    coefficients: Float[Tensor, "n k"]
    explained: Float[Tensor, " k"]

    @property
    def score(self) -> float:
        """The share that all atoms together explain; 0 without any."""
        return float(self.explained[-1]) if len(self.explained) else 0.0


def somp(
    outputs: Float[Tensor, "n d"], dictionary: Float[Tensor, "v d"], atoms: int = 50, *,
    norm: Literal["l1", "l2"] = "l1", normalize: bool = False, center: bool = False,
) -> Pursuit:  # fmt: skip
    """Code outputs by few rows of a dictionary, the same rows for all outputs.

    Each step takes the row with the largest correlation with what is left of the outputs, over all of them together,
    and fits the outputs to all rows taken by least squares. It stops when nothing is left. Cost: O(v (d + n)) a step.

    Args:
        outputs: one row for each sample.
        dictionary: one row for each atom.
        atoms: the number of steps; at most v and d are possible.
        norm: how the correlations of an atom with all outputs are added up.
        normalize: True selects by rows of unit length. Otherwise long rows are taken first.
        center: True subtracts the outputs' mean.
    """
    validate.count("atoms", atoms, 1)
    validate.one_of("norm", norm, ("l1", "l2"))
    if outputs.ndim != 2 or dictionary.ndim != 2 or outputs.shape[1] != dictionary.shape[1] or not outputs.numel():
        raise ShapeError(f"outputs (n, d) and dictionary (v, d) must fit; got {shown(outputs)}, {shown(dictionary)}")
    dtype = torch.promote_types(torch.promote_types(outputs.dtype, dictionary.dtype), torch.float32)
    left, rows, order = outputs.to(dtype), dictionary.to(dtype), 1 if norm == "l1" else 2
    left = whole = left - left.mean(0) if center else left
    lengths = torch.linalg.vector_norm(rows, dim=1).clamp_min(torch.finfo(dtype).tiny)
    correlation = rows @ left.mT
    least = 100 * torch.finfo(dtype).eps
    taken: list[int] = []
    explained: list[float] = []
    basis = rows.new_zeros(rows.shape[1], 0)
    first = 0.0
    for _ in range(min(atoms, *rows.shape)):
        strength = torch.linalg.vector_norm(correlation, order, dim=1)
        strength = strength / lengths if normalize else strength
        strength[taken] = -1.0
        best = int(strength.argmax())
        first = first or float(strength[best])
        if float(strength[best]) <= least * first:
            break
        new = rows[best]
        for _again in range(2):  # once more for what rounding left
            new = new - basis @ (basis.mT @ new)
        new = new / torch.linalg.vector_norm(new)
        along = left @ new
        left = left - along[:, None] * new
        correlation = correlation - (rows @ new)[:, None] * along
        basis = torch.cat([basis, new[:, None]], 1)
        taken.append(best)
        explained.append(1.0 - float(left.square().sum() / whole.square().sum()))
    upper = basis.mT @ rows[taken].mT  # the atoms in the basis: triangular
    coefficients = torch.linalg.solve_triangular(upper.triu(), basis.mT @ whole.mT, upper=True).mT
    return Pursuit(torch.tensor(taken, dtype=torch.long), coefficients, torch.tensor(explained, dtype=dtype))


def head_pursuit(
    model: object, prompts: Iterable[Prompts], concept: Iterable[int], *, atoms: int = 50, tokens: Averaged = "all",
    against: Iterable[int] | None = None, dictionary: Float[Tensor, "v d"] | None = None,
    norm: Literal["l1", "l2"] = "l1", normalize: bool = False, center: bool = False,
) -> Float[Tensor, "l h"]:  # fmt: skip
    """Return for each head the share of its outputs that a concept's tokens explain, `(layers, heads)`.

    One pass of the model over the prompts; a head's output is averaged over each prompt. All heads' averages are held:
    O(prompts · layers · heads · d).

    Args:
        model: a decoder.
        prompts: token ids `(B, N)`, or mappings with an attention mask, each of one or more prompts.
        concept: the ids of the concept's tokens, or rows of `dictionary`.
        atoms: the number of tokens that are picked; at most all of the concept.
        tokens: the tokens of a prompt to average over; see `head_writes`.
        against: ids of other tokens; what they explain is subtracted.
        dictionary: a row for each id; None is the model's unembedding.
        norm, normalize, center: see `somp`.
    """
    rows = _unembedding(model) if dictionary is None else dictionary
    lists = [_ids("concept", concept, len(rows))]
    if against is not None:
        lists.append(_ids("against", against, len(rows)))
    found, writes = host(model), _all_writes(model, prompts, tokens)
    scores = torch.zeros(found.layers, found.heads)
    for layer, outputs in writes.items():
        for head in range(outputs.shape[1]):
            shares = [
                somp(outputs[:, head], rows[ids].cpu(), atoms, norm=norm, normalize=normalize, center=center).score
                for ids in lists
            ]
            scores[layer, head] = shares[0] - sum(shares[1:])
    return scores


def concept_logits(
    model: object, prompts: Iterable[Prompts], concept: Iterable[int], *, tokens: Averaged = "all"
) -> Float[Tensor, "l h"]:
    """Return for each head the mean logit that its outputs alone give the concept's tokens: the paper's baseline."""
    rows = _unembedding(model)
    mean = rows[_ids("concept", concept, len(rows))].cpu().float().mean(0)
    found = host(model)
    scores = torch.zeros(found.layers, found.heads)
    for layer, outputs in _all_writes(model, prompts, tokens).items():
        scores[layer, : outputs.shape[1]] = outputs.mean(0) @ mean
    return scores


def control_heads(heads: Iterable[Head], shape: Sequence[int], generator: torch.Generator | None = None) -> list[Head]:
    """Return random heads, as many in each layer as are given, none of them given: the paper's control.

    Args:
        heads: the heads that were selected.
        shape: the numbers of layers and heads of the model.
        generator: draws them.
    """
    selected, drawn = checked_heads(heads), list[Head]()
    for layer in sorted({layer for layer, _ in selected}):
        own = {head for at, head in selected if at == layer}
        others = [head for head in range(shape[1]) if head not in own]
        if len(others) < len(own):
            raise OptionError(f"heads must be at most half of each layer's {shape[1]}; layer {layer} has {len(own)}")
        order = torch.randperm(len(others), generator=generator)[: len(own)]
        drawn += [(layer, others[place]) for place in order.tolist()]
    return drawn


def scale_heads(heads: Iterable[Head], factor: float, shape: Sequence[int]) -> Scale:
    """Return the method that multiplies the outputs of some heads: -1 to suppress what they write, 5 to enhance it.

    Args:
        heads: pairs of layer and head.
        factor: multiplies their outputs at all tokens; 1 changes nothing.
        shape: the numbers of layers and heads of the model.
    """
    factors = torch.ones(*shape)
    for layer, head in checked_heads(heads):
        if layer not in range(shape[0]) or head not in range(shape[1]):
            raise OptionError(f"head {(layer, head)} is not among {shape[0]} layers of {shape[1]} heads")
        factors[layer, head] = factor
    return Scale(factors)


def _all_writes(model: object, prompts: Iterable[Prompts], tokens: Averaged) -> dict[int, Float[Tensor, "n h d"]]:
    parts: dict[int, list[Tensor]] = {}
    for inputs in prompts:
        for layer, outputs in head_writes(model, inputs, tokens).items():
            parts.setdefault(layer, []).append(outputs)
    if not parts:
        raise OptionError("prompts must hold at least one prompt; got none")
    return {layer: torch.cat(part) for layer, part in parts.items()}


def _unembedding(model: object) -> Float[Tensor, "v d"]:
    found = host(model).model
    weight = getattr(found.get_output_embeddings(), "weight", None)
    if not isinstance(weight, Tensor):
        raise UnsupportedModel(f"{type(found).__name__} has no unembedding; give a dictionary, or a model with a head")
    return weight.detach()


def _ids(name: str, ids: Iterable[int], size: int) -> Int[Tensor, " k"]:
    listed = sorted(set(ids))
    if not listed or listed[0] < 0 or listed[-1] >= size:
        raise OptionError(f"{name} must be ids in 0..{size - 1}, at least one; got {shown(listed)}")
    return torch.tensor(listed)
