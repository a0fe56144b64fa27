"""Sites of diffusion models, what readers find at them, and what methods of other rooms do there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foveate
from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host import DiffusionHost, Method, Site
from foveate.lens import OutputNorm, Patch, ablate, attention_maps, head_outputs
from foveate.steer import FreeSwim
from tests.support.diffusion_checks import EVERY, refusal
from tests.support.diffusion_models import CROSSING, LENGTH, call, diffusers, inputs, model
from tests.support.host_models import Reads, SameWeights

# -- sites -------------------------------------------------------------------------------------------------------------


@EVERY
@torch.no_grad()
def test_sites(name: str) -> None:
    sites = Reads(lambda site: site)
    with foveate.apply(model(name), sites) as run:
        call(name)
    assert sorted(site.layer for site in sites.seen) == list(range(len(run.layers)))
    for site in sites.seen:
        n, s = site.q.shape[2], site.k.shape[2]
        assert site.phase == "prefill" and site.cache is None and not site.is_causal and site.groups == 1
        assert site.hidden.shape[:2] == (2, n if name != "sd3" else n - LENGTH)
        assert (site.seen, site.asked) == (s, n)
        assert site.positions.shape[2] == s and site.query_positions.tolist() == list(range(n))
        assert site.crosses == (site.context is not None) == (s == LENGTH)
        assert site.crosses == (site.module in DiffusionHost(model(name)).part(crosses=True))
    crossing = [site for site in sites.seen if site.crosses]
    assert bool(crossing) == (name in CROSSING)
    if name == "unet":
        assert all(torch.equal(site.context, inputs(name)["encoder_hidden_states"]) for site in crossing)
        assert {site.q.shape[2] for site in sites.seen} == {64, 16}
    if name == "sd3":  # the image and the prompt in one attention
        assert {site.k.shape[2] for site in sites.seen} == {16 + LENGTH}


@pytest.mark.parametrize("name", CROSSING)
@torch.no_grad()
def test_another_context_goes_through_the_layers_own_projections(name: str) -> None:
    """The context itself gives the call's own keys and values; several go at once, and order does not matter."""
    gaps: list[float] = []

    class Projects(Method):
        def read(self, site: Site, out: Tensor) -> None:
            if site.context is None or site.project is None:
                assert site.project is None
                return
            k, v = site.project(torch.cat([site.context.flip(0), site.context.flip(1)]))
            for ours, theirs in ((k, site.k), (v, site.v)):
                assert len(ours) == 4
                gaps.append(float((ours[:2].flip(0) - theirs).abs().max()))
                gaps.append(float((ours[2:].flip(2) - theirs).abs().max()))

    expected = call(name)
    with foveate.apply(model(name), Projects()):
        assert torch.equal(call(name), expected)
    assert len(gaps) >= 8 and max(gaps) < 1e-5


@torch.no_grad()
def test_spans_name_tokens_of_the_prompt() -> None:
    """Sites of cross-attention show the caller's spans beside their keys; a method can turn to a word."""

    class To(Method):
        def __init__(self, word: str) -> None:
            self.word, self.mass = word, list[float]()

        def at(self, site: Site) -> bool:
            return self.word in site.spans

        def edit_logits(self, site: Site, logits: Tensor) -> Tensor:
            return logits + 1e4 * site.spans.required(self.word, "To")[:, None, None]

        def read(self, site: Site, out: Tensor) -> None:
            assert site.crosses and site.spans[self.word].shape == (2, LENGTH)
            assert site.weights is not None
            self.mass.append(float(site.weights[..., 3:5].sum(-1).min()))

    method, expected = To("cube"), call("unet")
    with foveate.apply(model("unet"), method) as run:
        assert torch.equal(call("unet"), expected)  # it is not named yet
        run.spans = {"cube": [3, 4]}
        assert not torch.allclose(call("unet"), expected, atol=1e-4)
        run.spans["cube"] = torch.arange(LENGTH) == 3
        run.spans["ball"] = [5]
        call("unet")
    assert len(method.mass) == 2 * len(DiffusionHost(model("unet")).part(crosses=True))
    assert min(method.mass) > 0.99


@torch.no_grad()
def test_notes_last_for_a_pass() -> None:
    counts: list[int] = []

    class Counts(Method):
        def read(self, site: Site, out: Tensor) -> None:
            site.step["calls"] = site.step.get("calls", 0) + 1
            counts.append(site.step["calls"])
            assert not site.notes(self)
            site.notes(self)["seen"] = True

    with foveate.apply(model("pixart"), Counts()):
        call("pixart")
        call("pixart")
    assert counts == [1, 2, 3, 4] * 2


