"""Hedgehog: its weights are spiky and monotone before training, and imitate a softmax after distillation."""

from __future__ import annotations

from typing import final

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import foveate
from foveate.core.errors import OptionError, ShapeError
from foveate.ops.base.linear import Linear
from foveate.ops.dense.softmax import Softmax
from foveate.ops.linear.hedgehog import Hedgehog
from foveate.train.distillation.attention_mimicry import attention_entropy, distill, distillation_loss, monotonicity
from tests.systems.ops.recall import Model, Recall, accuracy, train

FORMS = ("softmax", "two_softmax", "exp", "exp_shifted")


@final
class Learned(Linear):
    """The baseline: `act(W x + b)` per head, for q and for k (`elu + 1`, or the ReLU of T2R)."""

    eps = 1e-6

    def __init__(self, heads: int, dim: int, act: str) -> None:
        super().__init__()
        self.act = {"elu": lambda x: F.elu(x) + 1, "relu": F.relu}[act]
        self.maps = nn.Parameter(torch.eye(dim).repeat(2, heads, 1, 1))
        self.biases = nn.Parameter(torch.zeros(2, heads, 1, dim))

    def query_features(self, q: Tensor, scale: float) -> Tensor:
        return self.act(q @ self.maps[0].to(q.dtype).mT + self.biases[0].to(q.dtype))

    def key_features(self, k: Tensor, scale: float) -> Tensor:
        return self.act(k @ self.maps[1].to(k.dtype).mT + self.biases[1].to(k.dtype))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("causal", [True, False])
def test_weights_are_a_distribution_and_the_forms_agree(form, causal):
    op, (q, k, v) = Hedgehog(2, 16, form), (draw(2, 2, 128, 16, seed=s) for s in range(3))
    weights = op.weights(q, k, causal=causal)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 128))
    found = [op(q, k, v, causal=causal, engine=engine) for engine in op.capabilities.engines]
    assert max((x - found[0]).abs().max() for x in found[1:]) < 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_constant_features_give_the_running_mean(form):
    op, v = Hedgehog(2, 16, form), draw(1, 2, 50, 16)
    for each in (op.query_map, op.key_map):
        nn.init.zeros_(each.weight)
    out = op(draw(1, 2, 50, 16, seed=1), draw(1, 2, 50, 16, seed=2), v, causal=True)
    assert (out - v.cumsum(2) / torch.arange(1, 51)[:, None]).abs().max() < 1e-6


def test_features_by_hand():
    x, w = draw(1, 2, 5, 3, dtype=torch.float64), draw(2, 3, 3, seed=1, dtype=torch.float64)
    b = draw(2, 1, 3, seed=2, dtype=torch.float64)
    y = 1.5 * (torch.einsum("hij,bhnj->bhni", w, x) + b)
    whole = torch.cat([y, -y], -1)
    expected = {
        "exp": whole.exp(),
        "softmax": whole.softmax(-1),
        "two_softmax": torch.cat([y.softmax(-1), (-y).softmax(-1)], -1),
        "exp_shifted": torch.cat([(y - y.max(-1, True)[0]).exp(), (-y - (-y).max(-1, True)[0]).exp()], -1),
    }
    for form, features in expected.items():
        op = Hedgehog(2, 3, form, gain=1.5).double()
        op.key_map.weight.data, op.key_map.bias.data = w, b
        torch.testing.assert_close(op.key_features(x, 1.0), features)
        torch.testing.assert_close(op.key_features(x / 2, 4.0), features)  # the root of the scale goes to each side


def test_the_port_with_one_map_for_all_heads_and_gain_2():
    op, q, k = Hedgehog(4, 8, gain=2.0, shared=True), draw(1, 4, 9, 8), draw(1, 4, 9, 8, seed=1)
    layers = [nn.Linear(8, 8), nn.Linear(8, 8)]
    for each, layer in zip((op.query_map, op.key_map), layers, strict=True):
        each.weight.data, each.bias.data = layer.weight[None], layer.bias[None, None]
    fq, fk = (torch.cat([2 * f(x), -2 * f(x)], -1).softmax(-1) for f, x in zip(layers, (q, k), strict=True))
    weights = fq @ fk.mT
    torch.testing.assert_close(op.weights(q, k), weights / weights.sum(-1, keepdim=True))


@pytest.mark.parametrize(("bias", "numbers"), [("none", 0), ("scalar", 2), ("vector", 16)])
def test_options_shape_the_maps(bias, numbers):
    op = Hedgehog(2, 8, bias=bias)
    assert sum(p.numel() for p in op.query_map.parameters()) == 2 * 64 + numbers
    assert Hedgehog(2, 8, bias=bias, shared=True).query_map.weight.shape == (1, 8, 8)
    q = draw(1, 2, 5, 8)
    assert foveate.attend(q, q, q, "hedgehog", heads=2, head_dim=8, bias=bias).shape == q.shape


