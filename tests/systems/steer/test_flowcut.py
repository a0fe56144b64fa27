"""FlowCut: its formulas by loops, its exact limit, a whole LLaVA by hand, and its claim on a small image classifier."""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.nn import functional as F

from foveate.core.errors import FoveateError, OptionError, ShapeError, UnsupportedModel
from foveate.host import Method, Site, apply
from foveate.host.stream import Stream
from foveate.host.weight_tiles import weight_tile
from foveate.steer.vision.flowcut import FlowCut, flowcut_score, prune_count
from foveate.tasks import Digits
from tests.conftest import ClaimFixture
from tests.support.clip import clip_config
from tests.support.host_models import model, tokens
from tests.support.vision_models import vision_model

pytestmark = pytest.mark.filterwarnings("ignore")

IMAGE, PATCHES = 60, 36


@cache
def llava(blocks: int = 8) -> Any:
    """A tiny random LLaVA, whose encoder has 36 patches and 8 blocks, of which the last but one is read."""
    vision = hf.CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=blocks, num_attention_heads=3, image_size=24,
        patch_size=4, projection_dim=16, initializer_factor=3.0,
    )  # fmt: skip
    text = hf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=PATCHES)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = hf.LlavaForConditionalGeneration(config).eval()
    for block in made.model.vision_tower.encoder.layers:  # attention that prefers some patches
        block.self_attn.q_proj.weight.data *= 12
    made.generation_config.pad_token_id, made.generation_config.eos_token_id = 0, None
    made.generation_config.suppress_tokens = [IMAGE]
    return made


def prompts(padding: int = 0, tokens_of_image: int = PATCHES, seed: int = 3) -> dict[str, Tensor]:
    """Two prompts of words, a picture, and words; the first one may be padded."""
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(2, 50, (2, 3 + tokens_of_image + 5), generator=draw)
    words[:, 3 : 3 + tokens_of_image] = IMAGE
    ids = torch.cat([torch.randint(2, 50, (2, padding), generator=draw), words], 1)
    mask = torch.ones_like(ids)
    ids[0, :padding], mask[0, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 24, 24, generator=draw)}


# -- the formulas ------------------------------------------------------------------------------------------------------


def test_the_score_is_that_of_loops() -> None:
    draw = torch.Generator().manual_seed(0)
    attention = torch.rand(2, 7, generator=draw, dtype=torch.float64)
    values = torch.randn(2, 3, 8, 5, generator=draw, dtype=torch.float64)
    score = flowcut_score(attention, values)
    for row in range(2):
        alike = [0.0] * 8
        for head in range(3):
            products = [float((values[row, head, 0] * values[row, head, j]).sum()) for j in range(8)]
            total = sum(math.exp(x) for x in products)
            alike = [a + math.exp(x) / total / 3 for a, x in zip(alike, products, strict=True)]
        for j in range(7):
            strength = sum(abs(sum(float(values[row, h, j + 1, c]) for h in range(3)) / 3) for c in range(5))
            shares = float(attention[row, j] / attention[row].sum()) + alike[j + 1] / sum(alike[1:])
            assert float(score[row, j]) == pytest.approx(shares * strength, abs=1e-6)


