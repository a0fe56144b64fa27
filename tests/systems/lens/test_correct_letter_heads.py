"""Multiple-choice circuits: known heads are named, effects are those by hand, and three directions suffice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.core.errors import FoveateError, OptionError
from foveate.lens import (
    LetterPrompts,
    LetterReport,
    Subspace,
    activation_patch,
    compress_head,
    direct_effects,
    head_outputs,
    item_accuracy,
    letter_head_report,
    letter_inputs,
)
from tests.conftest import ClaimFixture
from tests.lens.models import eager_maps, tiny
from tests.support import host_models
from tests.support.choosing import (
    AMPLIFIER,
    CONSTANT,
    CORRECT,
    GATHERER,
    SINGLE,
    accuracy,
    choices,
    choosing_lm,
)


def random_prompts(seed: int = 0) -> LetterPrompts:
    """Prompts for random models: eight of them, with four options."""
    ids = host_models.tokens(8, 14, seed)
    labels = torch.tensor([2, 4, 6, 8]).expand(8, -1)
    ids[:, [2, 4, 6, 8]] = torch.tensor([10, 11, 12, 13])
    return LetterPrompts(ids, labels, torch.arange(8) % 4, labels + 1)


def lead(prompts: LetterPrompts, logits: Tensor) -> float:
    """The correct letter's logit, less the mean over the other letters."""
    total = 0.0
    for row, right in enumerate(prompts.correct.tolist()):
        own = logits[row, prompts.ids[row, prompts.labels[row]]].tolist()
        total += own.pop(right) - sum(own) / len(own)
    return total / len(prompts.ids)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_report_is_that_by_hand(name: str) -> None:
    lm, prompts = host_models.model(name), random_prompts()
    report = letter_head_report(lm, prompts)
    maps = eager_maps(lm, {"input_ids": prompts.ids})[1][:, 2, -1]
    effects = direct_effects(lm, prompts.ids, torch.tensor([10, 11, 12, 13]), centred=True)
    for right in range(4):
        rows = [right, right + 4]
        assert torch.allclose(report.attention[1, 2, right], maps[rows][:, [2, 4, 6, 8]].mean(0), atol=1e-5)
        assert torch.allclose(report.contents[1, 2, right], maps[rows][:, [3, 5, 7, 9]].mean(0), atol=1e-5)
        assert torch.allclose(report.rises[1, 2, right], effects.heads[rows, 1, 2].mean(0), atol=1e-5)
    assert float(report.end[1, 2]) == pytest.approx(float(maps[:, 10:].sum(-1).mean()), abs=1e-5)
    own = report.attention[1, 2]
    assert float(report.preference[1, 2, 3]) == pytest.approx(float(own[3, 3] - own[:3, 3].mean()), abs=1e-6)
    with torch.no_grad():
        logits = lm(prompts.ids).logits[:, -1]
    if name == "llama":  # Gemma 2 caps its logits afterwards
        assert report.statistic == pytest.approx(lead(prompts, logits), abs=1e-4)
    picked = effects.heads[torch.arange(8), 1, 2]
    expected = [picked[row, row % 4] - picked[row, [at for at in range(4) if at != row % 4]].mean() for row in range(8)]
    assert float(report.heads[1, 2]) == pytest.approx(float(torch.stack(expected).mean()), abs=1e-5)
    right = torch.arange(8) % 4
    assert report.accuracy == float((logits[:, 10:14].argmax(-1) == right).double().mean())


def test_net_effects_of_all_parts_sum_to_the_statistic() -> None:
    """Embedding and biases are the rest; the model has no biases, and its embedding knows no letters."""
    lm = tiny("llama")
    prompts = random_prompts()
    prompts = LetterPrompts(prompts.ids % 50, prompts.labels, prompts.correct)
    report = letter_head_report(lm, prompts)
    embedding = direct_effects(lm, prompts.ids, prompts.letters, centred=True).embedding
    rest = float(prompts.lead(embedding).mean())
    assert float(report.heads.sum() + report.mlps.sum()) + rest == pytest.approx(report.statistic, abs=1e-3)
    assert not report.contents.any()


