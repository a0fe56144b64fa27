"""Interventions on heads: they equal the same change made by hand before the output projection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

import foveate
from foveate.core.errors import FoveateError
from foveate.host import cut_heads, host
from foveate.kv.sink_recent import SinkRecent
from foveate.lens import (
    HeadOutputs,
    Patch,
    Scale,
    SetAttention,
    ablate,
    head_means,
    head_outputs,
    path_patch,
)
from tests.lens.models import image, text, tiny
from tests.support.tensors import assert_near

CASES = {
    "llama": ("llama", text("left")),
    "mistral": ("mistral", text()),
    "gemma2": ("gemma2", text()),
    "bert": ("bert", text("right")),
    "vit": ("vit", image()),
}
OUTPUT = {"bert": "attention.output.dense", "vit": "attention.output.dense"}
CASE = pytest.mark.parametrize("case", CASES)


def projections(kind: str, model: PreTrainedModel) -> list[nn.Module]:
    """The output projections in the order of the layers; their inputs are the outputs of the heads, side by side."""
    names = ("o_proj", OUTPUT.get(kind, "o_proj"), "attention.o_proj")
    return [module for name, module in model.named_modules() if name.endswith(names)]


@contextmanager
def by_hand(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change the heads' outputs `(B, N, H, Dv)` before an output projection."""

    def hook(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (change(given[0].unflatten(-1, (4, -1)).clone()).flatten(2), *given[1:])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def states(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def set_head(head: int, value: Tensor | float, rows: slice = slice(None)) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        x[:, rows, head] = value
        return x

    return change


@CASE
def test_ablation_is_a_zero_before_the_output_projection(case: str) -> None:
    kind, inputs = CASES[case]
    model = tiny(kind)
    with by_hand(projections(kind, model)[1], set_head(2, 0.0)):
        expected = states(model, inputs)
    with foveate.apply(model, ablate([(1, 2)])):
        assert_near(states(model, inputs), expected, 1e-6)
    assert (states(model, inputs) - expected).abs().max() > 1e-3, "the head matters, and is back"
    factors = torch.ones(2, 4)
    factors[1, 2] = 0.0
    with foveate.apply(model, Scale(factors)):
        assert_near(states(model, inputs), expected, 1e-6)


@CASE
def test_a_patch_with_the_outputs_of_another_input_equals_that_by_hand(case: str) -> None:
    kind, inputs = CASES[case]
    model = tiny(kind)
    other = {name: value.flip(0) if name != "attention_mask" else value for name, value in inputs.items()}
    found = head_outputs(model, other)[0]
    with by_hand(projections(kind, model)[0], set_head(3, found[:, 3])):
        whole = states(model, inputs)
    with by_hand(projections(kind, model)[0], set_head(3, found[:, 3, 5:7], slice(5, 7))):
        some = states(model, inputs)
    with foveate.apply(model, Patch({(0, 3): found[:, 3]})):
        assert_near(states(model, inputs), whole, 1e-6)
    with foveate.apply(model, Patch({(0, 3): found[:, 3]}, positions=(5, 6))):
        assert_near(states(model, inputs), some, 1e-6)
    assert (whole - some).abs().max() > 1e-3
    with foveate.apply(model, Patch({(0, 3): head_outputs(model, inputs)[0][:, 3]})):
        assert_near(states(model, inputs), states(model, inputs), 1e-6)


def test_mean_ablation_and_positions_from_the_end() -> None:
    model, inputs = tiny("llama"), text()
    means = head_means(model, [inputs])
    expected = head_outputs(model, inputs)[1].mean((0, 2))
    assert_near(means[1], expected, 1e-6)
    with by_hand(projections("llama", model)[1], set_head(0, expected[0], slice(-1, None))):
        last = states(model, inputs)
    with foveate.apply(model, ablate([(1, 0)], means, positions=[-1])):
        assert_near(states(model, inputs), last, 1e-5)


def test_calls_on_one_cache_are_patched_by_position() -> None:
    model, ids = tiny("llama"), text()["input_ids"]
    patch = Patch({(0, 1): torch.zeros(1, 12, 8)})  # tokens past the twelfth keep their own
    with foveate.apply(model, patch):
        expected = states(model, {"input_ids": ids})
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            parts = [model(piece, past_key_values=cache).logits for piece in ids.split([10, 13, 1], 1)]
    assert_near(torch.cat(parts, 1), expected, 1e-5)


def test_gradients_of_the_factors_are_the_first_order_effect() -> None:
    model, inputs = tiny("llama").double(), text()
    factors = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
    with foveate.apply(model, Scale(factors)):
        model(**inputs).logits.logsumexp(-1).sum().backward()
    step, changed = 1e-2, []  # the model's norms compute in float32
    for sign in (1.0, -1.0):
        other = torch.ones(2, 4, dtype=torch.float64)
        other[0, 2] += sign * step
        with foveate.apply(model, Scale(other)):
            changed.append(states(model, inputs).logsumexp(-1).sum().item())
    assert factors.grad is not None
    assert factors.grad[0, 2].item() == pytest.approx((changed[0] - changed[1]) / (2 * step), rel=1e-2)


def test_interventions_compose_with_a_policy() -> None:
    model, ids = tiny("llama"), text()["input_ids"]
    with torch.no_grad(), foveate.apply(model, SinkRecent(2, 4), ablate([(0, 0)])) as run:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert run.stats.kept < 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ablate([(7, 0)]), "must be in 0.0..1.3"),
        (lambda: ablate([3]), "pairs (layer, head)"),
        (lambda: Patch({(0, 0): torch.zeros(2, 2)}), "outputs"),
        (lambda: Scale(torch.ones(3, 3)), "factors"),
        (lambda: HeadOutputs([9]), "must be in 0.0..1.3"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], Any], message: str) -> None:
    model = tiny("llama")
    with pytest.raises(FoveateError) as caught, foveate.apply(model, make()):
        pass
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_head_that_the_model_lacks_has_one_message_everywhere() -> None:
    model, messages = tiny("llama"), set()
    for call in (
        lambda: cut_heads(model, [(1, 4)]),
        lambda: foveate.apply(model, ablate([(1, 4)])).__enter__(),
        lambda: foveate.apply(model, SetAttention([(1, 4)], torch.tensor([0]))).__enter__(),
        lambda: path_patch(model, *torch.ones(2, 2, 6, dtype=torch.long), torch.ones(2, 2, dtype=torch.long),
                           receivers=[(1, 4)]),
        lambda: host(model).check_heads([(0, 3), (1, 4)]),
    ):  # fmt: skip
        with pytest.raises(FoveateError) as caught:
            call()
        messages.add(str(caught.value))
    assert messages == {"head 1.4 must be in 0.0..1.3 (layer.head) for this model"}


def test_resample_ablation_is_a_patch_with_other_outputs() -> None:
    model, inputs = tiny("llama"), text()
    other = head_outputs(model, inputs["input_ids"].flip(0))
    with foveate.apply(model, Patch({(0, 3): other[0][:, 3], (1, 1): other[1][:, 1]})):
        expected = states(model, inputs)
    with foveate.apply(model, ablate([(0, 3), (1, 1)], outputs=other)):
        assert torch.equal(states(model, inputs), expected)
    assert (states(model, inputs) - expected).abs().max() > 1e-3
