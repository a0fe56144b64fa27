"""Methods that drop given tokens, and the same by hand: blocks called one by one on what is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foveate.host import Method
from foveate.host.stream import Stream

Choose = Callable[[int, Tensor, Stream], Tensor | None]


class Drops(Method):
    """Drops by a function of the block's number, the hidden states and the stream."""

    def __init__(self, choose: Choose, renumbers: bool = False, drops_in: tuple[Any, ...] = ("text",)) -> None:
        self.choose, self.renumbers, self.drops_in = choose, renumbers, drops_in

    def drop(self, layer: int, hidden: Tensor, stream: Stream) -> Tensor | None:
        return self.choose(layer, hidden, stream)


def behind(layer: int, keep: Tensor, renumbers: bool = False) -> Drops:
    """Return a method that keeps these tokens of a prompt behind a block."""

    def choose(number: int, hidden: Tensor, stream: Stream) -> Tensor | None:
        if number != layer or stream.past or stream.tokens == 1:
            return None
        return keep.repeat_interleave(len(hidden) // len(keep), 0)

    return Drops(choose, renumbers)


def some(batch: int, tokens: int, count: int, seed: int = 0, last: int = 1) -> Tensor:
    """Return a mask of `count` random tokens of each sequence, its last ones among them."""
    scores = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed))
    scores[:, tokens - last :] = 2.0
    return torch.zeros(batch, tokens, dtype=torch.bool).scatter(1, scores.topk(count).indices, True)


@torch.no_grad()
def calls_of(subject: Any, blocks: nn.ModuleList, **inputs: Any) -> list[tuple[Tensor, dict[str, Any]]]:
    """Return the hidden states and the other arguments of each block in a plain pass with eager masks, uncached."""
    seen: list[tuple[Tensor, dict[str, Any]]] = []

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("hidden_states", "attention_mask"), args, strict=False)) | kwargs
        seen.append((given.pop("hidden_states"), given))

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    before = subject.config._attn_implementation
    subject.set_attn_implementation("eager")
    try:
        subject(**inputs, **({"use_cache": False} if "input_ids" in inputs else {}))
    finally:
        subject.set_attn_implementation(before)
        for handle in handles:
            handle.remove()
    return seen


@torch.no_grad()
def by_hand(
    subject: Any, blocks: nn.ModuleList, drops: dict[int, Tensor], rotate: Callable[..., Any] | None = None,
    **inputs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the last block's output on what is left, and the tokens that are left, for one sequence.

    Args:
        subject, blocks: a model and its blocks.
        drops: by the number of a block, the tokens `(N,)` that stay behind it, of all tokens.
        rotate: makes position embeddings of what is left, by the block's number, its hidden states and the tokens that
            are left; None keeps the original ones.
        inputs: of the model, one sequence.
    """
    calls = calls_of(subject, blocks, **inputs)
    before = subject.config._attn_implementation
    subject.set_attn_implementation("eager")
    hidden, left = calls[0][0], torch.arange(calls[0][0].shape[1])
    try:
        for number, block in enumerate(blocks):
            given = dict(calls[number][1])
            if number - 1 in drops:
                stays = drops[number - 1][left]
                hidden, left = hidden[:, stays], left[stays]
            if (mask := given.get("attention_mask")) is not None:
                given["attention_mask"] = mask[:, :, left][..., left]
            if given.get("position_embeddings") is not None:
                cos, sin = given["position_embeddings"]
                given["position_embeddings"] = (cos[:, left], sin[:, left])
                if rotate is not None and len(left) < calls[0][0].shape[1]:
                    given["position_embeddings"] = rotate(number, hidden, left)
            if given.get("position_ids") is not None:
                given["position_ids"] = given["position_ids"][:, left]
            out = block(hidden, **given)
            hidden = out[0] if isinstance(out, tuple) else out
    finally:
        subject.set_attn_implementation(before)
    return hidden, left
