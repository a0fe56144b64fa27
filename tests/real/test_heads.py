"""What the literature says of attention heads holds on these models: sinks, and few heads that retrieve.

Sinks: Efficient Streaming Language Models with Attention Sinks (2023), arXiv 2309.17453: beyond the first two layers,
heads give the first token much of their weight, whatever it says. Retrieval heads: Retrieval Head Mechanistically
Explains Long-Context Factuality (2024), arXiv 2404.15574: they are few, and none is in the first layers; RazorAttention
(2024), arXiv 2407.15891, finds them as induction heads on random tokens.
"""

from __future__ import annotations

import random

import pytest
import torch

from foveate.core.catalog import system
from foveate.host import apply
from foveate.lens import Lens, NeedleCase, ablate, needle_span, retrieval_scores, top_heads
from foveate.tasks.text.needle import Needle
from tests.real.conftest import Real

pytestmark = pytest.mark.real


@torch.inference_mode()
@pytest.mark.parametrize("start", [0, 5000])
def test_sinks_exist(real: Real, start: int) -> None:
    tokens, lens = 256, Lens(measures=("sink_mass",))
    with apply(real.model, lens):
        real.model(real.ids(tokens, start), use_cache=False)
    mass = torch.tensor([row["value"] for row in lens.table() if row["layer"] >= 2])
    even = sum(1 / (row + 1) for row in range(tokens)) / tokens
    assert mass.mean() > max(0.2, 8 * even), mass
    assert (mass > 5 * even).float().mean() > 0.5, mass


@torch.inference_mode()
def test_retrieval_heads_are_few_and_not_in_the_first_layers(real: Real) -> None:
    scores = real.lessons(system("razor_attention").load(), "razor_attention")["induction"]
    best = scores.flatten().topk(max(1, scores.numel() // 20)).indices // scores.shape[1]
    assert scores.max() > 0.3, scores
    assert (scores > 0.5 * scores.max()).float().mean() < 0.25, scores
    assert int(best.min()) >= 2, scores


@torch.inference_mode()
def test_retrieval_heads_carry_retrieval(real: Real) -> None:
    """Without the twenty heads with the largest scores no needle is found; without twenty others some are."""
    if real.key != "qwen2.5-coder-0.5b-instruct":
        pytest.skip("this model misses needles with the full cache too, so that there is little to lose")
    examples = Needle(length=1800, count=8, seed=5).examples()
    ids = [real.tokenizer(example.prompt, return_tensors="pt", verbose=False).input_ids for example in examples]
    needles = [torch.tensor(real.tokenizer(e.answer, add_special_tokens=False).input_ids) for e in examples]
    cases = [NeedleCase(row[0], *needle_span(row[0], own, 1.0)) for row, own in zip(ids[:5], needles, strict=False)]
    scores = retrieval_scores(real.model, cases, new=8)
    assert (scores >= 0.1).float().mean() < 0.25, scores

    def found(heads: list[tuple[int, int]]) -> int:
        right = 0
        with apply(real.model, ablate(heads)):
            for example, row in zip(examples[5:], ids[5:], strict=True):
                out = real.model.generate(
                    row, attention_mask=torch.ones_like(row), max_new_tokens=8, do_sample=False, pad_token_id=0
                )
                right += example.answer.strip() in real.tokenizer.decode(out[0, row.shape[1] :])
        return right

    best, rest = top_heads(scores, 20), top_heads(scores, scores.numel())[60:]
    others = [random.Random(seed).sample(rest, 20) for seed in range(2)]
    assert found([]) == 3
    assert found(best) == 0
    assert sum(found(heads) for heads in others) >= 4
