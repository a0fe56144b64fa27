"""The spans of vision-language models are those of the embeddings that their decoders read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import DynamicCache

from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host import Method, ModelCall, Site, Spans, apply, spans_of
from tests.support.host_models import model, tokens
from tests.support.vision_models import IMAGE, KINDS, PICTURE, VIDEO, prompt, vision_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


class Notes(Method):
    """Notes the spans at the first site of each call of the decoder, and those of the calls of blocks and model."""

    def __init__(self) -> None:
        self.sites: list[dict[str, Tensor]] = []
        self.blocks: list[dict[str, Tensor]] = []
        self.calls: list[dict[str, Tensor]] = []

    def read(self, site: Site, out: Tensor) -> None:
        if site.layer == 0 and site.cache is not None:
            self.sites.append(dict(site.spans.items()))

    def edit_hidden(self, layer: int, hidden: Tensor, spans: Spans) -> Tensor:
        if layer == 0:
            self.blocks.append(dict(spans.items()))
        return hidden

    def edit_next_token(self, logits: Tensor, call: ModelCall) -> Tensor:
        self.calls.append(dict(call.spans.items()))
        return logits


@torch.no_grad()
def replaced(kind: str, inputs: dict[str, Tensor]) -> Tensor:
    """Return the tokens whose embeddings are not those of their ids: the model has put the picture's there."""
    subject, seen = vision_model(kind), []
    decoder = subject.get_decoder()
    handle = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    subject(**inputs)
    handle.remove()
    words = subject.get_input_embeddings()(inputs["input_ids"])
    return (seen[0] != words).any(-1)


@torch.no_grad()
def test_the_image_is_where_the_model_puts_it(kind: str) -> None:
    inputs, notes = prompt(kind, padding=2), Notes()
    image = replaced(kind, inputs)
    assert image.sum(1).tolist() == [PICTURE, PICTURE]
    real = inputs["attention_mask"].bool()
    with apply(vision_model(kind), notes) as run:
        vision_model(kind)(**inputs)
        found = dict(run.spans)
    for spans in (found, spans_of(vision_model(kind), inputs), notes.sites[0], notes.blocks[0], notes.calls[0]):
        assert torch.equal(spans["image"], image)
        assert torch.equal(spans["system"], real & (image.cumsum(1) == 0))
        assert torch.equal(spans["text"], real & ~image & (image.cumsum(1) > 0))
        assert not spans["generated"].any() and not spans["video"].any()


@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_generated_tokens_follow(kind: str, beams: int) -> None:
    inputs, notes, new = prompt(kind, padding=2), Notes(), 4
    plain = vision_model(kind).generate(**inputs, max_new_tokens=new, do_sample=False, num_beams=beams)
    with apply(vision_model(kind), notes) as run:
        made = vision_model(kind).generate(**inputs, max_new_tokens=new, do_sample=False, num_beams=beams)
        count = inputs["input_ids"].shape[1]
        assert run.spans["generated"].sum(1).tolist() == [new - 1] * 2 * beams
        assert torch.equal(run.spans["image"][:, :count], (inputs["input_ids"] == IMAGE).repeat_interleave(beams, 0))
    assert torch.equal(made, plain)
    for step, spans in enumerate(notes.sites):
        assert (
            spans["generated"].shape == (2 * beams, count + step) and int(spans["generated"].sum()) == 2 * beams * step
        )
        together = torch.stack(list(spans.values())).sum(0)
        assert int(together.max()) == 1, "no two spans share a token"
    for spans in (*notes.blocks[1:], *notes.calls[1:]):
        assert spans["generated"].tolist() == [[True]] * 2 * beams and not spans["image"].any()


@torch.no_grad()
def test_a_later_turn_and_rejected_tokens() -> None:
    llava, inputs, cache = vision_model("llava"), prompt("llava", batch=1), DynamicCache()
    count = inputs["input_ids"].shape[1]
    with apply(llava, Notes()) as run:
        llava(**inputs, past_key_values=cache)
        for _ in range(3):
            llava(tokens(1, 1), past_key_values=cache)
        cache.crop(-2)
        llava(tokens(1, 3), past_key_values=cache)  # words of the user's
        spans = run.spans
        assert spans["generated"][0].nonzero()[:, 0].tolist() == [count]
        assert spans["text"][0, count:].tolist() == [False, True, True, True]
        assert int(spans["image"].sum()) == PICTURE


@torch.no_grad()
def test_a_prompt_in_chunks_has_the_spans_of_the_whole() -> None:
    """The words before the picture are the system's, also if the picture comes in a later call."""
    llava, inputs = vision_model("llava"), prompt("llava")
    whole = spans_of(llava, inputs)
    embeds = llava.get_input_embeddings()(inputs["input_ids"])  # without a picture: only the placeholders count
    notes, cache = Notes(), DynamicCache()
    with apply(llava, notes):
        for piece in inputs["input_ids"].split([2, 6, 4], 1):
            llava(piece, past_key_values=cache)
    assert embeds.shape[1] == 12
    for name, span in whole.items():
        assert torch.equal(notes.sites[-1][name], span), name


