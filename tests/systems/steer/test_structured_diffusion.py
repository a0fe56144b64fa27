"""Structured diffusion: its mathematics by hand, its exact limits, its place in networks of diffusers, its claim."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foveate
from foveate.steer import StructuredDiffusion, align_all, align_spans, structured_cross_attention
from tests.conftest import ClaimFixture
from tests.support import colour_prompts as world
from tests.support.diffusion_models import (
    CROSSING,
    model,
    pipeline,
)
from tests.support.host_models import Reads
from tests.support.structured_prompts import PHRASES, PROMPT, SPANS, given, states, steering

# -- the mathematics ---------------------------------------------------------------------------------------------------


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Q, W_K, W_V = drawn(2, 5, 12), drawn(12, 7, seed=1), drawn(12, 7, seed=2)
CONTEXTS = [drawn(2, 6, 7, seed=3 + i) for i in range(4)]


def to_k(x: Tensor) -> Tensor:
    return x @ W_K.T


def to_v(x: Tensor) -> Tensor:
    return x @ W_V.T


def attended(key: Tensor, value: Tensor) -> Tensor:
    """Cross-attention of three heads, head by head."""
    heads = [slice(4 * h, 4 * h + 4) for h in range(3)]
    k, v = to_k(key), to_v(value)
    return torch.cat([(Q[..., h] @ k[..., h].mT / 2).softmax(-1) @ v[..., h] for h in heads], -1)


def test_one_map_over_several_values() -> None:
    got = structured_cross_attention(Q, CONTEXTS[:1], CONTEXTS, to_k, to_v, 3)
    expected = sum(attended(CONTEXTS[0], value) for value in CONTEXTS) / 4
    torch.testing.assert_close(got, expected)
    mean = attended(CONTEXTS[0], torch.stack(CONTEXTS).mean(0))  # it is linear in the values
    torch.testing.assert_close(got, mean, atol=1e-5, rtol=0)


def test_several_maps_over_one_value() -> None:
    got = structured_cross_attention(Q, CONTEXTS, CONTEXTS[3:], to_k, to_v, 3)
    torch.testing.assert_close(got, sum(attended(key, CONTEXTS[3]) for key in CONTEXTS) / 4)


def test_as_many_maps_as_values_are_paired() -> None:
    got = structured_cross_attention(Q, CONTEXTS[:2], CONTEXTS[2:], to_k, to_v, 3)
    expected = (attended(CONTEXTS[0], CONTEXTS[2]) + attended(CONTEXTS[1], CONTEXTS[3])) / 2
    torch.testing.assert_close(got, expected)


def test_without_phrases_it_is_cross_attention() -> None:
    got = structured_cross_attention(Q, CONTEXTS[:1], CONTEXTS[:1], to_k, to_v, 3)
    torch.testing.assert_close(got, attended(CONTEXTS[0], CONTEXTS[0]), atol=1e-6, rtol=0)
    same = structured_cross_attention(Q, CONTEXTS[:1], CONTEXTS[:1] * 3, to_k, to_v, 3)
    torch.testing.assert_close(same, got, atol=1e-6, rtol=0)


def test_one_context_serves_a_batch() -> None:
    one = [context[:1] for context in CONTEXTS]
    both = structured_cross_attention(Q, one[:1], one, to_k, to_v, 3)
    torch.testing.assert_close(both[1:], structured_cross_attention(Q[1:], one[:1], one, to_k, to_v, 3))


def test_gradients_reach_everything() -> None:
    q, first, second = (x.clone().requires_grad_() for x in (Q[:1], CONTEXTS[0][:1], CONTEXTS[1][:1]))
    assert torch.autograd.gradcheck(
        lambda a, b, c: structured_cross_attention(a, [b], [b, c], to_k, to_v, 3), (q, first, second)
    )


@pytest.mark.parametrize("bos", [0, 1, 2])
def test_alignment_changes_the_rows_of_a_span_alone(bos: int) -> None:
    full, phrases = drawn(9, 3), [drawn(9, 3, seed=1), drawn(5, 3, seed=2)]
    spans, before = [(0, 2), (3, 6)], full.clone()
    aligned = align_spans(full, phrases, spans, bos)
    for rows, phrase, (start, stop) in zip(aligned, phrases, spans, strict=True):
        inside = slice(bos + start, bos + stop)
        assert torch.equal(rows[inside], phrase[bos : bos + stop - start])
        outside = torch.ones(9, dtype=torch.bool)
        outside[inside] = False
        assert torch.equal(rows[outside], full[outside])
    assert torch.equal(full, before)
    both = align_all(full, phrases, spans, bos)
    assert torch.equal(both - full, (aligned[0] - full) + (aligned[1] - full)) and torch.equal(full, before)


def test_where_two_phrases_overlap_the_later_stands() -> None:
    full, phrases = drawn(8, 3), [drawn(8, 3, seed=1), drawn(8, 3, seed=2)]
    both = align_all(full, phrases, [(0, 3), (2, 4)])
    assert torch.equal(both[1:3], phrases[0][1:3]) and torch.equal(both[3:5], phrases[1][1:3])


# -- in networks -------------------------------------------------------------------------------------------------------


class ByHand:
    """A processor of diffusers that computes structured attention itself, for the last `mine` rows of a batch."""

    def __init__(self, contexts: list[Tensor], mode: str, mine: int) -> None:
        self.contexts, self.mode, self.mine = contexts, mode, mine

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        def attend(key: Tensor, value: Tensor, rows: slice) -> Tensor:
            norm_q, norm_k = attn.norm_q or nn.Identity(), attn.norm_k or nn.Identity()
            q, k = heads(norm_q(attn.to_q(hidden_states[rows]))), heads(norm_k(attn.to_k(key)))
            logits = q @ k.mT * attn.scale
            if attention_mask is not None:
                logits = logits + attention_mask.reshape(len(hidden_states), 1, 1, -1)[rows]
            return (logits.softmax(-1) @ heads(attn.to_v(value))).transpose(1, 2).flatten(2)

        rows, others = slice(len(hidden_states) - self.mine, None), slice(0, len(hidden_states) - self.mine)
        full, *aligned = self.contexts
        if self.mode == "values":
            outs = [attend(full[None], value[None], rows) for value in self.contexts]
        else:
            joined = full.clone()
            for context in aligned:
                joined = torch.where(context != full, context, joined)
            outs = [attend(key[None], joined[None], rows) for key in self.contexts]
        plain = attend(encoder_hidden_states[others], encoder_hidden_states[others], others)
        return attn.to_out[1](attn.to_out[0](torch.cat([plain, torch.stack(outs).mean(0)])))


def as_read(name: str, encoded: Tensor) -> Tensor:
    """Encodings as the network's cross-attention gets them."""
    if name == "unet":
        return encoded
    with torch.no_grad():
        projected = model(name).caption_projection(encoded)
        return model(name).caption_norm(projected) if name == "sana" else projected


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", ["values", "pairs"])
@pytest.mark.parametrize("name", CROSSING)
@torch.no_grad()
def test_equals_a_processor_that_does_it(name: str, mode: Any, masked: bool) -> None:
    network, call = model(name), given(name, masked)
    full, *phrases = as_read(name, states(PROMPT, *PHRASES))
    contexts = [full, *(full.clone() for _ in PHRASES)]
    for context, phrase, (start, stop) in zip(contexts[1:], phrases, SPANS, strict=True):
        context[1 + start : 1 + stop] = phrase[1 : 1 + stop - start]
    plain = network(**call, return_dict=False)[0]
    with foveate.apply(network, StructuredDiffusion(full, phrases, SPANS, mode)):
        got = network(**call, return_dict=False)[0]
    before = {module: module.processor for module in network.modules() if hasattr(module, "processor")}
    for module in before:
        if module.is_cross_attention:
            module.processor = ByHand(contexts, mode, mine=2)
    try:
        expected = network(**call, return_dict=False)[0]
    finally:
        for module, processor in before.items():
            module.processor = processor
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(got[0], plain[0])  # the row without the prompt
    assert (got - plain).flatten(1).abs().amax(1)[1:].min() > 1e-4


