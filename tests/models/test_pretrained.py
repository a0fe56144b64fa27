"""Trained decoders as Hugging Face models give the same numbers in every way of calling them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from foveate.core.errors import UnsupportedModel
from foveate.kv.duo_attention import duo_train
from foveate.models.base.hf_checkpoint import FoveateConfig, FoveateForCausalLM
from foveate.models.base.spec import Mixer, Spec
from tests.support.tensors import assert_near

PLAIN = dict(position="rotary", qk_norm=True, gate="sigmoid")
SPECS = {
    "interface": (Mixer("softmax", around=PLAIN),) * 2,
    "grouped": (Mixer("softmax", around=dict(position="rotary", kv_heads=1)),) * 2,
    "streams": (Mixer("hedgehog", around=dict(conv=3)), Mixer("titans", around=dict(conv=3, out_norm=True))),
    "mixed": (Mixer("lightning_attention_2", around=dict(out_norm=True)), Mixer("softmax", around=PLAIN)),
}


def model(name: str, places: int = 0) -> FoveateForCausalLM:
    torch.manual_seed(0)
    spec = Spec(16, 2, SPECS[name], vocabulary=11, places=places)
    return FoveateForCausalLM(FoveateConfig(network=spec.to_dict())).eval()


def tokens(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=SPECS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("places", [0, 32])
@torch.no_grad()
def test_it_is_the_decoder(name: str, places: int) -> None:
    ours, ids = model(name, places), tokens()
    logits = ours(ids).logits
    assert_near(logits, ours.released()(ids), 1e-5)


@pytest.mark.parametrize("places", [0, 32])
@pytest.mark.parametrize("cut", [1, 5, 8])
@torch.no_grad()
def test_a_cache_changes_nothing(name: str, places: int, cut: int) -> None:
    ours, ids = model(name, places), tokens()
    whole = ours(ids).logits
    first = ours(ids[:, :cut], use_cache=True)
    assert_near(first.logits, whole[:, :cut], 1e-5)
    cache = first.past_key_values
    assert cache.get_seq_length() == cut
    for t in range(cut, 9):
        out = ours(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        assert_near(out.logits, whole[:, t : t + 1], 1e-5)
    assert cache.get_seq_length() == 9


@torch.no_grad()
def test_a_prompt_in_two_parts(name: str) -> None:
    ours, ids = model(name), tokens()
    cache = ours(ids[:, :4], use_cache=True).past_key_values
    assert_near(ours(ids[:, 4:], past_key_values=cache, use_cache=True).logits, ours(ids).logits[:, 4:], 1e-5)


@torch.no_grad()
def test_greedy_generation(name: str) -> None:
    ours, ids = model(name), tokens(1, 4)
    generated = ours.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    for _ in range(5):
        ids = torch.cat([ids, ours(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, ids)


@torch.no_grad()
def test_saved_and_loaded_by_transformers(name: str, tmp_path) -> None:
    ours, ids = model(name), tokens()
    ours.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(theirs, FoveateForCausalLM)
    assert torch.equal(theirs(ids).logits, ours(ids).logits)


@torch.no_grad()
def test_padding_on_the_left() -> None:
    """Attention ignores padding; layers with a state of their own refuse it."""
    ours, ids = model("grouped"), tokens(1, 6)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    seen = torch.tensor([[0] * 3 + [1] * 6])
    assert_near(ours(padded, attention_mask=seen).logits[:, 3:], ours(ids).logits, 1e-5)  # rotary: distances only
    with pytest.raises(UnsupportedModel, match="read padding as text"):
        model("streams")(padded, attention_mask=seen)


def test_a_loss_from_labels(name: str) -> None:
    ours, ids = model(name), tokens()
    out = ours(ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert_near(out.loss, expected, 1e-5)


@torch.no_grad()
def test_its_decoder_gives_the_states_before_the_head(name: str) -> None:
    ours, ids = model(name), tokens()
    states = ours.get_decoder()(ids, use_cache=False).last_hidden_state
    assert_near(ours.get_output_embeddings()(states), ours(ids).logits, 1e-6)


def test_gates_are_trained_on_it() -> None:
    """Training that reads the decoder's states works on our networks as on any other model."""
    answers = torch.zeros(2, 9, dtype=torch.bool)
    answers[:, -3:] = True
    gates = duo_train(model("grouped"), iter([(tokens(), answers)] * 3), steps=3, rate=0.1, sink=1, recent=2)
    assert gates.shape == (2, 1)
    assert (gates < 1).all()


def test_resized_embeddings() -> None:
    ours = model("grouped")
    ours.resize_token_embeddings(13)
    logits = ours(torch.full((1, 3), 12)).logits
    assert logits.shape == (1, 3, 13)
    assert_near(ours.released()(torch.full((1, 3), 12)), logits, 1e-5)
