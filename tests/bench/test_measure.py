"""One batch under one method: its answers, losses and memory; and the grouping of prompts into batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from foveate.bench.comparison.encoding import Prompt
from foveate.bench.comparison.evaluation import Evaluation
from foveate.bench.comparison.measure import batches, memory_use, run_batch
from foveate.bench.comparison.run import compare
from foveate.bench.parts.memory import Memory, peak_bytes
from foveate.host import Method
from foveate.kv.sink_recent import SinkRecent
from foveate.tasks.base.task import Example
from tests.bench.conftest import write_prompts

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(decoder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(decoder).eval()


def encoded(*lengths: int, new: int = 6, context: int = 768) -> list[Prompt]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(97, 120, (1, length), generator=generator) for length in lengths]
    return [Prompt(Example(f"p{index}", "a"), row, new, context) for index, row in enumerate(ids)]


@pytest.mark.parametrize("size", [1, 3])
def test_memory_is_measured_on_the_longest_prompt_that_the_context_holds(size: int) -> None:
    prompts = encoded(40, 90, 58, 50, context=64)
    answers = [[1], [2], [3, 4], [5]]
    for forced in (None, answers):
        batch = Evaluation(prompts, "exact", lambda *_: 0.0, forced, size, 0, frozenset(), None).memory_batch
        assert batch.prompts == (prompts[2],)
        assert batch.forced is None if forced is None else batch.forced.tolist() == [[3, 4]]
    beyond = encoded(70, 90, 80, context=64)
    batch = Evaluation(beyond, "exact", lambda *_: 0.0, None, size, 0, frozenset(), None).memory_batch
    assert batch.prompts == (beyond[1],)


def test_greedy_answers_are_the_models_own(model: PreTrainedModel) -> None:
    (batch,) = batches(encoded(40), 1, None, 0)
    result = run_batch(model, (), batch)
    expected = model.generate(batch.ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    assert result.ids == [expected[0, 40:].tolist()] and result.losses is None
    assert (result.kept, result.read) == (1.0, 1.0) and result.prefill_ms > 0 and result.decode_ms > 0


@pytest.mark.parametrize("methods", [(), (SinkRecent(sink=4, recent=16),)], ids=["full", "sink_recent"])
def test_a_batch_gives_the_answers_of_single_prompts(model: PreTrainedModel, methods: tuple[Method, ...]) -> None:
    prompts = encoded(40, 43, 41, 44)
    (batch,) = batches(prompts, 4, None, 0)
    assert batch.indices == (0, 2, 1, 3) and batch.length == 40 and batch.ids.shape == (4, 44)
    together = run_batch(model, methods, batch)
    for index, ids in zip(batch.indices, together.ids, strict=True):
        (alone,) = batches([prompts[index]], 1, None, 0)
        assert run_batch(model, methods, alone).ids == [ids]


def test_a_padded_batch_has_each_prompts_positions() -> None:
    """GPT-2 has learned positions, which would differ if they counted the padding."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=260, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.5)
    model, prompts = GPT2LMHeadModel(config).eval(), encoded(40, 43, context=64)
    (batch,) = batches(prompts, 2, None, 0)
    alone = [run_batch(model, (), single).ids[0] for single in batches(prompts, 1, None, 0)]
    assert run_batch(model, (), batch).ids == alone
    assert len({tuple(ids) for ids in alone}) == 2


def test_batches_have_similar_lengths_and_at_most_their_size() -> None:
    found = batches(encoded(100, 50, 105, 52, 760, 51, 104), 3, None, 0)
    assert [batch.indices for batch in found] == [(1, 5, 3), (0, 6, 2), (4,)]
    assert [batch.indices for batch in batches(encoded(9, 5, 7), 1, None, 0)] == [(0,), (1,), (2,)]
    assert len(batches(encoded(761, 763), 2, None, 0)) == 2  # one of them exceeds the context


