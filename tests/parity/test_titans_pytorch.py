"""Memories that learn at test time against `NeuralMemory` of `titans-pytorch`, which differentiates a loss by autograd.

It averages the squared error over channels, where ours sums it: its step is `D` times ours. Its chunk of 1 token with a
`batch_size` of b takes gradients of b tokens at the same weights: our chunk of b. Its memory is any module and its loss
any function, so that Titans' and Miras' objectives are written down here as losses, and differentiated there. Its
longer chunks are our `reads="chunk"`, with one forgetting and momentum for all of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.nn.sequence.neural_memory import NeuralMemory
from foveate.ops.base.test_time import Memory
from foveate.ops.memory.miras import Miras
from foveate.ops.memory.titans import Titans
from tests.parity import peers
from tests.support.tensors import assert_near

peer = pytest.importorskip("titans_pytorch", reason=peers.MISSING)

D, N = 4, 10
STEP = 0.2  # the largest; with longer ones some of these memories diverge on both sides
RATES = {"alpha": "to_decay_factor", "eta": "to_momentum", "theta": "to_adaptive_step"}


class Learner(nn.Module):
    """An MLP without biases, `x + norm(mlp(x))` where `around`: the norm's gain and shift are not learned inside."""

    def __init__(self, first: nn.ParameterList, act: Callable[[Tensor], Tensor], around: bool) -> None:
        super().__init__()
        self.layers = nn.ParameterList(p.detach()[0].float() for p in first)
        self.act, self.around = act, around

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for index, matrix in enumerate(self.layers):
            y = (self.act(y) if index else y) @ matrix.mT
        return x + F.layer_norm(y, y.shape[-1:]) if self.around else y


def memory(op: Any, chunk: int | None, loss: Callable[[Tensor, Tensor], Tensor] | None, model: nn.Module) -> nn.Module:
    """Theirs without norms and with our step; projections and rates are of our choice."""
    made = peer.NeuralMemory(
        D, chunk_size=1, batch_size=chunk, model=model, mem_model_norm_add_residual=False, pre_rmsnorm=False,
        adaptive_step_transform=lambda raw: STEP * raw.sigmoid() * (D if loss is None else 1),
        qk_rmsnorm=op.unit, **({} if loss is None else {"store_memory_loss_fn": loss}),
    ).double()  # fmt: skip
    for theirs, ours in zip(made.memory_model_parameters, op.first, strict=True):  # they try it in float32
        theirs.data = ours.detach().clone()
    if op.unit:  # the length of what their norm gives is sqrt(D)
        for norm in (made.q_norm, made.k_norm):
            nn.init.constant_(norm.gamma, D**-0.5 - 1)
    return made


def agree(op: Memory, theirs: nn.Module, first: bool = True, n: int = N) -> None:
    """Outputs, and gradients for tokens, projections, rates and (where `first`) the memory's first weights."""
    own = dict(theirs.named_parameters())
    w = {name: p for name, p in peers.weights(theirs).items() if "memory_model" not in name and "_norm" not in name}
    w = {name: p for name, p in w.items() if not name.startswith("combine")}
    frozen = {name: p for name, p in own.items() if name not in w}
    start = {f"first.{i}": own[f"memory_model_parameters.{i}"] for i in range(len(op.first))} if first else {}
    x = peers.leaf(2, n, D, seed=1)

    def ours() -> Tensor:
        q, k, v = ((x @ w[f"to_{part}.weight"].mT)[:, None] for part in ("queries", "keys", "values"))
        rates = {
            name: (x @ w[f"{to}.0.weight"].mT + w[f"{to}.0.bias"]).sigmoid().transpose(1, 2)
            for name, to in RATES.items()
        }
        rates["theta"] = STEP * rates["theta"]
        given = dict(op.named_parameters()) | start
        return torch.func.functional_call(op, given, (q, k, v), {"causal": True, **rates})[:, 0]

    def other() -> Tensor:
        return peers.call(theirs, {**frozen, **w}, x)[0]

    peers.agree(ours, other, {"x": x, **w, **start}, 1e-9)


CHUNKS = [(1, 1), (3, 3), (5, 5), (N, None)]  # ours, their batch; without one, all gradients are taken at the start


@pytest.mark.parametrize("chunk, batch", CHUNKS)
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("unit", [False, True])
def test_titans(chunk: int, batch: int | None, depth: int, unit: bool) -> None:
    op = titans(depth, chunk, unit)
    agree(op, memory(op, batch, None, Learner(op.first, F.silu, False)))


def titans(depth: int, chunk: int = 1, unit: bool = True) -> Titans:
    made = Titans(1, D, depth=depth, expansion=2, chunk=chunk, unit=unit, generator=torch.Generator().manual_seed(0))
    nn.init.normal_(made.first[-1], std=0.3, generator=torch.Generator().manual_seed(1))
    return made.double()


def test_its_own_memory_with_one_layer() -> None:
    """A single matrix, stored transposed there, is the learner that both sides have ready."""
    op = titans(1)
    theirs = memory(op, 1, None, peer.MemoryMLP(D, depth=1))
    theirs.memory_model_parameters[0].data = op.first[0].detach().mT.clone()
    agree(op, theirs, first=False)


