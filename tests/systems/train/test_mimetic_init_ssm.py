"""Mimetic initialisation of state spaces: the weights it sets, the resulting linear attention, and copying."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from foveate.core.errors import OptionError
from foveate.nn import MultiHeadAttention
from foveate.tasks.training.copying import Copying
from foveate.train.init.mimetic_init_ssm import mimetic_init_linear_attention, mimetic_init_ssm, state_spaces
from foveate.train.loop.loop import Schedule, evaluate, fit
from tests.conftest import ClaimFixture
from tests.support.tensors import assert_near

DIM, STATE = 32, 16


def mamba(vocabulary: int = 20, layers: int = 1) -> MambaForCausalLM:
    torch.manual_seed(0)
    return MambaForCausalLM(
        MambaConfig(vocab_size=vocabulary, hidden_size=DIM, state_size=STATE, num_hidden_layers=layers)
    )


def mamba2(vocabulary: int = 20, layers: int = 1, dim: int = DIM, state: int = STATE, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=vocabulary, hidden_size=dim, state_size=state, num_hidden_layers=layers, head_dim=dim // 2,
            num_heads=4, expand=2, n_groups=1, chunk_size=32,
        )
    )  # fmt: skip


MODELS = pytest.mark.parametrize("make", [mamba, mamba2])


@MODELS
def test_decay_steps_and_projections_are_set(make) -> None:
    model = make()
    before = copy.deepcopy(model)
    assert mimetic_init_ssm(model) == 1
    layer, old = next(state_spaces(model)), next(state_spaces(before))
    assert (torch.exp(-torch.exp(layer.decay)) - 1).abs().max() < 1e-3
    x = torch.randn(5, layer.step.shape[1])
    steps = F.softplus(x @ layer.step.mT + layer.step_bias)
    assert_near(steps, torch.ones_like(steps), 1e-6)
    assert torch.equal(layer.read, layer.write)
    assert layer.read.data_ptr() != layer.write.data_ptr()
    assert_near(layer.write / layer.write.norm(), old.write / old.write.norm(), 1e-6)
    assert abs((layer.write.mT @ layer.write).diagonal().mean() - 1) < 1e-5
    signal = torch.randn(2, layer.conv.in_channels, 7)
    assert_near(layer.conv(signal)[..., :7], signal, 1e-6)
    assert torch.equal(layer.value, old.value)


@MODELS
def test_one_training_step_separates_equal_weights(make) -> None:
    model = make()
    mimetic_init_ssm(model)
    ids = torch.randint(20, (2, 12), generator=torch.Generator().manual_seed(0))
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    model(ids, labels=ids, use_cache=False).loss.backward()
    optimiser.step()
    layer = next(state_spaces(model))
    assert not torch.equal(layer.read, layer.write)


@MODELS
def test_each_part_is_optional(make) -> None:
    model = make()
    old = next(state_spaces(copy.deepcopy(model)))
    mimetic_init_ssm(model, a_log=-3.0, delta=0.5, tie_bc=False, identity_conv=False, identity_value=True)
    layer = next(state_spaces(model))
    assert (layer.decay == -3.0).all()
    assert_near(F.softplus(layer.step_bias), torch.full_like(layer.step_bias, 0.5), 1e-6)
    assert torch.equal(layer.read, old.read)
    assert torch.equal(layer.write, old.write)
    assert torch.equal(layer.conv.weight, old.conv.weight)
    assert_near(layer.out @ layer.value, torch.eye(DIM), 1e-5)


def scores(model: nn.Module, ids: Tensor) -> Tensor:
    """Return `C_t . B_s` of the first layer, `(N, N)`, after the convolution and its SiLU."""
    mixer = model.backbone.layers[0].mixer
    x = model.backbone.layers[0].norm(model.backbone.embeddings(ids))
    inner, width = mixer.intermediate_size, mixer.ssm_state_size
    mixed = mixer.in_proj(x)[..., inner : 2 * inner + 2 * width]
    mixed = F.silu(mixer.conv1d(mixed.mT)[..., : ids.shape[1]].mT)[0]
    return mixed[:, -width:] @ mixed[:, -2 * width : -width].mT


@torch.no_grad()
def test_tokens_match_their_repeats(claim: ClaimFixture) -> None:
    """In a string that occurs twice, `C . B` of a token and its repeat is larger than with other tokens."""

    def ratio(model: nn.Module) -> float:
        string = torch.randperm(100, generator=torch.Generator().manual_seed(1))[:30]
        found = scores(model, torch.cat([string, string])[None])
        same = torch.zeros(60, 60, dtype=torch.bool)
        same[30:, :30] = torch.eye(30, dtype=torch.bool)
        others = torch.zeros_like(same)
        others[30:, :30] = ~torch.eye(30, dtype=torch.bool)
        return (found[same].mean() / found[others].abs().mean()).item()

    plain, ours = (mamba2(100, dim=64, state=32) for _ in range(2))
    mimetic_init_ssm(ours)
    claim(
        "score of a token with its repeat over that with other tokens, before training",
        ours=ratio(ours), baseline=3 * abs(ratio(plain)), better="higher",
        baseline_name="three times Mamba-2's default", seed=0,
    )  # fmt: skip


@torch.no_grad()
def test_the_layer_is_linear_attention() -> None:
    """The layer computes `y_t = sum_s (C_t . B_s) x_s + D x_t`, with B, C and x from the projection and its SiLU alone.

    It does so up to the remaining decay: the factor per step is exp(-exp(-8)), 0.979 after 64 tokens.
    """
    model = mamba2()
    mimetic_init_ssm(model)
    mixer = model.backbone.layers[0].mixer
    seen = {}
    mixer.norm.register_forward_hook(lambda module, given, out: seen.update(y=given[0]))
    ids = torch.randint(20, (1, 64), generator=torch.Generator().manual_seed(0))
    model(ids, use_cache=False)
    x = model.backbone.layers[0].norm(model.backbone.embeddings(ids))
    inner, width = mixer.intermediate_size, mixer.ssm_state_size
    mixed = F.silu(mixer.in_proj(x)[0, :, inner : 2 * inner + 2 * width])
    values, write, read = mixed.split([inner, width, width], -1)
    age = torch.arange(64)[:, None] - torch.arange(64)
    skip, got = mixer.D.repeat_interleave(mixer.head_dim) * values, seen["y"].reshape(64, inner)
    decayed = torch.exp(-math.exp(-8) * age).tril() * (read @ write.mT)
    assert (got - decayed @ values - skip).norm() < 1e-5 * got.norm()
    assert (got - (read @ write.mT).tril() @ values - skip).norm() < 64 * math.exp(-8) * got.norm()


def test_linear_attention_is_initialised_alike() -> None:
    layer = MultiHeadAttention(16, 4, kv_heads=2, op="titans", conv=3)
    assert mimetic_init_linear_attention(layer) == 1
    keys = layer.k.weight.unflatten(0, (2, 4))
    assert torch.equal(layer.q.weight.unflatten(0, (4, 4)), keys[[0, 0, 1, 1]])
    x = torch.randn(2, 5, layer.conv.conv.in_channels)
    assert_near(layer.conv(x), x, 1e-6)
    forgetting = torch.sigmoid(layer.rates["alpha"](torch.randn(3, 16)))
    assert_near(forgetting, torch.full_like(forgetting, 1 / (1 + math.exp(8))), 1e-7)
    assert layer.rates["theta"].weight.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mimetic_init_ssm(nn.Linear(2, 2)), "module=Linear must hold a Mamba layer"),
        (lambda: mimetic_init_ssm(mamba2(), delta=0.0), "delta=0.0 must be in"),
        (lambda: mimetic_init_ssm(mamba2(), a_log=float("nan")), "a_log=nan must be in"),
        (
            lambda: mimetic_init_linear_attention(MultiHeadAttention(4, 2)),
            "must hold linear MultiHeadAttention",
        ),
    ],
)
def test_bad_arguments_are_refused(call, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        call()


class Logits(nn.Module):
    """A transformers model with the training loop's interface."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits


@pytest.mark.slow
def test_copying_is_learnt_faster(claim: ClaimFixture) -> None:
    """Two layers copy 16 letters better if the second is initialised and the first keeps its convolution."""
    task = Copying(vocabulary=17, length=32)

    def accuracy(mimetic: bool, seed: int) -> float:
        net = Logits(mamba2(20, layers=2, dim=64, state=32, seed=seed))
        if mimetic:
            mimetic_init_ssm(net.model.backbone.layers[1])
        fit(net, task, Schedule(steps=400, batch=32, rate=3e-3, seed=seed), evaluations=1)
        return evaluate(net, task, 512)

    ours, plain = (sum(accuracy(mimetic, seed) for seed in (0, 1)) / 2 for mimetic in (True, False))
    claim(
        "copying 16 letters after 400 steps, Mamba-2 of two layers, two seeds",
        ours=ours, baseline=plain, better="higher", margin=0.15, baseline_name="Mamba-2's default initialisation",
        seed=0,
    )  # fmt: skip
