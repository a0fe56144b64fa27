"""Head pursuit: recovery and parity of SOMP, the logit lens as its first step, and heads whose concept is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.linear_model import orthogonal_mp
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import foveate
from foveate.core.errors import FoveateError, OptionError, ShapeError, UnsupportedModel
from foveate.lens import (
    concept_logits,
    control_heads,
    head_outputs,
    head_pursuit,
    head_writes,
    scale_heads,
    somp,
    top_heads as top,
)
from tests.conftest import ClaimFixture
from tests.lens.models import text, tiny
from tests.support.constructed import BOS, FILLER, HEAD, KEYS, PREDICTION, VALUES, induction_lm, recall
from tests.support.tensors import assert_near

# -- matching pursuit --------------------------------------------------------------------------------------------------


def planted(seed: int, noise: float = 0.01) -> tuple[Tensor, Tensor, set[int]]:
    """A hundred outputs made of five of 500 atoms, some stronger than others, with noise."""
    draw = torch.Generator().manual_seed(seed)
    dictionary = torch.randn(500, 64, generator=draw, dtype=torch.float64)
    support = torch.randperm(500, generator=draw)[:5]
    strengths = torch.tensor([4.0, 2.0, 1.0, 1.0, 0.5])
    outputs = torch.randn(100, 5, generator=draw, dtype=torch.float64) * strengths @ dictionary[support]
    outputs += noise * outputs.std() * torch.randn(100, 64, generator=draw, dtype=torch.float64)
    return outputs, dictionary, set(support.tolist())


def test_planted_atoms_are_recovered(claim: ClaimFixture) -> None:
    ours = votes = 0
    for seed in range(20):
        outputs, dictionary, support = planted(seed)
        found = somp(outputs, dictionary, 5)
        ours += set(found.atoms.tolist()) == support
        assert found.score > 0.999 or set(found.atoms.tolist()) != support
        lens = (outputs @ dictionary.mT).abs().argmax(1)
        votes += set(torch.bincount(lens, minlength=500).topk(5).indices.tolist()) == support
    assert ours >= 19
    claim(
        "share of 20 drawings in which exactly the five atoms behind noisy outputs are found",
        ours=ours / 20, baseline=votes / 20, better="higher", margin=0.2,
        baseline_name="the five tokens with most votes of the logit lens", seed=0,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_one_output_gives_orthogonal_matching_pursuit(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    dictionary = torch.nn.functional.normalize(torch.randn(40, 16, generator=draw, dtype=torch.float64), dim=1)
    output = torch.randn(1, 16, generator=draw, dtype=torch.float64)
    found = somp(output, dictionary, 6)
    peer = torch.from_numpy(orthogonal_mp(dictionary.mT.numpy(), output[0].numpy(), n_nonzero_coefs=6))
    assert set(found.atoms.tolist()) == set(peer.nonzero()[:, 0].tolist())
    assert_near(found.coefficients[0], peer[found.atoms], 1e-9)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("center", [False, True])
def test_each_step_is_the_definition(norm: Any, normalize: bool, center: bool) -> None:
    draw = torch.Generator().manual_seed(3)
    outputs = torch.randn(7, 12, generator=draw, dtype=torch.float64) + 1.0
    dictionary = torch.randn(30, 12, generator=draw, dtype=torch.float64) * torch.rand(30, 1, generator=draw).double()
    found = somp(outputs, dictionary, 5, norm=norm, normalize=normalize, center=center)
    whole = outputs - outputs.mean(0) if center else outputs
    rows = torch.nn.functional.normalize(dictionary, dim=1) if normalize else dictionary
    left, taken = whole, list[int]()
    for step in range(5):
        strength = (rows @ left.mT).norm(p=1 if norm == "l1" else 2, dim=1)
        strength[taken] = -1.0
        taken.append(int(strength.argmax()))
        weights = torch.linalg.lstsq(dictionary[taken].mT, whole.mT).solution.mT
        left = whole - weights @ dictionary[taken]
        assert float(found.explained[step]) == pytest.approx(1 - float(left.square().sum() / whole.square().sum()))
    assert found.atoms.tolist() == taken
    assert_near(found.coefficients, weights, 1e-9)


def test_orthonormal_atoms_are_recovered_exactly_and_then_it_stops() -> None:
    draw = torch.Generator().manual_seed(0)
    dictionary = torch.linalg.qr(torch.randn(16, 16, generator=draw, dtype=torch.float64))[0]
    weights = torch.randn(9, 4, generator=draw, dtype=torch.float64)
    found = somp(weights @ dictionary[[2, 5, 7, 11]], torch.cat([dictionary, dictionary]), 30)
    assert sorted(atom % 16 for atom in found.atoms.tolist()) == [2, 5, 7, 11]
    assert float(found.explained[-1]) == pytest.approx(1.0, abs=1e-12)
    order = [[2, 5, 7, 11].index(atom % 16) for atom in found.atoms.tolist()]
    assert_near(found.coefficients, weights[:, order], 1e-9)
    assert somp(torch.zeros(3, 16), dictionary).score == 0.0


def test_a_long_row_is_taken_first_unless_rows_are_normalised() -> None:
    outputs, dictionary, support = planted(1)
    other = next(row for row in range(500) if row not in support)
    dictionary[other] *= 30
    assert int(somp(outputs, dictionary, 1).atoms) == other
    assert int(somp(outputs, dictionary, 1, normalize=True).atoms) in support


def test_the_first_step_on_one_sample_is_the_logit_lens() -> None:
    model, ids = tiny("llama"), text()["input_ids"][:1]
    outputs = head_writes(model, ids, "last")[1][0]
    for output in outputs:
        logits = model.lm_head.weight.detach() @ output
        assert int(somp(output[None], model.lm_head.weight.detach(), 1).atoms) == int(logits.abs().argmax())


# -- outputs of a model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_what_heads_write_adds_up_to_the_output_of_attention(kind: str, padding: str) -> None:
    model, inputs, seen = tiny(kind), text(padding), list[Tensor]()
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(lambda module, given, out: seen.append(out))
    real = inputs["attention_mask"].bool()
    ids = inputs["input_ids"]
    special = 2 + int((ids[:, 12:17] - 2)[0, 0])
    inputs["input_ids"][:, 14] = special
    choices: dict[Any, Tensor] = {"all": real, special: real & (ids == special)}
    choices["last"] = torch.zeros_like(real)
    choices["last"][torch.arange(2), [int(row.nonzero().max()) for row in real]] = True
    for tokens, chosen in choices.items():
        seen.clear()
        found = head_writes(model, inputs, tokens)
        for layer, whole in enumerate(seen):
            expected = torch.stack([whole[b, chosen[b]].mean(0) for b in range(2)])
            assert_near(found[layer].sum(1), expected, 1e-4)
    one = head_outputs(model, inputs)[1][:, 2]  # one head by hand
    part = model.model.layers[1].self_attn.o_proj.weight.detach()[:, 16:24]
    mean = torch.stack([one[b, real[b]].mean(0) for b in range(2)])
    assert_near(head_writes(model, inputs)[1][:, 2], mean @ part.mT, 1e-4)


# -- heads whose concept is known --------------------------------------------------------------------------------------

COLOURS, NUMBERS = range(32, 40), range(40, 48)
COLOUR_HEAD, NUMBER_HEAD = (1, 0), (1, 2)


def two_concepts() -> LlamaForCausalLM:
    """A model that recalls what stood behind a key: one head writes it if it is a colour, another if it is a number."""
    model = induction_lm(matching=[COLOUR_HEAD, NUMBER_HEAD])
    weight = model.model.layers[1].self_attn.o_proj.weight
    with torch.no_grad():
        for (_, head), own in ((COLOUR_HEAD, COLOURS), (NUMBER_HEAD, NUMBERS)):
            others = [PREDICTION + token for token in range(48) if token not in own]
            weight[others, head * HEAD : (head + 1) * HEAD] = 0.0
    return model


def prompts() -> tuple[Tensor, Tensor]:
    ids, answers = recall(48, 40, seed=1)
    return ids, answers[:, 0]


def right(model: LlamaForCausalLM, heads: list[tuple[int, int]], factor: float) -> tuple[float, float]:
    """The shares of colours and of numbers that are recalled while heads are scaled."""
    ids, answers = prompts()
    with torch.no_grad(), foveate.apply(model, scale_heads(heads, factor, (2, 4))):
        hits = model(ids).logits[:, -1].argmax(-1) == answers
    is_colour = answers < NUMBERS.start
    return float(hits[is_colour].float().mean()), float(hits[~is_colour].float().mean())


@pytest.mark.parametrize("tokens", ["all", "last"])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_concept_belongs_to_the_head_that_writes_it(tokens: Any, normalize: bool) -> None:
    model, (ids, _) = two_concepts(), prompts()
    for concept, head in ((COLOURS, COLOUR_HEAD), (NUMBERS, NUMBER_HEAD)):
        scores = head_pursuit(model, [ids[:20], ids[20:]], concept, tokens=tokens, normalize=normalize)
        assert scores.shape == (2, 4) and top(scores, 1) == [head]
        assert float(scores[head]) > 0.99
        assert top(concept_logits(model, [ids], concept, tokens=tokens), 1) == [head]
    contrast = head_pursuit(model, [ids], COLOURS, against=NUMBERS, tokens=tokens)
    assert float(contrast[COLOUR_HEAD]) > 0.99 and float(contrast[NUMBER_HEAD]) < -0.99


def test_suppressing_the_head_of_a_concept_spares_the_other(claim: ClaimFixture) -> None:
    model, (ids, _) = two_concepts(), prompts()
    assert right(model, [], 1.0) == (1.0, 1.0) == right(model, [COLOUR_HEAD], 1.0)
    best = top(head_pursuit(model, [ids], COLOURS), 1)
    colours, numbers = right(model, best, -1.0)
    draw = torch.Generator().manual_seed(0)
    controls = [right(model, control_heads(best, (2, 4), draw), -1.0) for _ in range(10)]
    lengths = torch.stack([x.square().sum(-1).mean(0) for x in head_writes(model, ids).values()])
    by_norm = right(model, top(lengths, 1), -1.0)
    claim(
        "accuracy on numbers minus accuracy on colours after the colours' head is flipped",
        ours=numbers - colours,
        baseline=max(sum(n - c for c, n in controls) / 10, by_norm[1] - by_norm[0]),
        better="higher", margin=0.5, baseline_name="random heads of the layer, or the head with the largest outputs",
        seed=0,
    )  # fmt: skip


def test_a_scaled_head_tips_an_open_question() -> None:
    """A key stands before a colour and before a number, so that the heads are at odds."""
    model, draw = two_concepts(), torch.Generator().manual_seed(0)
    ids = torch.randint(FILLER.start, FILLER.stop, (32, 30), generator=draw)
    ids[:, 0], ids[:, [5, 15, 29]] = BOS, KEYS.start
    ids[:, 6] = torch.randint(COLOURS.start, COLOURS.stop, (32,), generator=draw)
    ids[:, 16] = torch.randint(NUMBERS.start, VALUES.stop, (32,), generator=draw)
    best = top(head_pursuit(model, [ids], COLOURS), 1)
    for factor, answer in ((5.0, ids[:, 6]), (-1.0, ids[:, 16])):
        with torch.no_grad(), foveate.apply(model, scale_heads(best, factor, (2, 4))):
            assert torch.equal(model(ids).logits[:, -1].argmax(-1), answer)


def test_controls_are_other_heads_of_the_same_layers() -> None:
    given = [(0, 1), (2, 0), (2, 3)]
    drawn = [control_heads(given, (3, 8), torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert all(sorted(layer for layer, _ in heads) == [0, 2, 2] for heads in drawn)
    assert not any(set(heads) & set(given) or len(set(heads)) < 3 for heads in drawn)
    assert len({tuple(heads) for heads in drawn}) > 5


# -- a model that is trained on two concepts ---------------------------------------------------------------------------

ASK_COLOUR, ASK_NUMBER = 48, 49


def questions(count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Texts with one colour and one number, of which the last token asks for one; and the answers."""
    ids = torch.randint(FILLER.start, FILLER.stop, (count, 10), generator=draw)
    places = torch.rand(count, 8, generator=draw).argsort(1) + 1
    both = torch.stack([torch.randint(r.start, r.stop, (count,), generator=draw) for r in (COLOURS, NUMBERS)], 1)
    ids.scatter_(1, places[:, :2], both)
    asked = torch.randint(2, (count, 1), generator=draw)
    ids[:, 0], ids[:, -1:] = BOS, ASK_COLOUR + asked
    return ids, both.gather(1, asked)[:, 0]