def test_the_delta_rule_has_a_step_of_two_theta_over_d() -> None:
    """The port's limit, as its loss has it: what our step of theta does, theirs does with D theta."""
    op = titans(1)
    theirs = memory(op, 1, None, Learner(op.first, F.silu, False))
    theirs.adaptive_step_transform = torch.sigmoid  # without the factor
    x = peers.leaf(2, N, D, seed=1).detach()
    q, k, v = ((x @ getattr(theirs, f"to_{part}").weight.mT)[:, None] for part in ("queries", "keys", "values"))
    rates = {name: getattr(theirs, to)[0](x).sigmoid().transpose(1, 2) for name, to in RATES.items()}
    rates["theta"] = rates["theta"] / D
    assert_near(op(q, k, v, causal=True, **rates)[:, 0], theirs(x)[0], 1e-9)


@pytest.mark.parametrize("chunk", [2, 4, 5])
@pytest.mark.parametrize("depth", [1, 2])
def test_reading_once_for_a_chunk(chunk: int, depth: int) -> None:
    """Without forgetting and momentum, which theirs have for a chunk; its last token there reads what that wrote."""
    op = titans(depth, chunk)
    op.reads = "chunk"
    theirs = peer.NeuralMemory(
        D, chunk_size=chunk, batch_size=chunk, model=Learner(op.first, F.silu, False), momentum=False,
        mem_model_norm_add_residual=False, pre_rmsnorm=False, qk_rmsnorm=False,
        adaptive_step_transform=lambda raw: STEP * D * raw.sigmoid(),
    ).double()  # fmt: skip
    op.unit = False
    for other, ours in zip(theirs.memory_model_parameters, op.first, strict=True):
        other.data = ours.detach().clone()
    nn.init.constant_(theirs.to_decay_factor[0].weight, 0.0)
    nn.init.constant_(theirs.to_decay_factor[0].bias, -1e4)
    x = peers.leaf(2, N, D, seed=1)
    q, k, v = ((x @ getattr(theirs, f"to_{part}").weight.mT)[:, None] for part in ("queries", "keys", "values"))
    theta = STEP * theirs.to_adaptive_step[0](x).sigmoid().transpose(1, 2)
    still = torch.zeros_like(theta)
    ours = op(q, k, v, causal=True, theta=theta, alpha=still, eta=still)[:, 0]
    inside = torch.arange(N) % chunk < chunk - 1
    peers.agree(lambda: ours[:, inside], lambda: theirs(x)[0][:, inside], [x], 1e-9)


LOSSES: dict[str, tuple[dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "l2": ({"bias": "l2"}, lambda y, v: 0.5 * (y - v).square().sum(-1)),
    "dot": ({"bias": "dot"}, lambda y, v: -(y * v).sum(-1)),
    "lp": ({"bias": "lp", "p": 3.0, "smooth": 1e-24}, lambda y, v: (y - v).abs().pow(3).sum(-1)),
    "huber_channel": (
        {"bias": "huber_channel", "delta": 0.5}, lambda y, v: F.huber_loss(y, v, reduction="none", delta=0.5).sum(-1)
    ),
    "huber_norm": (
        {"bias": "huber_norm", "delta": 0.8, "smooth": 1e-24},
        lambda y, v: F.huber_loss((y - v).norm(dim=-1), 0 * y[..., 0], reduction="none", delta=0.8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk, batch", [(1, 1), (3, 3)])
@pytest.mark.parametrize("architecture", ["plain_mlp", "mlp"])
def test_miras_objectives(name: str, chunk: int, batch: int, architecture: Any) -> None:
    options, loss = LOSSES[name]
    op = Miras(
        **options, retention="l2", memory=architecture, heads=1, head_dim=D, chunk=chunk,
        generator=torch.Generator().manual_seed(0),
    ).double()  # fmt: skip
    nn.init.normal_(op.first[-1], std=0.3, generator=torch.Generator().manual_seed(1))
    mlp = architecture == "mlp"
    agree(op, memory(op, batch, loss, Learner(op.first, F.gelu if mlp else F.silu, mlp)))


@pytest.mark.parametrize("chunk", [1, 5])
def test_a_stream_goes_on_as_theirs_does(chunk: int) -> None:
    op = titans(2, chunk)
    theirs = memory(op, chunk, None, Learner(op.first, F.silu, False))
    theirs.adaptive_step_transform = lambda raw: D * raw.sigmoid()
    layer = NeuralMemory(D, depth=2, expansion=2, chunk=chunk, conv=0).double()
    layer.op.first = op.first
    for ours, other in (("q", "queries"), ("k", "keys"), ("v", "values")):
        getattr(layer, ours).load_state_dict(getattr(theirs, f"to_{other}").state_dict())
        theirs.get_submodule(f"to_{other}").register_forward_hook(lambda _, args, y: F.silu(y))
    for ours, other in RATES.items():
        layer.rates[ours].load_state_dict(getattr(theirs, other)[0].state_dict())
    x, answers = peers.leaf(2, N, D, seed=1).detach(), []
    layer.norm.register_forward_pre_hook(lambda _, args: answers.append(args[0][:, 0]))
    state = layer.init_state(2, dtype=torch.float64)
    for t in range(N):
        _, state = layer.step(x[:, t : t + 1], state)
    expected, after = theirs(x[:, :chunk])
    rest = []
    for t in range(chunk, N):
        y, after = theirs(x[:, t : t + 1], state=after)
        rest.append(y)
    assert_near(torch.cat(answers, 1), torch.cat([expected, *rest], 1), 1e-9)
