"""The context length of a model, also with RoPE scaling."""

from __future__ import annotations

from typing import Any

#: The names of the context length in configurations.
_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "seq_length")


def context_length(config: Any) -> int | None:
    """Return the context length of a configuration; None without a limit.

    RoPE scaling stores it in different ways. YaRN starts from `original_max_position_embeddings`; some checkpoints have
    multiplied it into `max_position_embeddings` and others have not, so the larger value is right. With "linear" and
    "dynamic" the configuration holds the length before scaling, unless layers have their own parameters (Gemma 3); then
    it holds the full length. "llama3", "longrope" and "proportional" hold the full length.
    """
    text = config.get_text_config()
    length = next((value for name in _NAMES if isinstance(value := getattr(text, name, None), int) and value > 0), None)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if length is None or not isinstance(rope, dict):
        return length
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if not isinstance(factor, int | float) or factor < 1:
        return length
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("yarn", "linear", "dynamic"):
        return max(length, int((original or length) * factor))
    return length
