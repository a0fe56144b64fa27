"""Methods compose: runs nest, hooks act in order, and impossible requests are refused in one line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import foveate
from foveate.core.errors import FoveateError, OptionError, UnsupportedModel
from foveate.core.selection import Indices, Selection
from foveate.host import Method, Site
from foveate.host.hf import dispatch
from foveate.host.hf.attach import OPEN
from foveate.host.hf.cache import SlotLayer
from tests.support.host_models import Adds, Evicts, Reads, Recent, model, padded, tokens, use


@pytest.mark.parametrize("order", ["evicts in reads", "reads in evicts", "together"])
@torch.no_grad()
def test_a_reader_beside_a_policy(order: str) -> None:
    """Both get the same call: the reader gets the slots that the policy kept, and changes nothing."""
    llama, ids, mask = model("llama"), *padded(tokens(), "left")

    def generate() -> Tensor:
        return llama.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, num_beams=2)

    with foveate.apply(llama, Recent(5)):
        expected = generate()
    policy, reader = Recent(5), Reads(lambda site: (site.phase, site.k.shape[2]))
    first, second = {"evicts in reads": ([reader], [policy]), "reads in evicts": ([policy], [reader])}.get(
        order, ([policy, reader], [])
    )
    with foveate.apply(llama, *first), foveate.apply(llama, *second):
        assert torch.equal(generate(), expected)
    assert reader.seen == [("prefill", 14)] * 3 + [("decode", 6)] * 3 * 5


@torch.no_grad()
def test_an_inner_run_may_begin_and_end_within_a_sequence() -> None:
    llama, ids, cache = model("llama"), tokens(2, 16), DynamicCache()
    lengths = Reads(lambda site: (site.seen, site.k.shape[2]))
    with foveate.apply(llama, lengths) as run:
        llama(ids[:, :12], past_key_values=cache)
        with foveate.apply(llama, Recent(5)) as inner:
            llama(ids[:, 12:14], past_key_values=cache)
            assert inner.stats.kept == run.stats.kept == 5 / 14
        assert all(isinstance(layer, SlotLayer) for layer in cache.layers)
        llama(ids[:, 14:], past_key_values=cache)
    assert lengths.seen == [(12, 12)] * 3 + [(14, 14)] * 3 + [(16, 7)] * 3
    assert "reorder_cache" not in vars(cache)


class Doubles(Method):
    def edit_output(self, site: Site, out: Tensor) -> Tensor:
        return 2 * out

    def edit_weights(self, site: Site, weights: Tensor) -> Tensor:
        return 2 * weights

    def edit_logits(self, site: Site, logits: Tensor) -> Tensor:
        return 2 * logits


@pytest.mark.parametrize("nested", [False, True])
@torch.no_grad()
def test_methods_compose_in_order(nested: bool) -> None:
    llama, outputs = model("llama"), {}

    class Keeps(Method):
        def __init__(self, name: str) -> None:
            self.name = name

        def edit_output(self, site: Site, out: Tensor) -> Tensor:
            if site.layer == 0:
                outputs[self.name] = out
            return out

    def between(*methods: Method) -> Tensor:
        applied = (Keeps("before"), *methods, Keeps("after"))
        runs = [applied[:2], applied[2:]] if nested else [applied, ()]
        with foveate.apply(llama, *runs[0]), foveate.apply(llama, *runs[1]):
            use(llama)
        return outputs["after"]

    plain = between()
    assert torch.equal(between(Adds(1.0), Doubles()), (outputs["before"] + 1) * 2)
    assert torch.equal(between(Doubles(), Adds(1.0)), outputs["before"] * 2 + 1)
    assert not torch.allclose(plain, outputs["after"])


@torch.no_grad()
def test_edits_of_the_matrix_compose_in_order() -> None:
    """Logits are edited after the scale and before the mask, weights after the softmax, in the order of methods."""
    llama, ids = model("llama"), tokens(1, 5)
    rows = Reads(lambda site: site.weights[0])

    class Plants(Method):
        def edit_logits(self, site: Site, logits: Tensor) -> Tensor:
            rank = torch.arange(5.0)
            return rank.expand_as(logits)

        def edit_weights(self, site: Site, weights: Tensor) -> Tensor:
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
            return weights + 1.0

    with foveate.apply(llama, Plants(), Doubles(), rows):
        llama(ids)
    expected = torch.full((5, 5), 1.0)
    for i in range(5):
        expected[i, : i + 1] += (2 * torch.arange(i + 1.0)).softmax(-1)
    torch.testing.assert_close(rows.seen[0], (2 * expected).expand(4, 5, 5))


@torch.no_grad()
def test_the_last_method_that_attends_decides() -> None:
    class Attends(Method):
        def __init__(self, value: float | None) -> None:
            self.value = value

        def attend(self, site: Site) -> Tensor | None:
            return None if self.value is None else torch.full_like(site.q, self.value)

    outputs = Reads(lambda site: site)
    values = []
    outputs.read = lambda site, out: values.append(float(out[0, 0, 0, 0]))  # type: ignore[method-assign]
    with foveate.apply(model("llama"), Attends(1.0), Attends(2.0), Attends(None), outputs):
        use(model("llama"))
    assert values == [2.0] * 3


class SelectsAllButOne(Method):
    """Selects every key but one for each decoding query."""

    def select(self, site: Site) -> Selection | None:
        n, total = site.q.shape[2], site.k.shape[2]
        keys = torch.tensor([key for key in range(total) if key != 3])
        return Indices(keys.expand(1, 1, 1, -1), n, total) if n == 1 else None


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_a_key_that_is_not_selected_may_hold_nan(masked: bool) -> None:
    """One list of keys is gathered without an engine's check for NaN: hidden keys are not read."""
    llama, ids, out = model("llama"), tokens(2, 12), []
    for value in (0.0, float("nan")):
        cache = DynamicCache()
        with foveate.apply(llama, SelectsAllButOne()):
            llama(ids, past_key_values=cache)
            for layer in cache.layers:
                layer.keys[:, :, 3] = layer.values[:, :, 3] = value
            mask = torch.ones(2, 13, dtype=torch.long) if masked else None
            out.append(llama(tokens(2, 1), attention_mask=mask, past_key_values=cache).logits)
    assert torch.equal(*out) and out[0].isfinite().all()


