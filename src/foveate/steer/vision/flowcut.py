"""FlowCut: drop image tokens inside the image encoder, by what flows between each of them and the class token.

FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models (2025), arXiv 2505.19536. Three
signs tell how much a patch matters to the class token: how much the class token attends to it, how much its value
resembles the class token's, and how strong its value is. Their product is averaged over layers, and the more uneven the
attention of the class token is, the more patches are dropped.

The release gives NaN where a patch gets no attention at all; here 0 log 0 is 0. For pictures in tiles it leaves out the
tokens that end a row of patches; here these stay, and do not count. The release can fine-tune a model with FlowCut on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, UnsupportedModel, shown
from foveate.host.hf.model import Host
from foveate.host.hf.stacks import Stack, stacks_of
from foveate.host.method import Method
from foveate.host.site import Site
from foveate.host.spans import Spans
from foveate.host.stream import Stream
from foveate.host.weight_tiles import weight_tile

#: Names of an image encoder's class token.
_CLASS_TOKENS = ("class_embedding", "cls_token")


@final
@dataclass(eq=False)
class FlowCut(Method):
    """A method that drops image tokens while a picture is encoded, so that a language model reads fewer of them.

        with foveate.apply(model, foveate.steer.FlowCut(128)):
            model.generate(**processor(images=image, text=question, return_tensors="pt"))

    Nothing is trained. Of an encoder of L blocks, the first L - 3 or so get fewer patches step by step, the last two
    exactly `target`, and a decoder behind it reads `target` tokens for each picture, at consecutive positions. Without
    a decoder (a classifier, a bare encoder), outputs have an entry for each patch: a dropped one has its last state.
    Cost: one row of attention and one of products of values per block. The wrong choice for encoders without a class
    token, for encoders that merge patches, and where small details matter that the class token does not look at.

    Args:
        target: patches of each picture that stay; all, if there are no more.
        momentum: share of the scores so far in the score of a layer.
        llm_layer: number of the decoder's block behind which a second cut leaves `target` tokens of all pictures
            together; the encoder then leaves half of `target` for each. For pictures in tiles (LLaVA-NeXT); the release
            uses 1. None for no second cut.
        over: the span of the second cut. "text" cuts a prompt of words in the same way and leaves the encoder alone,
            which the paper does not do.
    """

    target: int = 128
    momentum: float = 0.5
    llm_layer: int | None = None
    over: Literal["image", "text"] = "image"
    renumbers = True

    def __post_init__(self) -> None:
        validate.count("target", self.target, 1)
        validate.between("momentum", self.momentum, 0.0, 1.0)
        if self.llm_layer is not None:
            validate.count("llm_layer", self.llm_layer)
            validate.count("target", self.target, 2)
        validate.one_of("over", self.over, ("image", "text"))
        if self.over == "text" and self.llm_layer is None:
            raise OptionError('over="text" needs llm_layer, the number of the block behind which words are cut')

    def bind(self, host: Host) -> None:
        self.drops_in = ("image",) if self.llm_layer is None else ("image", "text")
        if self.llm_layer is not None and (host.decoder is None or self.llm_layer >= host.layers - 1):
            raise OptionError(
                f"llm_layer={self.llm_layer} must be a block of a decoder before its last one (of {host.layers})"
            )
        if self.over == "text":
            self.drops_in = ("text",)
            return
        stacks = stacks_of(host, ("image",))
        if not stacks:
            raise UnsupportedModel(f"FlowCut needs an image encoder; {type(host.model).__name__} has none")
        for stack in stacks:
            _check(host, stack)

    def at(self, site: Site) -> bool:
        if site.is_causal:
            return site.layer == self.llm_layer and site.tokens > 1
        return self.over == "image" and site.tokens > 1

    def read(self, site: Site, out: Tensor) -> None:
        if site.is_causal:
            site.step[self] = site
        else:
            site.step[self] = weight_tile(site, slice(0, 1)).weights[:, :, 0].mean(1)[:, 1:], site.v

    def drop(self, layer: int, hidden: Tensor, stream: Stream) -> Tensor | None:
        if stream.part == "image":
            return self._cut_patches(layer, hidden.shape[1] - 1, stream)
        return self._cut_span(stream) if layer == self.llm_layer and stream.tokens > 1 else None

    def _cut_patches(self, layer: int, n: int, stream: Stream) -> Bool[Tensor, "b n"] | None:
        """Return the class token and the patches that stay behind a block of the encoder."""
        target, remaining = self.target if self.llm_layer is None else self.target // 2, stream.depth - 3 - layer
        if layer < 0 or remaining < 0 or n <= target:
            return None
        attention, values = stream.step.pop(self)
        score = flowcut_score(attention, values)
        if self in stream.notes:
            score = self.momentum * stream.notes[self] + (1 - self.momentum) * score
        stream.notes[self] = score
        count = 0 if remaining % 2 else prune_count(attention, n, target, remaining)
        if not count:
            return None
        best = score.topk(n - count).indices.sort().values
        stream.notes[self] = score.gather(1, best)
        keep = torch.zeros_like(score, dtype=torch.bool).scatter(1, best, True)
        return torch.cat([torch.ones_like(keep[:, :1]), keep], 1)

    def _cut_span(self, stream: Stream) -> Bool[Tensor, "b n"] | None:
        """Return the tokens that stay behind a block of the decoder, where the last one has the class token's part."""
        site, spans = stream.step.pop(self), stream.spans
        assert isinstance(spans, Spans)
        span = spans.required(self.over, "FlowCut").clone()
        real = torch.ones_like(span) if stream.is_token is None else stream.is_token
        last = real.shape[1] - 1 - real.flip(1).to(torch.uint8).argmax(1, keepdim=True)
        if self.over == "image" and bool(span.gather(1, last).any()):
            raise OptionError("FlowCut needs the question behind the picture in one call; leave prefill_chunk_size out")
        span.scatter_(1, last, False)
        if not bool(span.any()):
            return None
        if stream.past:
            raise OptionError(
                "FlowCut cuts a prompt that is read in one call, from its first token on; leave prefill_chunk_size out"
            )
        score = _relayed(site, span, last).masked_fill(~span, -math.inf)
        best = score.topk(min(self.target, score.shape[1])).indices
        return ~span | torch.zeros_like(span).scatter(1, best, True)


