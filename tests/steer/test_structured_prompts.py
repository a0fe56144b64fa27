"""Structured diffusion from a prompt: its encodings, the parser, and bad calls."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.core.errors import FoveateError
from foveate.steer import StructuredDiffusion, align_all, align_spans, noun_phrases, structured_cross_attention
from tests.support.diffusion_models import CONTEXT, LENGTH, model, text_encoder, words
from tests.support.host_models import model as language_model
from tests.support.structured_prompts import PHRASES, PROMPT, SPANS, given, states, steering


def test_a_prompt_is_encoded_as_the_pipeline_does() -> None:
    method = steering()
    full, *phrases = states(PROMPT, *PHRASES)
    torch.testing.assert_close(method.contexts, torch.stack([full, *align_spans(full, phrases, SPANS)]))
    joined = steering("pairs")
    torch.testing.assert_close(joined.contexts[-1], align_all(full, phrases, SPANS))
    assert len(joined.contexts) == 4 and method.count == joined.count == 2
    parsed = StructuredDiffusion.of_prompt(words(), text_encoder(), PROMPT, lambda prompt: [prompt[:10]])
    torch.testing.assert_close(parsed.contexts, method.contexts[:2])


# -- the parser --------------------------------------------------------------------------------------------------------


class Chunk(str):
    """A noun chunk as spaCy gives it: its text, and its number of tokens."""

    __slots__ = ()
    text = property(str)

    def __len__(self) -> int:
        return len(self.split())


def test_noun_phrases_by_spacy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of several words, without one that is the whole prompt."""
    chunks = {PROMPT: [*PHRASES, "it"], "a red cube": ["a red cube"]}

    def load(name: str) -> Any:
        if name != "en_core_web_sm":
            raise OSError(name)
        return lambda prompt: types.SimpleNamespace(noun_chunks=[Chunk(chunk) for chunk in chunks[prompt]])

    monkeypatch.setitem(sys.modules, "spacy", types.SimpleNamespace(load=load))
    assert noun_phrases(PROMPT) == PHRASES
    assert noun_phrases("a red cube") == []
    method = StructuredDiffusion.of_prompt(words(), text_encoder(), PROMPT)
    torch.testing.assert_close(method.contexts, steering().contexts)
    with pytest.raises(FoveateError, match="needs spaCy's pipeline other: python -m spacy download other"):
        noun_phrases(PROMPT, "other")
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(FoveateError, match="needs the package spacy: pip install spacy, or give the phrases"):
        noun_phrases(PROMPT)


# -- bad calls ---------------------------------------------------------------------------------------------------------

Q, CONTEXTS = torch.zeros(2, 5, 12), [torch.zeros(2, 6, 7)] * 4


def to_k(x: Tensor) -> Tensor:
    return x.new_zeros(*x.shape[:2], 12)


FULL = torch.zeros(LENGTH, CONTEXT)


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda: steering("both"), "mode='both' must be one of 'values', 'pairs'"),
        (lambda: steering(phrases=["a green cube"]), "'a green cube' is not in prompt"),
        (lambda: steering(phrases="a red cube"), "phrases='a red cube' must be a list of phrases"),
        (lambda: StructuredDiffusion(FULL, [FULL], []), "spans must have one for each of 1 phrases; got 0"),
        (lambda: StructuredDiffusion(FULL, [FULL], [(3, 3)]), "(3, 3) must be (start, stop) with 0 <= start < stop"),
        (lambda: StructuredDiffusion(FULL, [FULL], [(9, 12)]), "with 0 <= start < stop <= 11"),
        (lambda: StructuredDiffusion(FULL, [FULL], [[0, 1]]), "[0, 1] must be (start, stop)"),
        (lambda: StructuredDiffusion(FULL, [FULL[:2]], [(0, 2)]), "phrases must be (T, d=20) with T at least 3"),
        (lambda: StructuredDiffusion(FULL, [FULL[:, :4]], [(0, 2)]), "got (12, 4)"),
        (lambda: StructuredDiffusion(FULL[None], [], []), "full must be one encoded prompt (T, d); got (1, 12, 20)"),
        (lambda: StructuredDiffusion(FULL, [], [], bos=-1), "bos=-1 must be a whole number"),
        (lambda: structured_cross_attention(Q, CONTEXTS[:2], CONTEXTS[:3], to_k, to_k, 3), "2 contexts for keys and 3"),
        (lambda: structured_cross_attention(Q, [], CONTEXTS, to_k, to_k, 3), "0 contexts for keys and 4"),
        (lambda: structured_cross_attention(Q, CONTEXTS, CONTEXTS, to_k, to_k, 5), "a multiple of heads=5"),
        (lambda: foveate.apply(model("dit"), steering()).__enter__(), "DiTTransformer2DModel has none"),
        (lambda: foveate.apply(model("sd3"), steering()).__enter__(), "SD3Transformer2DModel has none"),
        (lambda: foveate.apply(language_model("llama"), steering()).__enter__(), "LlamaForCausalLM has none"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused(act: Any, says: str) -> None:
    with pytest.raises(FoveateError) as caught:
        act()
    assert says in str(caught.value) and "\n" not in str(caught.value)


@torch.no_grad()
def test_a_pass_without_the_prompt_is_refused() -> None:
    call = given("unet", masked=False)
    with foveate.apply(model("unet"), steering()):
        with pytest.raises(FoveateError, match="no row of this batch reads the prompt"):
            model("unet")(**{key: value[:1] for key, value in call.items()})
        call["encoder_hidden_states"] = call["encoder_hidden_states"][:, :7]
        with pytest.raises(FoveateError, match=r"full is \(12, 20\) and cross-attention reads \(7, 20\)"):
            model("unet")(**call)


def test_phrases_must_have_the_same_tokens_alone() -> None:
    """A tokenizer may join words of a prompt, so that the phrase alone has other tokens."""
    encoder, tokenizer = text_encoder(), words()

    class Joins:
        is_fast, model_max_length = True, LENGTH

        def __call__(self, texts: Any, **options: Any) -> Any:
            read = tokenizer(texts, **options)
            if isinstance(texts, list):
                read["input_ids"][1, 2] = 9
            return read

    with pytest.raises(FoveateError, match="'a red cube' has other tokens alone than in the prompt"):
        StructuredDiffusion.of_prompt(Joins(), encoder, PROMPT, ["a red cube"])
