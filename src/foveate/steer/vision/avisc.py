"""AvisC: contrast a vision-language model with itself, reading only the image tokens that it attends to too much.

Don't Miss the Forest for the Trees: Attentional Vision Calibration for Large Vision Language Models (2024), arXiv
2405.17820. Some image tokens draw the attention of the last prompt token whatever the question is: blind tokens. A
second reading that keeps only them shows what the model says without the rest of the image, and is subtracted.

The release handles batches of one. Here each sequence of a batch has its own layers and its own blind tokens. The
release's `mask="noise"` draws anew for each prompt; here `seed` determines the noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, UnsupportedModel, shown
from foveate.host.branch import Branch
from foveate.host.hf.model import Host
from foveate.host.method import Method
from foveate.host.model_call import ModelCall
from foveate.host.site import Site
from foveate.steer.parts.contrast import contrast, plausible
from foveate.steer.parts.last_attention import last_attention


@final
@dataclass(eq=False)
class AvisCDecoding(Method):
    """A method that decodes against a second reading of the prompt, in which only the blind image tokens are left.

        with foveate.apply(model, foveate.steer.AvisCDecoding()):
            model.generate(**processor(images=image, text=question, return_tensors="pt"))

    Nothing is trained, and every way of generating works. Cost: each forward pass twice, and a second cache; one row of
    attention per layer while the prompt is read, beside the fused kernel. Prompts are read in one call, with a cache. A
    prompt without an image decodes as it would without the method. The wrong choice where a wrong answer does not come
    from a habit of the model that it also has without the image: the contrast removes nothing else.

    Args:
        alpha: strength of the contrast; 0 for none. The release uses 2.5 for LLaVA-1.5 and 3 for InstructBLIP.
        beta: a token stays possible if it has at least this share of the likeliest token's probability; 0 for all.
        gamma: layers count, from the one with the most attention to the image on, until they hold this share of it.
        lam: a token is blind if its attention is this many standard deviations above the image's mean.
        mask: what replaces the embeddings of the other image tokens: "zeros", "ones", or "noise" (normal).
        over: the span that holds the image. "text" contrasts a prompt of words in the same way, which the paper does
            not do.
        seed: of the noise.
    """

    alpha: float = 2.5
    beta: float = 0.1
    gamma: float = 0.5
    lam: float = 1.0
    mask: Literal["zeros", "ones", "noise"] = "zeros"
    over: Literal["image", "text"] = "image"
    seed: int = 0
    needs_cache: ClassVar[bool] = True
    _branch: ClassVar[Branch] = Branch()

    def __post_init__(self) -> None:
        validate.at_least("alpha", self.alpha, 0.0)
        validate.between("beta", self.beta, 0.0, 1.0)
        _check(self.gamma, self.lam)
        validate.one_of("mask", self.mask, ("zeros", "ones", "noise"))
        validate.one_of("over", self.over, ("image", "text"))
        validate.count("seed", self.seed)

    def bind(self, host: Host) -> None:
        if host.config.is_encoder_decoder or not host.model.can_generate():
            raise UnsupportedModel(
                f"AvisCDecoding needs a decoder that reads image tokens; {type(host.model).__name__} has none"
            )

    def at(self, site: Site) -> bool:
        return site.cache is not None and site.asked == site.q.shape[2] and not site.is_branch

    def read(self, site: Site, out: Tensor) -> None:
        site.step.setdefault(self, []).append(last_attention(site))

    def edit_next_token(self, logits: Tensor, call: ModelCall) -> Tensor:
        left = self._left(call)
        if left is None:
            return logits
        blind = self._branch.logits(self, call, None if call.past else lambda x: self._masked(x, left))
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        sharper = contrast(wide, blind.to(wide.dtype), self.alpha)
        sharper = sharper.masked_fill(~plausible(wide, self.beta), float("-inf"))
        return torch.where(call.notes(self)["seen"][:, None], sharper, wide).to(logits.dtype)

    def _left(self, call: ModelCall) -> Bool[Tensor, "b n"] | None:
        """Return the embeddings of the prompt that the second reading keeps; None if no sequence has an image."""
        notes = call.notes(self)
        if call.past and (call.reads_prompt or "left" not in notes):
            raise OptionError(
                "AvisCDecoding finds the blind tokens when the whole prompt is read in one call, from its first token "
                "on; leave prefill_chunk_size out, and apply the method before the prompt is read"
            )
        if not call.past and (self, "found") not in call.step:
            image = call.spans.required(self.over, "AvisCDecoding")
            notes["left"], notes["seen"] = None, image.any(-1)
            if bool(image.any()):
                rows = torch.stack([row.to(image.device) for row in call.step[self]], 1)
                notes["left"] = find_blind_tokens(rows, image, self.gamma, self.lam) | ~image
            call.step[self, "found"] = True
        return notes["left"]

    def _masked(self, embeds: Float[Tensor, "b n c"], left: Bool[Tensor, "b n"]) -> Float[Tensor, "b n c"]:
        """Return embeddings of which only some are left."""
        if self.mask == "noise":
            draw = torch.Generator().manual_seed(self.seed)
            other = torch.randn(embeds.shape[1:], generator=draw).to(embeds)  # one draw, whatever else is in the batch
        else:
            other = torch.full_like(embeds, float(self.mask == "ones"))
        return torch.where(left.to(embeds.device)[..., None], embeds, other)


def find_blind_tokens(
    attention: Float[Tensor, "*b l n"],
    image: Bool[Tensor, "*b n"] | None = None,
    gamma: float = 0.5,
    lam: float = 1.0,
) -> Bool[Tensor, "*b n"]:
    """Return the image tokens that draw the most attention, in the layers that attend to the image most.

    Layers are taken in the order of their attention to the image, until they hold the share `gamma` of what all layers
    have. A token is blind if its mean attention over them is at least the mean over the image plus `lam` times its
    standard deviation (unbiased; 0 for an image of one token).

    Args:
        attention: weights of the last prompt token, averaged over heads, for each layer.
        image: the tokens of the image; None for all.
        gamma, lam: see `AvisCDecoding`.
    """
    _check(gamma, lam)
    if attention.dim() < 2 or not attention.is_floating_point():
        raise ShapeError(f"attention must be weights (..., layers, N); got {shown(attention)}")
    if image is None:
        image = torch.ones_like(attention[..., 0, :], dtype=torch.bool)
    if image.dtype != torch.bool or image.shape != attention[..., 0, :].shape:
        raise ShapeError(f"image must be bool {tuple(attention[..., 0, :].shape)}; got {shown(image)}")
    inside = attention * image[..., None, :]
    received = _mean_over_layers(inside, gamma)
    count = image.sum(-1, keepdim=True)
    mean = received.sum(-1, keepdim=True) / count.clamp_min(1)
    spread = ((received - mean).square() * image).sum(-1, keepdim=True) / (count - 1).clamp_min(1)
    return image & (received >= mean + lam * spread.sqrt())


def _mean_over_layers(inside: Float[Tensor, "*b l n"], gamma: float) -> Float[Tensor, "*b n"]:
    """Return the mean attention to each image token over the layers that attend to the image most."""
    layer = inside.sum(-1)
    share = layer / layer.sum(-1, keepdim=True).clamp_min(torch.finfo(layer.dtype).tiny)
    order = share.argsort(dim=-1, descending=True, stable=True)
    held = share.gather(-1, order).cumsum(-1)
    count = ((held < gamma).sum(-1, keepdim=True) + 1).clamp_max(layer.shape[-1])
    chosen = order.argsort(-1) < count
    return (inside * chosen[..., None]).sum(-2) / count


def _check(gamma: float, lam: float) -> None:
    validate.between("gamma", gamma, 0.0, 1.0)
    validate.at_least("lam", lam, 0.0)
