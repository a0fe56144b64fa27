"""Second-order effects: by hand on four kinds of encoders, their sums, the authors' constants, and a trained ViT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from sklearn.decomposition import SparseCoder
from torch import Tensor, nn

from foveate.core.errors import FoveateError, OptionError, ShapeError, UnsupportedModel
from foveate.lens import (
    NeuronDirections,
    SecondOrderLens,
    contrast_texts,
    describe,
    image_texts,
    mean_ablated,
    neuron_directions,
    neuron_paths,
    neuron_segmentation,
    somp,
)
from tests.conftest import ClaimFixture
from tests.lens.digit_vit import classifier, heldout
from tests.support.clip import clip_config
from tests.support.tensors import assert_near

_TEXT = dict(
    vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, projection_dim=20,
    eos_token_id=49,
)  # fmt: skip


def sizes(layers: int = 3) -> dict[str, Any]:
    return dict(
        hidden_size=32, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=4, image_size=24,
        patch_size=8,
    )  # fmt: skip


MAKERS: dict[str, Callable[[int], hf.PreTrainedModel]] = {
    "clip vision": lambda layers: hf.CLIPVisionModelWithProjection(clip_config(layers)),
    "clip": lambda layers: hf.CLIPModel(
        hf.CLIPConfig(text_config=_TEXT, vision_config=clip_config(layers).to_dict(), projection_dim=20)
    ),
    "vit": lambda layers: hf.ViTForImageClassification(hf.ViTConfig(**sizes(layers), num_labels=7)),
    "dinov2": lambda layers: hf.Dinov2Model(hf.Dinov2Config(**sizes(layers), mlp_ratio=2)),
}


def built(kind: str, layers: int = 3, seed: int = 0) -> Any:
    """Build a model in float64 whose weights, biases, norms and layer scales are random and large."""
    torch.manual_seed(seed)
    model = MAKERS[kind](layers).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
        elif parameter.dim() > 1:
            parameter.mul_(0.2 / parameter.std())
    return model


@cache
def encoder(kind: str) -> Any:
    """A model of three blocks; it is shared: leave its weights as they are."""
    return built(kind)


def images(count: int = 3, channels: int = 3, size: int = 24) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(count, channels, size, size, generator=draw, dtype=torch.float64)


def vision(model: Any) -> Any:
    return getattr(model, "vision_model", getattr(model, "vit", model))


def blocks(model: Any) -> nn.ModuleList:
    own = vision(model)
    return own.layers if hasattr(own, "layers") else getattr(own.encoder, "layers", getattr(own.encoder, "layer", None))


def named(block: Any) -> tuple[nn.LayerNorm, Any, nn.Linear]:
    """Return a block's norm in front of attention, its attention, and the map that reads its neurons."""
    norm = next(getattr(block, name) for name in ("layer_norm1", "layernorm_before", "norm1") if hasattr(block, name))
    return norm, getattr(block, "self_attn", None) or block.attention, block.mlp.fc2


@contextmanager
def watched(model: Any) -> Iterator[dict[Any, Any]]:
    """Record what the modules of a model read and give, by module."""
    seen: dict[Any, Any] = {}

    def hook(module: nn.Module, args: Any, kwargs: Any, made: Any) -> None:
        given = (*args, *(each for each in kwargs.values() if isinstance(each, Tensor)))
        if given:
            seen[module] = given[0], made[0] if isinstance(made, tuple) else made

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in model.modules()]
    yield seen
    for handle in handles:
        handle.remove()


def run(model: Any, x: Tensor) -> Any:
    return model.get_image_features(pixel_values=x) if isinstance(model, hf.CLIPModel) else model(pixel_values=x)


def output(kind: str, x: Tensor) -> Tensor:
    made = run(encoder(kind), x)
    if kind == "clip vision":
        return made.image_embeds
    return made.logits if kind == "vit" else made.pooler_output


def read_out(model: Any, seen: dict[Any, Any], x: Tensor) -> Tensor:
    """Return changes `(B, ..., C)` of the class token's stream at the output; the last norm's statistics stay."""
    norm = vision(model).post_layernorm if hasattr(vision(model), "post_layernorm") else vision(model).layernorm
    stream = seen[norm][0]
    stream = stream[:, 0] if stream.dim() == 3 else stream
    std = (stream.var(-1, correction=0) + norm.eps).sqrt().view(-1, *[1] * (x.dim() - 1))
    x = x * norm.weight / std
    head = getattr(model, "visual_projection", getattr(model, "classifier", None))
    return x if head is None else x @ head.weight.T


