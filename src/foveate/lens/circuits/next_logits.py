"""Direct logit attribution at every token of a text: what each head adds to the logit of the token that comes next.

    found = next_logits(model, ids)
    found.heads                    # (B, layers, heads, N)

`direct_effects` splits the logits of one token of a text into all parts of the model, and checks their sum. Here heads
alone are read, at all tokens, in O(N) memory. A head's output is multiplied by a vector for each token, the row of the
unembedding taken back through the norms, so that no head's output is held as wide as the residual stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import ShapeError, shown
from foveate.host.entry import apply
from foveate.host.hf.model import Host, host, plain_call
from foveate.host.method import Method
from foveate.host.output_projection import TILE, projection_parts
from foveate.host.site import Site
from foveate.lens.circuits.direct_effects import FrozenNorm, _unembedding
from foveate.lens.circuits.residual_stream import Inputs, Step, Trace, as_mapping, first_tensor, trace, wide

_PROBE = 8  # tokens of the run that finds the norms between heads and logits


@final
@dataclass(frozen=True, eq=False)
class NextLogits:
    """The summands of heads in logits, at each token.

    Args:
        heads: the summand of each head in the logit of the target; zero where `counted` is False.
        counted: the tokens that are no padding and have a target.
    """

    heads: Float[Tensor, "b l h n"]
    counted: Bool[Tensor, "b n"]

    def reduced(self) -> Float[Tensor, "b l h"]:
        """Return the mean over the tokens that count; NaN without any."""
        return self.heads.sum(-1) / self.counted.sum(-1)[:, None, None]


@torch.no_grad()
def next_logits(
    model: object, inputs: Inputs, targets: Int[Tensor, "b n"] | None = None, *, centred: bool = True
) -> NextLogits:
    """Run a decoder once and return what each head adds to the logit of each token's target.

    A first run over a few tokens finds the norms between heads and logits, and refuses a model whose parts do not sum
    to its logits; see `direct_effects` for what is frozen and what is left out.

    Args:
        model: a decoder with a language-model head; blocks in sequence, branches added to one residual stream.
        inputs: token ids `(B, N)`, or a tokenizer's mapping.
        targets: the token whose logit is split at each token; negative for none. None is the token that comes next.
        centred: subtract the mean over the vocabulary from each logit, as a softmax does not see it.

    Raises:
        UnsupportedModel: the model's parts do not sum to its own residual stream, or it has other norms.
    """
    validate.flag("centred", centred)
    run = host(model)
    given = as_mapping(run, inputs)
    ids, real = _texts(given, run)
    wanted = _following(ids, real) if targets is None else _checked(targets, ids, run.vocabulary)
    counted = (wanted >= 0) & real
    found = trace(run.model, ids[:1, real[0]][:, :_PROBE])
    rows, _ = _unembedding(found.unembedding, wanted.clamp_min(0).to(found.unembedding.made.device), centred)
    reader = _Reader(found, rows, real)
    heads = reader.run(run, given)
    return NextLogits(torch.where(counted[:, None, None].to(heads.device), heads, 0.0), counted)


def _texts(given: Mapping[str, Any], run: Host) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
    """Return the ids, and the tokens that are no padding."""
    ids, mask = given.get(run.model.main_input_name), given.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.numel() or ids.is_floating_point():
        raise ShapeError(f"inputs must be token ids (B, N), or a mapping with input_ids; got {shown(ids)}")
    return ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


def _following(ids: Int[Tensor, "b n"], real: Bool[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """Return the token after each; -1 where there is none."""
    after = torch.where(real, ids, -1)[:, 1:]
    return torch.cat([after, after.new_full((len(ids), 1), -1)], 1)


def _checked(targets: object, ids: Tensor, vocabulary: int) -> Int[Tensor, "b n"]:
    if not isinstance(targets, Tensor) or targets.dtype != torch.long or targets.shape != ids.shape:
        raise ShapeError(f"targets must be token ids like the inputs {tuple(ids.shape)}; got {shown(targets)}")
    if int(targets.max()) >= vocabulary:
        raise ShapeError(f"targets must hold token ids under {vocabulary}, or negative numbers for none")
    return targets


@dataclass(frozen=True, eq=False)
class _Norms:
    """A chain of norms, whose linear part is the same at all tokens but for a factor."""

    modules: tuple[nn.Module, ...]
    frozen: tuple[FrozenNorm, ...]

    @classmethod
    def of(cls, steps: tuple[Step, ...]) -> _Norms:
        return cls(tuple(step.module for step in steps), tuple(FrozenNorm.of(step) for step in steps))

    def back(self, rows: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """Return the vectors whose products with the input are those of `rows` with the output, but for the factor."""
        for norm in reversed(self.frozen):
            rows = rows * norm.weight.to(rows)
            rows = rows - rows.mean(-1, keepdim=True) if norm.centres else rows
        return rows


class _Reader(Method):
    """A method that multiplies the outputs of heads by the vectors of their tokens.

    Args:
        found: a run that shows the norms.
        rows: the rows of the unembedding, for each token that of its target.
        real: the tokens that are no padding.
    """

    def __init__(self, found: Trace, rows: Float[Tensor, "b n c"], real: Bool[Tensor, "b n"]) -> None:
        self.last, self.real = _Norms.of(found.final), real
        self.rows = self.last.back(rows)
        self.after = {block.attention.module: _Norms.of(block.after) for block in found.blocks}
        chains = [self.last, *self.after.values()]
        self.frozen = {module: norm for each in chains for module, norm in zip(each.modules, each.frozen, strict=True)}
        self.scales: dict[nn.Module, Float[Tensor, "b n"]] = {}
        self.found: dict[nn.Module, Float[Tensor, "b h n"]] = {}

    def run(self, run: Host, given: Mapping[str, Any]) -> Float[Tensor, "b l h n"]:
        """Run the model, and return the products of all layers."""
        with ExitStack() as stack, apply(run.model, self, on="decoder"):
            for module in self.frozen:
                stack.callback(module.register_forward_hook(self._scaled, with_kwargs=True).remove)
            run.model(**{**given, **plain_call(run.model)})
        layers = [self.found[module] * self._factor(chain) for module, chain in self.after.items()]
        widest = max(layer.shape[1] for layer in layers)
        whole = torch.stack([nn.functional.pad(x, (0, 0, 0, widest - x.shape[1])) for x in layers], 1)
        return whole * self._factor(self.last)[:, None]

    def read(self, site: Site, out: Tensor) -> None:
        rows = self.after[site.module].back(self.rows)
        parts, _ = projection_parts(site.module, out.shape[1])
        values = rows.new_empty(*out.shape[:3])
        step = max(1, TILE // (out.shape[0] * rows.shape[2]))
        for head, part in enumerate(parts):
            for start in range(0, out.shape[2], step):
                some = slice(start, start + step)
                written = wide(out[:, head, some].detach()).to(rows) @ wide(part).to(rows)
                values[:, head, some] = torch.linalg.vecdot(written, rows[:, some])
        self.found[site.module] = values

    def _scaled(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> None:
        """Note the factor of a norm at each token."""
        given, result = first_tensor((*args, *kwargs.values())), first_tensor(made)
        assert given is not None and result is not None
        real = self.real.to(given.device)
        scale = self.frozen[module].at(Step(module, given.detach()[real], result.detach()[real])).scale
        self.scales[module] = scale.new_zeros(real.shape).masked_scatter(real, scale)

    def _factor(self, chain: _Norms) -> Float[Tensor, "#b 1 #n"]:
        factor = self.rows.new_ones(1, 1, 1)
        for module in chain.modules:
            factor = factor * self.scales[module][:, None]
        return factor
