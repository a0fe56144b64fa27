"""What the literature says of attention heads holds on these models: sinks, and few heads that retrieve.

Sinks: Efficient Streaming Language Models with Attention Sinks (2023), arXiv 2309.17453: beyond the first two layers,
heads give the first token much of their weight, whatever it says. Retrieval heads: Retrieval Head Mechanistically
Explains Long-Context Factuality (2024), arXiv 2404.15574: they are few, and none is in the first layers; RazorAttention
(2024), arXiv 2407.15891, finds them as induction heads on random tokens.
"""

from __future__ import annotations

import pytest
import torch

from foveate.core.catalog import system
from foveate.host import apply
from foveate.lens import Lens
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
