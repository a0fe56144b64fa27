"""The contract of the diffusion host: methods act on networks of diffusers, no-ops change no bit, nothing is left."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foveate
from foveate.core.errors import FoveateError, OptionError, UnsupportedModel
from foveate.core.selection import Indices, Selection
from foveate.host import DiffusionHost, Method, Site
from foveate.host.hf.attach import OPEN
from foveate.kv import KIVI, SnapKV
from foveate.lens import OutputNorm, Patch, ablate, attention_maps, head_outputs
from foveate.steer import AvisCDecoding, FreeSwim, StructuredDiffusion
from tests.contracts.methods import ON_DIFFUSION
from tests.support.diffusion_models import CONTEXT, CROSSING, LENGTH, MODELS, call, diffusers, inputs, model
from tests.support.host_models import (
    NO_OPS,
    Reads,
    SameHidden,
    SameLogits,
    SameNextToken,
    SameOutput,
    SameWeights,
    evicts,
)

EVERY = pytest.mark.parametrize("name", MODELS)

#: Ways through the host that a model without a cache and without a decoder has.
PATHS = {path: kinds for path, kinds in NO_OPS.items() if not evicts(*(kind() for kind in kinds)) and path != "hidden"}
#: Those on which PyTorch's kernel computes what the processor asked of it.
NATIVE = ("no method", "output")


class Fingerprint:
    """Everything about a network that a run could leave changed; processors as objects."""

    def __init__(self, subject: nn.Module) -> None:
        self.processors = [id(module.processor) for module in subject.modules() if hasattr(module, "processor")]
        self.weights = {name: (value.data_ptr(), value._version) for name, value in subject.state_dict().items()}
        hooks = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called", "_backward_hooks")
        self.hooks = [len(getattr(module, hook)) for module in subject.modules() for hook in hooks]
        self.attributes = [{key: id(value) for key, value in vars(module).items()} for module in subject.modules()]

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


class Breaks(Method):
    def __init__(self, where: str, error: type[BaseException] = RuntimeError) -> None:
        self.where, self.error = where, error

    def bind(self, host: Any) -> None:
        if self.where == "bind":
            raise self.error("broken")

    def edit_output(self, site: Site, out: Tensor) -> Tensor:
        if self.where == "forward" and site.layer == 1:
            raise self.error("broken")
        return out


class Adds(Method):
    def __init__(self, number: float) -> None:
        self.number = number

    def edit_output(self, site: Site, out: Tensor) -> Tensor:
        return out + self.number


class Doubles(Method):
    def edit_output(self, site: Site, out: Tensor) -> Tensor:
        return 2 * out


def refusal(kind: type[FoveateError], act: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- methods of the catalogue ------------------------------------------------------------------------------------------

#: Methods that act on diffusion models alone, for the prompt that `inputs("unet")` gives its first row.
METHODS: dict[str, Callable[[Tensor], Method]] = {
    "structured_diffusion": lambda full: StructuredDiffusion(full, [full.flip(0)], [(2, 5)]),
}


def test_every_method_of_the_catalogue_is_here() -> None:
    assert METHODS.keys() == ON_DIFFUSION


@pytest.mark.parametrize("key", METHODS)
@torch.no_grad()
def test_it_acts_and_leaves_no_trace(key: str) -> None:
    given, before, plain = inputs("unet"), Fingerprint(model("unet")), call("unet")
    method, results = METHODS[key](given["encoder_hidden_states"][0]), []
    for _ in range(2):
        with foveate.apply(model("unet"), method):
            results.append(call("unet"))
    assert torch.equal(*results) and not torch.allclose(results[0], plain, atol=1e-3)
    with pytest.raises(RuntimeError), foveate.apply(model("unet"), method):
        model("unet")(**{**given, "sample": given["sample"][:, :2]})
    assert Fingerprint(model("unet")) == before and torch.equal(call("unet"), plain)


# -- methods that change nothing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("path", PATHS)
@EVERY
@torch.no_grad()
def test_no_ops(name: str, path: str, masked: bool) -> None:
    if masked and name not in CROSSING:
        pytest.skip("it takes no mask of the prompt")
    expected = call(name, masked=masked)
    with foveate.apply(model(name), *(kind() for kind in PATHS[path])) as run:
        got = call(name, masked=masked)
    assert torch.equal(call(name, masked=masked), expected)
    assert run.stats.calls == len(run.layers) > 1
    if path in NATIVE:
        assert torch.equal(got, expected)
    else:
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", ["no method", "output", "weights", "indices"])
@EVERY
def test_gradients(name: str, path: str) -> None:
    def gradients(*methods: Method) -> list[Tensor | None]:
        model(name).zero_grad()
        with foveate.apply(model(name), *methods):
            call(name).square().mean().backward()
        return [parameter.grad for parameter in model(name).parameters()]

    expected = [None if each is None else each.clone() for each in gradients()]
    plain, got = [None if each is None else each.clone() for each in expected], gradients(*(k() for k in PATHS[path]))
    model(name).zero_grad()
    assert sum(each is not None for each in plain) > 20
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@EVERY
@torch.no_grad()
def test_in_half_precision(name: str) -> None:
    half = copy.deepcopy(model(name)).to(torch.bfloat16)
    given = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs(name).items()}
    expected = half(**given, return_dict=False)[0]
    with foveate.apply(half, SameOutput()):
        assert torch.equal(half(**given, return_dict=False)[0], expected)


# -- methods that change something -------------------------------------------------------------------------------------


@EVERY
@torch.no_grad()
def test_edits_compose_in_order(name: str) -> None:
    """Methods of one run, and of nested ones, get the result of those before them; the network gets the last."""

    def ends(*runs: tuple[Method, ...]) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        last = Reads(lambda site: None)
        last.read = lambda site, out: seen.append(out)  # type: ignore[method-assign]
        with ExitStack() as stack:
            for methods in (*runs, (last,)):
                stack.enter_context(foveate.apply(model(name), *methods))
            whole = call(name)
        return seen[0], whole

    plain, whole = ends()
    for both in (((Adds(1.0), Doubles()),), ((Adds(1.0),), (Doubles(),))):
        first, changed = ends(*both)
        assert torch.equal(first, (plain + 1) * 2)
        assert not torch.allclose(changed, whole, atol=1e-3)
    assert torch.equal(ends((Doubles(), Adds(1.0)))[0], plain * 2 + 1)


@EVERY
@torch.no_grad()
def test_a_method_may_replace_weights_and_choose_keys(name: str) -> None:
    """Uniform weights give each query the mean value; one selected key gives each query its value."""
    means, firsts = [], []

    class Uniform(Method):
        def edit_weights(self, site: Site, weights: Tensor) -> Tensor:
            return torch.full_like(weights, 1 / weights.shape[-1])

        def read(self, site: Site, out: Tensor) -> None:
            means.append((out - site.v.mean(2, keepdim=True)).abs().max())

    class First(Method):
        def select(self, site: Site) -> Selection:
            n, s = site.q.shape[2], site.k.shape[2]
            return Indices(torch.zeros(1, 1, n, 1, dtype=torch.long), n, s)

        def read(self, site: Site, out: Tensor) -> None:
            firsts.append((out - site.v[:, :, :1]).abs().max())

    for method, found in ((Uniform(), means), (First(), firsts)):
        with foveate.apply(model(name), method) as run:
            call(name)
        assert len(found) == len(run.layers) and max(found) < 1e-5


@torch.no_grad()
def test_the_weights_are_those_of_the_network() -> None:
    """Weights that a method reads, times the values, are the output that PyTorch's kernel gives."""
    for name in MODELS:
        gaps: list[Tensor] = []

        class Checks(Method):
            def read(self, site: Site, out: Tensor) -> None:
                logits = site.q @ site.k.mT * site.scale
                weights = (logits if site.mask is None else logits + site.mask).softmax(-1)
                gaps.append((weights @ site.v - out).abs().max())  # noqa: B023

        with foveate.apply(model(name), Checks()):
            call(name, masked=name in CROSSING)
        assert len(gaps) > 1 and max(gaps) < 1e-5


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


