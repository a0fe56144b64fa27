"""The parts of a model: which attention modules belong to one, and the numbers of their layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertLMHeadModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from foveate.core.errors import UnsupportedModel
from foveate.host import apply
from foveate.host.hf.model import host
from foveate.lens import Lens, head_outputs, look
from foveate.lens.parts.stack import Part, Stack
from tests.lens.models import BART, DECODER, ENCODER, tiny
from tests.support.tensors import assert_near


def llava() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Build a language model behind a vision tower of three layers of two heads, and an image with a text."""
    torch.manual_seed(0)
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=16)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, patch_size=8), text_config=LlamaConfig(**DECODER), image_token_id=49,
        vision_feature_layer=-1, image_seq_length=4,
    )  # fmt: skip
    ids = torch.tensor([[1, 49, 49, 49, 49, 5, 9, 3]])
    return LlavaForConditionalGeneration(config).eval(), {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 16, 16),
    }  # fmt: skip


SIZES: dict[str, dict[Part, tuple[int, int, bool]]] = {
    "llama": {"auto": (2, 4, False), "decoder": (2, 4, False)},
    "bert": {"auto": (2, 4, False), "encoder": (2, 4, False)},
    "vit": {"auto": (2, 4, False), "encoder": (2, 4, False)},
    "bart": {"encoder": (2, 4, True), "decoder": (3, 2, False), "cross": (3, 2, False)},
    "t5": {"encoder": (2, 4, True), "decoder": (3, 4, False), "cross": (3, 4, False)},
}


@pytest.mark.parametrize("kind", SIZES)
def test_layers_and_heads_of_each_part(kind: str) -> None:
    for part, sizes in SIZES[kind].items():
        stack = Stack.of(host(tiny(kind)), part)
        assert (stack.layers, stack.heads, stack.outside) == sizes, part
        assert set(stack.numbers.values()) == set(range(sizes[0])), part


def test_a_vision_tower_is_the_encoder_of_its_language_model() -> None:
    model, inputs = llava()
    images, words = look(model, inputs, part="encoder"), look(model, inputs)
    assert images.values("entropy").keys() == {0, 1, 2} and words.values("entropy").keys() == {0, 1}
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        maps = tower(inputs["pixel_values"], output_attentions=True).attentions
    tower.set_attn_implementation("sdpa")
    for layer, w in enumerate(maps):
        assert_near(images.values("entropy")[layer], torch.special.entr(w).sum(-1), 1e-4)
        assert_near(images.values("received_mass")[layer], w.sum(-2), 1e-4)
    outputs = head_outputs(model, inputs, part="encoder")
    assert {layer: out.shape for layer, out in outputs.items()} == dict.fromkeys(range(3), (1, 2, 5, 16))
    with torch.no_grad(), apply(model, Lens(part="encoder"), Lens(), on="all"):
        assert torch.equal(model(**inputs).logits, images.output.logits)


def test_two_encoders_of_other_classes_and_their_decoder() -> None:
    """An encoder-decoder of two BERTs has cross attention in modules of its own."""
    torch.manual_seed(0)
    both = [BertConfig(vocab_size=50, **ENCODER), BertConfig(vocab_size=50, **ENCODER, is_decoder=True,
                                                             add_cross_attention=True)]  # fmt: skip
    model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(*both)).eval()
    ids = torch.randint(2, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    with pytest.raises(UnsupportedModel, match='choose part="encoder"'):
        look(model, {"input_ids": ids, "decoder_input_ids": ids[:, :5]})
    shapes = {"encoder": (2, 4, 9), "decoder": (2, 4, 5), "cross": (2, 4, 9)}
    for part, shape in shapes.items():
        seen = look(model, {"input_ids": ids, "decoder_input_ids": ids[:, :5]}, part=part)  # type: ignore[arg-type]
        assert {layer: x.shape for layer, x in seen.values("received_mass").items()} == {0: shape, 1: shape}


def test_one_of_two_towers_is_the_text_part() -> None:
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = CLIPModel(CLIPConfig(
        text_config=dict(vocab_size=50, **sizes), vision_config=dict(image_size=16, patch_size=8, **sizes),
    )).eval()  # fmt: skip
    assert set(Stack.of(host(model)).numbers) <= set(model.text_model.modules())


def test_decoders_that_could_attend_to_another_text_and_do_not_are_refused() -> None:
    ids = torch.arange(2, 12)[None]
    with pytest.raises(UnsupportedModel, match="part='cross': BartForCausalLM attended to no other sequence"):
        look(BartForCausalLM(BartConfig(**BART)).eval(), ids, part="cross", use_cache=False)
    assert look(BartForCausalLM(BartConfig(**BART)).eval(), ids, use_cache=False).values("entropy").keys() == {0, 1, 2}
    decoder = BertLMHeadModel(BertConfig(vocab_size=50, **ENCODER, is_decoder=True)).eval()
    assert look(decoder, ids).values("entropy").keys() == {0, 1}
