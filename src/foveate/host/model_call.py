"""One forward pass of a model, as methods get it that change the logits of the next token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.host.hf.model import Host
from foveate.host.spans import Spans

#: Changes the embeddings `(B, N, C)` of the tokens that a call reads.
Edit = Callable[[Float[Tensor, "b n c"]], Float[Tensor, "b n c"]]

#: `again(cache, edit)` reads the call's tokens once more, and returns all logits of the call and the cache.
Again = Callable[[Any, Edit | None], tuple[Float[Tensor, "b n v"], Any]]


@dataclass(frozen=True, eq=False)
class ModelCall:
    """One forward pass of a model, when its logits are computed.

    Args:
        host: the model.
        cache: the cache of its sequences; None if it keeps none.
        sequences: number of sequences.
        past: tokens of the sequences before the call.
        tokens: tokens that it reads of each.
        spans: spans of these tokens, bool `(B, N)` by name.
        step: the notes of methods on this pass, as in `Site.step`.
        reads_prompt: whether the prompt is not yet complete before the call.
        drafts: whether its last tokens are drafts of assisted decoding, which may be removed again.
        at: the token whose logits are edited, as an index of the call's logits; or one for each sequence.
    """

    host: Host
    cache: Any
    sequences: int
    past: int
    tokens: int
    spans: Spans
    step: dict[Any, Any]
    reads_prompt: bool
    drafts: bool
    at: int | Tensor
    _notes: dict[Any, dict[str, Any]]
    _again: Again
    _fresh: Any

    def notes(self, method: object) -> dict[str, Any]:
        """Return the notes of a method on these sequences, for later calls; empty at the start of each sequence.

        They are apart from those of `Site.notes`. Tensors and caches in them follow beam search.
        """
        return self._notes.setdefault((id(method), "next token"), {})

    def fresh_cache(self) -> Any:
        """Return an empty cache like that of the call, at the start of a sequence; None lets the model make its own."""
        return self._fresh

    def again(self, cache: Any, edit: Edit | None = None) -> tuple[Float[Tensor, "b n v"], Any]:
        """Let the model read the call's tokens once more, into another cache, and return its logits and that cache.

        The other hooks of all methods act on this reading too. `edit_next_token` does not.

        Args:
            cache: holds the same tokens as that of the call did before it. It grows.
            edit: changes the embeddings that the decoder reads.
        """
        return self._again(cache, edit)

    def picked(self, logits: Float[Tensor, "b n v"]) -> Float[Tensor, "b v"]:
        """Return the logits of the edited token, of all logits of a call."""
        return picked(logits, self.at)


def picked(logits: Float[Tensor, "b n v"], at: int | Tensor) -> Float[Tensor, "b v"]:
    """Return each sequence's logits at an index, or at one for each sequence."""
    if isinstance(at, int):
        return logits[:, at]
    return logits[torch.arange(logits.shape[0], device=logits.device), at]


def placed(logits: Float[Tensor, "b n v"], at: int | Tensor, new: Float[Tensor, "b v"]) -> Float[Tensor, "b n v"]:
    """Return the logits with others at an index, or at one for each sequence."""
    if logits.shape[1] == 1:
        return new[:, None]
    changed = logits.clone()
    if isinstance(at, int):
        changed[:, at] = new
    else:
        changed[torch.arange(logits.shape[0], device=logits.device), at] = new
    return changed
