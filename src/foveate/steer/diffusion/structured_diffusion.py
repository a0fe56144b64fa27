"""Structured diffusion guidance: cross-attention that reads each noun phrase as if it stood alone.

Training-Free Structured Diffusion Guidance for Compositional Text-to-Image Synthesis (2022), arXiv 2212.05032. A text
encoder mixes the words of a prompt, so that in "a red cube and a blue ball" some red gets into the encoding of "ball".
Here each phrase is encoded alone as well, and the values of its tokens come from there too. The layout stays that of
the prompt, because the attention map does.

The release writes the joined values into the prompt's encoding in place, so that in mode "pairs" its first keys change
as well; here they do not. The release parses with a constituency tree, of which it takes all noun phrases, the highest
or the lowest; here the caller gives the phrases, or spaCy's noun chunks do, which are the lowest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Self, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, UnsupportedModel, shown
from foveate.host.diffusers.model import DiffusionHost
from foveate.host.diffusers.words import phrase_spans, tokens_before
from foveate.host.hf.model import Host
from foveate.host.method import Method
from foveate.host.site import Site
from foveate.steer.diffusion.noun_phrases import noun_phrases
from foveate.steer.diffusion.structured_attention import Span, align_all, align_spans, structured_attention

#: The modes: one map over the mean of several values, or several maps over one value.
Mode = Literal["values", "pairs"]

#: The largest difference between an encoding and the prompt's, of its norm, at which it is the prompt's: half precision
#: rounds far less, and another prompt differs far more.
SAME = 0.02


@final
class StructuredDiffusion(Method):
    """A method that binds attributes to their objects in the images of a text-to-image diffusion model.

        method = foveate.steer.StructuredDiffusion.of_prompt(
            pipe.tokenizer, pipe.text_encoder, prompt, ["a red cube", "a blue ball"]
        )
        with foveate.apply(pipe.unet, method):
            image = pipe(prompt, guidance_scale=7.5).images[0]

    Nothing is trained. It acts in every cross-attention layer and in every step, on the rows of the batch whose context
    is the prompt's encoding. All other rows stay as they are, as the unconditional half of classifier-free guidance
    does. Without phrases, and with phrases whose encodings are the prompt's own rows, it is the plain model.

    Cost: mode "values" projects k + 1 short contexts, and makes one attention map as before; mode "pairs" makes k + 1
    maps. The wrong choice where the text encoder reads words alone, for prompts of one object, and where the objects
    themselves are missing or merged: the layout does not change.

    Args:
        full: the encoded prompt `(T, d)`, as it reaches cross-attention. A model that projects its prompt first, as
            PixArt does, needs the projected one.
        phrases: each phrase, encoded alone in the same way, `(T, d)`.
        spans: each phrase's tokens in the prompt, `(start, stop)`, without the tokens before the text.
        mode: "values" is the paper's; "pairs" is its variant for prompts that join two phrases by "and".
        bos: tokens before the text: 1 for CLIP, 0 for T5.

    Raises:
        OptionError: in a forward pass, if no row of the batch is the prompt. Leave the block for such passes.
    """

    def __init__(
        self, full: Float[Tensor, "t d"], phrases: Sequence[Float[Tensor, "t d"]], spans: Sequence[Span],
        mode: Mode = "values", bos: int = 1,
    ) -> None:  # fmt: skip
        validate.one_of("mode", mode, ("values", "pairs"))
        self.full, self.mode, self.count = full, mode, len(phrases)
        contexts = [full, *align_spans(full, phrases, spans, bos)]
        if mode == "pairs":
            contexts.append(align_all(full, phrases, spans, bos))
        self.contexts = torch.stack(contexts)

    @classmethod
    @torch.no_grad()
    def of_prompt(
        cls, tokenizer: Any, text_encoder: Any, prompt: str,
        phrases: Sequence[str] | Callable[[str], Sequence[str]] = noun_phrases, mode: Mode = "values",
    ) -> Self:  # fmt: skip
        """Encode a prompt and its phrases with a pipeline's only text encoder, as Stable Diffusion's does.

        Args:
            tokenizer, text_encoder: of the pipeline; the tokenizer is a fast one.
            prompt: the prompt, as the pipeline gets it.
            phrases: phrases that stand in the prompt, or a parser that finds them. `noun_phrases` needs spaCy.
            mode: see `StructuredDiffusion`.
        """
        found = list(phrases(prompt) if callable(phrases) else phrases)
        if isinstance(phrases, str):
            raise OptionError(f"phrases={shown(phrases)} must be a list of phrases, or a parser")
        texts, bos = [prompt, *found], tokens_before(tokenizer, prompt)
        spans = [(span.start - bos, span.stop - bos) for span in phrase_spans(tokenizer, prompt, found)]
        read = tokenizer(
            texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        ids = read.input_ids
        for phrase, span, row in zip(found, spans, ids[1:], strict=True):
            if not torch.equal(row[bos : bos + span[1] - span[0]], ids[0, bos + span[0] : bos + span[1]]):
                raise OptionError(f"phrases: {shown(phrase)} has other tokens alone than in the prompt")
        masked = bool(getattr(text_encoder.config, "use_attention_mask", False))
        mask = read.attention_mask.to(text_encoder.device) if masked else None
        states = text_encoder(ids.to(text_encoder.device), attention_mask=mask)[0]
        return cls(states[0], list(states[1:]), spans, mode, bos)

    def bind(self, host: Host | DiffusionHost) -> None:
        if not isinstance(host, DiffusionHost) or not host.part(crosses=True):
            raise UnsupportedModel(
                f"StructuredDiffusion needs cross-attention to a prompt in a diffusion model; "
                f"{type(host.model).__name__} has none"
            )

    def at(self, site: Site) -> bool:
        return self.count > 0 and site.context is not None

    def attend(self, site: Site) -> Float[Tensor, "b hq n dv"]:
        assert site.context is not None and site.project is not None
        mine, others = self._rows(site)
        k, v = site.project(self.contexts.to(site.context))
        shape = (len(mine), *k.shape[1:])
        keys, values = [site.k[mine]], [each.expand(shape) for each in v]
        if self.mode == "pairs":
            keys, values = [*keys, *(each.expand(shape) for each in k[1:-1])], values[-1:]
        out = site.q.new_empty(*site.q.shape[:3], v.shape[-1])
        out = out.index_copy(0, mine, structured_attention(*_part(site, mine), keys, values, site.scale, site.dropout))
        q, mask = _part(site, others)
        plain = structured_attention(q, mask, [site.k[others]], [site.v[others]], site.scale, site.dropout)
        return out.index_copy(0, others, plain)

    def _rows(self, site: Site) -> tuple[Int[Tensor, " r"], Int[Tensor, " s"]]:
        """Return the rows of the batch that read the prompt, and the others; asks the device once in a pass."""
        context = site.context
        assert context is not None
        if context.shape[1:] != self.full.shape:
            raise ShapeError(
                f"full is {tuple(self.full.shape)} and cross-attention reads {tuple(context.shape[1:])}: give "
                f"encodings as they reach it, padded and projected as the model does"
            )
        known = site.step.get(id(self))
        if known is not None and known[0] is context:
            return known[1]
        same = same_rows(context, self.full.to(context))
        mine, others = same.nonzero()[:, 0], (~same).nonzero()[:, 0]
        if not len(mine):
            raise OptionError(
                "no row of this batch reads the prompt that StructuredDiffusion was made for: leave the block for a "
                "pass without it, and encode the prompt as the pipeline does"
            )
        site.step[id(self)] = context, (mine, others)
        return mine, others


def same_rows(context: Float[Tensor, "b t d"], full: Float[Tensor, "t d"]) -> Bool[Tensor, " b"]:
    """Return which encodings of a batch are a given one, but for rounding."""
    gap = (context - full).flatten(1).float().norm(dim=1)
    return gap <= SAME * full.float().norm()


def _part(site: Site, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the queries and the mask of some rows of the batch."""
    mask = site.mask
    return site.q[rows], mask if mask is None or mask.shape[0] == 1 else mask[rows]
