"""AttnRank: rank matching by hand, profiles of a model with a known preference for places, and the paper's claim."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from foveate.core.errors import FoveateError
from foveate.steer.parts.document_attention import document_attention
from foveate.steer.parts.document_prompt import DocumentPrompt, PromptFormat
from foveate.steer.text.attn_rank import AttnRank, basin_index, position_profile
from tests.conftest import ClaimFixture
from tests.lens.models import tiny
from tests.support.lab import lab

ITEMS, LENGTH, CONTENT = 8, 10, 24
TOKENS = ITEMS * LENGTH + 2  # a start, the items, and the end that asks
#: Token 0 starts a prompt and the last one ends it; the others are content.
END, ONE, WIDTH, HEAD = CONTENT + 1, CONTENT + 2, CONTENT + 6, 8
TURN = 2 * math.pi / TOKENS


def placed(gain: float, peak: float = 0.0) -> LlamaForCausalLM:
    """Build one layer and one head whose logits are `gain * cos(2 pi (distance / TOKENS - peak))`, plus content.

    Without a peak the first and the last tokens get most: a basin. Its channels are rotary pairs: one turns once over
    the prompt, and one hardly turns and carries a logit of each token's own, from -1 to 1.
    """
    config = LlamaConfig(
        vocab_size=CONTENT + 2, hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=HEAD, rms_norm_eps=1e-12, bos_token_id=0, eos_token_id=None, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": TURN ** (-HEAD / 2)}, tie_word_embeddings=False,
    )  # fmt: skip
    model, half = LlamaForCausalLM(config).eval(), HEAD // 2
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight[:, : CONTENT + 2] = torch.eye(CONTENT + 2)
        model.model.embed_tokens.weight[:, ONE] = 1.0
        model.model.layers[0].input_layernorm.weight.fill_((2 / WIDTH) ** 0.5)
        attention, phase = model.model.layers[0].self_attn, 2 * math.pi * peak
        attention.q_proj.weight[1, ONE] = gain * HEAD**0.5
        attention.k_proj.weight[1, ONE] = math.cos(phase)
        attention.k_proj.weight[1 + half, ONE] = math.sin(phase)
        attention.q_proj.weight[half - 1, ONE] = HEAD**0.5
        attention.k_proj.weight[half - 1, 1 : CONTENT + 1] = torch.linspace(-1, 1, CONTENT)
    return model


def shares(gain: float, peak: float = 0.0) -> Tensor:
    """Compute by hand the share that each place gets if all items say the same."""
    distance = TOKENS - 1 - torch.arange(TOKENS, dtype=torch.float64)
    weights = (gain * (2 * math.pi * (distance / TOKENS - peak)).cos()).exp()
    by_item = weights[1:-1].view(ITEMS, LENGTH).sum(-1)
    return by_item / by_item.sum()


def build(_: None, documents: Sequence[Tensor], question: Tensor) -> DocumentPrompt:
    ends = 1 + torch.tensor([0, *(len(x) for x in documents)]).cumsum(0)
    spans = tuple(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True))
    return DocumentPrompt(torch.cat([torch.tensor([0]), *documents, question])[None], spans)


def library(seed: int = 0, count: int = 40) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return list(torch.randint(1, CONTENT + 1, (count, LENGTH), generator=draw))


def measured(model: LlamaForCausalLM, samples: int = 200, **options: Any) -> AttnRank:
    return AttnRank.calibrate(
        model, None, library(), [torch.tensor([END])], items=ITEMS, samples=samples, build=build,
        generator=torch.Generator().manual_seed(1), **options,
    )  # fmt: skip


# -- order -------------------------------------------------------------------------------------------------------------


def by_hand(profile: list[float], relevance: list[float]) -> list[int]:
    """Match ranks: repeatedly give the best place that is free to the most relevant document that is left."""
    order, places, documents = [-1] * len(profile), set(range(len(profile))), set(range(len(profile)))
    while places:
        place = min(places, key=lambda p: (-profile[p], p))
        order[place] = min(documents, key=lambda d: (-relevance[d], d))
        places.remove(place)
        documents.remove(order[place])
    return order


def test_ranks_are_matched() -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(100):
        k = int(torch.randint(1, 12, (), generator=draw))
        profile, relevance = torch.randint(0, 5, (2, k), generator=draw).double()
        order = AttnRank(profile).order(relevance)
        assert order.dtype == torch.long and sorted(order.tolist()) == list(range(k))
        assert order.tolist() == by_hand(profile.tolist(), relevance.tolist())
        names = [f"document {number}" for number in range(k)]
        assert AttnRank(profile).arrange(names, relevance.tolist()) == [names[number] for number in order]


def test_monotone_profiles_sort() -> None:
    relevance = torch.tensor([0.3, 0.9, 0.1, 0.5])
    assert AttnRank(torch.tensor([0.1, 0.2, 0.3, 0.4])).order(relevance).tolist() == relevance.argsort().tolist()
    assert (
        AttnRank(torch.tensor([0.4, 0.3, 0.2, 0.1])).order(relevance).tolist()
        == relevance.argsort(descending=True).tolist()
    )


def test_another_number_of_items_resamples() -> None:
    rank = AttnRank(torch.tensor([0.3, 0.1, 0.2, 0.4]))
    shape = rank.resampled(7).profile
    torch.testing.assert_close(shape / shape[0], torch.tensor([3, 2, 1, 1.5, 2, 3, 4]).double() / 3)
    assert float(shape.sum()) == pytest.approx(1)
    assert rank.order([5, 4, 3, 2, 1, 0, -1]).tolist() == AttnRank(shape).order([5, 4, 3, 2, 1, 0, -1]).tolist()
    assert rank.order([7.0]).tolist() == [0] and AttnRank(torch.tensor([1.0])).order([1.0, 2.0]).tolist() == [1, 0]
    assert rank.resampled(4) is rank


# -- profiles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gain", "peak"), [(1.0, 0.0), (0.6, 0.3), (0.0, 0.0)])
def test_a_known_preference_for_places_is_recovered(gain: float, peak: float) -> None:
    profile = measured(placed(gain, peak)).profile
    assert float(profile.sum()) == pytest.approx(1)
    assert float((profile - shares(gain, peak)).abs().max()) < 0.02


def test_the_basin_index() -> None:
    assert basin_index(measured(placed(1.0)).profile) > 0.05
    assert abs(basin_index(measured(placed(0.0)).profile)) < 0.02
    assert basin_index([0.5, 0.1, 0.1, 0.3]) == pytest.approx(0.3)
    assert basin_index([0.1, 0.4, 0.4, 0.1]) == pytest.approx(-0.3)


def test_options_choose_what_is_measured() -> None:
    """Long items get more by "sum" and no more by "mean"; the end's tokens, layers and heads reach the measurement."""
    flat, draw = placed(0.0), torch.Generator().manual_seed(0)
    documents = list(torch.randint(1, CONTENT + 1, (4, 30), generator=draw))
    documents[1] = documents[1][:10]
    prompts = [build(None, documents, torch.tensor([END, END]))]
    assert float(position_profile(flat, prompts)[1]) < 0.2
    assert float(position_profile(flat, prompts, per="mean")[1]) == pytest.approx(0.25, abs=0.06)
    model = tiny("llama")
    for options in ({"query": "question"}, {"layers": [1]}, {"heads": [(0, 1)]}, {"layers": "shallow"}):
        for prompt in prompts:
            got = position_profile(model, [prompt], **options)  # type: ignore[arg-type]
            one = document_attention(model, prompt.ids, prompt.spans, **options).double()  # type: ignore[arg-type]
            torch.testing.assert_close(got, one / one.sum())
            assert not torch.allclose(got, position_profile(model, [prompt]))


