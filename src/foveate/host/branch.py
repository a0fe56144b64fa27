"""Branches: a second reading of the same sequences, for contrastive decoding.

A method that contrasts the model with itself reads each sequence twice: as it is, and with some embeddings of the
prompt changed. Both readings get the same new tokens. The second has a cache of its own.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host.hf.adoption import is_recording
from foveate.host.hf.tokens_read import cached_tokens
from foveate.host.model_call import Edit, ModelCall


class Branch:
    """A second reading of the sequences that a model reads, for `Method.edit_next_token`.

        weak = self.branch.logits(self, call, edit)

    The first call of a sequence starts a cache, and later calls continue it. It follows beam search, padded batches and
    the removal of rejected drafts, and it is released with the cache of the first reading. Other methods of the run act
    on both readings. Cost: every forward pass once more, and a second cache.

    One object serves any number of sequences and threads; what it holds of a sequence is in the method's notes.

    Args:
        name: tells several branches of a method apart.
    """

    def __init__(self, name: str = "branch") -> None:
        self.name = name

    def logits(self, method: object, call: ModelCall, edit: Edit | None = None) -> Float[Tensor, "b v"]:
        """Return the logits of the second reading at the token that is edited.

        Args:
            method: the method whose branch it is.
            call: the forward pass of the first reading.
            edit: changes the embeddings `(B, N, C)` of the tokens that this call reads; None leaves them.

        Raises:
            OptionError: the sequence began before the method was applied, or was copied for several answers.
            UnsupportedModel: the model is not a decoder.
        """
        key = (Branch, id(method), self.name)
        if key not in call.step:  # drafted tokens of one call share its reading
            call.step[key] = self._read(method, call, edit)
        return call.picked(call.step[key])

    def _read(self, method: object, call: ModelCall, edit: Edit | None) -> Float[Tensor, "b n v"]:
        if call.host.config.is_encoder_decoder or not call.host.model.can_generate():
            raise UnsupportedModel(
                f"{type(method).__name__} reads a prompt twice, and {type(call.host.model).__name__} is no "
                f"decoder-only model"
            )
        if call.cache is None:
            return call.again(None, edit)[0]
        notes, rows = call.notes(method), f"{self.name}: sequences"
        if call.past == 0:
            cache, notes[rows] = call.fresh_cache(), call.sequences
        else:
            cache = self._continued(method, call, notes)
        if cache is not None and call.drafts:
            if not is_recording(cache):
                cache.activate_past_recording()
            if call.past:
                cache.crop(call.past - cached_tokens(cache))  # also of 0 tokens: it frees what a window left
        logits, notes[self.name] = call.again(cache, edit)
        return logits

    def _continued(self, method: object, call: ModelCall, notes: dict[str, Any]) -> Any:
        """Return the branch's cache, with the tokens that the first reading's cache has."""
        cache: Any = notes.get(self.name)
        sequences = notes.get(f"{self.name}: sequences", call.sequences)
        if sequences != call.sequences:
            raise OptionError(
                f"{type(method).__name__} read {sequences} sequences and gets {call.sequences} now; repeat the prompts "
                f"before they are read"
            )
        seen = -1 if cache is None else cached_tokens(cache)
        if seen < call.past:
            raise OptionError(
                f"{type(method).__name__} reads a sequence twice from its first token on, and this one has {call.past} "
                f"tokens already; apply the method before the prompt is read"
            )
        if seen > call.past and not call.drafts:
            cache.crop(call.past - seen)
        return cache
