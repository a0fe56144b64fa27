"""What heads add to the next token's logit, at every token: that of `direct_effects` at each of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from foveate.core.errors import FoveateError
from foveate.lens import direct_effects, next_logits
from tests.lens.models import DECODER, text, tiny
from tests.support.tensors import assert_near


def made(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()
    elif kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**DECODER)).eval()
    else:
        return tiny(kind)
    for name, parameter in model.named_parameters():  # no weight of a norm is 1, and no bias 0
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        parameter.data += (0.3 if parameter.dim() == 1 else 0.1) * noise
    return model


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "qwen3"])
def test_each_token_has_its_direct_effects(kind: str, centred: bool) -> None:
    model, ids = made(kind), text()["input_ids"]
    found = next_logits(model, ids, centred=centred)
    assert found.heads.shape == (2, 2, 4, 24)
    assert found.counted.tolist() == [[True] * 23 + [False]] * 2
    assert not found.heads[..., -1].any()
    for place in (0, 9, 22):
        wanted = direct_effects(model, ids, ids[:, place + 1 : place + 2], positions=place, centred=centred).heads
        assert_near(found.heads[..., place], wanted[..., 0], 1e-4, f"token {place}")


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_does_not_count(padding: str) -> None:
    model, inputs = made("llama"), text(padding)
    found = next_logits(model, inputs)
    real = inputs["attention_mask"].bool()
    assert found.counted.sum(-1).tolist() == [16, 23]
    alone = next_logits(model, {name: x[:1, real[0]] for name, x in inputs.items()})
    assert_near(found.heads[0][..., real[0]], alone.heads[0], 1e-4)
    assert not found.heads[0][..., ~real[0]].any()
    assert_near(found.reduced()[0], alone.heads[0][..., :16].mean(-1), 1e-4)


def test_other_targets() -> None:
    model, ids = made("llama"), text()["input_ids"]
    targets = torch.full_like(ids, -1)
    targets[0, 5], targets[1, 20] = 7, 9
    found = next_logits(model, ids, targets)
    assert found.counted.nonzero().tolist() == [[0, 5], [1, 20]]
    wanted = direct_effects(model, ids, torch.tensor([[7], [9]]), positions=torch.tensor([5, 20]), centred=True).heads
    assert_near(found.heads[0, ..., 5], wanted[0, ..., 0], 1e-4)
    assert_near(found.heads[1, ..., 20], wanted[1, ..., 0], 1e-4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: next_logits(m, text()["input_ids"], torch.zeros(2, 3, dtype=torch.long)), "targets must be"),
        (lambda m: next_logits(m, text()["input_ids"], torch.full((2, 24), 50)), "under 50"),
        (lambda m: next_logits(m, torch.zeros(2, 24, 32)), "inputs must be token ids"),
        (lambda m: next_logits(tiny("bert"), text()), "decoder"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, words: str) -> None:
    with pytest.raises(FoveateError) as caught:
        call(made("llama"))
    assert words in str(caught.value) and "\n" not in str(caught.value)
