"""The contract that every feature gate has to keep."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foveate.core.errors import OptionError, ShapeError
from foveate.nn import cost, insert
from tests.contracts.gates import BATCH, CHANNELS, GATES, KEYS, a_map, example, gate_type, gates
from tests.support.tensors import assert_near

Size = tuple[int, ...]
LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def test_the_contract_sees_the_gates() -> None:
    assert {"ulsam", "residual_attention", "gaam-GaussianGate"} <= set(GATES)


# -- maps in, maps out -------------------------------------------------------------------------------------------------


@gates(by_size=True)
def test_the_shape_stays(key: str, size: Size) -> None:
    gate, x = example(key, len(size)), a_map(size)
    before = x.clone()
    for mode in (True, False):
        out = gate.train(mode)(x)
        assert out.shape == x.shape
        assert out.isfinite().all()
    assert torch.equal(x, before), "the input is not written to"


@gates()
def test_the_gate_has_an_effect_that_depends_on_the_map(key: str, size: Size) -> None:
    gate, x = example(key, len(size)), a_map(size)
    out = gate(x)
    assert (out - x).abs().max() > 1e-3
    assert (gate(2 * x) - 2 * out).abs().max() > 1e-3, "a factor for each channel would be no attention"


@gates()
def test_channels_last(key: str, size: Size) -> None:
    gate, x = example(key, len(size)), a_map(size)
    expected = gate(x)
    assert expected.is_contiguous()
    if len(size) in LAST:
        out = gate(x.contiguous(memory_format=LAST[len(size)]))
        assert out.is_contiguous(memory_format=LAST[len(size)])
        assert_near(out, expected, 1e-12)
    assert_near(gate(x.transpose(1, 2).contiguous().transpose(1, 2)), expected, 1e-12)


@gates()
def test_examples_of_a_batch_are_independent(key: str, size: Size) -> None:
    gate, x = example(key, len(size)), a_map(size)
    together = gate(x)
    for i in range(BATCH):
        assert_near(gate(x[i : i + 1]), together[i : i + 1], 1e-12)


# -- gradients, numbers, copies ----------------------------------------------------------------------------------------


@gates()
def test_gradients(key: str, size: Size) -> None:
    """Each parameter and the input have the gradient of finite differences along a random direction."""
    gate, x = example(key, len(size)), a_map(size).requires_grad_()
    random, step = torch.Generator().manual_seed(5), 1e-7
    toward = torch.randn(x.shape, generator=random, dtype=torch.float64)
    names, wanted = zip(("x", x), *gate.named_parameters(), strict=True)
    grads = torch.autograd.grad((gate(x) * toward).sum(), wanted)
    for name, leaf, grad in zip(names, wanted, grads, strict=True):
        assert grad.isfinite().all(), name
        way, ends = torch.randn(leaf.shape, generator=random, dtype=torch.float64), []
        for sign in (1, -1):
            with torch.no_grad():
                leaf += sign * step * way
                ends.append((gate(x) * toward).sum())
                leaf -= sign * step * way
        expected = (grad * way).sum()
        assert_near((ends[0] - ends[1]) / (2 * step), expected, 1e-4 * (1 + expected.abs().item()), name)


@gates()
def test_training_reaches_every_parameter(key: str, size: Size) -> None:
    gate = example(key, len(size)).float().train()
    x = a_map(size).float().requires_grad_()
    (gate(x) * a_map(size, seed=1).float()).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    for name, parameter in gate.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@gates()
def test_other_dtypes(key: str, size: Size) -> None:
    gate, x = example(key, len(size)), a_map(size)
    for dtype, error in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        narrow = copy.deepcopy(gate).to(dtype)
        out = narrow(x.to(dtype))
        assert out.dtype == dtype
        expected = narrow.double()(x.to(dtype).double())
        assert (out.double() - expected).norm() < error * expected.norm()


@gates()
def test_copies_and_a_loaded_state_dict_are_twins(key: str, size: Size) -> None:
    gate, x = example(key, len(size)), a_map(size)
    expected = gate(x)
    other = copy.deepcopy(gate)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    other.load_state_dict(gate.state_dict())
    for twin in (other, copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))):
        assert torch.equal(twin(x), expected)


@gates()
def test_it_is_exported_and_compiled_whole(key: str, size: Size) -> None:
    gate, x = example(key, len(size)), a_map(size)
    assert_near(torch.export.export(gate, (x,)).module()(x), gate(x), 1e-12)
    torch._dynamo.reset()
    assert_near(torch.compile(gate, fullgraph=True, backend="eager")(x), gate(x), 1e-12)


# -- refusals ----------------------------------------------------------------------------------------------------------


def refusal(gate: nn.Module, x: Any) -> str:
    with pytest.raises(ShapeError) as caught:
        gate(x)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@gates()
def test_malformed_maps_are_refused(key: str, size: Size) -> None:
    gate = example(key, len(size))
    assert "of real numbers" in refusal(gate, a_map(size).long())
    assert "of real numbers" in refusal(gate, [[1.0]])
    assert "of real numbers" in refusal(gate, a_map(()))
    assert "of real numbers" in refusal(gate, a_map((2, 2, 2, 2)))
    assert "at least one position" in refusal(gate, a_map((0,) * len(size)))
    if gate.channels is not None:
        assert f"C={CHANNELS} channels" in refusal(gate, a_map(size, channels=CHANNELS + 1))
    for dims in {1, 2, 3} - ({gate.dims} if gate.dims else gate.axes):
        assert "must be a map" in refusal(gate, a_map((2,) * dims))


@pytest.mark.parametrize("key", KEYS)
def test_malformed_sizes_are_refused(key: str) -> None:
    cls = gate_type(key)
    for channels, dims in ((0, 2), (2.5, 2), (CHANNELS, 4), (CHANNELS, "2")):
        with pytest.raises(OptionError) as caught:
            cls.for_map(channels, dims)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


# -- in a network ------------------------------------------------------------------------------------------------------


@gates()
def test_the_cost_is_reported(key: str, size: Size) -> None:
    gate, x = example(key, len(size)), a_map(size)
    one, two = cost(gate, x[:1]), cost(gate, torch.empty(2, *x.shape[1:], device="meta", dtype=x.dtype))
    assert one.parameters == sum(p.numel() for p in gate.parameters())
    assert two.macs == 2 * one.macs >= 0


class Net(nn.Module):
    """A small convolutional network for maps of any number of axes."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
        self.stem = nn.Sequential(conv(3, CHANNELS, 3, padding=1), norm(CHANNELS), nn.ReLU())
        self.body = nn.Sequential(conv(CHANNELS, 2 * CHANNELS, 1), norm(2 * CHANNELS))
        self.head = nn.Linear(2 * CHANNELS, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).flatten(2).mean(-1))


@gates()
def test_it_goes_into_a_network_and_out_again(key: str, size: Size) -> None:
    torch.manual_seed(0)
    net, x = Net(len(size)).double().eval(), a_map(size, channels=3)
    before, state, names = net(x), copy.deepcopy(net.state_dict()), dict(net.named_modules())
    inserted = insert(net, lambda channels, dims: example(key, dims, channels), ["stem", "body.1"], x)
    assert {gate.channels for gate in inserted.gates.values()} == {CHANNELS, 2 * CHANNELS}
    assert (net(x) - before).abs().max() > 1e-6
    trained = {name: p for gate in inserted.gates.values() for name, p in gate.named_parameters()}
    optimiser, start = torch.optim.SGD(net.parameters(), 0.01), copy.deepcopy(trained)
    nn.functional.cross_entropy(net.train()(x), torch.arange(BATCH)).backward()
    optimiser.step()
    assert any(not torch.equal(p, start[name]) for name, p in trained.items())
    net.load_state_dict(state, strict=False)
    inserted.remove()
    assert dict(net.named_modules()) == names
    assert torch.equal(net.eval()(x), before)
    assert list(net.state_dict()) == list(state)
