"""The words of a pretrained model: its tokenizer, and the tokens that end its texts."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer, PreTrainedModel


def tokenizer_of(model: PreTrainedModel) -> Any | None:
    """Return the tokenizer of a model, or None.

    It is the model's attribute `tokenizer`, or else that of the folder, or of the local copy of the hub's repository,
    that the model was loaded from.
    """
    own = getattr(model, "tokenizer", None)
    if own is not None:
        return own
    name = getattr(model.config, "name_or_path", "")
    if not name:
        return None
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, KeyError):
        return None


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Return the tokens at which the model's own generation ends."""
    given = getattr(model.generation_config or model.config, "eos_token_id", None)
    return frozenset(token for token in (given if isinstance(given, list | tuple) else [given]) if token is not None)
