"""The diffusion host leaves nothing on a network, and refuses what it cannot do in one line."""

from __future__ import annotations

import copy
import pickle
import re
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foveate
from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host import DiffusionHost, Method, Site
from foveate.host.hf.attach import OPEN
from foveate.kv import KIVI, SnapKV
from foveate.steer import AvisCDecoding
from tests.support.diffusion_checks import EVERY, PATHS, Breaks, Doubles, Fingerprint, refusal
from tests.support.diffusion_models import CONTEXT, call, diffusers, inputs, model
from tests.support.host_models import SameHidden, SameLogits, SameNextToken, SameOutput, SameWeights

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


def test_foveate_never_imports_diffusers() -> None:
    imports, sources = re.compile(r"^\s*(import|from) diffusers\b", re.MULTILINE), Path(foveate.__file__).parent
    texts = [path.read_text("utf-8") for path in sources.rglob("*.py")]
    assert len(texts) > 500 and not any(imports.search(text) for text in texts)