def test_the_loss_covers_the_answer_after_the_prompt(model: PreTrainedModel) -> None:
    prompts, answers = encoded(40, 42), [[100, 101, 102], [99]]
    (batch,) = batches(prompts, 2, answers, 0)
    found = run_batch(model, (), batch).losses
    for prompt, ids, loss in zip(prompts, answers, found or [], strict=True):
        whole = torch.cat([prompt.ids, torch.tensor([ids])], 1)
        with torch.inference_mode():
            logits = model(whole).logits[0, prompt.ids.shape[1] - 1 : -1].log_softmax(-1)
        expected = -logits.gather(1, torch.tensor(ids)[:, None]).mean().item()
        assert loss == pytest.approx(expected, abs=1e-5)


def test_compare_measures_losses(decoder: Path, prompts: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model": str(decoder), "task": str(prompts), "methods": ["sink_recent"], "budget": 0.1}
    found = compare(**settings, score="loss", out=tmp_path / "alone")
    together = compare(**settings, score="loss", batch=3, out=tmp_path / "together")
    assert found.metric == "loss" and all(3 < row.score < 8 for row in found.rows)
    assert found.rows[0].score != found.rows[1].score
    for one, other in zip(found.rows, together.rows, strict=True):
        assert [a.score for a in one.answers] == pytest.approx([a.score for a in other.answers], abs=1e-4)


def test_an_answer_ends_at_a_stop_token(decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    file = write_prompts(tmp_path / "one.jsonl", ["abc"], answer="hi")
    tokens = [*tokenizer("hi", add_special_tokens=False).input_ids, tokenizer.eos_token_id, 100]
    original = run_batch

    def ends(*args: Any, **more: Any) -> Any:
        found = original(*args, **more)
        found.ids[0][:] = tokens
        return found

    monkeypatch.setattr("foveate.bench.comparison.interleaved.run_batch", ends)
    rows = compare(model=str(decoder), task=str(file), methods=["full"], score="exact", out=tmp_path / "out").rows
    assert (rows[0].answers[0].output, rows[0].score) == ("hi", 1.0)


@torch.inference_mode()
def test_live_memory_is_only_the_cache(model: PreTrainedModel) -> None:
    """After the answer exactly the full cache is live, besides a few bytes of the last token."""
    (batch,) = batches(encoded(200), 1, None, 0)
    cache = 2 * 3 * 2 * 8 * 4 * (200 + 5)  # keys and values, layers, heads, channels, bytes, tokens read
    _, after, peak = (1e6 * value for value in memory_use(model, (), batch))
    assert cache <= after <= cache + 600 and peak > after
    _, evicted, _ = (1e6 * value for value in memory_use(model, (SinkRecent(sink=4, recent=36),), batch))
    assert evicted < 0.35 * cache


@torch.inference_mode()
def test_tensors_that_a_method_holds_are_counted(model: PreTrainedModel) -> None:
    class HoldsTensors(Method):
        def __init__(self) -> None:
            self.held: list[torch.Tensor] = []

        def read(self, site: object, out: torch.Tensor) -> None:
            self.held.append(torch.zeros(1000))

    (batch,) = batches(encoded(50, new=3), 1, None, 0)
    plain, holding = memory_use(model, (), batch), memory_use(model, (HoldsTensors(),), batch)
    assert 1e6 * (holding[0] - plain[0]) == pytest.approx(3 * 4000, abs=200)
    assert 1e6 * (holding[1] - plain[1]) == pytest.approx(9 * 4000, abs=200)


def test_peak_and_live_bytes_follow_the_tensors() -> None:
    def work() -> None:
        a = torch.zeros(1000)
        b = a + 1  # both live: 8,000 bytes
        del a
        c = b.view(10, 100)  # a view takes no memory
        c + 1

    assert peak_bytes(work, CPU) == 8000
    with Memory(CPU) as counted:
        kept = torch.zeros(500)
        cycle: list[Any] = [torch.zeros(700)]
        cycle.append(cycle)
        del cycle
        assert (counted.now, counted.peak) == (2000, 4800)
        part = kept[:10]
        del kept
        assert counted.now == 2000 and part.numel() == 10  # a view keeps its whole storage