@pytest.mark.parametrize("feature_dim", [3, 8, 12])
@pytest.mark.parametrize("bias", ["none", "scalar", "vector"])
def test_a_width_of_the_features_apart_from_the_head_s(feature_dim, bias):
    op = Hedgehog(2, 8, "exp", bias=bias, feature_dim=feature_dim)
    assert op.query_map.weight.shape == op.key_map.weight.shape == (2, feature_dim, 8)
    assert op.init_state(1, 2, 2, 8, 5).sums.shape == (1, 2, 2 * feature_dim, 6)
    x = draw(1, 2, 9, 8)
    y = F.pad(x, (0, 4))[..., :feature_dim]  # at first the first channels, and zeros beyond them
    torch.testing.assert_close(op.key_features(x, 1.0), torch.cat([y.exp(), (-y).exp()], -1))
    nn.init.normal_(op.key_map.weight)
    expected = torch.einsum("hij,bhnj->bhni", op.key_map.weight, x)
    torch.testing.assert_close(op.key_features(x, 1.0), torch.cat([expected.exp(), (-expected).exp()], -1))
    assert op(x, x, x, causal=True).shape == x.shape
    plan, narrow = op.plan(x, x, x).flops, Hedgehog(2, 8, feature_dim=1).plan(x, x, x).flops
    assert plan > narrow
    assert op.feature_macs(8) == 8 * feature_dim


def test_features_are_one_at_least():
    with pytest.raises(OptionError, match="feature_dim=0 must be a whole number, at least 1"):
        Hedgehog(2, 8, feature_dim=0)


def test_untrained_it_is_spikier_and_more_monotone_than_elu(claim):
    q, k = (8 * F.normalize(draw(8, 1, 64, 16, seed=s), dim=-1) for s in (0, 1))
    ours, elu = (op.weights(q, k) for op in (Hedgehog(1, 16, "exp"), Learned(1, 16, "elu")))
    claim(
        "untrained weights are spiky: their entropy in nats, for q and k of norm 8",
        ours=attention_entropy(ours).mean().item(), baseline=attention_entropy(elu).mean().item(),
        better="lower", margin=0.2, baseline_name="elu + 1", seed=0,
    )  # fmt: skip
    scores = q @ k.mT
    claim(
        "untrained weights are monotone: their rank correlation with q . k, for q and k of norm 8",
        ours=monotonicity(scores, ours).mean().item(), baseline=monotonicity(scores, elu).mean().item(),
        better="higher", margin=0.15, baseline_name="elu + 1", seed=0,
    )  # fmt: skip


def tokens(size: int, g: torch.Generator, words: Tensor) -> Tensor:
    """Make queries or keys like those of a layer: each is one of a few words, so that some match, plus noise."""
    heads, count, dim = words.shape
    which = torch.randint(count, (heads, size, 64), generator=g)
    chosen = torch.stack([words[h][which[h]] for h in range(heads)], 1)
    return 5 * chosen + 0.5 * torch.randn(size, heads, 64, dim, generator=g)


def divergence(op: Linear, q: Tensor, k: Tensor) -> float:
    """Return KL(teacher || student), the mean over rows and heads."""
    with torch.no_grad():
        teacher = Softmax().weights(q, k)
        excess = distillation_loss(op.weights(q, k), teacher) - attention_entropy(teacher).mean(0).sum()
    return excess.item() / q.shape[1]


@pytest.mark.parametrize("form", ["softmax", "exp"])
def test_distillation_follows_a_softmax_where_elu_cannot(claim, form):
    # no map of 2D features fits isotropic Gaussians (KL about 0.26, elu 0.30): real keys are words with noise
    g = torch.Generator().manual_seed(0)
    words = F.normalize(torch.randn(2, 16, 16, generator=g), dim=-1)
    batches = [(tokens(4, g, words), tokens(4, g, words)) for _ in range(16)]
    unseen = (tokens(8, g, words), tokens(8, g, words))
    after = {}
    for name, op in (("ours", Hedgehog(2, 16, form)), ("elu", Learned(2, 16, "elu")), ("T2R", Learned(2, 16, "relu"))):
        before = divergence(op, *unseen)
        losses = distill(op, batches, steps=300)
        after[name] = divergence(op, *unseen)
        assert losses[-1] < losses[0]
        if name == "ours":
            assert after[name] < 0.5 * before
    assert after["ours"] < 0.5 * after["elu"]
    for name, baseline in (("elu", "a learned elu + 1 map"), ("T2R", "a learned ReLU map (T2R)")):
        claim(
            f"the form {form} imitates softmax weights after 300 steps of distillation: KL divergence",
            ours=after["ours"], baseline=after[name], better="lower", baseline_name=baseline, seed=0,
        )  # fmt: skip