# -- nothing is left ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@EVERY
@torch.no_grad()
def test_after_the_block(name: str, path: str) -> None:
    subject, before = model(name), Fingerprint(model(name))
    with foveate.apply(subject, *(kind() for kind in PATHS[path])):
        call(name)
        within = Fingerprint(subject)
        assert within != before  # otherwise this test could not fail
        assert within.processors == before.processors and within.weights == before.weights
    assert Fingerprint(subject) == before and not OPEN


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["bind", "forward", "block"])
@EVERY
@torch.no_grad()
def test_after_an_exception(name: str, where: str, error: type[BaseException]) -> None:
    subject, before, expected = model(name), Fingerprint(model(name)), call(name)
    with suppress(error), foveate.apply(subject, Doubles(), Breaks(where, error)):
        call(name)
        raise error("broken in the block")
    assert Fingerprint(subject) == before and not OPEN
    assert torch.equal(call(name), expected)


@torch.no_grad()
def test_a_pass_that_broke_leaves_the_block_usable() -> None:
    expected = call("unet")
    with foveate.apply(model("unet"), Breaks("forward", KeyboardInterrupt)) as run:
        with pytest.raises(KeyboardInterrupt):
            call("unet")
        run.methods.clear()
        for module in run.layers:
            OPEN[module][0].methods.clear()
        assert torch.equal(call("unet"), expected)


