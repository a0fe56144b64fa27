"""ACT: the paper's claims, on an attention-pooling classifier with constructed weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from foveate.core.errors import FoveateError
from foveate.host import apply
from foveate.steer.text.act_calibration import ActCalibration, act_search, calibrate_sinks, find_sinks
from tests.conftest import ClaimFixture
from tests.lens.models import tiny
from tests.support.tensors import assert_near

BOS, DELIMITER, END, VERDICT, CONTENT, VOCAB = 0, 1, 2, (3, 4), (5, 6), 8
WIDTH, HEAD, ONE, ANSWER = 16, 8, VOCAB, VOCAB + 1
STEALS, INITIAL, EVEN, HELPS = range(4)  # the heads of layer 2
LENGTH = 32


def pool() -> LlamaForCausalLM:
    """Build four layers; the third pools the prompt into two classes, with four heads, and the others are identities.

    Head STEALS pools content, but a delimiter gets most of its attention and votes for class 0. INITIAL pools content
    and has a sink at the start. EVEN contributes nothing. HELPS attends to a verdict later in the prompt, which is
    informative.
    """
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, head_dim=HEAD, rms_norm_eps=1e-12,
        rope_parameters={"rope_type": "default", "rope_theta": 1e24},
        bos_token_id=BOS, eos_token_id=None, pad_token_id=BOS, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    mass = {
        STEALS: {BOS: 12, DELIMITER: 62},
        INITIAL: {BOS: 40},
        EVEN: {},
        HELPS: {BOS: 12, VERDICT[0]: 30, VERDICT[1]: 30},
    }
    votes = {
        STEALS: {CONTENT[0]: (1, 0), CONTENT[1]: (0, 1), DELIMITER: (0.16, 0)},
        INITIAL: {CONTENT[0]: (0.1, 0), CONTENT[1]: (0, 0.1)},
        EVEN: {},
        HELPS: {VERDICT[0]: (0.1, 0), VERDICT[1]: (0, 0.1)},
    }
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight[:, :VOCAB] = torch.eye(VOCAB)
        model.model.embed_tokens.weight[:, ONE] = 1.0
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight[:2, ANSWER : ANSWER + 2] = torch.eye(2)
        attention = model.model.layers[2].self_attn
        model.model.layers[2].input_layernorm.weight.fill_((2 / WIDTH) ** 0.5)
        for head in range(4):
            first, still = head * HEAD, head * HEAD + HEAD // 2 - 1  # the pair of channels that rotates least
            attention.q_proj.weight[still, ONE] = HEAD**0.5
            for token, times in mass[head].items():
                attention.k_proj.weight[still, token] = torch.tensor(float(times)).log()
            for token, answer in votes[head].items():
                attention.v_proj.weight[first : first + 2, token] = torch.tensor(answer, dtype=torch.float32)
            attention.o_proj.weight[ANSWER : ANSWER + 2, first : first + 2] = torch.eye(2)
    return model


def prompts(count: int, seed: int) -> list[tuple[Tensor, int]]:
    """Draw prompts of noisy content, with a delimiter and a mostly right verdict, and their classes."""
    draw, examples = torch.Generator().manual_seed(seed), []
    for index in range(count):
        label = index % 2
        rare = torch.rand(LENGTH, generator=draw) < 0.35
        ids = torch.tensor(CONTENT)[(label + rare.long()) % 2]
        places = 6 + torch.randperm(18, generator=draw)[:2]
        right = torch.rand((), generator=draw) < 0.9
        ids[places] = torch.tensor([DELIMITER, VERDICT[label if right else 1 - label]])
        ids[0], ids[-1] = BOS, END
        examples.append((ids, label))
    return examples


def right(model: LlamaForCausalLM, example: tuple[Tensor, int]) -> float:
    ids, label = example
    return float(model(ids[None]).logits[0, -1, :2].argmax() == label)


def accuracy(model: LlamaForCausalLM, method: ActCalibration, examples: list[tuple[Tensor, int]]) -> float:
    with torch.no_grad(), apply(model, method):
        return sum(right(model, example) for example in examples) / len(examples)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return pool()


def causal_maps(n: int = 12, heads: int = 3, seed: int = 0) -> Tensor:
    """Draw causal maps with a few strong columns."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, heads, n, n, generator=draw) + 4.0 * (torch.rand(2, heads, 1, n, generator=draw) < 0.3)
    return logits.masked_fill(~torch.ones(n, n).tril().bool(), float("-inf")).softmax(-1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("beta", [0.0, 0.4, 0.9])
def test_rows_stay_causal_distributions_and_the_first_sink_is_kept(seed: int, beta: float) -> None:
    before = causal_maps(seed=seed)
    after = calibrate_sinks(before, None, beta, alpha=2.0)
    assert_near(after.sum(-1), torch.ones(2, 3, 12), 1e-6)
    assert bool((after.triu(1) == 0).all())
    sinks = find_sinks(before, "alpha/N", 2.0, seen=torch.ones(12, 12).tril().bool()[None, None])
    for item, head in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        first, *later = sinks[item, head].nonzero().flatten().tolist()
        assert bool((after[item, head, :, first] >= before[item, head, :, first]).all())
        for j in later:
            others = (before[item, head] * ~sinks[item, head]).sum(-1) > 0
            assert_near(after[item, head, others, j], beta * before[item, head, others, j], 1e-6)


def test_a_beta_of_one_is_the_identity() -> None:
    before = causal_maps()
    assert torch.equal(calibrate_sinks(before, None, beta=1.0, alpha=1.0), before)
    assert torch.equal(calibrate_sinks(before, [], alpha=1.0), before)


def test_calibration_of_a_small_map() -> None:
    """Of six tokens, keys 0 and 2 receive 0.567 and 0.35 on average, more than 2/6."""
    before = torch.tensor([
        [1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [0.6, 0.4, 0.0, 0.0, 0.0, 0.0],
        [0.5, 0.1, 0.4, 0.0, 0.0, 0.0],
        [0.4, 0.1, 0.4, 0.1, 0.0, 0.0],
        [0.4, 0.1, 0.4, 0.05, 0.05, 0.0],
        [0.5, 0.0, 0.2, 0.1, 0.1, 0.1],
    ])  # fmt: skip
    after = torch.tensor([
        [1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [0.6, 0.4, 0.0, 0.0, 0.0, 0.0],
        [0.7, 0.14, 0.16, 0.0, 0.0, 0.0],
        [0.56, 0.14, 0.16, 0.14, 0.0, 0.0],
        [0.56, 0.14, 0.16, 0.07, 0.07, 0.0],
        [0.575, 0.0, 0.08, 0.115, 0.115, 0.115],
    ])  # fmt: skip
    assert_near(calibrate_sinks(before[None, None], alpha=2.0)[0, 0], after, 1e-6)
    assert_near(calibrate_sinks(before[None, None], thr=0.34)[0, 0], after, 1e-6)
    assert torch.equal(
        calibrate_sinks(before[None, None], thr=0.36)[0, 0], before
    )  # only key 0 is a sink, and it is kept


def test_a_row_with_only_sinks_is_unchanged() -> None:
    before = torch.tensor([[1.0, 0.0], [0.5, 0.5]])[None, None]
    assert torch.equal(calibrate_sinks(before, thr=0.1, keep_first=False), before)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_padding_do_not_count(side: str) -> None:
    """Sinks are found on the visible rows and keys only."""
    part, n = causal_maps(n=12), 20
    real = slice(8, None) if side == "left" else slice(0, 12)
    whole, seen = torch.full((2, 3, n, n), 1 / n), torch.zeros(n, n, dtype=torch.bool)
    whole[..., real, :] = 0.0
    whole[..., real, real], seen[real, real] = part, torch.ones(12, 12).tril().bool()
    after = calibrate_sinks(whole, alpha=2.0, seen=seen[None, None])
    assert_near(after[..., real, real], calibrate_sinks(part, alpha=2.0), 1e-6)


def test_only_the_chosen_heads_change() -> None:
    before = causal_maps()
    after = calibrate_sinks(before, torch.tensor([False, True, False]), alpha=2.0)
    assert torch.equal(after[:, 0::2], before[:, 0::2]) and not torch.equal(after[:, 1], before[:, 1])
    assert torch.equal(after, calibrate_sinks(before, [1], alpha=2.0))


def test_calibration_of_the_stealing_head_helps(model: LlamaForCausalLM, claim: ClaimFixture) -> None:
    examples = prompts(200, seed=1)
    stolen = causal_map(model, examples[0][0])[STEALS, -1, examples[0][0] == DELIMITER]
    assert 0.55 < stolen.item() < 0.65
    claim(
        "Scaling down a later sink in the head that it steals 60% of raises accuracy",
        ours=accuracy(model, ActCalibration([(2, STEALS)]), examples),
        baseline=accuracy(model, ActCalibration([(2, STEALS)], beta=1.0), examples),
        better="higher", baseline_name="beta=1: the model as it is", margin=0.05, seed=1,
    )  # fmt: skip


def test_not_all_sinks_are_worth_calibrating(model: LlamaForCausalLM, claim: ClaimFixture) -> None:
    examples = prompts(200, seed=1)
    claim(
        "The heads that a search finds serve better than all heads: some later sinks help",
        ours=accuracy(model, ActCalibration([(2, STEALS)]), examples),
        baseline=accuracy(model, ActCalibration([(2, STEALS), (2, HELPS)]), examples),
        better="higher", baseline_name="every head with a later sink", margin=0.02, seed=1,
    )  # fmt: skip


def test_the_search_picks_the_stealing_head_alone(model: LlamaForCausalLM) -> None:
    calls: list[tuple[int, int, str]] = []
    found = act_search(model, prompts(60, seed=2), right, progress=lambda *call: calls.append(call))
    assert found.nonzero().tolist() == [[2, STEALS]]
    assert [done for done, _, _ in calls] == [1, 2, 3, 4] and calls[0][
        1
    ] == 4  # the default candidates are layer 2's heads
    examples = prompts(20, seed=3)
    assert accuracy(model, ActCalibration(found), examples) == accuracy(model, ActCalibration({2: [STEALS]}), examples)


def causal_map(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Return layer 2's weights `(heads, N, N)`."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(ids[None], output_attentions=True).attentions[2][0]
    model.set_attn_implementation("sdpa")
    return weights


def test_a_head_with_the_initial_sink_only_is_unchanged(model: LlamaForCausalLM) -> None:
    ids, _ = prompts(1, seed=4)[0]
    weights = causal_map(model, ids)[None]
    assert torch.equal(calibrate_sinks(weights, [INITIAL, EVEN]), weights)
    assert not torch.equal(calibrate_sinks(weights, [STEALS]), weights)
    with torch.no_grad():
        before = model(ids[None]).logits
        with apply(model, ActCalibration([(2, INITIAL)])):
            assert_near(model(ids[None]).logits, before, 1e-6)


@pytest.mark.parametrize(
    "method", [ActCalibration(beta=1.0), ActCalibration([]), ActCalibration(torch.zeros(4, 4).bool())]
)
def test_exact_limits_leave_the_outputs_unchanged(model: LlamaForCausalLM, method: ActCalibration) -> None:
    ids = torch.stack([ids for ids, _ in prompts(3, seed=5)])
    with torch.no_grad():
        before = model(ids).logits
        with apply(model, method):
            assert torch.equal(model(ids).logits, before)
        with apply(model, ActCalibration()):
            assert not torch.equal(model(ids).logits, before)
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", ["paper", "release"])
def test_padding_and_other_sequences_change_nothing(side: str, variant: str) -> None:
    """A short prompt in a padded batch is calibrated as it is alone."""
    model, draw = tiny("llama", num_hidden_layers=4), torch.Generator().manual_seed(0)
    long, short = torch.randint(2, 50, (24,), generator=draw), torch.randint(2, 50, (13,), generator=draw)
    gap = torch.full((11,), 7)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, slice(0, 11) if side == "left" else slice(13, None)] = 0
    both = torch.stack([long, torch.cat([gap, short] if side == "left" else [short, gap])])
    heads = {layer: range(4) for layer in range(4)}
    with torch.no_grad(), apply(model, ActCalibration(heads, alpha=1.3, variant=variant)):
        alone = [model(ids[None]).logits[0, -1] for ids in (long, short)]
        together = model(both, attention_mask=mask).logits
    assert_near(together[0, -1], alone[0], 1e-4)
    assert_near(together[1, -1 if side == "left" else 12], alone[1], 1e-4)


def test_only_the_prompt_is_calibrated(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, edit = [], ActCalibration.edit_weights

    def watched(self, site, weights):
        seen.append((site.layer, weights.shape[2]))
        return edit(self, site, weights)

    monkeypatch.setattr(ActCalibration, "edit_weights", watched)
    with torch.no_grad(), apply(model, ActCalibration([(2, STEALS)])):
        model.generate(prompts(1, seed=7)[0][0][None], max_new_tokens=4, do_sample=False)
    assert seen == [(2, LENGTH)]


def test_variants_set_the_threshold() -> None:
    assert ActCalibration().threshold == "alpha/N" and ActCalibration(variant="release").threshold == 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: ActCalibration(beta=1.5), "beta=1.5 must be in 0.0..1.0"),
        (lambda model: ActCalibration(variant="mine"), "variant='mine' must be one of 'paper', 'release'"),
        (lambda model: apply(model, ActCalibration([(4, 0)])).__enter__(), r"heads: (4, 0) must be in (0..3, 0..3)"),
        (lambda model: apply(model, ActCalibration(torch.ones(4, 3).bool())).__enter__(), "(layers, heads)=(4, 4)"),
        (lambda model: calibrate_sinks(torch.ones(2, 2)), "attn must be weights (B, H, Nq, Nk)"),
        (lambda model: calibrate_sinks(torch.ones(1, 2, 2, 2), [2]), "heads=[2] must be in 0..1"),
        (lambda model: calibrate_sinks(torch.ones(1, 2, 2, 2), [True]), "heads must be bools (H,)=(2,)"),
        (lambda model: calibrate_sinks(torch.ones(1, 2, 2, 2), thr="often"), "thr='often'"),
        (lambda model: act_search(model, [], right), "calibration_set"),
    ],
)
def test_bad_options_are_refused(model: LlamaForCausalLM, make, message: str) -> None:
    with pytest.raises(FoveateError) as caught:
        make(model)
    assert message in str(caught.value)