def trained(seed: int) -> LlamaForCausalLM:
    """Two layers of four narrow heads, which cannot carry both concepts well."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=2,
        bos_token_id=BOS, eos_token_id=None, pad_token_id=BOS,
    )  # fmt: skip
    model, draw = LlamaForCausalLM(config), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        ids, answers = questions(64, draw)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(ids).logits[:, -1], answers).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.slow
def test_a_trained_model_loses_the_concept_of_its_top_head(claim: ClaimFixture) -> None:
    ours, numbers, others = list[float](), list[float](), list[float]()
    for seed in range(4):
        model, (ids, answers) = trained(seed), questions(800, torch.Generator().manual_seed(100))
        asks_colour = ids[:, -1] == ASK_COLOUR

        def hits(heads: list[tuple[int, int]]) -> Tensor:
            with torch.no_grad(), foveate.apply(model, scale_heads(heads, -1.0, (2, 4))):  # noqa: B023
                right = (model(ids).logits[:, -1].argmax(-1) == answers).double()  # noqa: B023
            return torch.stack([right[asks_colour].mean(), right[~asks_colour].mean()])  # noqa: B023

        lost = {(layer, head): hits([]) - hits([(layer, head)]) for layer in range(2) for head in range(4)}
        best = top(head_pursuit(model, [ids[asks_colour]], COLOURS), 1)[0]
        assert float(hits([]).min()) > 0.9
        for kind, value in zip((ours, numbers), lost.pop(best).tolist(), strict=True):
            kind.append(value)
        others.append(float(torch.stack(list(lost.values()))[:, 0].mean()))
    assert sum(ours) > 2 * sum(numbers)
    claim(
        "accuracy on colours lost when the head with the top score for colours is flipped, mean of 4 trainings",
        ours=sum(ours) / 4, baseline=sum(others) / 4, better="higher", margin=0.1,
        baseline_name="the average other head", seed=0,
    )  # fmt: skip


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused() -> None:
    model, ids = tiny("llama"), text()["input_ids"]
    bad: list[tuple[type[FoveateError], str, Any, Any, dict[str, Any]]] = [
        (OptionError, "concept must be ids in 0..49", [ids], [50], {}),
        (OptionError, "concept", [ids], [], {}),
        (OptionError, "against", [ids], [3], {"against": [-1]}),
        (OptionError, "at least one prompt", [], [3], {}),
        (OptionError, "tokens=", [ids], [3], {"tokens": "first"}),
        (OptionError, "in every prompt", [ids], [3], {"tokens": 0}),
        (OptionError, "atoms=0", [ids], [3], {"atoms": 0}),
        (OptionError, "norm=", [ids], [3], {"norm": "max"}),
        (ShapeError, "token ids", [ids[0]], [3], {}),
        (ShapeError, "must fit", [ids], [3], {"dictionary": torch.ones(9, 7)}),
    ]
    for error, words, prompts, concept, options in bad:
        with pytest.raises(error, match=words):
            head_pursuit(model, prompts, concept, **options)
    with pytest.raises(UnsupportedModel, match="no unembedding"):
        head_pursuit(model.model, [ids], [3])
    with pytest.raises(OptionError, match="at most half"):
        control_heads([(0, 0), (0, 1), (0, 2)], (1, 4))
    with pytest.raises(OptionError, match="not among"):
        scale_heads([(2, 0)], 0.0, (2, 4))