@pytest.mark.parametrize("first", ["inner", "outer"])
@torch.no_grad()
def test_nested_runs_end_in_any_order(first: str) -> None:
    before, plain = Fingerprint(model("unet")), call("unet")
    with foveate.apply(model("unet"), Doubles()):
        doubled = call("unet")
    outer, inner = foveate.apply(model("unet"), Doubles()), foveate.apply(model("unet"), SameWeights())
    outer.__enter__()
    inner.__enter__()
    torch.testing.assert_close(call("unet"), doubled)
    (inner if first == "inner" else outer).__exit__(None, None, None)
    torch.testing.assert_close(call("unet"), doubled if first == "inner" else plain)
    (outer if first == "inner" else inner).__exit__(None, None, None)
    assert Fingerprint(model("unet")) == before and not OPEN
    assert torch.equal(call("unet"), plain)


@torch.no_grad()
def test_a_forward_that_others_have_set_comes_back() -> None:
    """Offloading sets a forward of its own on modules; it is called within the block, and is there after it."""
    subject, calls = copy.deepcopy(model("unet")), []
    attention = DiffusionHost(subject).attention_modules()[0]
    own = attention.forward
    attention.forward = lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs)
    theirs, before = attention.forward, Fingerprint(subject)
    with foveate.apply(subject, Doubles()):
        subject(**inputs("unet"))
    assert len(calls) == 1 and attention.forward is theirs and Fingerprint(subject) == before


@torch.no_grad()
def test_processors_may_be_set_within_the_block() -> None:
    subject = copy.deepcopy(model("unet"))
    with foveate.apply(subject, Doubles()):
        doubled = subject(**inputs("unet")).sample
        mine = diffusers.models.attention_processor.AttnProcessor2_0()
        subject.set_attn_processor(mine)
        assert torch.equal(subject(**inputs("unet")).sample, doubled)
    assert set(subject.attn_processors.values()) == {mine}
    assert not torch.allclose(subject(**inputs("unet")).sample, doubled, atol=1e-4)


@torch.no_grad()
def test_a_copy_made_within_the_block_is_plain() -> None:
    expected = call("unet")
    with foveate.apply(model("unet"), Doubles()):
        copied = copy.deepcopy(model("unet"))
        assert torch.equal(copied(**inputs("unet"), return_dict=False)[0], expected)
        assert "leave the block first" in refusal(OptionError, lambda: pickle.dumps(model("unet")))
        assert copied.state_dict().keys() == model("unet").state_dict().keys()
    assert torch.equal(copied(**inputs("unet"), return_dict=False)[0], expected)


@torch.no_grad()
def test_threads_within_one_block() -> None:
    """Each thread has its own notes on its pass, and attention outside of the network is left alone."""
    seen, alone = {}, {seed: call("pixart", seed=seed) for seed in range(4)}

    class Notes(Method):
        def read(self, site: Site, out: Tensor) -> None:
            site.step["calls"] = site.step.get("calls", 0) + 1
            assert site.step["calls"] <= 4

    def work(seed: int) -> None:
        seen[seed] = [call("pixart", seed=seed) for _ in range(5)]

    with foveate.apply(model("pixart"), Notes()) as run:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in alone]
        for thread in threads:
            thread.start()
        nn.functional.scaled_dot_product_attention(*(torch.randn(1, 1, 2, 2) for _ in range(3)))
        for thread in threads:
            thread.join()
    assert run.stats.calls == 4 * 5 * 4
    assert all(torch.equal(got, alone[seed]) for seed, many in seen.items() for got in many) and len(seen) == 4


