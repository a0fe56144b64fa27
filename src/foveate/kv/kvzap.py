"""KVzap: a linear map of each layer's hidden states predicts what KVzip would score.

KVzap: Fast, Adaptive, and Faithful KV Cache Pruning (2026), arXiv 2601.07891.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Self, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import DynamicCache

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError
from foveate.core.linear_systems import solve_positive
from foveate.host import Host, Method, apply, decoder_inputs
from foveate.host.hf.layout import layout
from foveate.host.hf.words import tokenizer_of
from foveate.host.output_projection import check_projections
from foveate.host.pass_end import PassEnd
from foveate.host.probing import Progress
from foveate.host.site import Site
from foveate.host.slots.ends import AT_END, AtEnd
from foveate.kv.base.policy import calibration_items
from foveate.kv.base.scored import Heads, ScorePolicy
from foveate.kv.parts import slot_notes
from foveate.kv.parts.reconstruction import Instruction, Reconstruction

#: Texts that are read twice in a calibration.
_TEXTS = 8


@final
@dataclass(eq=False)
class KVzap(ScorePolicy):
    """A token's score is a linear map of the hidden state from which its key is made, one number for each head.

    The map is fitted, once for each model, to the logarithm of KVzip+'s scores, which need a second reading of a text.
    With a `threshold`, tokens that score below it are dropped, in the prompt and while decoding, once `recent` newer
    tokens have come: what is kept then follows the text, as in the paper (thresholds of -3 to -6 for Qwen3-8B, -6 to -9
    for Llama 3.1 8B). Without one, the best `share` over all heads of all layers stays after the prompt. Cost: one
    product of each hidden state with `Hkv` vectors, and 8 bytes for each stored token. The wrong choice for texts
    unlike those of the calibration.

    This is the paper's linear surrogate, KVzap-Linear. Its other one, a network with one hidden layer of 512 numbers,
    is not here. As in the release, a ridge regression with penalty 1 fits it.

    Args:
        weight: the maps `(layers, Hkv, width)`, by `KVzap.calibrate`; zero for heads that do not exist.
        bias: their constants `(layers, Hkv)`.
        threshold: least score of a token that is kept, the logarithm of an attention weight; None for a share.
        every: while decoding, compress again after that many new tokens; with a threshold only.
        share, sink, recent, heads, safeguard, limit, layers: see `ScorePolicy`.
    """

    recent: int = 128
    heads: Heads = "global"
    safeguard: float = 0.0
    weight: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0), repr=False)
    bias: Tensor = field(default_factory=lambda: torch.zeros(0, 0), repr=False)
    _rows: dict[int, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.threshold is not None and self.every is None:
            self.every = 1
        super().__post_init__()
        if self.threshold is None and self.every is not None:
            raise OptionError(f"every={self.every} goes with a threshold; a share is kept of the prompt only")
        validate.tensor("weight", self.weight)
        validate.tensor("bias", self.bias)

    def bind(self, host: Host) -> None:
        super().bind(host)
        found = layout(host)
        expected = len(found), max(layer.kv_heads for layer in found.layers), host.config.hidden_size
        if not self.weight.numel():
            raise OptionError("KVzap needs weight= and bias= of this model: KVzap.calibrate")
        if tuple(self.weight.shape) != expected or tuple(self.bias.shape) != expected[:2]:
            raise ShapeError(
                f"weight and bias must be (layers, key/value heads, width)={expected} and {expected[:2]} for this "
                f"model; got {tuple(self.weight.shape)} and {tuple(self.bias.shape)}"
            )
        self._rows = {one.layer: row for row, one in enumerate(found.layers)}

    def read(self, site: Site, out: Tensor) -> None:
        if self.is_off(site) or (self.threshold is None and site.phase == "decode"):
            return
        if site.hidden is None:
            raise OptionError("KVzap needs the layers' hidden states, and this model's attention does not get them")
        row, heads, n = self._rows[site.layer], site.positions.shape[1], site.q.shape[2]
        hidden = site.hidden.float()
        new = hidden @ self.weight[row, :heads].to(hidden).mT + self.bias[row, :heads].to(hidden)
        at = (site.positions - (site.seen - n)).long()
        scores = new.mT.gather(2, at.clamp(0, n - 1)).masked_fill((at < 0) | (at >= n), 0.0)
        slot_notes.add(site.notes(self), site, scores)

    def score(self, site: Site) -> Float[Tensor, "b hkv s"]:
        return slot_notes.find(site.notes(self), site)

    def note_kept(self, site: Site, kept: Bool[Tensor, "b hkv s"]) -> None:
        slot_notes.trim(site.notes(self), site, kept, int(kept.sum(-1).max()))

    @classmethod
    def calibrate(
        cls, host: Host, data: Iterable[tuple[Tensor, Tensor]], progress: Progress | None = None
    ) -> dict[str, Tensor]:
        """Fit the maps to the scores of KVzip+ on eight texts, each of which is read twice."""
        check_projections(host)
        words = tokenizer_of(host.model)
        instruction = Instruction() if words is None else Instruction.of(words)
        fit = _Fit(Reconstruction(instruction, outputs=True))
        assert host.decoder is not None
        for step, (ids, _) in enumerate(calibration_items(data, _TEXTS)):
            with torch.no_grad(), apply(host.model, fit, on="decoder"):
                inputs = decoder_inputs(host, ids)
                host.decoder(**inputs, past_key_values=DynamicCache(config=host.config), use_cache=True)
            if progress is not None:
                progress(step + 1, _TEXTS, "scores of a second reading")
        found, width = layout(host), host.config.hidden_size
        weight = torch.zeros(len(found), max(layer.kv_heads for layer in found.layers), width)
        bias = torch.zeros(weight.shape[:2])
        for row, one in enumerate(found.layers):
            if one.layer in fit.sums:
                solved, constant = fit.sums[one.layer].solve()
                weight[row, : solved.shape[0]], bias[row, : solved.shape[0]] = solved, constant
        return {"weight": weight, "bias": bias}

    @classmethod
    def at_budget(cls, budget: float, host: Host, length: int, **learnt: Tensor) -> Self:
        """See `Policy.at_budget`. A fixed share after the prompt; the newest tokens take a quarter of it at most."""
        made = super().at_budget(budget, host, length)
        recent = min(made.recent, max(1, cls.tokens(budget, length) // 4))
        return replace(made, recent=recent, weight=learnt["weight"], bias=learnt["bias"])


class _Sums:
    """The sums of a ridge regression of several numbers `y` on `x`, with a constant that is not penalised."""

    def __init__(self, width: int, outputs: int) -> None:
        self.count = 0
        self.x, self.y = torch.zeros(width, dtype=torch.float64), torch.zeros(outputs, dtype=torch.float64)
        self.xx, self.xy = torch.zeros(width, width), torch.zeros(width, outputs)

    def add(self, x: Float[Tensor, "n d"], y: Float[Tensor, "n h"]) -> None:
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.mT @ x
        self.xy += x.mT @ y

    def solve(self, penalty: float = 1.0) -> tuple[Float[Tensor, "h d"], Float[Tensor, " h"]]:
        mean_x, mean_y = self.x / self.count, self.y / self.count
        xx = self.xx.double() - self.count * mean_x[:, None] * mean_x
        xy = self.xy.double() - self.count * mean_x[:, None] * mean_y
        weight = solve_positive(xx + penalty * torch.eye(len(xx), dtype=xx.dtype), xy).mT
        return weight.float(), (mean_y - weight @ mean_x).float()


class _Fit(Method):
    """A method that reads each text twice and adds up hidden states and the logarithms of their tokens' scores."""

    evicts = True

    def __init__(self, how: Reconstruction) -> None:
        self.how, self.sums = how, dict[int, _Sums]()

    def read(self, site: Site, out: Tensor) -> None:
        if site.hidden is not None:
            site.step[self, site.layer] = site.hidden.float().cpu()

    def keep(self, site: Site) -> AtEnd | None:
        whole = site.slots is not None and site.slots.window is None
        return AT_END if whole and (self, site.layer) in site.step else None

    def keep_all(self, end: PassEnd) -> list[Tensor | None]:
        self.how.measure(end, self)
        for site in end.sites:
            hidden, scores = site.step[self, site.layer], slot_notes.find(site.notes(self), site).cpu()
            order = site.positions[:, :1].cpu().long().clamp_min(0)  # every head holds every token
            places = order[:, 0, :, None].expand(-1, -1, hidden.shape[2])
            real = (site.positions[:, 0] >= 0).cpu()
            x, y = hidden.gather(1, places)[real], scores.mT[real].clamp_min(1e-30).log()
            sums = self.sums.setdefault(site.layer, _Sums(x.shape[1], y.shape[1]))
            sums.add(x, y)
        return [None] * len(end.sites)