@pytest.mark.parametrize("positions", [(-1,), (-3, -1), None])
def test_total_effects_are_patches_by_hand(positions: Any) -> None:
    lm, prompts, corrupt = host_models.model("llama"), random_prompts(), random_prompts(1)
    found = activation_patch(lm, prompts, corrupt, positions)
    rows = slice(None) if positions is None else list(positions)
    new = head_outputs(lm, corrupt.ids)[1].transpose(1, 2)
    layer = lm.model.layers[1]

    def with_head(_: Any, given: tuple[Tensor]) -> tuple[Tensor]:
        x = given[0].clone()
        x[:, rows, 16:24] = new[:, rows, 2]
        return (x,)

    caught: list[Tensor] = []

    def with_mlp(_: Any, given: Any, made: Tensor) -> Tensor:
        made = made.clone()
        made[:, rows] = caught[0][:, rows]
        return made

    with torch.no_grad():
        start = lead(prompts, lm(prompts.ids).logits[:, -1])
        handle = layer.self_attn.o_proj.register_forward_pre_hook(with_head)
        head = lead(prompts, lm(prompts.ids).logits[:, -1])
        handle.remove()
        handle = layer.mlp.register_forward_hook(lambda _, given, made: caught.append(made))
        other = lm(corrupt.ids).logits[:, -1]
        handle.remove()
        handle = layer.mlp.register_forward_hook(with_mlp)
        mlp = lead(prompts, lm(prompts.ids).logits[:, -1])
        handle.remove()
    assert min(abs(head - start), abs(mlp - start)) > 1e-2
    assert found.clean == pytest.approx(start, abs=1e-5)
    assert found.corrupt == pytest.approx(lead(prompts, other), abs=1e-5)
    assert float(found.heads[1, 2]) == pytest.approx(head - start, abs=1e-4)
    assert float(found.mlps[1]) == pytest.approx(mlp - start, abs=1e-4)


def test_known_heads_get_their_kinds(claim: ClaimFixture) -> None:
    lm, prompts = choosing_lm(), choices(64)
    assert accuracy(lm, prompts) == 1.0
    report = letter_head_report(lm, prompts)
    assert report.kinds() == {
        CORRECT: "correct letter", SINGLE: "single letter", CONSTANT: "constant letter",
        AMPLIFIER: "amplification", GATHERER: "content gatherer",
    }  # fmt: skip
    assert report.output_nodes(0.5) == [CORRECT]
    assert set(report.output_nodes(0.99)) == {CORRECT, SINGLE, AMPLIFIER}
    share = report.attention[CORRECT].diagonal().mean() / report.attention[CORRECT].sum(-1).mean()
    claim(
        "share of the attention to labels that the correct-letter head gives to the correct one", ours=share,
        baseline=0.25, better="higher", margin=0.25, baseline_name="chance", seed=0,
    )  # fmt: skip
    claim(
        "net direct effect of the correct-letter head", ours=report.heads[CORRECT],
        baseline=report.heads.flatten().sort().values[-3], better="higher", margin=1.0,
        baseline_name="the last quarter's edge of heads", seed=0,
    )  # fmt: skip


