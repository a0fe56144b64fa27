"""`Renumbered` equals the plain model on the kept tokens. Models whose keys do not rotate are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from foveate.bench.comparison.model_context import context_length
from foveate.bench.comparison.run import compare
from foveate.core.errors import UnsupportedModel
from foveate.host import apply
from foveate.kv.razor_attention import RazorAttention
from foveate.kv.renumbered import Renumbered, shifts
from foveate.kv.sink_recent import SinkRecent
from foveate.labs import LABS
from foveate.tasks.parts.corpus import text

_SIZES = dict(
    vocab_size=64, hidden_size=64, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0,
    max_position_embeddings=512, initializer_range=0.3, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
_GROUPED = dict(_SIZES, num_key_value_heads=2, head_dim=16)
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10_000.0}
_MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED)),
    "yarn": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED, rope_parameters=_YARN)),
    "a part of the channels": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_SIZES, rotary_pct=0.25)),
    "neighbouring channels": lambda: hf.CohereForCausalLM(hf.CohereConfig(**_GROUPED)),
    "soft cap": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_GROUPED, attn_logit_softcapping=5.0)),
}


def made(make: Any) -> Any:
    torch.manual_seed(0)
    return make().eval()


def ids(rows: int, n: int) -> torch.Tensor:
    return torch.randint(2, 64, (rows, n), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("kind", _MODELS)
def test_kept_tokens_are_seen_without_gaps(kind: str) -> None:
    """Dropped tokens have no effect on a model of one layer, since its keys depend on their own token only."""
    model, text = made(_MODELS[kind]), ids(2, 60)
    cache = hf.DynamicCache(config=model.config)
    with apply(model, SinkRecent(3, 12), Renumbered()):
        model(text[:, :30], past_key_values=cache)
        for token in text[:, 30:].split(1, 1):
            logits = model(token, past_key_values=cache).logits
    left = torch.cat([text[:, :3], text[:, -13:]], 1)
    torch.testing.assert_close(logits[:, -1], model(left).logits[:, -1], atol=1e-4, rtol=1e-4)
    with apply(model, SinkRecent(3, 12)):  # without the method the sinks are far away
        plain = hf.DynamicCache(config=model.config)
        model(text[:, :30], past_key_values=plain)
        for token in text[:, 30:].split(1, 1):
            far = model(token, past_key_values=plain).logits
    assert not torch.allclose(far[:, -1], logits[:, -1], atol=1e-2)


@torch.no_grad()
def test_pieces_and_padding() -> None:
    """A piece sees the kept tokens right before it; a padded sequence sees what it would see without a batch."""
    model, text = made(_MODELS["llama"]), ids(1, 40)
    methods = (SinkRecent(2, 6), Renumbered())
    separate = hf.DynamicCache(config=model.config)
    with apply(model, *methods):
        model(text[:, :30], past_key_values=separate)
        piece = model(text[:, 30:], past_key_values=separate).logits
    left = torch.cat([text[:, :2], text[:, 24:]], 1)
    torch.testing.assert_close(piece, model(left).logits[:, 8:], atol=1e-4, rtol=1e-4)
    rows = torch.cat([torch.cat([torch.zeros(1, 5, dtype=torch.long), text[:, :35]], 1), text])
    mask = torch.ones_like(rows)
    mask[0, :5] = 0
    both, cache = [], hf.DynamicCache(config=model.config)
    with apply(model, *methods):
        model(rows[:, :30], attention_mask=mask[:, :30], past_key_values=cache)
        both.append(model(rows[:, 30:], attention_mask=mask, past_key_values=cache).logits)
    torch.testing.assert_close(both[0][1:], piece, atol=1e-4, rtol=1e-4)
    short = hf.DynamicCache(config=model.config)
    with apply(model, *methods):
        model(text[:, :25], past_key_values=short)
        own = model(text[:, 25:35], past_key_values=short).logits
    torch.testing.assert_close(both[0][:1], own, atol=1e-4, rtol=1e-4)


def test_shifts_close_the_gaps_and_skip_empty_slots() -> None:
    positions = torch.tensor([[[0, 1, 7, 8, -1]], [[-2, 9, 5, 6, 8]]])
    assert shifts(positions, 10).tolist() == [[[6, 6, 1, 1, 0]], [[0, 0, 1, 1, 0]]]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)),
            "SinkRecent do without",
        ),
        (
            lambda: hf.LlamaForCausalLM(
                hf.LlamaConfig(**_GROUPED, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
            ),
            "depend on the text's length",
        ),
    ],
)
def test_other_positions_are_refused_on_entering(make: Any, reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason), apply(made(make), SinkRecent(2, 6), Renumbered()):
        raise AssertionError("not reached")


@torch.no_grad()
def test_a_summary_and_heads_of_unequal_length_are_supported() -> None:
    """Razor's full heads have no gap, and its summary has no position: neither moves."""
    model, text = made(_MODELS["llama"]), ids(1, 60)
    razor = RazorAttention(heads=torch.tensor([[True, False]]), sink=2, min_window=8, ratio=100.0)
    with apply(model, razor, Renumbered()) as run:
        cache = hf.DynamicCache(config=model.config)
        model(text[:, :50], past_key_values=cache)
        assert model(text[:, 50:51], past_key_values=cache).logits.isfinite().all()
    assert run.stats.kept < 0.7


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", _MODELS)
def test_half_precision_is_supported(kind: str, dtype: torch.dtype) -> None:
    with apply(made(_MODELS[kind]).to(dtype), SinkRecent(2, 6), Renumbered()):
        pass


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_drafts_change_no_text(seed: int) -> None:
    torch.manual_seed(seed)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**_GROUPED, "num_hidden_layers": 2})).eval()
    generated = []
    for options in ({}, {"prompt_lookup_num_tokens": 3}):
        with apply(model, SinkRecent(3, 9), Renumbered()):
            generated.append(model.generate(ids(1, 24), max_new_tokens=30, do_sample=False, **options))
    assert torch.equal(*generated)


@pytest.mark.slow
def test_text_beyond_the_context_is_read_as_well_as_within(tmp_path: Any) -> None:
    """`compare --renumber` reads three times the lab model's context, at which the full cache is refused."""
    context = context_length(hf.AutoConfig.from_pretrained(LABS["lm"].path))
    assert context is not None
    corpus, rows = text("heldout"), []
    for start in (0, 20_000, 40_000):
        whole = corpus[start : start + 3 * context + 64]
        rows.append({"prompt": whole[:-64], "answer": whole[-64:]})
    import json

    file = tmp_path / "long.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    found = {
        renumber: compare(
            task=str(file), methods=["sink_recent"], budget=0.1, score="loss", out=tmp_path / str(renumber),
            renumber=renumber,
        )
        for renumber in (True, False)
    }  # fmt: skip
    loss = {renumber: result.rows[1].score for renumber, result in found.items()}
    assert found[True].rows[0].error
    assert loss[True] < loss[False] and loss[True] < 2.5, loss