@pytest.mark.parametrize("remaining", [1, 2, 4, 9])
@pytest.mark.parametrize(("n", "target"), [(576, 128), (36, 9), (10, 10), (5, 8)])
def test_more_is_dropped_the_more_uneven_attention_is(n: int, target: int, remaining: int) -> None:
    one = F.one_hot(torch.tensor(2), n).float()
    assert prune_count(torch.full((n,), 0.3), n, target, remaining) == 0
    assert prune_count(one, n, target, remaining) == (round((n - target) / math.sqrt(remaining)) if n > target else 0)
    assert prune_count(torch.full((n,), 0.3), n, target, 0) == max(0, n - target)
    if n > target:
        half = torch.zeros(n).index_fill(0, torch.arange(n // 2), 1.0)
        evenness = math.log(n // 2) / math.log(n)
        wanted = round((n - target) / math.sqrt(remaining) * (1 - evenness**2))
        assert prune_count(half, n, target, remaining) == wanted
        batch = torch.stack([torch.ones(n), half, torch.ones(n)])
        assert prune_count(batch, n, target, remaining) == wanted, "the largest of a batch counts"


def test_malformed_calls_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"values must be \(B, H, n \+ 1, D\)"):
        flowcut_score(torch.rand(2, 7), torch.rand(2, 3, 7, 5))
    with pytest.raises(ShapeError, match="weights of n=7 patches"):
        prune_count(torch.rand(2, 6), 7, 3, 2)
    for wrong in ({"target": 0}, {"momentum": 1.5}, {"llm_layer": -1}, {"target": 1, "llm_layer": 1}, {"over": "x"}):
        with pytest.raises(FoveateError) as caught:
            FlowCut(**wrong)
        assert "\n" not in str(caught.value)
    with pytest.raises(OptionError, match='over="text" needs llm_layer'):
        FlowCut(over="text")


# -- in the encoder ----------------------------------------------------------------------------------------------------


def features(method: FlowCut | None, pictures: Tensor) -> tuple[Tensor, Stream | None]:
    """Return the states of the last block but one of the encoder alone, and its stream."""
    tower = llava().model.vision_tower
    with torch.no_grad(), apply(tower, *([] if method is None else [method])) as run:
        states = tower(pictures, output_hidden_states=True).hidden_states
    return states[-2], run.streams.get("image")


@pytest.mark.parametrize("target", [PATCHES, 100])
def test_a_target_of_all_patches_leaves_the_encoder_alone(target: int) -> None:
    pictures = prompts()["pixel_values"]
    got, stream = features(FlowCut(target), pictures)
    assert torch.equal(got, features(None, pictures)[0]) and stream is not None and stream.index is None


@pytest.mark.parametrize("target", [1, 5, 12, 35])
@pytest.mark.parametrize("seed", [0, 1])
def test_exactly_the_target_is_left_in_order_with_the_class_token(target: int, seed: int) -> None:
    pictures = 3 * torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(seed))
    _, stream = features(FlowCut(target), pictures)
    assert stream is not None and stream.index is not None
    assert stream.index.shape == (3, target + 1) and (stream.index[:, 0] == 0).all()
    assert (stream.index.diff(dim=1) > 0).all()
    assert stream.counts[-2:] == [target + 1] * 2 and stream.counts[:2] == [PATCHES + 1] * 2


@torch.no_grad()
def cut_by_hand(pictures: Tensor, target: int, momentum: float) -> tuple[Tensor, Tensor, list[int]]:
    """Return the features of what is left, its patches, and the tokens of each block; blocks called one by one."""
    tower = llava().model.vision_tower
    blocks, select = tower.encoder.layers, len(tower.encoder.layers) - 2
    x = tower.pre_layrnorm(tower.embeddings(pictures))
    left = torch.arange(PATCHES).expand(len(x), -1)
    total, counts = None, []
    for number, block in enumerate(blocks[: select + 1]):
        counts.append(x.shape[1])
        q, k, v = (
            getattr(block.self_attn, name)(block.layer_norm1(x)).unflatten(-1, (3, 8)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        attention = (q[:, :, :1] @ k.mT / math.sqrt(8)).softmax(-1).mean(1)[:, 0, 1:]
        x = block(x, None)
        n, remaining = x.shape[1] - 1, select - number - 1
        if n <= target or remaining < 0:
            continue
        score = flowcut_score(attention, v)
        total = score if total is None else momentum * total + (1 - momentum) * score
        if remaining % 2:
            continue
        share = attention / attention.sum(-1, keepdim=True)
        ratio = -(share * share.log()).sum(-1) / math.log(n)
        count = round(float(((n - target) / math.sqrt(remaining) * (1 - ratio**2)).max())) if remaining else n - target
        best = total.topk(max(target, n - count)).indices.sort().values
        total, left = total.gather(1, best), left.gather(1, best)
        x = torch.cat([x[:, :1], x[:, 1:].gather(1, best[..., None].expand(-1, -1, x.shape[-1]))], 1)
    return x[:, 1:], left, counts


@pytest.mark.parametrize("momentum", [0.5, 0.8])
@pytest.mark.parametrize("target", [3, 9, 20])
def test_the_encoder_is_that_by_hand(target: int, momentum: float) -> None:
    pictures = 3 * prompts()["pixel_values"]
    expected, left, counts = cut_by_hand(pictures, target, momentum)
    got, stream = features(FlowCut(target, momentum), pictures)
    assert stream is not None and stream.index is not None
    assert torch.equal(stream.index[:, 1:] - 1, left) and stream.counts[: len(counts)] == counts
    assert len(set(counts)) > 2, "patches leave in more than one step"
    picked = got[:, 1:].gather(1, left[..., None].expand(-1, -1, got.shape[-1]))
    torch.testing.assert_close(picked, expected, atol=1e-5, rtol=1e-5)


# -- a whole LLaVA -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def short_prompt(inputs: dict[str, Tensor], row: int, target: int) -> Tensor:
    """Return the embeddings of a prompt whose picture has only the features that are left."""
    subject = llava()
    kept, _, _ = cut_by_hand(inputs["pixel_values"], target, 0.5)
    ids = inputs["input_ids"][row, inputs["attention_mask"][row].bool()]
    words = subject.get_input_embeddings()(ids)
    first = int((ids == IMAGE).nonzero()[0, 0])
    picture = subject.model.multi_modal_projector(kept[row])
    return torch.cat([words[:first], picture, words[first + PATCHES :]])[None]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("padding", [0, 4])
@torch.no_grad()
def test_the_decoder_reads_a_shorter_prompt(padding: int, options: dict[str, Any]) -> None:
    """Generation is that of a prompt with the features that are left alone, at consecutive positions."""
    subject, inputs, target, new = llava(), prompts(padding), 9, 6
    with apply(subject, FlowCut(target)) as run:
        made = subject.generate(**inputs, max_new_tokens=new, do_sample=False, **options)
    text = run.streams["text"]
    assert made.shape == (2, inputs["input_ids"].shape[1] + new)
    assert text.index is not None and text.index.shape[1] == made.shape[1] - new - PATCHES + target + (
        0 if options.get("use_cache", True) else new - 1
    )
    assert text.counts == [text.index.shape[1]] * 3
    for row in range(2):
        embeds = short_prompt(inputs, row, target)
        alone = subject.generate(inputs_embeds=embeds, max_new_tokens=new, do_sample=False, **options)
        assert torch.equal(made[row, -new:], alone[0])
    assert not torch.equal(made, subject.generate(**inputs, max_new_tokens=new, do_sample=False, **options))


@torch.no_grad()
def test_one_call_and_chunks_give_the_same() -> None:
    subject, inputs, target = llava(), prompts(3), 9
    with apply(subject, FlowCut(target)):
        out = subject(**inputs)
        made = subject.generate(**inputs, max_new_tokens=5, do_sample=False)
        chunked = subject.generate(**inputs, max_new_tokens=5, do_sample=False, prefill_chunk_size=30)
    for row in range(2):
        alone = subject.model.language_model(inputs_embeds=short_prompt(inputs, row, target)).last_hidden_state
        torch.testing.assert_close(out.logits[row, -5:], subject.lm_head(alone)[0, -5:], atol=1e-4, rtol=1e-4)
    assert torch.equal(chunked, made) and out.logits.isfinite().all()


@torch.no_grad()
def test_a_picture_at_the_end_of_a_prompt() -> None:
    """The text goes on behind the last patch that is left; a call of dropped patches alone is refused."""
    subject, target, end = llava(), 9, 3 + PATCHES
    inputs = {name: value[:, :end] if name != "pixel_values" else value for name, value in prompts().items()}
    with apply(subject, FlowCut(target)):
        made = subject.generate(**inputs, max_new_tokens=5, do_sample=False)
        with pytest.raises(OptionError, match="leaves none of the 1 tokens|leaves none of the 2 tokens"):
            subject.generate(**inputs, max_new_tokens=5, do_sample=False, prefill_chunk_size=2)
    for row in range(2):
        embeds = short_prompt(inputs, row, target)
        assert torch.equal(
            made[row, end:], subject.generate(inputs_embeds=embeds, max_new_tokens=5, do_sample=False)[0]
        )


@torch.no_grad()
def test_later_turns_continue_at_the_right_positions() -> None:
    """A second question after an answer, on the cache of the first one."""
    subject, inputs, target = llava(), prompts(), 9
    inputs = {name: value[:1] for name, value in inputs.items()}
    with apply(subject, FlowCut(target)):
        first = subject.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        longer = torch.cat([first.sequences, tokens(1, 3) % 50 + 2], 1)
        later = subject.generate(
            longer, attention_mask=torch.ones_like(longer), past_key_values=first.past_key_values, max_new_tokens=4,
            do_sample=False,
        )  # fmt: skip
    words = subject.get_input_embeddings()(longer[:, inputs["input_ids"].shape[1] :])
    embeds = torch.cat([short_prompt(inputs, 0, target), words], 1)
    assert torch.equal(later[:, -4:], subject.generate(inputs_embeds=embeds, max_new_tokens=4, do_sample=False))


@torch.no_grad()
def test_pictures_that_are_not_cut_leave_the_model_bit_for_bit() -> None:
    subject, inputs = llava(), prompts(2)
    plain = subject.generate(
        **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    with apply(subject, FlowCut(PATCHES)):
        made = subject.generate(
            **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    assert torch.equal(torch.stack(made.logits), torch.stack(plain.logits))


# -- the second cut ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_second_cut_is_that_of_loops() -> None:
    """Behind block 1 of the decoder, the last token has the class token's part; half of the target comes from above."""
    subject, inputs, target = llava(), prompts(3), 8
    seen: list[Site] = []

    class Notes(Method):
        def at(self, site: Site) -> bool:
            return site.is_causal and site.layer == 1

        def read(self, site: Site, out: Tensor) -> None:
            seen.append(site)

    with apply(subject, FlowCut(target, llm_layer=1), Notes()) as run:
        subject(**inputs)
    assert run.streams["text"].counts == [3 + 3 + 4 + 5] * 3, "4 of 8 come from the encoder, and none has to go"
    with apply(subject, FlowCut(2, llm_layer=1, over="text"), Notes()) as run:
        seen.clear()
        subject(**inputs)
    index, site = run.streams["text"].index, seen[0]
    assert index is not None and run.streams["text"].counts[0] == 47
    ids = inputs["input_ids"]
    for row in range(2):
        last, span = 46, list(range(6 + PATCHES, 46))
        assert (ids[row, span] != IMAGE).all()
        keys, values = (x[row].repeat_interleave(2, 0).double() for x in (site.k, site.v))
        attention, alike = torch.zeros(len(span)).double(), torch.zeros(len(span)).double()
        for head in range(4):
            scores = torch.stack([site.q[row, head, last].double() @ keys[head, j] / math.sqrt(8) for j in span])
            likes = torch.stack([values[head, last] @ values[head, j] / math.sqrt(8) for j in span])
            attention, alike = attention + scores.softmax(0) / 4, alike + likes.softmax(0) / 4
        strength = torch.stack([values[:, j].mean(0).abs().sum() for j in span])
        score = (attention / attention.sum() + alike / alike.sum()) * strength
        best = {span[j] for j in score.topk(2).indices.tolist()}
        kept = set(index[row].tolist()) - {-1}
        assert kept & set(span) == best and set(range(6 + PATCHES)) - kept == set() and last in kept


@torch.no_grad()
def test_tiles_are_cut_twice_to_the_target() -> None:
    """LLaVA-NeXT: half of the target of each tile, then the target of all tiles together behind block 1."""
    vision = hf.CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=6, num_attention_heads=3, image_size=24, patch_size=4,
        projection_dim=16, initializer_factor=3.0,
    )  # fmt: skip
    config = hf.LlavaNextConfig(
        vision_config=vision, text_config=llava().config.text_config, image_token_index=IMAGE, image_seq_length=PATCHES,
        image_grid_pinpoints=[[24, 48], [48, 24]],
    )  # fmt: skip
    torch.manual_seed(0)
    subject = hf.LlavaNextForConditionalGeneration(config).eval()
    count = PATCHES + 6 * 12 + 6  # the whole picture, two tiles side by side, and the end of each row
    inputs = prompts(0, count)
    inputs = {name: value[:1] for name, value in inputs.items()}
    draw = torch.Generator().manual_seed(0)
    inputs |= {"pixel_values": torch.randn(1, 3, 3, 24, 24, generator=draw), "image_sizes": torch.tensor([[24, 48]])}
    with apply(subject, FlowCut(10, llm_layer=1)) as run:
        out = subject(**inputs)
    assert out.logits.shape[1] == count + 8 and out.logits.isfinite().all()
    assert run.streams["image"].counts[-1] == 1 + 5
    assert run.streams["text"].counts == [8 + 3 * 5 + 6, 8 + 3 * 5 + 6, 8 + 10]
    index = run.streams["text"].index
    assert index is not None and {0, 1, 2, *range(count + 3, count + 8)} <= set(index[0].tolist())


@torch.no_grad()
def test_the_question_has_to_come_with_the_picture() -> None:
    subject, inputs = llava(), prompts()
    with pytest.raises(OptionError, match="leave prefill_chunk_size out"), apply(subject, FlowCut(12, llm_layer=1)):
        subject.generate(**inputs, max_new_tokens=2, do_sample=False, prefill_chunk_size=30)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_models_without_patches_of_their_own_are_refused() -> None:
    cases = [
        (model("llama"), "needs an image encoder; LlamaForCausalLM has none"),
        (vision_model("paligemma"), "with a class token; SiglipVisionModel has none"),
        (vision_model("llava"), "of at least 3 blocks; CLIPVisionModel has 2"),
        (hf.CLIPVisionModel(clip_config(2)), "of at least 3 blocks"),
    ]
    for subject, words in cases:
        with pytest.raises(UnsupportedModel) as caught, apply(subject, FlowCut(3)):
            pass
        assert words in str(caught.value)
    merged = copy.deepcopy(llava())
    merged.config.image_seq_length = 9
    with pytest.raises(UnsupportedModel, match="makes 9 image tokens of 36 patches"), apply(merged, FlowCut(3)):
        pass
    with pytest.raises(OptionError, match="llm_layer=2 must be a block"), apply(llava(), FlowCut(4, llm_layer=2)):
        pass


# -- the claim ---------------------------------------------------------------------------------------------------------


class OneCut(Method):
    """The baselines: keeps patches behind one block, those that the class token attends to most, or random ones."""

    drops_in = ("image",)

    def __init__(self, target: int, how: str, layer: int, seed: int = 0) -> None:
        self.target, self.how, self.layer = target, how, layer
        self.draw = torch.Generator().manual_seed(seed)

    def read(self, site: Site, out: Tensor) -> None:
        site.step[self] = weight_tile(site, slice(0, 1)).weights[:, :, 0].mean(1)[:, 1:]

    def drop(self, layer: int, hidden: Tensor, stream: Stream) -> Tensor | None:
        if layer != self.layer:
            return None
        score = stream.step[self]
        if self.how == "random":
            score = torch.rand(score.shape, generator=self.draw)
        keep = torch.zeros(score.shape, dtype=torch.bool).scatter(1, score.topk(self.target).indices, True)
        return torch.cat([torch.ones(len(keep), 1, dtype=torch.bool), keep], 1)


def collage(images: Tensor, seed: int) -> Tensor:
    """Return digits at twice their size, each in a corner of a picture of noise: a quarter of 8 by 8 patches."""
    draw = torch.Generator().manual_seed(seed)
    out = torch.rand(len(images), 1, 32, 32, generator=draw)
    big = F.interpolate(images, scale_factor=2.0)
    corners = torch.randint(0, 2, (len(images), 2), generator=draw).mul(16).tolist()
    for picture, digit, (row, column) in zip(out, big, corners, strict=True):
        picture[:, row : row + 16, column : column + 16] = digit
    return out


@cache
def classifier(seed: int, steps: int = 500) -> Any:
    """A ViT of 6 blocks with a class token, trained on digits."""
    config = hf.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4, image_size=32, patch_size=4,
        num_channels=1, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = hf.ViTForImageClassification(config).train()
    draw = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    with torch.enable_grad():
        for step in range(steps):
            images, labels = Digits().sample(32, draw)
            F.cross_entropy(net(collage(images, 1000 * seed + step)).logits, labels).backward()
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
    return net.eval()


@torch.no_grad()
def accuracy(seed: int, *methods: Method) -> float:
    images, labels = Digits().heldout()
    with apply(classifier(seed), *methods):
        return float((classifier(seed)(collage(images, 7)).logits.argmax(-1) == labels).float().mean())


def measured(seeds: range) -> dict[str, float]:
    """Return the mean accuracy of each way to keep a quarter of the 64 patches."""
    rows = [
        {
            "all": accuracy(seed), "flowcut": accuracy(seed, FlowCut(16)),
            "attention": accuracy(seed, OneCut(16, "attention", 1)), "random": accuracy(seed, OneCut(16, "random", 1)),
        }
        for seed in seeds
    ]  # fmt: skip
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


STATEMENT = "of 64 patches FlowCut leaves 16: accuracy of a ViT on digits in a corner of a noisy picture"


@pytest.mark.slow
def test_a_quarter_of_the_patches(claim: ClaimFixture) -> None:
    """The baselines drop behind block 1, where FlowCut begins.

    The order shows in one seed of three, 0.40 against 0.38 and 0.31. In the two others nothing is lost, whatever is
    dropped: the class token has read the picture by then. So the mean is 0.48 against 0.47 and 0.45, and the
    5 points before random patches do not appear at this size. The classifiers get half of the digits right.
    """
    got = measured(range(3))
    claim(
        f"{STATEMENT}, 3 seeds", ours=got["flowcut"], baseline=got["random"], better="higher",
        baseline_name="random patches", seed=0,
    )  # fmt: skip
    claim(
        f"{STATEMENT}, 3 seeds", ours=got["flowcut"], baseline=got["attention"], better="higher",
        baseline_name="the patches that the class token attends to most in block 1", seed=0,
    )  # fmt: skip
