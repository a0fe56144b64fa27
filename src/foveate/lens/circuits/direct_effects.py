"""Direct logit attribution: what each head, each MLP and the embedding adds to a logit by itself.

    effects = direct_effects(model, ids, targets)
    effects.heads          # (B, layers, heads, targets)
    effects.total()        # equals effects.logits, the model's own, to rounding

The logits are a linear function of the residual stream once the scale of the final norm is frozen at its value in the
run, and the stream is a sum of what the parts of the model add. So each logit is a sum with one summand a part. A norm
between a branch and the stream (Gemma 2) is frozen in the same way, so that its heads have parts too.

A norm is known by what it does, not by its class: its weight and bias come from probes, and its scale is the one that
fits the run. What is neither RMSNorm nor LayerNorm is refused. Logits are those of the unembedding: a cap or a scale
that the model applies to them afterwards is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import ShapeError, UnsupportedModel, shown
from foveate.host.output_projection import projection_parts
from foveate.lens.circuits.residual_stream import Block, Inputs, Step, Trace, agree, trace, wide


@final
@dataclass(frozen=True, eq=False)
class DirectEffects:
    """The summands of some logits, at one token of each text.

    Args:
        heads, mlps, embedding: what the parts of the model add to each logit.
        biases: what the biases of attention's output projection, and of a norm behind it, add at each layer.
        constant: what the biases of the final norm and of the unembedding add.
        logits: the model's own logits, before a cap or a scale.
    """

    heads: Float[Tensor, "b l h t"]
    mlps: Float[Tensor, "b l t"]
    embedding: Float[Tensor, "b t"]
    biases: Float[Tensor, "b l t"]
    constant: Float[Tensor, "b t"]
    logits: Float[Tensor, "b t"]

    def total(self) -> Float[Tensor, "b t"]:
        """Return the sum of all parts: the logits, to rounding."""
        return self.heads.sum((1, 2)) + self.mlps.sum(1) + self.embedding + self.biases.sum(1) + self.constant


def direct_effects(
    model: object,
    inputs: Inputs,
    targets: Int[Tensor, "... t"],
    *,
    positions: Int[Tensor, " b"] | int | None = None,
    centred: bool = False,
) -> DirectEffects:
    """Run a decoder once and split some of its logits into what each part adds.

    Args:
        model: a decoder with a language-model head; blocks in sequence, branches added to one residual stream.
        inputs: token ids, or a tokenizer's mapping.
        targets: the tokens whose logits are split, `(t,)` for all texts or `(B, t)` for each.
        positions: the token that predicts them, one for all texts or for each; None is the last that is no padding.
        centred: subtract the mean over the vocabulary from each logit.

    Raises:
        UnsupportedModel: the model's parts do not sum to its own residual stream or logits, or it has other norms.
    """
    validate.flag("centred", centred)
    found = trace(model, inputs, positions)
    batch, vocabulary = found.unembedding.made.shape
    targets = _checked_targets(targets, batch, vocabulary).to(found.unembedding.made.device)
    parts = residual_parts(found)
    rows, bias = _unembedding(found.unembedding, targets, centred)
    frozen = [FrozenNorm.of(step) for step in found.final]
    heads, mlps, embedding, biases = (
        _read(part, frozen, rows) for part in (parts.heads, parts.mlps, parts.embedding, parts.biases)
    )
    shift = rows.new_zeros(batch, rows.shape[-1])
    for norm in frozen:
        shift = norm.linear(shift) + norm.bias
    own = wide(found.unembedding.made)
    logits = own.gather(1, targets) - (own.mean(1, keepdim=True) if centred else 0.0)
    constant = torch.einsum("bc,btc->bt", shift, rows) + bias
    result = DirectEffects(heads, mlps, embedding, biases, constant, logits)
    _check_sum(result, own, found)
    return result


@final
@dataclass(frozen=True, eq=False)
class ResidualParts:
    """The residual stream in front of the final norm, as the sum of its parts, at one token of each text."""

    heads: Float[Tensor, "b l h c"]
    mlps: Float[Tensor, "b l c"]
    embedding: Float[Tensor, "b c"]
    biases: Float[Tensor, "b l c"]

    def total(self) -> Float[Tensor, "b c"]:
        """Return the stream itself."""
        return self.heads.sum((1, 2)) + self.mlps.sum(1) + self.embedding + self.biases.sum(1)


def residual_parts(found: Trace) -> ResidualParts:
    """Return what each part adds to the stream in a traced run; refuse a model whose parts do not sum to the stream."""
    heads, mlps, biases = zip(*(_block_parts(block) for block in found.blocks), strict=True)
    widest = max(part.shape[1] for part in heads)
    padded = [F.pad(part, (0, 0, 0, widest - part.shape[1])) for part in heads]
    parts = ResidualParts(
        torch.stack(padded, 1), torch.stack(mlps, 1), wide(found.blocks[0].entered), torch.stack(biases, 1)
    )
    for before, after in zip(found.blocks, found.blocks[1:], strict=False):
        if not torch.equal(before.left, after.entered):
            raise UnsupportedModel(
                "a block must read what the block before it wrote, and nothing may change it between"
            )
    return parts


@final
@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """A norm as a linear function: its scale is that of one run.

    Args:
        weight, bias: per channel.
        centres: whether the mean over channels is removed first, as LayerNorm does.
        scale: the reciprocal of the standard deviation, or of the root mean square, of each text's token.
    """

    weight: Float[Tensor, " c"]
    bias: Float[Tensor, " c"]
    centres: bool
    scale: Float[Tensor, " b"]

    @classmethod
    def of(cls, step: Step) -> FrozenNorm:
        """Return a module of a run as a frozen norm; refuse what is neither RMSNorm nor LayerNorm."""
        probe = torch.ones_like(step.given[:1, None])
        probe[..., 1::2] = -1.0
        probe[..., 1] -= probe.sum()
        with torch.no_grad():
            zero, ones, own = (wide(step.module(x))[0, 0] for x in (probe * 0, torch.ones_like(probe), probe))
        weight = (own - zero) / wide(probe)[0, 0]
        centres = bool((ones - zero).norm() < 1e-2 * weight.norm())
        return cls(weight, zero, centres, torch.empty(0)).at(step)

    def at(self, step: Step) -> FrozenNorm:
        """Return the norm with its scale in another run of the module."""
        given, made = wide(step.given), wide(step.made)
        line = self.weight * (given - given.mean(-1, keepdim=True) if self.centres else given)
        size = line.square().sum(-1).clamp_min(torch.finfo(line.dtype).tiny)
        scale = ((made - self.bias) * line).sum(-1) / size
        if not agree(scale[:, None] * line + self.bias, step.made):
            raise UnsupportedModel(
                f"{type(step.module).__name__} between the residual stream and the logits is neither RMSNorm nor "
                f"LayerNorm"
            )
        return replace(self, scale=scale)

    def linear(self, x: Float[Tensor, "b ... c"]) -> Float[Tensor, "b ... c"]:
        """Return a part of the input as it leaves the norm, without the bias."""
        x = x - x.mean(-1, keepdim=True) if self.centres else x
        return x * self.weight.to(x) * self.scale.to(x).view(-1, *[1] * (x.ndim - 1))


def _block_parts(block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a block's heads, its MLP and its attention's biases add: `(B, H, C)`, `(B, C)` and `(B, C)`."""
    module = block.attention.module
    weight, bias = projection_parts(module, block.heads.shape[1])
    if weight.shape[1] != block.heads.shape[2]:
        raise UnsupportedModel(
            f"{type(module).__name__} changes the {block.heads.shape[2]} numbers of a head before its output "
            f"projection, which takes {weight.shape[1]}"
        )
    heads = torch.einsum("bhd,hdc->bhc", wide(block.heads), wide(weight))
    shared = torch.zeros_like(heads[:, 0]) + (0.0 if bias is None else wide(bias))
    if not agree(heads.sum(1) + shared, block.attention.made):
        raise UnsupportedModel(f"the heads of {type(module).__name__} do not sum to its output")
    for step in block.after:
        norm = FrozenNorm.of(step)
        heads, shared = norm.linear(heads), norm.linear(shared) + norm.bias
    mlp = torch.stack([torch.zeros_like(shared), *(wide(step.made) for step in block.others)]).sum(0)
    return heads, mlp, shared


