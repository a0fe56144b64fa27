"""TidalDecode: a few layers choose the tokens of a decoding step, and the others read only these.

TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention (2024), arXiv 2410.05076. The
optional cache correction, which reads recent tokens again with full attention, is left out: it is a second forward pass
of the model, which a method cannot start inside an attention call. The release uses one re-selection layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, UnsupportedModel, shown
from foveate.core.selection import Indices, Selection
from foveate.host import Host, apply
from foveate.host.hf.layout import layout
from foveate.host.hf.model import host
from foveate.host.probing import Progress
from foveate.host.site import Site
from foveate.kv.base.policy import Policy, calibration_items, check_budget
from foveate.kv.parts.head_split import check_reach, far_layers
from foveate.kv.parts.last_query import has_everything, last_logits

Per = Literal["head", "group", "layer"]


@final
@dataclass(eq=False)
class TidalDecode(Policy):
    """While decoding, a few layers read everything and choose `top_k` tokens; the layers after them read only these.

    Nothing is evicted and prefill is dense. A step makes `dense_layers + 1 + len(reselect_layers)` full reads instead
    of one per layer. The set is used for one step. The wrong choice for shallow models, whose full reads are most of
    the work, and with a re-selection layer whose choice does not suit the later layers: `calibrate` measures which one
    suits them. Layers with a window of their own, or from which another method evicts, read all that they hold. Layer
    numbers count only the layers that attend to all tokens (if there are none, those with the widest window), and skip
    a hybrid model's other layers.

    Args:
        top_k: tokens that a sparse layer reads.
        dense_layers: number of layers before the first selection, which read everything; the next layer selects.
        reselect_layers: further layers that read everything and select again.
        per: the owner of a set: each query "head", each "group" of heads of one key/value head (each key is then read
            once for the group), or the "layer".
        reduce: how the heads of a group or a layer are combined: by the largest logit ("max"), or by their "sum".
    """

    top_k: int = 256
    dense_layers: int = 2
    reselect_layers: tuple[int, ...] = (13,)
    per: Per = "group"
    reduce: Literal["max", "sum"] = "max"
    in_place: ClassVar[bool] = True
    _order: dict[int, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        validate.count("top_k", self.top_k, 1)
        validate.count("dense_layers", self.dense_layers)
        validate.one_of("per", self.per, ("head", "group", "layer"))
        validate.one_of("reduce", self.reduce, ("max", "sum"))
        if not isinstance(self.reselect_layers, tuple | list):
            raise OptionError(f"reselect_layers={shown(self.reselect_layers)} must be a tuple of layer numbers")
        for layer in self.reselect_layers:
            validate.count("reselect_layers", layer)

    def bind(self, host: Host) -> None:
        far = far_layers(layout(host))
        if len(far) < 2:
            raise UnsupportedModel(
                f"tidal_decode needs two layers that attend to all tokens, one to select and one to read; "
                f"{type(host.model).__name__} has {len(far)}"
            )
        check_reach("top_k: tidal_decode", self.top_k, host)
        for layer in self.reselect_layers:
            if layer >= len(far):
                raise OptionError(
                    f"reselect_layers={self.reselect_layers} must be under the {len(far)} layers of this model that "
                    f"attend to all tokens"
                )
        self._order = {layer.layer: order for order, layer in enumerate(far)}

    def at(self, site: Site) -> bool:
        if site.phase != "decode" or self._order.get(site.layer, -1) < self.dense_layers:
            return False
        return has_everything(site)

    def select(self, site: Site) -> Selection | None:
        if site.k.shape[2] <= self.top_k:
            return None
        order = self._order[site.layer]
        if order == self.dense_layers or order in self.reselect_layers:
            site.step[id(self)] = self._choose(site)
            return None
        if id(self) not in site.step:
            return None
        return Indices(site.step[id(self)].to(site.q.device), 1, site.k.shape[2])

    def _choose(self, site: Site) -> Int[Tensor, "b h 1 k"]:
        logits = last_logits(site)
        if self.per != "head":
            groups = logits.unflatten(1, (site.k.shape[1] if self.per == "group" else 1, -1))
            logits = groups.amax(2) if self.reduce == "max" else groups.sum(2)
        return logits.topk(self.top_k).indices[:, :, None]

    @classmethod
    def calibrate(
        cls, host: Host, data: Iterable[tuple[Tensor, Tensor]], progress: Progress | None = None
    ) -> dict[str, Tensor]:
        """Measure, for each layer, the loss of one answer if the layer re-selects; see `reselection_losses`."""
        ((ids, answers),) = calibration_items(data, 1)
        dense = min(2, len(far_layers(layout(host))) // 4)
        losses = reselection_losses(host.model, ids, answers, max(1, ids.shape[1] // 16), dense, progress)
        return {"losses": losses}

    @classmethod
    def at_budget(cls, budget: float, host: Host, length: int, **learnt: Tensor) -> Self:
        """See `Policy.at_budget`. There is one re-selection, and min(2, a quarter of the layers) dense layers.

        The re-selection layer is the one with which the model loses least on an answer, if `calibrate` has measured
        this. Otherwise it is the layer at 13/32 of the depth, that of the paper's Llama models. `top_k` uses the budget
        that the full reads leave. If they leave none, the model is too shallow for the budget: sparse layers then read
        the budget's share, and the whole model reads more.
        """
        return cls(*split_budget(budget, len(far_layers(layout(host))), length, learnt.get("losses")))


def split_budget(budget: float, layers: int, length: int, losses: Tensor | None) -> tuple[int, int, tuple[int, ...]]:
    """Split a budget for some layers into `(top_k, dense_layers, reselect_layers)`; see `TidalDecode.at_budget`."""
    check_budget(budget, length)
    if losses is not None and tuple(losses.shape) != (layers,):
        raise ShapeError(f"losses must be ({layers},) for this model; got {tuple(losses.shape)}")
    dense = min(2, layers // 4)
    again: tuple[int, ...] = ()
    later = reselecting(layers, dense)
    if later:
        middle = min(max(round(layers * 13 / 32), later[0]), later[-1])
        # of losses that are the same up to rounding, the layer nearest to the paper's
        each = [0.0 if losses is None else round(float(losses[layer]), 3) for layer in later]
        again = (min(later, key=lambda layer: (each[layer - later[0]], abs(layer - middle))),)
    full = dense + 1 + len(again)
    left = (budget * layers - full) / max(1, layers - full)
    return Policy.tokens(left if left > 0 else budget, length), dense, again


def reselecting(layers: int, dense: int) -> range:
    """Return the layers that may re-select: the last one for itself alone, unless there are three layers or fewer."""
    return range(dense + 1, layers if layers > 3 else layers - 1)


@torch.no_grad()
def reselection_losses(
    model: object, ids: Int[Tensor, "b n"], answers: Bool[Tensor, "b n"], top_k: int, dense: int = 2,
    progress: Progress | None = None,
) -> Float[Tensor, " l"]:  # fmt: skip
    """Return the mean loss of an answer's tokens for each layer that may re-select; infinite for the others.

    The text before the answer is read once, densely; the answer follows token by token. The paper places the layer by
    the same test, pass keys in long text. How much the layers' choices have in common (`topk_overlap`) is no guide: on
    Qwen2.5 0.5B it points at a layer behind the heads that retrieve.

    Args:
        model: a decoder.
        ids: text without padding; the first sequence with an answer counts.
        answers: the answers' tokens; the first answer counts, up to 16 tokens of it.
        top_k: tokens that a sparse layer reads.
        dense: layers before the first selection.
        progress: called as `progress(step, steps, note)`.
    """
    here, layers = host(model), len(far_layers(layout(host(model))))
    rows = [row for row in range(len(ids)) if answers[row, 1:].any()]
    if not rows:
        raise OptionError("answers must mark a token after the first one; got none")
    text, marked = ids[rows[0]], answers[rows[0]].nonzero()[:, 0].tolist()
    begin = next(place for place in marked if place > 0)
    stop = next(place for place in range(begin, begin + 17) if place - begin == 16 or place not in marked)
    text = text.to(here.model.device)[None]
    past = here.model(input_ids=text[:, : begin - 1], use_cache=True).past_key_values if begin > 1 else None
    losses = torch.full((layers,), torch.inf)
    for step, layer in enumerate(reselecting(layers, dense)):
        cache, total = copy.deepcopy(past), 0.0
        with apply(here.model, TidalDecode(top_k, dense, (layer,))):
            for place in range(begin - 1, stop - 1):
                out = here.model(input_ids=text[:, place : place + 1], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                total += F.cross_entropy(out.logits[:, -1].float(), text[:, place + 1]).item()
        losses[layer] = total / (stop - begin)
        if progress is not None:
            progress(step + 1, len(reselecting(layers, dense)), f"layer {layer} re-selects: loss {losses[layer]:.3f}")
    return losses