def test_the_gatherer_has_a_total_but_no_direct_effect() -> None:
    lm, prompts = choosing_lm(), choices(32)
    other = (prompts.correct + 1) % 4
    ids = prompts.ids.clone()
    ids[:, -1] = prompts.ids.gather(1, prompts.contents).gather(1, other[:, None])[:, 0]  # type: ignore[arg-type]
    found = activation_patch(lm, prompts, LetterPrompts(ids, prompts.labels, other, prompts.contents))
    report = letter_head_report(lm, prompts)
    assert abs(float(report.heads[GATHERER])) < 1e-3
    assert float(found.heads[GATHERER]) == pytest.approx(found.corrupt - found.clean, rel=1e-2)
    assert float(found.heads[CORRECT]) < -10.0
    assert not found.mlps.any()


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2"])
def test_the_whole_rank_changes_nothing(name: str) -> None:
    lm, prompts, head = host_models.model(name), random_prompts(), (1, 3)
    data = letter_inputs(lm, prompts, head)
    whole = compress_head(
        head, q=Subspace.fit(data.q, 8), k=Subspace.fit(data.k, 8), v=Subspace.fit(data.v, 8), query=None
    )
    low = compress_head(head, k=Subspace.fit(data.k, 1), v=Subspace.fit(data.v, 1))
    with torch.no_grad():
        before = lm(prompts.ids).logits
        with foveate.apply(lm, whole):
            same = lm(prompts.ids).logits
        with foveate.apply(lm, low):
            other = lm(prompts.ids).logits
    assert torch.allclose(same, before, atol=1e-4)
    assert (other - before).abs().max() > 1e-2


def test_a_compressed_head_is_that_by_hand_and_its_neighbours_are_as_they_were() -> None:
    lm, prompts, head = host_models.model("llama"), random_prompts(), (0, 3)
    data = letter_inputs(lm, prompts, head)
    spaces = Subspace.fit(data.q, 2), Subspace.fit(data.k, 2), Subspace.fit(data.v, 2)
    seen: dict[str, Tensor] = {}

    class Watch(foveate.host.Method):
        def read(self, site: Any, out: Tensor) -> None:
            if site.layer == 0:
                seen.update(q=site.q, k=site.k, v=site.v, out=out, scale=torch.tensor(site.scale))

    low = compress_head(head, q=spaces[0], k=spaces[1], v=spaces[2], keys=prompts.labels)
    with torch.no_grad(), foveate.apply(lm, low, Watch()):
        lm(prompts.ids)
    q, k, v = seen["q"][:, 3, -1].clone(), seen["k"][:, 1].clone(), seen["v"][:, 1].clone()
    q = spaces[0].project(q)
    for x, space in ((k, spaces[1]), (v, spaces[2])):
        x[:, [2, 4, 6, 8]] = space.project(x[:, [2, 4, 6, 8]])
    weights = (torch.einsum("bd,bkd->bk", q, k) * seen["scale"]).softmax(-1)
    assert torch.allclose(seen["out"][:, 3, -1], torch.einsum("bk,bkd->bd", weights, v), atol=1e-5)
    plain = head_outputs(lm, prompts.ids)[0]
    assert torch.allclose(seen["out"][:, :3], plain[:, :3], atol=1e-5)
    assert torch.allclose(seen["out"][:, 3, :2], plain[:, 3, :2], atol=1e-5), "tokens in front of the labels"
    assert (seen["out"][:, 3, 5] - plain[:, 3, 5]).abs().max() > 1e-3


def test_three_directions_suffice(claim: ClaimFixture) -> None:
    lm, prompts = choosing_lm(helpers=False), choices(100, seed=5)
    data = letter_inputs(lm, choices(64), CORRECT)

    def with_rank(rank: int, make: Callable[[Tensor, int], Subspace] = Subspace.fit) -> float:
        spaces = [make(x, rank) for x in (data.q, data.k, data.v)]
        with foveate.apply(lm, compress_head(CORRECT, q=spaces[0], k=spaces[1], v=spaces[2], keys=prompts.labels)):
            return accuracy(lm, prompts)

    whole, three, one = accuracy(lm, prompts), with_rank(3), with_rank(1)
    draws = [torch.Generator().manual_seed(seed) for seed in range(4)]
    random = sum(with_rank(3, lambda x, rank, g=draw: Subspace.random(x, rank, g)) for draw in draws) / 4
    assert whole - three <= 0.03
    assert whole - one > 0.2
    claim(
        "accuracy with queries, keys and values of rank 3", ours=three, baseline=random, better="higher", margin=0.3,
        baseline_name="random directions", seed=0,
    )  # fmt: skip