def test_gradient_checkpointing() -> None:
    """The backward pass computes the layers again: within the block with the methods, and never without them."""
    subject = copy.deepcopy(model("unet"))

    def gradient(checkpoints: bool, inside: bool = True) -> Tensor:
        (subject.enable_gradient_checkpointing if checkpoints else subject.disable_gradient_checkpointing)()
        subject.train().zero_grad()
        with foveate.apply(subject, Doubles()):
            loss = subject(**inputs("unet")).sample.square().mean()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        return subject.conv_in.weight.grad.clone()

    torch.testing.assert_close(gradient(checkpoints=True), gradient(checkpoints=False))
    assert "gradient checkpointing runs the model again" in refusal(
        UnsupportedModel, lambda: gradient(checkpoints=True, inside=False)
    )


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


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (SnapKV(), "SnapKV acts on a cache of keys and values, and the diffusion model UNet2DConditionModel has none"),
        (KIVI(), "KIVI acts on a cache"),
        (AvisCDecoding(), "AvisCDecoding acts on a cache"),
        (SameNextToken(), "SameNextToken edits a next token, which the diffusion model UNet2DConditionModel does not"),
        (SameHidden(), "SameHidden edits a decoder's blocks"),
        (foveate.ops.SlidingWindow(4), "replaces attention while a prompt is read, and UNet2DConditionModel reads"),
    ],
)  # fmt: skip
def test_methods_that_need_a_language_model_are_refused(method: Any, says: str) -> None:
    before = Fingerprint(model("unet"))
    assert says in refusal(UnsupportedModel, lambda: foveate.apply(model("unet"), method))
    assert Fingerprint(model("unet")) == before


@torch.no_grad()
def test_models_and_calls_that_are_refused() -> None:
    unet = model("unet")
    assert "got str" in refusal(OptionError, lambda: foveate.apply(unet, "h2o"))  # type: ignore[arg-type]
    assert "on='decoder'" in refusal(OptionError, lambda: foveate.apply(unet, on="decoder"))
    assert "evict='never'" in refusal(OptionError, lambda: foveate.apply(unet, evict="never"))  # type: ignore[arg-type]
    run = foveate.apply(unet)
    with run:
        assert "already" in refusal(OptionError, run.__enter__)
    pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    assert "apply to pipe.unet" in refusal(UnsupportedModel, lambda: foveate.apply(pipe, SameOutput()))
    compiled = copy.deepcopy(unet)
    compiled.compile()
    assert "is compiled" in refusal(UnsupportedModel, lambda: foveate.apply(compiled, SameOutput()))
    assert "is compiled" in refusal(UnsupportedModel, lambda: foveate.apply(torch.compile(unet), SameOutput()))
    eager = copy.deepcopy(unet)
    eager.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    with foveate.apply(eager):
        eager(**inputs("unet"))
    with foveate.apply(eager, SameLogits()):
        says = refusal(UnsupportedModel, lambda: eager(**inputs("unet")))
    assert "AttnProcessor of Attention does not call scaled_dot_product_attention" in says
    assert "reads the configuration" in refusal(UnsupportedModel, lambda: DiffusionHost(unet).config)
    assert DiffusionHost(unet).decoder is None
    assert "head 9.0 must be in" in refusal(OptionError, lambda: DiffusionHost(unet).check_heads([(9, 0)]))


@torch.no_grad()
def test_another_thread_inside_is_refused() -> None:
    found: list[str] = []
    with foveate.apply(model("dit")):
        thread = threading.Thread(
            target=lambda: found.append(refusal(OptionError, foveate.apply(model("dit"), SameOutput()).__enter__))
        )
        thread.start()
        thread.join()
    assert "another thread is inside" in found[0] and not OPEN


@torch.no_grad()
def test_linear_attention_is_left_alone() -> None:
    """Sana's self-attention has no softmax, and its attention to the prompt has."""
    with foveate.apply(model("sana"), Doubles()) as run:
        call("sana")
    assert len(run.layers) == 2 and all(module.is_cross_attention for module in run.layers)
    linear = nn.ModuleList(
        module for module in model("sana").modules()
        if type(getattr(module, "processor", None)).__name__ == "SanaLinearAttnProcessor2_0"
    )  # fmt: skip
    assert len(linear) == 2
    assert "has linear attention alone" in refusal(UnsupportedModel, lambda: foveate.apply(linear, Doubles()))


def test_the_context_is_as_wide_as_the_tests_say() -> None:
    assert model("unet").config.cross_attention_dim == CONTEXT