def flowcut_score(attn_cls: Float[Tensor, "b n"], values: Float[Tensor, "b h m d"]) -> Float[Tensor, "b n"]:
    """Return how much information flows between the class token and each patch, in one layer.

    The sum of two shares (of the class token's attention, and of the softmax of the products of its value with all
    values, averaged over heads), times the sum of the absolute values of the patch's mean value over heads.

    Args:
        attn_cls: attention of the class token to the n patches, averaged over heads.
        values: values of the class token and then of the patches, `m = n + 1`.
    """
    if attn_cls.dim() != 2 or values.dim() != 4 or values.shape[::2] != (len(attn_cls), attn_cls.shape[1] + 1):
        raise ShapeError(
            f"values must be (B, H, n + 1, D) beside attn_cls (B, n); got {shown(values)} and {shown(attn_cls)}"
        )
    alike = (values[:, :, :1] @ values.mT)[:, :, 0].softmax(-1).mean(1)[:, 1:]
    return _product(attn_cls, alike, values[:, :, 1:].mean(1))


def prune_count(attn_cls: Float[Tensor, "*b n"], n: int, target: int, remaining: int) -> int:
    """Return the number of patches to drop in a layer: more, the more uneven the attention to them is.

    It is `(n - target) / sqrt(remaining) * (1 - (H / log n)**2)`, rounded, with the entropy H of the attention; the
    largest of a batch counts. In the last layer (0 remaining) all but `target` patches are dropped.

    Args:
        attn_cls: attention of the class token to the patches.
        n: number of patches.
        target: patches that stay in the end.
        remaining: layers after this one that may drop.
    """
    for name, value, least in (("n", n, 1), ("target", target, 1), ("remaining", remaining, 0)):
        validate.count(name, value, least)
    if attn_cls.shape[-1] != n:
        raise ShapeError(f"attn_cls must be weights of n={n} patches; got {shown(attn_cls)}")
    if n <= target or not remaining:
        return max(0, n - target)
    share = attn_cls / attn_cls.sum(-1, keepdim=True)
    evenness = torch.special.entr(share).sum(-1) / math.log(n)
    most = float((1 - evenness.square()).max()) * (n - target) / math.sqrt(remaining)
    return min(max(0, round(most)), n - target)


def _product(
    attention: Float[Tensor, "b n"], alike: Float[Tensor, "b n"], mean_value: Float[Tensor, "b n d"]
) -> Tensor:
    """Return the sum of two shares, times the strength of each mean value."""
    shares = attention / attention.sum(-1, keepdim=True) + alike / alike.sum(-1, keepdim=True)
    return shares * mean_value.abs().sum(-1)


def _relayed(site: Site, span: Bool[Tensor, "b n"], last: Tensor) -> Float[Tensor, "b n"]:
    """Return the scores of a span's tokens, with the last token of the prompt in the place of the class token."""
    k, v = (x.repeat_interleave(site.groups, 1) for x in (site.k, site.v))
    query = site.q.gather(2, last[:, None, :, None].expand(-1, site.q.shape[1], -1, site.q.shape[3]))
    relay = v.gather(2, last[:, None, :, None].expand(-1, v.shape[1], -1, v.shape[3]))

    def over_span(logits: Tensor) -> Tensor:
        hidden = logits[:, :, 0].masked_fill(~span[:, None], -math.inf)
        return hidden.softmax(-1).nan_to_num(0.0).mean(1)  # a sequence without the span has no weights

    alike = over_span(relay @ v.mT / math.sqrt(v.shape[3]))
    return _product(over_span(query @ k.mT * site.scale), alike, v.mean(1))


def _check(host: Host, stack: Stack) -> None:
    """Refuse an image encoder without a class token, one of too few blocks, and one whose patches are merged."""
    name = type(stack.root).__name__
    if not any(each in _CLASS_TOKENS for each in _parameter_names(stack.root)):
        raise UnsupportedModel(f"FlowCut needs an image encoder with a class token; {name} has none")
    if len(stack.blocks) < 3:
        raise UnsupportedModel(f"FlowCut needs an image encoder of at least 3 blocks; {name} has {len(stack.blocks)}")
    config: Any = stack.root.config
    asked, size, patch = getattr(host.model.config, "image_seq_length", None), config.image_size, config.patch_size
    if isinstance(asked, int) and isinstance(size, int) and asked != (size // patch) ** 2:
        raise UnsupportedModel(
            f"{type(host.model).__name__} makes {asked} image tokens of {(size // patch) ** 2} patches, so that a "
            f"dropped patch has no token of its own"
        )


def _parameter_names(root: nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, _ in root.named_parameters()}