def test_keys_that_stand_for_letters_fail_the_feature_test_and_keys_of_items_pass() -> None:
    lm = choosing_lm(helpers=False)
    fitted = letter_inputs(lm, choices(64), CORRECT).k
    assert item_accuracy(fitted, letter_inputs(lm, choices(64, 1), CORRECT).k) == 1.0
    for letters in ("random", "shuffled"):
        assert item_accuracy(fitted, letter_inputs(lm, choices(64, 1, letters), CORRECT).k) < 0.4
    draw = torch.Generator().manual_seed(0)
    items, names = torch.randn(2, 4, 16, generator=draw)
    texts = 3 * torch.randn(2, 50, 1, 16, generator=draw)  # what all labels of a prompt share is taken off
    noise = 0.1 * torch.randn(2, 50, 4, 16, generator=draw)
    shuffled = torch.stack([names[torch.randperm(4, generator=draw)] for _ in range(50)])
    assert item_accuracy(items + names + texts[0] + noise[0], items + 0.2 * shuffled + texts[1] + noise[1]) > 0.9
    assert item_accuracy(names + texts[0] + noise[0], shuffled + texts[1] + noise[1]) < 0.4


def test_a_subspace_is_the_directions_of_most_variance() -> None:
    draw = torch.Generator().manual_seed(0)
    data = torch.randn(200, 6, generator=draw) * torch.tensor([5.0, 0.1, 3.0, 0.1, 0.1, 0.1]) + 7.0
    space = Subspace.fit(data, 2)
    assert torch.allclose(space.project(data)[:, [0, 2]], data[:, [0, 2]], atol=0.3)
    assert (space.project(data)[:, [1, 3, 4, 5]] - 7.0).abs().max() < 0.3
    assert torch.allclose(space.basis.mT @ space.basis, torch.eye(2, dtype=torch.float64), atol=1e-9)
    other = Subspace.random(data, 2, draw)
    assert torch.allclose(other.basis.mT @ other.basis, torch.eye(2, dtype=torch.float64), atol=1e-9)
    assert torch.equal(space.mean, other.mean)


def test_output_nodes_are_the_fewest() -> None:
    heads, table = torch.tensor([[1.0, 5.0], [-1.0, 0.0]]), torch.zeros(2, 2, 2, 2)
    report = LetterReport(heads, torch.tensor([3.0, 0.0]), table, table, table, heads * 0, statistic=8.0, accuracy=1.0)
    assert report.output_nodes(0.5) == [(0, 1)]
    assert report.output_nodes(1.0) == [(0, 1), (0, None)]
    assert LetterReport(heads, heads[0] * 0, table, table, table, heads * 0, 80.0, 1.0).output_nodes() == [
        (0, 1),
        (0, 0),
    ]
    assert report.kinds() == {}


def bad_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    lm, given = host_models.model("llama"), random_prompts()
    yield "labels", lambda: LetterPrompts(given.ids, given.labels + 9, given.correct)
    yield "correct", lambda: LetterPrompts(given.ids, given.labels, given.correct + 1)
    yield "contents", lambda: LetterPrompts(given.ids, given.labels, given.correct, given.labels[:, :2])
    yield "each option", lambda: letter_head_report(lm, LetterPrompts(given.ids, given.labels, given.correct * 0))
    yield "alike", lambda: activation_patch(lm, given, LetterPrompts(given.ids[:, :10], given.labels, given.correct))
    yield "rank", lambda: Subspace.fit(torch.randn(4, 3), 5)
    yield "at least one subspace", lambda: compress_head((0, 0))
    yield "items", lambda: item_accuracy(torch.randn(3, 4, 8), torch.randn(3, 3, 8))


def test_what_does_not_fit_is_refused() -> None:
    for message, call in bad_calls():
        with pytest.raises(FoveateError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    report = letter_head_report(host_models.model("llama"), random_prompts())
    with pytest.raises(OptionError, match="share"):
        report.output_nodes(2.0)
