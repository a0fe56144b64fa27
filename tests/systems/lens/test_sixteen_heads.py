"""Importance of heads by gradients: the gradient of gates, the pruning curve, and what pruning by it keeps."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2Model, PreTrainedModel, T5Config, T5ForConditionalGeneration

import foveate
from foveate.core.errors import FoveateError, OptionError, ShapeError, UnsupportedModel
from foveate.host import cut_heads
from foveate.lens import (
    HeadOutputs,
    Patch,
    Scale,
    ablate_each,
    example_losses,
    gradient_importance,
    head_outputs,
    keep_one,
    prune_in_steps,
    pruning_order,
)  # fmt: skip
from tests.conftest import ClaimFixture
from tests.lens.digit_vit import accuracy, classifier, heldout, train_set
from tests.lens.models import image, text, tiny
from tests.support.tensors import assert_near

CASES = {"llama": text("left"), "gemma2": text(), "bert": text("right"), "vit": image()}
CASE = pytest.mark.parametrize("case", CASES)


def loss(output: Any, targets: Tensor) -> Tensor:
    return output[0].flatten(1).sin().mean(1) * targets


def each(inputs: dict[str, Tensor]) -> list[tuple[dict[str, Tensor], Tensor]]:
    """The two examples of an input as batches of one, with a weight for the loss."""
    return [({name: value[i : i + 1] for name, value in inputs.items()}, torch.tensor([i + 1.0])) for i in range(2)]


def gate_gradient(model: PreTrainedModel, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    gates = torch.ones(2, 4, requires_grad=True)
    with foveate.apply(model, Scale(gates)):
        loss(model(**inputs), targets).sum().backward()
    assert gates.grad is not None
    return gates.grad


@CASE
def test_importance_is_the_size_of_each_examples_gradient_of_the_gates(case: str) -> None:
    model, inputs = tiny(case), CASES[case]
    expected = torch.stack([gate_gradient(model, *one).abs() for one in each(inputs)]).mean(0)
    scale = 1 / expected.max()
    together = gradient_importance(model, [(inputs, torch.tensor([1.0, 2.0]))], loss, normalize="none")
    assert_near(together * scale, expected * scale, 1e-5)
    apart = gradient_importance(model.requires_grad_(False), each(inputs), loss, normalize="none")
    assert_near(apart * scale, expected * scale, 1e-5)
    normal = gradient_importance(model, each(inputs), loss)
    assert_near(normal.square().sum(1), torch.ones(2), 1e-5)
    assert_near(normal * expected.norm(dim=1, keepdim=True) * scale, expected * scale, 1e-5)


def test_gradients_of_two_examples_do_not_cancel() -> None:
    model, (inputs, _) = tiny("vit"), each(image())[0]
    twice = {name: value.repeat(2, 1, 1, 1) for name, value in inputs.items()}
    one = gradient_importance(model, [(inputs, torch.tensor([1.0]))], loss, normalize="none")
    two = gradient_importance(model, [(twice, torch.tensor([1.0, -1.0]))], loss, normalize="none")
    assert_near(two / one.max(), one / one.max(), 1e-5)


def test_by_position_takes_the_absolute_value_of_each_position() -> None:
    model, (inputs, target) = tiny("vit").double(), each(image())[0]
    inputs = {name: value.double() for name, value in inputs.items()}
    outputs, expected, step = head_outputs(model, inputs)[1][0], torch.zeros(4), 1e-3
    for head in range(4):
        for position in range(17):
            changed = []
            for sign in (1.0, -1.0):
                other = outputs[None].clone()
                other[:, head, position] *= 1 + sign * step
                with torch.no_grad(), foveate.apply(model, Patch({(1, head): other[:, head]})):
                    changed.append(loss(model(**inputs), target).item())
            expected[head] += abs(changed[0] - changed[1]) / (2 * step)
    found = gradient_importance(model, [(inputs, target)], loss, normalize="none", per="position")[1]
    assert_near(found / found.max(), expected / found.max(), 1e-4)
    assert (found > gradient_importance(model, [(inputs, target)], loss, normalize="none")[1]).all()


@pytest.mark.parametrize(
    ("case", "heads"),
    [
        ("llama", [(0, 0), (0, 1), (1, 2), (1, 3)]),
        ("vit", [(0, 1), (0, 3), (1, 0), (1, 1), (1, 2)]),
        ("bert", [(0, 0), (1, 3), (1, 2)]),
        ("vit", [(0, 0), (0, 1), (0, 2), (0, 3)]),
        ("llama", [(1, 0), (1, 1), (1, 2), (1, 3)]),
    ],
)
def test_cut_heads_equal_masked_heads(case: str, heads: list[tuple[int, int]]) -> None:
    model, inputs, mask = tiny(case), CASES[case], torch.ones(2, 4)
    for parameter in model.parameters():
        parameter.data.add_(0.01)  # biases that are not zero
    for head in heads:
        mask[head] = 0.0
    small = cut_heads(model, heads)
    with torch.no_grad():
        whole = model(**inputs)[0]
        with foveate.apply(model, Scale(mask)):
            masked = model(**inputs)[0]
        assert_near(small(**inputs)[0], masked, 1e-5)
        assert torch.equal(model(**inputs)[0], whole)
        with foveate.apply(small, HeadOutputs()):
            assert_near(small(**inputs)[0], masked, 1e-5)
    assert (whole - masked).abs().max() > 1e-3
    assert small.num_parameters() < model.num_parameters()


def readout(model: PreTrainedModel) -> float:
    with torch.no_grad():
        return model(**image())[0].sin().mean().item()


def without(model: PreTrainedModel, heads: list[tuple[int, int]]) -> float:
    return readout(cut_heads(model, heads))


def test_scores_of_single_heads() -> None:
    model = tiny("vit")
    assert ablate_each(model, readout)[1, 2].item() == pytest.approx(without(model, [(1, 2)]), abs=1e-5)
    one = keep_one(model, readout)
    assert one[0, 3].item() == pytest.approx(without(model, [(0, 0), (0, 1), (0, 2)]), abs=1e-5)
    assert one.shape == (2, 4) and one.unique().numel() == 8


def test_heads_go_from_the_least_important() -> None:
    model = tiny("vit")
    importance = torch.tensor([[0.5, 0.1, 0.9, torch.nan], [0.2, 0.1, 0.8, 0.7]])
    order = [(0, 1), (1, 1), (1, 0), (0, 0), (1, 3), (1, 2), (0, 2)]
    assert pruning_order(importance) == order
    curve = prune_in_steps(model, importance, readout, step=0.3)
    assert curve.order == order and curve.counts == [0, 2, 4, 6, 7]
    assert curve.scores[0] == pytest.approx(readout(model), abs=1e-6)
    assert curve.scores[2] == pytest.approx(without(model, order[:4]), abs=1e-5)
    assert curve.removed(0.3) == order[:2]
    assert prune_in_steps(model, importance, readout, step=0.01, until=0.4).counts == [0, 1, 2, 3]
    falling = iter([1.0, 0.98, 0.99, 0.5, 0.99])
    assert prune_in_steps(model, importance, lambda _: next(falling), step=0.3).prunable(0.05) == 4 / 7


def test_importance_may_be_estimated_again_on_the_pruned_model() -> None:
    model, batches = tiny("vit"), [(image(), torch.tensor([1.0, 2.0]))]

    def measure(model: Any) -> Tensor:
        return gradient_importance(model, batches, loss, normalize="none")

    first = pruning_order(measure(model))[:2]
    curve = prune_in_steps(model, measure, readout, step=0.25, until=0.5)
    mask = torch.ones(2, 4)
    for head in first:
        mask[head] = 0.0
    with foveate.apply(model, Scale(mask)):
        again = measure(model)
    assert all(again[head] == 0 for head in first)
    assert curve.order == first + [head for head in pruning_order(again) if head not in first][:2]


def test_a_language_models_loss_is_a_mean_over_the_positions_that_count() -> None:
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[1, 2, -100, -100, 3], [-100] * 5])
    by_hand = -sum(logits[0, place].log_softmax(-1)[target] for place, target in ((0, 1), (1, 2), (4, 3))) / 3
    found = example_losses(SimpleNamespace(logits=logits), targets)
    assert_near(found, torch.stack([by_hand, torch.tensor(0.0)]), 1e-6)
    assert_near(example_losses(SimpleNamespace(logits=logits[0, :2]), targets[0, :2]).sum() * 2,
                by_hand * 3 * 2 + 2 * logits[0, 4].log_softmax(-1)[3], 1e-5)  # fmt: skip


def test_pruning_by_importance_keeps_more_than_chance(claim: ClaimFixture) -> None:
    (x, y), (images, labels) = heldout(), train_set()
    found: dict[str, list[float]] = {"least": [], "random": [], "most": [], "whole": [], "one": []}
    for seed in (0, 1):
        model = classifier(2, 8, (1, 8), seed, 300)
        importance = gradient_importance(model, [(images[:512], labels[:512])])
        score: Callable[[Any], float] = lambda model: accuracy(model, x, y)  # noqa: E731
        order = pruning_order(importance)
        draw = torch.Generator().manual_seed(seed)
        found["whole"].append(score(model))
        found["least"].append(score(cut_heads(model, order[:6])))
        found["most"].append(score(cut_heads(model, order[-6:])))
        for _ in range(5):
            chosen = [order[number] for number in torch.randperm(16, generator=draw)[:6].tolist()]
            found["random"].append(score(cut_heads(model, chosen)))
        found["one"].append(float(keep_one(model, score).amax(1).max()))
    mean = {name: sum(values) / len(values) for name, values in found.items()}
    assert min(found["whole"]) >= 0.9
    for one, whole in zip(found["one"], found["whole"], strict=True):
        assert one >= 0.95 * whole, "one layer does with its best head"
    for name, words in (("random", "a random 40%"), ("most", "the most important 40%")):
        claim(
            "accuracy on digits without the 40% of heads with the least importance",
            ours=mean["least"], baseline=mean[name], better="higher", margin=0.04, baseline_name=words, seed=0,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: gradient_importance(model, []), "batches"),
        (lambda model: gradient_importance(model, [(image(), None)], lambda o, _: o[0].mean()), "loss must return"),
        (lambda model: gradient_importance(model, [], normalize="model"), "normalize="),
        (lambda model: gradient_importance(model, [], per="token"), "per="),
        (lambda model: prune_in_steps(model, torch.ones(3, 4), readout), "importance must be"),
        (lambda model: prune_in_steps(model, torch.ones(2, 4), readout, step=0.0), "step=0"),
        (lambda model: prune_in_steps(model, torch.ones(2, 4), readout, until=2.0), "until="),
        (lambda model: cut_heads(model, [(2, 0)]), "head 2.0 must be in"),
        (lambda _: cut_heads(tiny("llama"), [(0, 1)]), "whole groups of 2"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(FoveateError) as caught:
        make(tiny("vit"))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_models_without_a_table_of_heads_are_refused() -> None:
    sizes: Any = dict(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4, vocab_size=20)
    with pytest.raises(UnsupportedModel, match="single stack"):
        gradient_importance(T5ForConditionalGeneration(T5Config(**sizes)), [])
    fused = GPT2Model(GPT2Config(n_embd=16, n_head=4, n_layer=1, vocab_size=20))
    with pytest.raises(UnsupportedModel, match="separate linear projections"):
        cut_heads(fused, [(0, 0)])
    with pytest.raises(ShapeError, match="targets must be"):
        gradient_importance(classifier(2, 8, (1, 8), 0, 300), [(torch.zeros(2, 1, 8, 8), torch.zeros(3))])
    with pytest.raises(OptionError, match="share="):
        prune_in_steps(tiny("vit"), torch.ones(2, 4), readout, until=0.5).removed(0.9)
