"""SimLayerKV: layers that only look at sinks and recent tokens keep only those.

SimLayerKV: A Simple Framework for Layer-Level KV Cache Reduction (2024), arXiv 2410.13846. The authors' code is
sail-sg/SimLayerKV.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core import validate
from foveate.host import Ends, Host
from foveate.host.hf.layout import layout
from foveate.host.method import Method
from foveate.host.padding import tokens
from foveate.host.probing import Progress, read
from foveate.host.site import Site
from foveate.kv.base.policy import Policy, calibration_items, check_budget
from foveate.kv.base.scored import own_positions
from foveate.kv.parts.head_split import far_layers, keep_ends
from foveate.kv.parts.window_queries import LastQueries, last_rows, window_weights

#: Texts that `calibrate` reads.
_TEXTS = 4


@final
@dataclass(eq=False)
class SimLayerKV(Policy):
    """A layer is lazy if its last queries pay more than `threshold` of their attention to sinks and recent tokens.

    A lazy layer keeps the first `sink` and the last `recent` tokens, in all of its heads, also while decoding. Every
    other layer keeps everything. Cost: `queries` rows of weights in each layer, once after the prompt. What is kept in
    total follows from the text and the threshold. The wrong choice where a layer has few heads that retrieve: the mean
    over its heads hides them. A prompt of at most `sink + recent` tokens says nothing; the layers are then told apart
    when the sequence is twice as long as that. In a batch, a layer takes the memory of its longest sequence.

    Args:
        threshold: share of the attention, a mean over query heads, above which a layer is lazy. The release takes 0.65
            for Llama 2, 0.8 for Mistral, 0.85 for Qwen and 0.9 for Llama 3.
        sink: first tokens that a lazy layer keeps.
        recent: last tokens that a lazy layer keeps.
        queries: last queries of the prompt to average over.
        most: the most layers that may keep everything; when as many do, the layers above are lazy whatever they look
            at. None for no limit.

    The release decides when the first token is generated, with that token's query, and cuts lazy layers once: tokens
    that are made later all stay there. This decides with the prompt's end, as kvpress does, so that a text can be
    compressed before a question comes.
    """

    threshold: float = 0.9
    sink: int = 4
    recent: int = 1024
    queries: int = 1
    most: int | None = None
    evicts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        validate.between("threshold", self.threshold, 0.0, 1.0)
        validate.count("sink", self.sink)
        validate.count("recent", self.recent, 1)
        validate.count("queries", self.queries, 1)
        if self.most is not None:
            validate.count("most", self.most)

    def at(self, site: Site) -> bool:
        return self.threshold < 1.0 or self.most is not None

    def keep(self, site: Site) -> Tensor | Ends | None:
        notes = site.notes(self)
        if site.phase == "prefill" or not notes.get("settled", True):
            self._decide(site, notes)
        if notes.get("alike", False) is False:
            return None
        if notes["alike"]:
            return keep_ends(site, self.sink, self.recent)
        own, count = own_positions(site)
        kept = (own < self.sink) | (own >= (count - self.recent)[:, None, None]) | ~notes["lazy"][:, None, None]
        return kept & (own >= 0)

    def _decide(self, site: Site, notes: dict[str, Any]) -> None:
        """Note for which sequences this layer is lazy. It stays so, since it has dropped tokens."""
        _, count = own_positions(site)
        none = torch.zeros_like(count, dtype=torch.bool)
        decided, before = notes.get("decided", none), notes.get("lazy", none)
        able = last_rows(site, 1)[1][:, 0]  # a sequence whose prompt ended in an earlier piece decides no more
        if site.phase == "prefill":
            able = able & (count > self.sink + self.recent)
        else:
            able = able & ~decided & (count >= 2 * (self.sink + self.recent))
        lazy = lazy_mass(site, self.sink, self.recent, self.queries) > self.threshold
        key = (id(self), "layers that keep everything")
        used = site.step.get(key, torch.zeros_like(count))
        if self.most is not None:
            lazy = lazy | (used >= self.most)
        notes["lazy"], notes["decided"] = before | (lazy & able), decided | able
        site.step[key] = used + ~notes["lazy"]
        rows, settled = torch.stack([notes["lazy"], notes["decided"]]).tolist()  # the host waits for the device here
        notes["alike"] = rows[0] if len(set(rows)) == 1 else None
        notes["settled"] = all(settled)

    @classmethod
    def calibrate(
        cls, host: Host, data: Iterable[tuple[Tensor, Tensor]], progress: Progress | None = None
    ) -> dict[str, Tensor]:
        """Measure each layer's attention to sinks and the last eighth of a text, a mean over a few texts."""
        probe = _Probe()
        for step, (ids, _) in enumerate(calibration_items(data, _TEXTS)):
            read(host, ids[:1], probe)
            if progress is not None:
                progress(step + 1, _TEXTS, "lazy layers")
        found = [probe.found[layer.layer] for layer in layout(host).layers]
        return {"mass": torch.tensor([sum(one) / len(one) for one in found])}

    @classmethod
    def at_budget(cls, budget: float, host: Host, length: int, **learnt: Tensor) -> Self:
        """See `Policy.at_budget`. Half of the budget buys windows in all layers, the rest layers that keep everything.

        As many layers keep everything as that buys, at most; what is then left lengthens the windows. The threshold
        lies between the layers that were lazy in calibration and the others.
        """
        check_budget(budget, length)
        if budget >= 1.0:
            return cls(threshold=1.0)
        far, mass = far_layers(layout(host)), learnt.get("mass")
        most = int(budget / 2 / (1 - budget / 2) * len(far) + 1e-6)
        window = max(1, int((budget * len(far) - most) / (len(far) - most) * length))
        sink, threshold = min(4, window - 1), cls.threshold
        if mass is not None and most:
            order = mass.double().sort().values
            threshold = float(order[most - 1 : most + 1].mean().clamp(0.0, 0.999))
        return cls(threshold=threshold, sink=sink, recent=window - sink, most=most)


def lazy_mass(site: Site, sink: int, recent: int, queries: int = 1) -> Float[Tensor, " b"]:
    """Return the attention of each sequence's last queries to its first and its last tokens, a mean over heads."""
    last = LastQueries.of(site, queries)
    weights = window_weights(site, last)
    found, positions = tokens(site), site.positions
    own = positions if found is None else found.own(positions)
    first = last.at if found is None else found.own(last.at[:, None])[:, 0]
    near = own[:, :, None] > first[:, None, :, None] - recent
    near = (near | (own < sink)[:, :, None]).repeat_interleave(weights.shape[1] // own.shape[1], 1)
    return (weights * near).sum(-1).mean(1).sum(-1) / last.real.sum(-1).clamp_min(1)


class _Probe(Method):
    """A method that records how much of each layer's attention goes to sinks and the last eighth of a text."""

    def __init__(self) -> None:
        self.found: dict[int, list[float]] = {}

    def read(self, site: Site, out: Tensor) -> None:
        mass = lazy_mass(site, 4, max(1, site.seen // 8))
        self.found.setdefault(site.layer, []).append(float(mass.mean()))