def test_inputs_of_other_kinds() -> None:
    config, ids = vision_model("qwen2_vl").config, torch.tensor([[5, IMAGE, VIDEO, VIDEO, 6]])
    spans = spans_of(config, {"input_ids": ids})
    assert {name: span[0].nonzero()[:, 0].tolist() for name, span in spans.items()} == {
        "system": [0], "image": [1], "video": [2, 3], "text": [4], "generated": [],
    }  # fmt: skip
    types = torch.tensor([[0, 1, 2, 2, 0]])
    by_type = spans_of(config, {"inputs_embeds": torch.zeros(1, 5, 32), "mm_token_type_ids": types})
    assert all(torch.equal(by_type[name], spans[name]) for name in spans)
    text = spans_of(model("llama"), {"input_ids": tokens(1, 4)})
    assert text["text"].all() and not any(text[name].any() for name in ("system", "image", "video", "generated"))


@torch.no_grad()
def test_the_callers_spans_come_first() -> None:
    llava, inputs, notes = vision_model("llava"), prompt("llava"), Notes()
    with apply(llava, notes) as run:
        run.spans["image"] = torch.tensor([0, 1])
        llava(**inputs)
        assert run.spans["image"].tolist() == [0, 1] and run.spans["text"].any()
        run.spans = {}
        llava(**inputs)
        assert torch.equal(run.spans["image"], inputs["input_ids"] == IMAGE)
    assert notes.sites[0]["image"].nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert torch.equal(notes.sites[1]["image"], inputs["input_ids"] == IMAGE)


# -- refusals ----------------------------------------------------------------------------------------------------------


class Expands(hf.LlavaForConditionalGeneration):
    """Puts four embeddings in the place of one placeholder, within its forward pass."""

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        if input_ids is not None and bool((input_ids == IMAGE).any()):
            at = int((input_ids[0] == IMAGE).nonzero()[0])
            input_ids = torch.cat(
                [input_ids[:, :at], *[input_ids[:, at : at + 1]] * PICTURE, input_ids[:, at + 1 :]], 1
            )
        return super().forward(input_ids=input_ids, **kwargs)


@torch.no_grad()
def test_a_placeholder_that_becomes_many_tokens_is_refused() -> None:
    subject = Expands(vision_model("llava").config).eval()
    ids, pixels = torch.tensor([[5, 6, IMAGE, 7]]), prompt("llava", batch=1)["pixel_values"]

    class Asks(Method):
        def edit_hidden(self, layer: int, hidden: Tensor, spans: Spans) -> Tensor:
            return hidden.masked_fill(spans["image"][..., None], 0.0)

    with apply(subject, Asks()), pytest.raises(UnsupportedModel) as caught:
        subject(input_ids=ids, pixel_values=pixels)
    assert str(caught.value) == (
        "Expands was given 4 tokens and its decoder read 7: it puts several embeddings in the place of one token, so "
        "that spans cannot be told from its inputs; set run.spans"
    )
    with apply(subject, Asks()) as run:
        run.spans["image"] = torch.tensor([2, 3, 4, 5])
        subject(input_ids=ids, pixel_values=pixels)


def test_pictures_without_tokens_are_refused() -> None:
    pixels = prompt("llava", batch=1)["pixel_values"]
    with pytest.raises(UnsupportedModel) as caught:
        spans_of(vision_model("llava"), {"input_ids": tokens(1, 4) % 50, "pixel_values": pixels})
    assert str(caught.value) == (
        f"the pictures of llava have no tokens of their own (no token {IMAGE} is in input_ids), so that their span is "
        f"unknown"
    )
    with pytest.raises(UnsupportedModel, match="its configuration names no image token"):
        spans_of(model("llama"), {"input_ids": tokens(1, 4), "pixel_values": pixels})
    with pytest.raises(OptionError, match="inputs must hold input_ids"):
        spans_of(model("llama"), {"inputs_embeds": torch.zeros(1, 4, 32)})


@torch.no_grad()
def test_embeddings_have_no_spans_of_their_own() -> None:
    class Needs(Method):
        def edit_hidden(self, layer: int, hidden: Tensor, spans: Spans) -> Tensor:
            assert "image" not in spans and len(spans) == 0
            spans.required("image", "Needs")
            return hidden

    with apply(model("llama"), Needs()) as run, pytest.raises(OptionError) as caught:
        model("llama")(inputs_embeds=torch.zeros(1, 4, 32))
    assert dict(run.spans) == {} and str(caught.value) == (
        'Needs needs the span "image", which was not found in the inputs: set run.spans["image"] to the positions of '
        "its tokens"
    )