@torch.no_grad()
def test_rows_of_the_prompt_are_found_wherever_they_stand() -> None:
    call, method = given("unet", masked=False), steering()
    with foveate.apply(model("unet"), method):
        forward = model("unet")(**call).sample
        back = model("unet")(**{key: value.flip(0) for key, value in call.items()}).sample
        one = model("unet")(**{key: value[2:] for key, value in call.items()}).sample
        half = model("unet")(**{**call, "encoder_hidden_states": call["encoder_hidden_states"].bfloat16().float()})
    torch.testing.assert_close(back.flip(0), forward)
    torch.testing.assert_close(one, forward[2:])
    torch.testing.assert_close(half.sample, forward, atol=0.02, rtol=0.02)


@torch.no_grad()
def test_layers_of_one_pass_may_read_other_contexts() -> None:
    """Rows are found again where a layer of the same pass reads another tensor."""
    x, there, full = torch.randn(2, 5, world.WIDTH), torch.randn(2, 6, world.WIDTH), torch.randn(6, world.WIDTH)
    there[0] = full

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn2 = world.Painter().attn2

        def forward(self, *contexts: Tensor) -> list[Tensor]:
            return [self.attn2(x, encoder_hidden_states=context) for context in contexts]

    network, method = Twice(), StructuredDiffusion(full, [full.flip(0)], [(0, 2)])
    with foveate.apply(network, method):
        both = network(there, there.flip(0))
        alone = [network(there)[0], network(there.flip(0))[0]]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(both, alone, strict=True))