def layer_inputs(model: Model, task: Recall) -> list[list[tuple[Tensor, Tensor]]]:
    """Record each operator's q and k over a few batches."""
    g, seen = torch.Generator().manual_seed(1), [[] for _ in model.mixers]
    hooks = [
        mixer.op.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[:2]))
        for mixer, kept in zip(model.mixers, seen, strict=True)
    ]
    with torch.no_grad():
        for _ in range(16):
            model(task.batch(16, g)[0])
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.slow
def test_a_trained_softmax_model_is_converted(claim):
    task = Recall(pairs=24, length=80)
    torch.manual_seed(0)
    model = train(Model([Softmax(), Softmax()], unit=False), task, 300)
    assert accuracy(model, task) >= 0.95
    inputs, found = layer_inputs(model, task), {}
    for name, make in (("ours", lambda: Hedgehog(2, 32)), ("elu", lambda: Learned(2, 32, "elu"))):
        for mixer, batches in zip(model.mixers, inputs, strict=True):
            mixer.op = make()
            distill(mixer.op, batches, steps=300, causal=True)
        found[name] = accuracy(model, task)
    assert found["ours"] >= 0.8
    claim(
        "it can replace a trained model's softmax after 300 steps of distillation: share of values recalled, 24 keys",
        ours=found["ours"], baseline=found["elu"], better="higher", margin=0.2,
        baseline_name="a learned elu + 1 map", seed=0,
    )  # fmt: skip


def test_distillation_changes_the_maps_alone_and_repeats():
    q, k = draw(2, 2, 9, 4), draw(2, 2, 9, 4, seed=1)
    runs = []
    for _ in range(2):
        op, given = Hedgehog(2, 4), [(q.clone().requires_grad_(), k.clone())]
        with torch.no_grad():
            runs.append(distill(op, given, steps=5, causal=True))
        assert given[0][0].grad is None
        assert all(p.grad is None for p in op.parameters())
    assert runs[0] == runs[1]
    with pytest.raises(OptionError, match="op=Softmax must have parameters to train"):
        distill(Softmax(), [(q, k)], steps=1)
    with pytest.raises(OptionError, match="steps=0"):
        distill(op, [(q, k)], steps=0)
    with pytest.raises(OptionError, match="at least one pair"):
        distill(op, [], steps=1)


def test_the_loss_is_at_least_the_teachers_entropy_and_that_only_for_its_weights():
    teacher = draw(2, 3, 9, 11, dtype=torch.float64).softmax(-1)
    least = attention_entropy(teacher).mean(0).sum()
    torch.testing.assert_close(distillation_loss(teacher, teacher), least)
    for seed in range(5):
        other = (teacher.log() + 0.1 * draw(2, 3, 9, 11, seed=seed, dtype=torch.float64)).softmax(-1)
        assert distillation_loss(other, teacher) > least + 1e-4
    # rows that see nothing count neither in the loss nor in the entropy
    blank = torch.cat([teacher, torch.zeros_like(teacher[:, :, :4])], 2)
    torch.testing.assert_close(distillation_loss(blank, blank), least)
    torch.testing.assert_close(attention_entropy(blank), attention_entropy(teacher))


def test_diagnostics_on_cases_one_can_work_out():
    scores = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])
    assert attention_entropy(torch.full((1, 1, 2, 8), 1 / 8)).item() == pytest.approx(3 * 0.6931472)
    assert monotonicity(scores, scores.exp()).item() == pytest.approx(1.0)
    assert monotonicity(scores, -scores).item() == pytest.approx(-1.0)
    assert monotonicity(scores, torch.tensor([[[[0.1, 0.1, 0.2, 0.3]]]])).item() == pytest.approx(0.9486833)  # a tie
    assert monotonicity(scores, torch.ones(1, 1, 1, 4)).item() == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "relu"}, "form='relu' must be one of 'softmax', 'two_softmax', 'exp', 'exp_shifted'"),
        ({"bias": True}, "bias=True must be one of"),
        ({"gain": -1}, "gain=-1"),
        ({"heads": 0}, "heads=0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(OptionError, match=message):
        Hedgehog(**{"heads": 2, "head_dim": 4, **options})


def test_bad_calls():
    q = draw(1, 2, 5, 4)
    with pytest.raises(ShapeError, match="built for Hq=3, D=4; got Hq=2, D=4"):
        Hedgehog(3, 4)(q, q, q)
    with pytest.raises(OptionError, match="scale=-1.0 must be at least 0"):
        Hedgehog(2, 4)(q, q, q, scale=-1.0)
    with pytest.raises(ShapeError, match="built for Hq=2"):
        Hedgehog(2, 4).init_state(1, 4, 4, 4, 4)


def test_a_zero_scale_is_a_mean_and_a_negative_one_is_refused() -> None:
    q, k, v = (torch.randn(1, 2, 6, 4, generator=torch.Generator().manual_seed(s)) for s in range(3))
    op = Hedgehog(2, 4)
    torch.testing.assert_close(op(q, k, v, scale=0.0), v.mean(2, keepdim=True).expand_as(v))
    with pytest.raises(OptionError, match="scale=-1"):
        op(q, k, v, scale=-1.0)


def test_the_plan_counts_the_maps() -> None:
    """The plan counts 16 features of 8 numbers for 5 queries and 9 keys, and a state of 16 by 3 values and a sum."""
    q, k, v = torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 9, 8), torch.zeros(2, 4, 9, 3)
    flops = Hedgehog(4, 8).plan(q, k, v).flops
    assert flops == 2 * 2 * 4 * (5 + 9) * (8 * 8 + 16 * 4)
