"""The cost of a module: counts by hand, nothing computed, nothing changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from foveate.nn import Cost, MultiHeadAttention, cost


def test_convolutions_by_hand() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1, groups=4))
    expected = 8 * 3 * 9 * 5 * 4 + 4 * 2 * 5 * 4
    assert cost(net, torch.zeros(1, 3, 10, 7)) == Cost(8 * 27 + 8 + 16 + 8 + 4, expected)
    assert cost(net, torch.zeros(5, 3, 10, 7)).macs == 5 * expected, "the whole batch"


def test_products_by_hand() -> None:
    assert cost(nn.Linear(6, 5), torch.zeros(2, 7, 6)) == Cost(35, 2 * 7 * 6 * 5)
    assert cost(nn.Bilinear(3, 4, 5, bias=False), torch.zeros(2, 3), torch.zeros(2, 4)).parameters == 60


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_by_hand(need_weights: bool) -> None:
    """Projections, scores and sums over values, however torch computes them."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x, need_weights=need_weights)[0]

    assert cost(Layer(), torch.zeros(3, 5, 8)).macs == 3 * (4 * 5 * 8 * 8 + 2 * 5 * 5 * 8)
    ours = MultiHeadAttention(8, 2)
    assert cost(ours, torch.zeros(3, 5, 8)).macs == 3 * (4 * 5 * 8 * 8 + 2 * 5 * 5 * 8)


def test_trained_parameters_count_once() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    net[2].requires_grad_(False)
    assert cost(net, torch.zeros(2, 4)) == Cost(4 * 4 + 4 + 4, 2 * 3 * 16)


class Counts(nn.Module):
    """A module that would show that it was run."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.norm(x) @ x.mT


def test_the_module_stays_as_it_is() -> None:
    net = nn.Sequential(Counts(), nn.Dropout())
    net[0].norm.eval()
    state, buffers = copy.deepcopy(net.state_dict()), dict(net.named_buffers())
    assert cost(net, torch.full((2, 3, 4), float("nan"))).macs == 2 * 3 * 4 * 3
    assert [part.training for part in net.modules()] == [True, True, False, True]
    assert all(torch.equal(x, state[name]) for name, x in net.state_dict().items())
    assert all(x is buffers[name] for name, x in net.named_buffers())


def test_what_would_not_fit_in_memory() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(2**20, 2**20, bias=False), nn.ReLU())
    assert cost(net, torch.empty(2**20, 2**20, device="meta")) == Cost(2**40, 2**60)
    assert cost(nn.Linear(8, 8), torch.empty(2**40, 8, device="meta")).macs == 2**46


def test_a_call_that_fails_leaves_the_mode() -> None:
    net = nn.Linear(4, 4).train()
    with pytest.raises(RuntimeError):
        cost(net, torch.zeros(2, 5))
    assert net.training