def _unembedding(step: Step, targets: Int[Tensor, "b t"], centred: bool) -> tuple[Tensor, Tensor]:
    """Return the rows `(B, t, C)` of the unembedding that compute the targets' logits, and their biases `(B, t)`."""
    weight, bias = getattr(step.module, "weight", None), getattr(step.module, "bias", None)
    if not isinstance(weight, Tensor) or weight.shape != (step.made.shape[1], step.given.shape[1]):
        raise UnsupportedModel(f"{type(step.module).__name__} must be a linear unembedding (vocabulary, channels)")
    weight = weight.detach()
    rows = wide(weight[targets])
    biases = rows.new_zeros(targets.shape) if bias is None else wide(bias.detach())[targets]
    if centred:
        rows = rows - wide(weight.mean(0, dtype=rows.dtype))
        biases = biases - (0.0 if bias is None else wide(bias.detach()).mean())
    return rows, biases


def _read(part: Float[Tensor, "b ... c"], norms: list[FrozenNorm], rows: Float[Tensor, "b t c"]) -> Tensor:
    """Return what a part of the stream adds to the logits behind the frozen norms, `(B, ..., t)`."""
    for norm in norms:
        part = norm.linear(part)
    return torch.einsum("b...c,btc->b...t", part, rows.to(part))


def _check_sum(result: DirectEffects, own: Tensor, found: Trace) -> None:
    """Refuse a model whose logits are not the sum of its parts; the size of its logits sets the rounding."""
    gap = (result.total() - result.logits).abs().amax()
    size = torch.stack([part.abs().amax() for part in (own, result.heads, result.mlps, result.embedding)]).amax()
    tolerance = max(8 * torch.finfo(found.unembedding.made.dtype).eps, 1e-4)
    if not bool(gap <= tolerance * size):
        raise UnsupportedModel(
            f"the parts of the model sum to other logits than its own, by up to {float(gap):.3g}: something between "
            f"the blocks and the unembedding is no norm"
        )


def _checked_targets(targets: Tensor, batch: int, vocabulary: int) -> Int[Tensor, "b t"]:
    if not isinstance(targets, Tensor) or targets.dtype != torch.long or targets.ndim not in (1, 2):
        raise ShapeError(f"targets must be token ids, (t,) or (B, t); got {shown(targets)}")
    if targets.ndim == 2 and targets.shape[0] != batch:
        raise ShapeError(f"targets must be (t,) or (B={batch}, t); got {tuple(targets.shape)}")
    if not targets.numel() or int(targets.min()) < 0 or int(targets.max()) >= vocabulary:
        raise ShapeError(f"targets must hold token ids in 0..{vocabulary - 1}, at least one")
    return targets if targets.ndim == 2 else targets.expand(batch, -1)