def scaled(block: Any, name: str, x: Tensor) -> Tensor:
    return x * getattr(block, name).lambda1 if hasattr(block, name) else x


def removed(kind: str, layer: int, neuron: int, x: Tensor) -> Tensor:
    """Return how the output falls when a neuron's part is taken from what later values are made of, and nothing else.

    The later blocks' attention runs again, with other values; its change at the class token goes straight to the
    output. Statistics of norms stay what they were.
    """
    model = encoder(kind)
    with watched(model) as seen:
        run(model, x)
    down = named(blocks(model)[layer])[2]
    part = scaled(blocks(model)[layer], "layer_scale2", seen[down][0][..., [neuron]] * down.weight[:, neuron])
    total = torch.zeros_like(output(kind, x))
    for block in list(blocks(model))[layer + 1 :]:
        norm, attention, _ = named(block)
        stream = seen[norm][0]
        normed = part * norm.weight / (stream.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        hook = attention.v_proj.register_forward_hook(
            lambda module, given, made, normed=normed: made - normed @ module.weight.T
        )
        changed = attention(seen[attention][0])[0]
        hook.remove()
        fall = scaled(block, "layer_scale1", (seen[attention][1] - changed)[:, 0])
        total += read_out(model, seen, fall)
    return total


# -- the effects -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind", MAKERS)
def test_an_effect_is_what_the_output_loses_without_the_neuron_in_later_values(kind: str, layer: int) -> None:
    lens, x = SecondOrderLens(encoder(kind), layer), images()
    found = lens.effects(x)
    assert_near(lens.outputs(x), output(kind, x), 1e-10)
    width = {"clip vision": 20, "clip": 20, "vit": 7, "dinov2": 32}[kind]
    assert found.shape == (3, {"dinov2": 64}.get(kind, 40), width)
    for neuron in (0, 17, 39):
        expected = removed(kind, layer, neuron, x)
        assert expected.abs().max() > 1e-4
        assert_near(found[:, neuron], expected, 1e-8)
    assert_near(lens.effects(x, [17, 2]), found[:, [17, 2]], 1e-12)
    assert_near(lens.effects(x[:1]), found[:1], 1e-9)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("means", ["shared", "own"])
@pytest.mark.parametrize("share_constants", [False, True])
def test_the_neurons_sum_to_the_layer(kind: str, means: Any, share_constants: bool) -> None:
    lens = SecondOrderLens(encoder(kind), 0, means=means, share_constants=share_constants, coefficient=100.0)
    assert_near(lens.effects(images()).sum(1), lens.layer_effect(images()), 1e-8)
    assert_near(lens.outputs(images()).norm(dim=1), torch.full((3,), 100.0).double(), 1e-8)


def test_float32_and_bfloat16() -> None:
    torch.manual_seed(0)
    model = encoder("clip vision")
    whole = SecondOrderLens(model, 0).effects(images())
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        twin = hf.CLIPVisionModelWithProjection(model.config)
        twin.load_state_dict(model.state_dict())
        found = SecondOrderLens(twin.to(dtype).eval(), 0).effects(images().to(dtype))
        assert found.dtype == torch.float32
        assert (found - whole).norm() < bound * whole.norm()


def test_all_orders_sum_to_the_output() -> None:
    """One block follows, and its MLP gives nothing: what is left is direct, or goes through its heads."""
    model, x = built("clip vision", 2, 1), images()
    last = blocks(model)[1].mlp.fc2
    last.weight.zero_()
    last.bias.zero_()
    with watched(model) as seen:
        made = model(pixel_values=x).image_embeds
    block = blocks(model)[0]
    stream, attention, (active, mlp) = seen[block][0], seen[block.self_attn][1], seen[block.mlp.fc2]
    for own_mean in (False, True):
        paths = neuron_paths(model, x, 0)
        neurons = paths.of_neurons(own_mean)
        second = neurons.sum(1) + paths.of_part(stream + attention + block.mlp.fc2.bias, own_mean)
        norm = paths.final[0]
        first = norm.weighed(stream + attention + mlp, own_mean)[:, 0] * norm.scale[:, None] @ paths.projection.T
        assert_near(mlp, active @ block.mlp.fc2.weight.T + block.mlp.fc2.bias, 1e-12)
        assert_near(first + second + constants(paths, own_mean), made, 1e-9)
        assert neurons.sum(1).norm() > 0.05 * made.norm()


def constants(paths: Any, own_mean: bool) -> Tensor:
    """Return what the biases and the means add to the output when nothing is shared out, for one later block."""
    (heads,), (norm,) = paths.later, paths.final
    mixed = torch.einsum("bhn,bnc->bhc", heads.weights, heads.norm.shared(1, own_mean))
    values = torch.einsum("bhc,hdc->bhd", mixed, heads.values) + heads.value_bias
    x = torch.einsum("bhd,hdc->bc", values, heads.outputs) + heads.output_bias
    return (norm.weighed(x, own_mean) * norm.scale[:, None] + norm.shared(1, own_mean)) @ paths.projection.T


def test_shared_constants_are_those_of_the_authors_code() -> None:
    """Neuron by neuron, token by token and head by head, with every constant divided as the release divides it."""
    model, x = encoder("clip vision"), images(2)
    with watched(model) as seen:
        made = model(pixel_values=x).image_embeds
    down = blocks(model)[0].mlp.fc2
    n, layers, total = 40, 3, torch.zeros(2, 40, 20, dtype=torch.float64)
    parts = seen[down][0][..., None] * down.weight.T + down.bias / n  # images, tokens, neurons, channels
    post = vision(model).post_layernorm
    stream = seen[post][0]
    for later in (1, 2):
        norm, attention, _ = named(blocks(model)[later])
        entered = seen[norm][0]
        mean = entered.mean(-1)[..., None, None]
        std = (entered.var(-1, correction=0) + norm.eps).sqrt()[..., None, None]
        count = (1 + 2 * later) * n
        normed = norm.weight * (parts - mean / count) / std + norm.bias / count
        for head in range(4):
            rows = slice(8 * head, 8 * head + 8)
            v = normed @ attention.v_proj.weight[rows].T + attention.v_proj.bias[rows] / count
            q, k = (linear(seen[attention][0])[..., rows] for linear in (attention.q_proj, attention.k_proj))
            mixed = torch.einsum("bt,btnd->bnd", (q[:, 0, None] @ k.mT * 8**-0.5).softmax(-1)[:, 0], v)
            out = mixed @ attention.out_proj.weight[:, rows].T + attention.out_proj.bias / (count * 4)
            final = count * (1 + 2 * layers) * 4
            out = post.weight * (out - stream.mean(-1)[:, None, None] / final)
            out = out / (stream.var(-1, correction=0) + post.eps).sqrt()[:, None, None] + post.bias / final
            total += out @ model.visual_projection.weight.T
    total = 100.0 * total / made.norm(dim=-1)[:, None, None]
    assert_near(SecondOrderLens(model, 0, share_constants=True, coefficient=100.0).effects(x), total, 1e-8)


def test_own_means_take_the_mean_of_each_part() -> None:
    model, x = encoder("clip vision"), images()
    found = SecondOrderLens(model, 1, means="own").effects(x)
    blind = SecondOrderLens(encoder("clip vision"), 1)
    paths = neuron_paths(blind.model, x, 1)
    centred = paths.rows - paths.rows.mean(1, keepdim=True)
    (heads,), (norm,) = paths.later, paths.final
    for neuron in (3, 20):
        part = centred[neuron] * heads.norm.weight * paths.activations[..., [neuron]] * heads.norm.scale[..., None]
        v = torch.einsum("bnc,hdc->bhnd", part, heads.values)
        out = torch.einsum("bhn,bhnd,hdc->bc", heads.weights, v, heads.outputs)
        out = (out - out.mean(-1, keepdim=True)) * norm.weight * norm.scale[:, None] @ paths.projection.T
        assert_near(found[:, neuron], out, 1e-10)
    assert (found - blind.effects(x)).abs().max() > 1e-3


def test_a_neuron_that_is_not_active_has_no_effect() -> None:
    model, x = built("clip vision"), images()
    up = blocks(model)[0].mlp.fc1
    up.weight[7], up.bias[7] = 0.0, 0.0  # quick GELU of zero is zero
    found = SecondOrderLens(model, 0).effects(x)
    assert not found[:, 7].any() and found[:, :7].abs().amax(2).min() > 0
    assert SecondOrderLens(model, 0, share_constants=True).effects(x)[:, 7].abs().min() > 0


def test_the_model_is_left_as_it_was() -> None:
    model, x = encoder("clip"), images()
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    before = output("clip", x)
    SecondOrderLens(model, 0).effects({"pixel_values": x})
    assert torch.equal(output("clip", x), before)
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# -- directions, texts and maps ----------------------------------------------------------------------------------------


def synthetic(seed: int = 0, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """Effects of 6 neurons on 300 images, each along a direction of its own that 30 images use; and the directions."""
    draw = torch.Generator().manual_seed(seed)
    own = torch.nn.functional.normalize(torch.randn(6, 16, generator=draw, dtype=torch.float64), dim=1)
    strength = torch.zeros(300, 6, dtype=torch.float64)
    for neuron in range(6):
        used = torch.randperm(300, generator=draw)[:30]
        strength[used, neuron] = 2.0 + torch.rand(30, generator=draw, dtype=torch.float64)
    effects = strength[..., None] * own + noise * torch.randn(300, 6, 16, generator=draw, dtype=torch.float64)
    return effects + torch.randn(6, 16, generator=draw, dtype=torch.float64), own


def test_directions_are_the_first_singular_vectors_of_the_longest_effects() -> None:
    effects, _ = synthetic(noise=0.5)
    found = neuron_directions(effects, 25)
    for neuron in range(6):
        centred = effects[:, neuron] - effects[:, neuron].mean(0)
        longest = centred[centred.norm(dim=1).argsort(descending=True)[:25]]
        _, values, right = torch.linalg.svd(longest)
        along = longest @ right[0]
        sign = 1.0 if (along > 0).sum() > 12 else -1.0
        assert_near(found.vectors[neuron], sign * right[0], 1e-9)
        assert float(found.bounds[neuron]) == pytest.approx(float(longest.norm(dim=1).min()))
        assert float(found.explained[neuron]) == pytest.approx(float(values[0] ** 2 / values.square().sum()))
        assert_near(found.along(effects)[:, neuron], centred @ (sign * right[0]), 1e-9)
        expected = effects[:, neuron].mean(0) + (centred @ right[0])[:, None] * right[0]
        assert_near(found.rank_one(effects)[:, neuron], expected, 1e-9)
    assert (found.significant(effects).sum(0) == 24).all()
    assert_near(neuron_directions(effects, 999).vectors, neuron_directions(effects, 300).vectors, 1e-12)


def test_planted_directions_are_found() -> None:
    effects, own = synthetic()
    found = neuron_directions(effects, 30)
    assert ((found.vectors * own).sum(1) > 0.98).all()  # the sign too: most of them point along it
    assert (found.explained > 0.9).all()


def test_mean_ablation_by_hand() -> None:
    effects, _ = synthetic(noise=0.5)
    found, some = neuron_directions(effects, 25), effects[:8]
    outputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rest = outputs - some.sum(1)
    mean = found.means.expand(8, -1, -1)
    long = ((some - mean).norm(dim=-1) > found.bounds)[..., None]
    assert long.any() and not long.all()
    expected = {
        "none": mean, "significant": torch.where(long, some, mean), "insignificant": torch.where(long, mean, some),
        "rank one": found.rank_one(some),
    }  # fmt: skip
    for keep, each in expected.items():
        assert_near(mean_ablated(outputs, some, found, keep), rest + each.sum(1), 1e-10)  # type: ignore[arg-type]


@pytest.mark.parametrize("normalize", ["texts", "channels"])
def test_a_description_is_orthogonal_matching_pursuit(normalize: Any) -> None:
    effects, _ = synthetic()
    found = neuron_directions(effects, 30)
    texts = 1.0 + torch.randn(40, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    codes = describe(found, texts, 5, normalize=normalize)
    rows = texts - texts.mean(0)
    rows = rows / rows.norm(dim=1 if normalize == "texts" else 0, keepdim=True)
    assert len(codes) == 6
    if normalize == "texts":
        peer = SparseCoder(rows.numpy(), transform_algorithm="omp", transform_n_nonzero_coefs=5)
        expected = torch.from_numpy(peer.transform(found.vectors.numpy()))
        for code, row in zip(codes, expected, strict=True):
            dense = torch.zeros(40, dtype=torch.float64).index_put((code.atoms,), code.coefficients[0])
            assert_near(dense, row, 1e-8)
    for neuron, code in enumerate(codes):
        assert int(code.atoms[0]) == int((rows @ found.vectors[neuron]).abs().argmax())
        left = found.vectors[neuron] - code.coefficients[0] @ rows[code.atoms]
        assert_near(rows[code.atoms] @ left, torch.zeros(5).double(), 1e-9)
        assert code.score == pytest.approx(1 - float(left.square().sum()))
    (one,) = describe(found, texts, 5, neurons=[4], normalize=normalize)
    assert torch.equal(one.atoms, codes[4].atoms)


def worded() -> tuple[NeuronDirections, list[Any], Tensor]:
    """Three neurons, each made of two of six orthogonal texts: (0, 1), (2, 3) and (4, 5)."""
    texts = torch.eye(8, dtype=torch.float64)[:6]
    vectors = torch.zeros(3, 8, dtype=torch.float64)
    for neuron in range(3):
        vectors[neuron, 2 * neuron], vectors[neuron, 2 * neuron + 1] = 0.8, 0.6
    one = torch.ones(3, dtype=torch.float64)
    return NeuronDirections(vectors, torch.zeros(3, 8).double(), one, one), [], texts


def test_texts_that_share_neurons_with_a_class() -> None:
    directions, _, texts = worded()
    codes = [somp(each[None], texts, 2) for each in directions.vectors]
    contrast = texts[0] - texts[4]  # towards text 0, away from text 4
    found = contrast_texts(directions, codes, contrast, neurons=2, count=3)
    assert [text for text, _ in found] == [0, 1, 5]
    assert [score for _, score in found] == pytest.approx([0.64, 0.48, -0.48])
    effects = torch.zeros(3, 8, dtype=torch.float64)
    effects[1, 2], effects[2, 0] = 5.0, 0.5  # the second is not significant
    assert image_texts(effects, directions, codes) == [(2, pytest.approx(4.0)), (3, pytest.approx(3.0))]


def test_a_map_is_the_mean_activation_of_a_texts_neurons() -> None:
    model, x = encoder("clip vision"), images()
    lenses = [SecondOrderLens(model, layer) for layer in (0, 1)]
    draw = torch.Generator().manual_seed(0)
    directions = [
        NeuronDirections(
            torch.randn(40, 20, generator=draw).double(), torch.zeros(40, 20).double(), torch.ones(40), torch.ones(40)
        )
        for _ in lenses
    ]
    text = torch.randn(20, generator=draw).double()
    with watched(model) as seen:
        model(pixel_values=x)
    active = torch.cat([seen[blocks(model)[layer].mlp.fc2][0] for layer in (0, 1)], -1)
    products = torch.cat([each.vectors for each in directions]) @ text
    chosen = products.abs().argsort(descending=True)[:9]
    assert (products[chosen] < 0).any() and (chosen < 40).any() and (chosen >= 40).any()
    expected = active[:, 1:, chosen].mean(-1).view(3, 3, 3)
    low, high = expected.amin((1, 2), keepdim=True), expected.amax((1, 2), keepdim=True)
    found = neuron_segmentation(lenses, x, text, directions, 9)
    assert_near(found, (expected - low) / (high - low), 1e-9)
    one = lenses[0].segment(x, text, directions[0], 4)
    assert one.shape == (3, 3, 3) and one.amin() == 0 and one.amax() == 1


# -- a trained ViT -----------------------------------------------------------------------------------------------------


@cache
def digits() -> tuple[Any, Tensor, Tensor, Tensor]:
    """Return a classifier of digits, the effects of its first MLP on its logits, the images and their digits."""
    model, (x, labels) = classifier(2, 4, 2, 0, 150), heldout()
    return model, SecondOrderLens(model, 0).effects(x), x, labels


def explained(effects: Tensor, vectors: Tensor, means: Tensor, top: int) -> Tensor:
    """Return the share of the longest effects' squared length that a direction explains, for each neuron."""
    centred = effects - means
    longest = centred.norm(dim=-1).topk(top, 0).indices
    some = centred.gather(0, longest[..., None].expand(-1, -1, centred.shape[2]))
    return torch.einsum("tme,me->tm", some, vectors).square().sum(0) / some.square().sum((0, 2))


def test_one_direction_explains_the_significant_effects(claim: ClaimFixture) -> None:
    _, effects, _, _ = digits()
    fitted, rest = effects[::2], effects[1::2]
    directions = neuron_directions(fitted, 20)
    ours = explained(rest, directions.vectors, directions.means, 20).median()
    draw = torch.Generator().manual_seed(0)
    random = torch.nn.functional.normalize(torch.randn(directions.vectors.shape, generator=draw), dim=1)
    baseline = explained(rest, random, directions.means, 20).median()
    assert ours >= 0.5 and baseline <= 0.1
    claim(
        "share of the significant effects' squared length along one direction, on other images than it is fitted to, "
        "median over neurons",
        ours=float(ours), baseline=float(baseline), better="higher", margin=0.4, baseline_name="a random direction",
        seed=0,
    )  # fmt: skip


@contextmanager
def silenced(model: Any, layer: int, neurons: Tensor, levels: Tensor) -> Iterator[None]:
    """Hold some neurons at a level, the mean over a data set, at all tokens."""

    def hook(module: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        x = given[0].clone()
        x[..., neurons] = levels[neurons]
        return (x,)

    handle = blocks(model)[layer].mlp.fc2.register_forward_pre_hook(hook)
    yield
    handle.remove()


def test_ablating_the_neurons_of_a_class_lowers_its_logit(claim: ClaimFixture) -> None:
    """The whole model runs without the neurons, so that all their ways count."""
    model, effects, x, labels = digits()
    levels, draw = SecondOrderLens(model, 0).activations(x).mean((0, 1)), torch.Generator().manual_seed(0)
    count, falls = round(0.05 * effects.shape[1]), dict[str, list[float]]()
    for digit in range(10):
        own = labels == digit
        size = effects[own, :, digit].abs().mean(0)
        chosen = {"largest": size.topk(count).indices, "least": (-size).topk(count).indices}
        chosen |= {f"random {i}": torch.randperm(len(size), generator=draw)[:count] for i in range(5)}
        before = model(pixel_values=x[own]).logits[:, digit].mean()
        for name, neurons in chosen.items():
            with silenced(model, 0, neurons, levels):
                falls.setdefault(name.split()[0], []).append(
                    float(before - model(pixel_values=x[own]).logits[:, digit].mean())
                )
    means = {name: sum(each) / len(each) for name, each in falls.items()}
    assert abs(means["least"]) < 0.5 * means["largest"]
    claim(
        "fall of a digit's logit when the 5 % of neurons with the largest effect on it are held at their means",
        ours=means["largest"], baseline=means["random"], better="higher", margin=0.1, baseline_name="random neurons",
        seed=0,
    )  # fmt: skip


# -- a ViT whose knowledge has to go through the neurons and the later heads -------------------------------------------

PATTERNS = torch.tensor([[1.0, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]])


def patterns(count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return images of 16 patches, most with the pattern of the image's class, each bright or dark at random."""
    labels = torch.randint(4, (count,), generator=draw)
    kind = torch.randint(4, (count, 16), generator=draw)
    kind = torch.where(torch.rand(count, 16, generator=draw) < 0.6, labels[:, None], kind)
    patches = PATTERNS[kind] * (2.0 * torch.randint(2, (count, 16, 1), generator=draw) - 1)
    x = patches.view(count, 4, 4, 2, 2).transpose(2, 3).reshape(count, 1, 8, 8)
    return x + 0.3 * torch.randn(x.shape, generator=draw), labels


@cache
def pattern_reader() -> Any:
    """Two blocks, of which the first only has an MLP and the second only heads, without queries.

    No linear map of a patch knows its pattern, which is as often bright as dark. The class token sees no patch before
    the second block.
    """
    torch.manual_seed(0)
    config = hf.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=8, patch_size=2,
        num_channels=1, num_labels=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model, draw = hf.ViTForImageClassification(config), torch.Generator().manual_seed(0)
    first, second = blocks(model)
    for linear in (first.attention.o_proj, second.mlp.fc2, second.attention.q_proj):
        for parameter in linear.parameters():
            parameter.data.zero_()
            parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        x, labels = patterns(64, draw)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(pixel_values=x).logits, labels).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def test_the_way_through_later_heads_matters_and_the_direct_one_does_not(claim: ClaimFixture) -> None:
    model, (x, labels) = pattern_reader(), patterns(300, torch.Generator().manual_seed(9))
    lens, paths = SecondOrderLens(model, 0), neuron_paths(model, x, 0)
    effects, logits = lens.effects(x), lens.outputs(x)
    directions, (norm,) = neuron_directions(effects, 20), paths.final
    direct = norm.weighed(paths.activations[:, 0] @ paths.rows, False) * norm.scale[:, None] @ paths.projection.T

    def accuracy(scores: Tensor) -> float:
        return float((scores.argmax(1) == labels).double().mean())

    without = {keep: accuracy(mean_ablated(logits, effects, directions, keep)) for keep in ("none", "rank one")}  # type: ignore[arg-type]
    assert accuracy(logits) > 0.9 and without["rank one"] > accuracy(logits) - 0.02, without
    claim(
        "accuracy lost when the second-order effects of an MLP are replaced by their means",
        ours=accuracy(logits) - without["none"], baseline=accuracy(logits) - accuracy(logits - direct + direct.mean(0)),
        better="higher", margin=0.3, baseline_name="when its direct effects are", seed=0,
    )  # fmt: skip


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_models_without_such_ways_are_refused() -> None:
    torch.manual_seed(0)
    siglip = hf.SiglipVisionModel(hf.SiglipVisionConfig(**sizes())).eval()
    with pytest.raises(UnsupportedModel, match="class token"):
        SecondOrderLens(siglip, 0).effects(images().float())
    bert = hf.BertModel(hf.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)).eval()
    with pytest.raises(UnsupportedModel, match="get_image_features"):
        SecondOrderLens(bert, 0).effects(images())
    with pytest.raises(UnsupportedModel, match="PreTrainedModel"):
        SecondOrderLens(nn.Linear(2, 2), 0).effects(images())
    gated = hf.CLIPVisionModel(clip_config(3)).eval()
    blocks(gated)[1].mlp.register_forward_hook(lambda module, given, made: made * 2)
    with pytest.raises(UnsupportedModel, match="do not sum"):
        SecondOrderLens(gated, 0).effects(images().float())


def test_bad_input_is_refused() -> None:
    model, x = encoder("clip vision"), images()
    effects, _ = synthetic()
    found = neuron_directions(effects)
    lens = SecondOrderLens(model, 0)
    bad: list[tuple[type[FoveateError], str, Any]] = [
        (OptionError, "mlp_layer=2 must be in 0..1", lambda: SecondOrderLens(model, 2).effects(x)),
        (OptionError, "mlp_layer=-1", lambda: SecondOrderLens(model, -1)),
        (OptionError, "means='mine'", lambda: SecondOrderLens(model, 0, means="mine")),  # type: ignore[arg-type]
        (OptionError, "share_constants=1", lambda: SecondOrderLens(model, 0, share_constants=1)),  # type: ignore[arg-type]
        (OptionError, "coefficient=-1", lambda: SecondOrderLens(model, 0, coefficient=-1)),
        (OptionError, "neurons must be numbers in 0..39", lambda: lens.effects(x, [40])),
        (OptionError, "neurons must be", lambda: lens.effects(x, [])),
        (ShapeError, "images must be pixel values", lambda: lens.effects(x[0])),
        (ShapeError, "images must be pixel values", lambda: lens.effects({"input_ids": x})),
        (OptionError, "top=0", lambda: neuron_directions(effects, 0)),
        (ShapeError, "two images or more", lambda: neuron_directions(effects[:1])),
        (ShapeError, "effects must be", lambda: found.along(effects[:, :3])),
        (OptionError, "keep='all'", lambda: mean_ablated(effects[:, 0], effects, found, "all")),  # type: ignore[arg-type]
        (ShapeError, r"texts must be \(texts, 16\)", lambda: describe(found, torch.ones(5, 4))),
        (OptionError, "normalize='rows'", lambda: describe(found, torch.ones(5, 16), normalize="rows")),  # type: ignore[arg-type]
        (OptionError, "codes must be those of all 6", lambda: contrast_texts(found, [], torch.ones(16))),
        (OptionError, "neurons=0", lambda: lens.segment(x, torch.ones(16), found, 0)),
        (ShapeError, r"text must be an embedding \(16,\)", lambda: lens.segment(x, torch.ones(3), found)),
        (OptionError, "as many as lenses", lambda: neuron_segmentation([lens], x, torch.ones(16), [])),
    ]
    for error, words, call in bad:
        with pytest.raises(error, match=words):
            call()
