"""How many positions a model was made for, also where its rotary embedding is stretched."""

from __future__ import annotations

from typing import Any

#: What configurations call the number of positions.
_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "seq_length")


def context_length(config: Any) -> int | None:
    """The positions that a configuration stands for; None where it sets no limit.

    Stretched embeddings say it in different ways. YaRN counts from `original_max_position_embeddings`, and some
    checkpoints already multiplied it into `max_position_embeddings` while others did not: the larger one holds. With
    "linear" and "dynamic" the configuration holds the length before stretching, except where layers have parameters
    of their own (Gemma 3), whose length is that of the whole model. "llama3", "longrope" and "proportional" say the
    full length.
    """
    text = config.get_text_config()
    told = next((value for name in _NAMES if isinstance(value := getattr(text, name, None), int) and value > 0), None)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if told is None or not isinstance(rope, dict):
        return told
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if not isinstance(factor, int | float) or factor < 1:
        return told
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("yarn", "linear", "dynamic"):
        return max(told, int((original or told) * factor))
    return told