# -- refusals ----------------------------------------------------------------------------------------------------------


def refusal(kind: type[FoveateError], call: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def inside(name: str, method: Method, call: Callable[[], object]) -> None:
    with torch.no_grad(), foveate.apply(model(name), method):
        call()


def test_refusals() -> None:
    llama, ids = model("llama"), tokens()
    assert refusal(UnsupportedModel, lambda: foveate.apply(torch.nn.Linear(2, 2))) == (
        "model must be a transformers PreTrainedModel; got Linear"
    )
    compiled = torch.compile(llama, backend="eager")
    assert refusal(UnsupportedModel, lambda: foveate.apply(compiled)).endswith(
        "got OptimizedModule: give the model inside it, model._orig_mod"
    )
    assert "FalconForCausalLM does not go through" in refusal(
        UnsupportedModel, lambda: foveate.apply(model("falcon"), Evicts())
    )
    says = refusal(OptionError, lambda: foveate.apply(llama, "sink_recent"))
    assert says == "apply() takes Method and Operator objects; got str"
    assert "got the class Evicts" in refusal(OptionError, lambda: foveate.apply(llama, Evicts))
    static = StaticCache(config=llama.config, max_cache_len=32)
    assert refusal(UnsupportedModel, lambda: inside("llama", Recent(), lambda: llama(ids, past_key_values=static))) == (
        "past_key_values must be a DynamicCache for a method that evicts; got StaticCache of StaticLayer: "
        "leave cache_implementation out"
    )
    with pytest.raises(UnsupportedModel, match="works inside foveate.apply"):
        dispatch.attention_function(llama.model.layers[0].self_attn, ids, ids, ids, None)


def test_a_call_without_a_cache_names_the_first_method_that_needs_one() -> None:
    class First(Reads):
        needs_cache = True

    class Second(Reads):
        needs_cache = True

    first, second, reader = First(lambda site: 0), Second(lambda site: 0), Reads(lambda site: 0)
    with foveate.apply(model("llama"), reader, first, second), pytest.raises(OptionError, match=r"^First acts on"):
        model("llama")(tokens(), use_cache=False)


def test_a_run_is_used_once() -> None:
    run = foveate.apply(model("llama"), Evicts())
    with run:
        use(model("llama"))
    assert refusal(OptionError, run.__enter__) == "this run was used already; call apply() again"
    assert not OPEN