def test_calibration_is_a_profile_of_random_prompts() -> None:
    steps: list[tuple[int, int, str]] = []
    model = placed(1.0, 0.2)
    rank = measured(model, 5, progress=lambda *step: steps.append(step))
    assert steps == [(number, 5, "prompts") for number in range(1, 6)]

    def prompts() -> Iterator[DocumentPrompt]:
        draw = torch.Generator().manual_seed(1)
        for _ in range(5):
            chosen = torch.randperm(40, generator=draw)[:ITEMS].tolist()
            torch.randint(1, (), generator=draw)
            yield build(None, [library()[number] for number in chosen], torch.tensor([END]))

    torch.testing.assert_close(rank.profile, position_profile(model, prompts()))
    assert torch.equal(rank.profile, measured(model, 5).profile)


# -- what the paper claims ---------------------------------------------------------------------------------------------


def baselines(relevance: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
    """Return the usual orders: by relevance, either way, alternating between both ends, and at random."""
    falling = relevance.argsort(descending=True)
    both_ends = torch.cat([falling[0::2], falling[1::2].flip(0)])
    return {
        "descending": falling, "ascending": falling.flip(0), "both ends": both_ends,
        "random": torch.randperm(len(relevance), generator=draw),
    }  # fmt: skip


def test_a_reader_of_uneven_attention_is_right_more_often(claim: ClaimFixture) -> None:
    """20 items, and a preference whose peak is the third place, beside a smaller one at the end."""
    draw, place = torch.Generator().manual_seed(0), torch.arange(20.0)
    profile = 0.05 + (-((place - 2) ** 2) / 2).exp() + 0.5 * (-((19 - place) ** 2) / 2).exp()
    profile /= profile.sum()
    hits = dict.fromkeys(("ours", "descending", "ascending", "both ends", "random"), 0)
    for _ in range(2000):
        relevance = torch.randn(20, generator=draw)
        right = float(torch.rand((), generator=draw))
        orders = {"ours": AttnRank(profile).order(relevance), **baselines(relevance, draw)}
        for name, order in orders.items():
            hits[name] += right < float(profile[order == relevance.argmax()])
    best = max(count for name, count in hits.items() if name != "ours")
    claim(
        "a reader that is right as often as it attends to the one relevant item of 20; its peak is the third place",
        ours=hits["ours"] / 2000, baseline=best / 2000, better="higher", margin=0.1, seed=0,
        baseline_name="the best of descending, ascending, both ends and random",
    )  # fmt: skip


def test_a_measured_profile_raises_the_relevant_items_attention(claim: ClaimFixture) -> None:
    """The profile comes from a model whose attention peaks inside the prompt, and so does the attention to an item."""
    model, draw = placed(1.5, 0.35), torch.Generator().manual_seed(0)
    rank, totals = measured(model, 60), dict.fromkeys(("ours", "descending", "ascending", "both ends", "random"), 0.0)
    for seed in range(30):
        documents, relevance = library(100 + seed, ITEMS), torch.randn(ITEMS, generator=draw)
        for name, order in {"ours": rank.order(relevance), **baselines(relevance, draw)}.items():
            prompt = build(None, [documents[number] for number in order.tolist()], torch.tensor([END]))
            attention = document_attention(model, prompt.ids, prompt.spans)
            totals[name] += float(attention[order == relevance.argmax()]) / 30
    claim(
        "the most relevant of 8 items gets more of a model's attention at the place that its measured profile names",
        ours=totals["ours"], baseline=max(value for name, value in totals.items() if name != "ours"), better="higher",
        margin=0.05, baseline_name="the best of descending, ascending, both ends and random", seed=0,
    )  # fmt: skip


# -- words -------------------------------------------------------------------------------------------------------------


def test_it_takes_a_model_a_tokenizer_and_texts() -> None:
    texts = ["Bees live in hives.", "Ants dig.", "Owls hunt at night.", "Moles are blind."]
    rank = AttnRank.calibrate(
        *lab(), texts, ["Who digs?", "Who hunts?"], items=3, samples=4, build=PromptFormat(document="{document}\n"),
        per="mean", generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert rank.profile.shape == (3,) and float(rank.profile.sum()) == pytest.approx(1)
    assert sorted(rank.arrange(texts, [0.1, 0.9, 0.2, 0.3])) == sorted(texts)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttnRank(torch.tensor([0.5, -0.1])), "profile must be numbers (k,), none below 0"),
        (lambda: AttnRank(torch.tensor([[0.5]])), "profile must be numbers (k,)"),
        (lambda: AttnRank(torch.tensor([float("nan")])), "profile must be numbers (k,)"),
        (lambda: AttnRank(torch.tensor([0.5, 0.5])).order([]), "relevance must be finite numbers (k,)"),
        (lambda: AttnRank(torch.tensor([0.5, 0.5])).order([0.1, float("inf")]), "relevance must be finite"),
        (lambda: AttnRank(torch.tensor([0.5, 0.5])).arrange(["a"], [0.1, 0.2]), "must have one length; got 1 and 2"),
        (lambda: AttnRank(torch.tensor([0.5, 0.5])).resampled(0), "items=0 must be a whole number, at least 1"),
        (lambda: basin_index([0.5, 0.5]), "profile must have at least three places; got 2"),
        (lambda: position_profile(placed(1.0), []), "prompts must hold at least one prompt"),
        (lambda: position_profile(placed(1.0), [], per="token"), "per='token' must be one of 'sum', 'mean'"),
        (
            lambda: position_profile(
                placed(1.0), [build(None, library()[:n], torch.tensor([END])) for n in (2, 3)]
            ),
            "prompts must hold equally many documents; got 2 and 3",
        ),
        (lambda: measured(placed(1.0), 0), "samples=0 must be a whole number, at least 1"),
        (
            lambda: AttnRank.calibrate(None, None, ["a"], ["?"], items=2),
            "documents must be at least items=2 and questions at least one; got 1 and 1",
        ),
    ],
)  # fmt: skip
def test_bad_calls_are_refused(make: Any, message: str) -> None:
    with pytest.raises(FoveateError) as caught:
        make()
    assert message in str(caught.value) and "\n" not in str(caught.value)
