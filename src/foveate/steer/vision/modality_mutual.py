"""Modality-mutual attention in a pretrained model: its image tokens see the question that follows them.

Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention for Multimodal LLMs (2025), arXiv
2503.02597. `foveate.ops.sparse.modality_mutual_mask` is the mask itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool
from torch import Tensor

from foveate.core import engines
from foveate.core.call import AttentionCall
from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host.method import Method
from foveate.host.site import Site
from foveate.host.spans import Spans
from foveate.ops.sparse.modality_mutual import mutual_pairs


@final
@dataclass(eq=False)
class ModalityMutual(Method):
    """A method that lets the image tokens of a prompt see all of its question. Text stays causal.

        with foveate.apply(model, foveate.steer.ModalityMutual()) as run:
            run.spans["question"] = torch.arange(40, 52)
            model.generate(**inputs)

    The span "image" is found in the inputs or set like "question", which ends before the marker of the answer. A prompt
    without an image, or with an empty question, is read as usual, and decoding is the model's own. The method adds
    pairs to the model's mask, so that padding stays hidden, and a layer with a window sees the question from any
    distance. Cost: prompts take a kernel with a mask. A model has to be fine-tuned inside such a block, for example
    with `backward()` of its own loss; the wrong choice for one that was not.
    """

    def at(self, site: Site) -> bool:
        return site.is_causal and not site.crosses and site.phase == "prefill" and "image" in site.spans

    def attend(self, site: Site) -> Tensor | None:
        pairs = self._pairs(site)
        if pairs is None:
            return None
        if site.softcap is not None:
            raise UnsupportedModel(f"ModalityMutual has no kernel for the soft cap of {type(site.module).__name__}")
        mask = site.mask
        if mask is not None and mask.dtype == pairs.dtype:
            mask = mask | pairs
        elif mask is not None:
            mask = mask.masked_fill(pairs & (mask <= torch.finfo(mask.dtype).min), 0.0)
        return engines.run(AttentionCall(site.q, site.k, site.v, site.scale, mask, dropout=site.dropout))

    def _pairs(self, site: Site) -> Bool[Tensor, "b h q s"] | None:
        """Return the image's queries with the question's keys; None if there are none."""
        spans = site.spans
        assert isinstance(spans, Spans)
        image, asked = spans.required("image", "ModalityMutual"), site.query_positions
        if not bool(image.any()):
            return None
        question = spans.required("question", "ModalityMutual")
        if site.real is not None:
            question = question & site.real[:, : question.shape[1]]
        if bool((image[:, : int(asked[0])].any(1) & question[:, asked].any(1)).any()):
            raise OptionError(
                "ModalityMutual needs images and question in one call: leave prefill_chunk_size out, and in a later "
                'turn set run.spans["image"] to its own images'
            )
        if not bool((image[:, asked].any(1) & question.any(1)).any()):
            return None
        at = site.positions[:, :1] if site.is_whole else site.positions
        keys = question[:, None].expand(-1, at.shape[1], -1).gather(2, at.clamp_min(0).long()) & (at >= 0)
        pairs = torch.cat([mutual_pairs(image[:, asked], head) for head in keys.unbind(1)], 1)
        return pairs.repeat_interleave(1 if at.shape[1] == 1 else site.q.shape[1] // at.shape[1], 1)
