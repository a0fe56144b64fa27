"""StreamingLLM: its limit, its positions, and text longer than the trained context."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host import Method, apply
from foveate.kv import Renumbered, SinkRecent, SnapKV, StreamingLLM
from foveate.tasks.parts import corpus
from tests.conftest import ClaimFixture
from tests.support.host_models import model, tokens
from tests.support.lab import lab


def steps(lm: hf.PreTrainedModel, ids: Tensor, *methods: Method, prompt: int = 30) -> Tensor:
    cache = DynamicCache(config=lm.config)
    with torch.no_grad(), apply(lm, *methods):
        out = [lm(ids[:, :prompt], past_key_values=cache).logits[:, -1:]]
        out += [lm(token, past_key_values=cache).logits for token in ids[:, prompt:].split(1, 1)]
    return torch.cat(out, 1)


def test_a_window_that_holds_everything_is_the_model() -> None:
    llama, ids = model("llama"), tokens(2, 50)
    assert torch.equal(steps(llama, ids, StreamingLLM(4, 46)), steps(llama, ids))
    assert not torch.equal(steps(llama, ids, StreamingLLM(4, 20)), steps(llama, ids))


def test_it_is_sinks_a_window_and_renumbered_positions() -> None:
    llama, ids = model("llama"), tokens(2, 60)
    both = steps(llama, ids, SinkRecent(3, 12), Renumbered())
    ours = steps(llama, ids, StreamingLLM(3, 12))  # it rotates the sinks alone, which rounds in another way
    torch.testing.assert_close(ours, both, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(steps(llama, ids, SinkRecent(3, 12)), both, atol=1e-2)


@pytest.mark.parametrize("other", [SnapKV(share=0.2), SinkRecent(3, 5)], ids=["snapkv", "smaller window"])
def test_beside_a_policy_that_drops_more_positions_close_all_gaps(other: Method) -> None:
    llama, ids = model("llama"), tokens(1, 60)
    ours = steps(llama, ids, StreamingLLM(3, 12), other)
    both = steps(llama, ids, SinkRecent(3, 12), other, Renumbered())
    torch.testing.assert_close(ours, both, atol=1e-5, rtol=1e-5)


def test_a_model_of_one_layer_sees_the_kept_tokens_alone() -> None:
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=64, hidden_size=64, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0,
        max_position_embeddings=512, initializer_range=0.3, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    lm, ids = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)).eval(), tokens(1, 60)
    last = steps(lm, ids, StreamingLLM(3, 12))[:, -1]
    with torch.no_grad():
        expected = lm(torch.cat([ids[:, :3], ids[:, -13:]], 1)).logits[:, -1]
    torch.testing.assert_close(last, expected, atol=1e-4, rtol=1e-4)


def losses(piece: int, ids: Tensor, *methods: Method) -> Tensor:
    """The loss of each token of a text that is read in pieces."""
    lm, cache = lab()[0], DynamicCache(config=lab()[0].config)
    with torch.no_grad(), apply(lm, *methods):
        out = [lm(some, past_key_values=cache).logits for some in ids.split(piece, 1)]
    return F.cross_entropy(torch.cat(out, 1)[0, :-1], ids[0, 1:], reduction="none")


@pytest.mark.slow
def test_text_beyond_the_trained_length_does_not_run_away(claim: ClaimFixture) -> None:
    """Three times the context of the lab model, in pieces: the loss of the last third, and of the same text alone."""
    lm, tokenizer = lab()
    context = lm.config.max_position_embeddings
    ids = tokenizer(corpus.text("heldout")[: 4 * context], return_tensors="pt", verbose=False).input_ids
    ids, piece = ids[:, : 3 * context], context // 4
    alone = losses(piece, ids[:, 2 * context :])[piece:].mean()
    full, kept, ours = (
        losses(piece, ids, *methods)[2 * context + piece :].mean()
        for methods in ([], [SinkRecent(4, 252)], [StreamingLLM(4, 252)])
    )
    assert float(ours) < 1.15 * float(alone)
    assert float(ours) < 0.97 * float(kept), "the same tokens at their positions in the text"
    claim(
        "text of three times the trained length is predicted as well as the same text alone: loss of the last third",
        ours=ours, baseline=full, better="lower", margin=2.0, baseline_name="the full cache", seed=0,
    )  # fmt: skip


def test_what_does_not_fit_is_refused() -> None:
    gpt = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)).eval()
    with pytest.raises(UnsupportedModel, match="do not rotate"), apply(gpt, StreamingLLM()):
        pass
    says = "sink \\+ recent = 304 does not fit in the 256 positions"
    with pytest.raises(OptionError, match=says), apply(model("llama"), StreamingLLM(4, 300)):
        pass
    for options, message in (({"sink": -1}, "sink=-1"), ({"recent": 0}, "recent=0")):
        with pytest.raises(OptionError, match=message):
            StreamingLLM(**options)