@pytest.mark.parametrize("mode", ["values", "pairs"])
@torch.no_grad()
def test_exact_limits(mode: Any) -> None:
    """Without phrases every bit is the network's; phrases encoded as the prompt's own rows change nothing."""
    call = given("unet", masked=False)
    plain = model("unet")(**call).sample
    with foveate.apply(model("unet"), steering(mode, [])):
        assert torch.equal(model("unet")(**call).sample, plain)
    full = states(PROMPT)[0]
    rows = [torch.cat([full[:1], full[1 + start : 1 + stop]]) for start, stop in SPANS]
    with foveate.apply(model("unet"), StructuredDiffusion(full, rows, SPANS, mode)):
        torch.testing.assert_close(model("unet")(**call).sample, plain, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_self_attention_and_the_maps_stay() -> None:
    """In mode "values" the first layer's map is the network's own; queries differ from the second layer on."""
    call = given("unet", masked=False)
    plain, changed = (Reads(lambda site: (site.crosses, site.replaced, site.q, site.k)) for _ in range(2))
    with foveate.apply(model("unet"), plain):
        model("unet")(**call)
    with foveate.apply(model("unet"), steering(), changed):
        model("unet")(**call)
    assert [crosses for crosses, *_ in changed.seen] == [replaced for _, replaced, *_ in changed.seen]
    for at, (ours, theirs) in enumerate(zip(changed.seen, plain.seen, strict=True)):
        assert torch.equal(ours[2], theirs[2]) == (at < 2)
        if ours[0]:
            assert torch.equal(ours[3], theirs[3])


@torch.no_grad()
def test_a_whole_pipeline() -> None:
    """Classifier-free guidance in Stable Diffusion's own pipeline; without phrases the latents are the same."""
    pipe = pipeline()

    def latents(*methods: StructuredDiffusion) -> Tensor:
        with foveate.apply(pipe.unet, *methods):
            return pipe(
                PROMPT, num_inference_steps=3, guidance_scale=7.5, height=8, width=8, output_type="latent",
                num_images_per_prompt=2, generator=torch.Generator().manual_seed(0),
            ).images  # fmt: skip

    plain = latents()
    assert torch.equal(latents(steering(phrases=[])), plain)
    values, pairs = latents(steering()), latents(steering("pairs"))
    assert not torch.allclose(values, plain, atol=1e-3) and not torch.allclose(values, pairs, atol=1e-3)
    assert torch.equal(latents(), plain)


# -- what the paper claims ---------------------------------------------------------------------------------------------


@torch.no_grad()
def right_colours(seed: int, prompts: int = 200) -> dict[str, float]:
    """Share of objects that get their own colour, in prompts with pairs of colours that training held out."""
    encoder, painter = world.trained(seed)
    objects = world.draw(prompts, world.HELD_OUT, torch.Generator().manual_seed(100 + seed))
    full, first, second = (encoder(ids) for ids in (objects.prompts(), objects.phrases(0), objects.phrases(1)))
    right = {"plain": 0.0, "values": 0.0, "misplaced": 0.0}
    for at in range(prompts):
        phrases = [first[at], second[at]]
        ways = {
            "plain": (), "values": (StructuredDiffusion(full[at], phrases, SPANS),),
            "misplaced": (StructuredDiffusion(full[at], phrases[::-1], SPANS),),
        }  # fmt: skip
        for way, methods in ways.items():
            with foveate.apply(painter, *methods):
                painted = painter(objects.shapes[at : at + 1], full[at : at + 1]).argmax(-1)[0]
            right[way] += float((painted == objects.colours[at]).double().mean()) / prompts
    return right


@pytest.mark.slow
def test_each_object_keeps_its_colour(claim: ClaimFixture) -> None:
    """The same weights, three times: phrases encoded alone keep colours with their objects, at their own places."""
    runs = [right_colours(seed) for seed in range(3)]
    mean = {way: sum(run[way] for run in runs) / len(runs) for way in runs[0]}
    assert mean["misplaced"] < mean["plain"] - 0.03
    claim(
        "two objects of a prompt get their own colours, for pairs of colours that training held out: share, 3 seeds",
        ours=mean["values"], baseline=mean["plain"], better="higher", margin=0.03,
        baseline_name="cross-attention to the prompt alone", seed=0,
    )  # fmt: skip