@torch.no_grad()
def test_causal_calls_and_masks_of_three_axes() -> None:
    """A processor of one's own may attend causally, also from fewer queries than keys: from the first on."""

    class Own:
        def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None, **_: Any) -> Tensor:
            source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            q, k, v = (to(x).unflatten(2, (2, -1)).transpose(1, 2) for to, x in (
                (attn.to_q, hidden_states), (attn.to_k, source), (attn.to_v, source)
            ))  # fmt: skip
            out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            bias = torch.linspace(-1, 1, k.shape[2]).expand(2, q.shape[2], -1)
            return out + nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.3)

    attention = diffusers.models.attention_processor.Attention(8, 6, heads=2, dim_head=4, processor=Own())
    x, context = torch.randn(2, 5, 8), torch.randn(2, 7, 6)
    expected = attention(x, context)
    with foveate.apply(attention, SameWeights()) as run:
        torch.testing.assert_close(attention(x, context), expected)
    assert run.stats.calls == 2


# -- readers and steering methods of other rooms -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "part"),
    [("unet", "auto"), ("unet", "cross"), ("pixart", "cross"), ("dit", "auto"), ("sana", "cross"), ("sd3", "auto")],
)
@torch.no_grad()
def test_look(name: str, part: Any) -> None:
    """Measures of `look` are those of the softmax, layer by layer in the order of the modules."""
    maps: dict[nn.Module, Tensor] = {}

    class Maps(Method):
        def read(self, site: Site, out: Tensor) -> None:
            maps[site.module] = (site.q @ site.k.mT * site.scale).softmax(-1)

    with foveate.apply(model(name), Maps()):
        expected = call(name)
    measures = ["entropy", "received_mass", OutputNorm()]
    seen = foveate.look(model(name), inputs(name), part=part, measures=measures, keep_maps={(1, 1): slice(None)})
    assert torch.equal(seen.output[0], expected)
    modules = DiffusionHost(model(name)).part(part == "cross")
    entropies, masses = seen.values("entropy"), seen.values("received_mass")
    assert len(entropies) == len(masses) == len(modules) > 1
    for layer, module in enumerate(modules):
        weights = maps[module]
        torch.testing.assert_close(entropies[layer], -weights.xlogy(weights).sum(-1), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(masses[layer], weights.sum(2), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(seen.map(1, 1), maps[modules[1]][:, 1], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_whole_maps() -> None:
    own, cross = (attention_maps(model("pixart"), inputs("pixart"), part=part) for part in ("auto", "cross"))
    assert own.shape == (2, 2, 2, 16, 16) and cross.shape == (2, 2, 2, 16, LENGTH)
    torch.testing.assert_close(cross.sum(-1), torch.ones(2, 2, 2, 16))
    says = refusal(UnsupportedModel, lambda: attention_maps(model("unet"), inputs("unet")))
    assert "has layers of different sizes" in says
    assert "has none" in refusal(UnsupportedModel, lambda: attention_maps(model("dit"), inputs("dit"), part="cross"))
    assert "has none" in refusal(UnsupportedModel, lambda: attention_maps(model("dit"), inputs("dit"), part="decoder"))
    assert "give inputs by name" in refusal(OptionError, lambda: foveate.look(model("dit"), torch.zeros(1)))


@pytest.mark.parametrize("part", ["auto", "cross"])
@torch.no_grad()
def test_interventions_on_heads(part: Any) -> None:
    """A head that is patched with its own outputs changes nothing, one that is removed changes the image."""
    outputs, expected = head_outputs(model("pixart"), inputs("pixart"), part=part), call("pixart")
    with foveate.apply(model("pixart"), Patch({(1, 0): outputs[1][:, 0]}, part=part)):
        torch.testing.assert_close(call("pixart"), expected)
    with foveate.apply(model("pixart"), ablate([(1, 0)], part=part)):
        assert not torch.allclose(call("pixart"), expected, atol=1e-4)
    with pytest.raises(OptionError, match="head 1.2 must be in"):
        foveate.apply(model("pixart"), ablate([(1, 2)], part=part)).__enter__()


@torch.no_grad()
def test_free_swim_beside_a_reader() -> None:
    """Windows of a trained size in a network of diffusers, by FreeSwim; a reader sees both kinds of attention."""
    swim, reader, given = FreeSwim(model("pixart"), (2, 2)), Reads(lambda site: site.crosses), inputs("pixart")
    alone = swim((1, 4, 4), **given, return_dict=False)[0]
    assert not torch.allclose(alone, call("pixart"), atol=1e-4)
    swim.reset()
    with foveate.apply(model("pixart"), reader):
        assert torch.equal(swim((1, 4, 4), **given, return_dict=False)[0], alone)
    assert sorted(reader.seen) == [False] * 4 + [True] * 4
