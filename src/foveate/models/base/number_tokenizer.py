"""A tokenizer with one token for each number, for sequences such as "17 42 3", in the Hugging Face format."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def build(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose ids are the numbers themselves, separated by spaces."""
    words = {str(number): number for number in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(vocab=words, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", clean_up_tokenization_spaces=False)
