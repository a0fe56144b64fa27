"""Checks by a short run right after loading, so that unusable models are refused early."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from foveate.bench.loading.refusal import reading, refused

_TOKENS = 6
#: The largest relative difference of equal logits; 16-bit arithmetic may round differently between calls.
_TOLERANCE = {torch.float32: 1e-4}
_TOLERANCE_HALF = 3e-2


@torch.no_grad()
def check_causal(name: str, model: PreTrainedModel) -> None:
    """Refuse a model whose logits are not finite, or depend on later tokens."""
    embedding = model.get_input_embeddings()
    words = int(getattr(embedding, "num_embeddings", 0) or model.config.get_text_config().vocab_size)
    ids = torch.arange(_TOKENS, device=model.device)[None] % words
    other = ids.clone()
    other[0, -1] = (_TOKENS + 1) % words
    with reading(name, "does not run"):
        first, second = (model.eval()(x).logits[0].float() for x in (ids, other))
    if not (first.isfinite().all() and second.isfinite().all()):
        kind = str(model.dtype).removeprefix("torch.")
        raise refused(name, f"gives logits that are NaN or infinite in {kind}; its weights are broken or too large")
    tolerance = _TOLERANCE.get(model.dtype, _TOLERANCE_HALF) * first.abs().max()
    if (first[:-1] - second[:-1]).abs().max() > tolerance:
        raise refused(name, "sees the tokens that follow, as an encoder does; it must be a decoder language model")


def check_words(name: str, tokenizer: Any) -> None:
    """Refuse a tokenizer that knows no words, such as one without its vocabulary."""
    with reading(name, "has a tokenizer that does not run"):
        ids = set(tokenizer("0 1 a b A B the", add_special_tokens=False).input_ids)
    if not ids - {tokenizer.unk_token_id}:
        raise refused(name, "has a tokenizer without a vocabulary: it knows none of some plain words")
