"""Pointer Networks: outputs are positions in inputs of any length."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.errors import OptionError, ShapeError
from foveate.nn.seq2seq.pointer_network import PointerNetwork, pointer_loss, pointer_scores
from foveate.tasks.training.planar import planar_batch
from tests.support.tensors import assert_near, gradients


def built(seed: int = 0, sharp: float = 1.0, **options) -> PointerNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = PointerNetwork(**{"in_dim": 2, "hidden": 6, **options}).double()
        for parameter in net.parameters():
            parameter.data.normal_(std=sharp)
    return net


def points(count: int = 3, n: int = 5, seed: int = 0, width: int = 2) -> Tensor:
    return torch.rand(count, n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- scores ------------------------------------------------------------------------------------------------------------


def test_scores_are_additive_attention() -> None:
    random = torch.Generator().manual_seed(0)
    e, d, w1, w2, v = (
        torch.randn(*shape, generator=random, dtype=torch.float64)
        for shape in ((2, 5, 3), (2, 4, 3), (6, 3), (6, 3), (6,))
    )
    mask = torch.ones(2, 4, 5, dtype=torch.bool)
    mask[0, 1, 2:], mask[1, 3] = False, False
    ours, masked = pointer_scores(e, d, w1, w2, v), pointer_scores(e, d, w1, w2, v, mask)
    for b, i in itertools.product(range(2), range(4)):
        u = torch.stack([(v * torch.tanh(w1 @ e[b, j] + w2 @ d[b, i])).sum() for j in range(5)])
        assert_near(ours[b, i], (u.exp() / u.exp().sum()).log(), 1e-12)
        seen = u[mask[b, i]]
        assert_near(masked[b, i][mask[b, i]].exp(), seen.exp() / seen.exp().sum(), 1e-12)
        assert (masked[b, i][~mask[b, i]] == -math.inf).all()


def by_hand(net: PointerNetwork, inputs: Tensor, targets: list[int] | None, steps: int, visit_once: bool = False):
    """Compute log-probabilities and choices of one sequence `(N, C)`, output by output."""
    e, (h, c) = net.encoder(inputs)
    slots = list(e) if net.stop is None else [*e, net.stop]
    state, given, scores, taken = (h[0], c[0]), net.start, [], []
    for step in range(steps):
        state = net.decoder(given, state)
        u = torch.stack([(net.v * torch.tanh(net.w1 @ slot + net.w2 @ state[0])).sum() for slot in slots])
        if visit_once:
            used = targets[:step] if targets is not None else taken
            u = torch.stack([u[j] - (math.inf if j in used and j < len(inputs) else 0) for j in range(len(slots))])
        if targets is None and taken and taken[-1] == len(inputs):
            u = torch.stack([u[j] - (math.inf if j < len(inputs) else 0) for j in range(len(slots))])
        scores.append(torch.log_softmax(u, 0))
        taken.append(scores[-1].argmax().item())
        chosen = taken[-1] if targets is None else targets[step]
        given = inputs[chosen] if 0 <= chosen < len(inputs) else net.start
    return torch.stack(scores), taken


@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("visit_once", [False, True])
def test_following_targets(stop: bool, visit_once: bool) -> None:
    net, inputs = built(stop=stop), points()
    lengths, targets = torch.tensor([5, 3, 4]), torch.tensor([[1, 0, 4], [2, 1, 0], [3, 0, 1]])
    if stop:
        targets[1] = torch.tensor([2, 5, -1])
    garbage = inputs.clone()
    garbage[1, 3:], garbage[2, 4:] = float("nan"), 1e9
    found = []
    for given in (inputs, garbage):
        log_probs = net.point(given, targets, lengths=lengths, mask_visited=visit_once).log_probs
        found.append((log_probs, *gradients(log_probs.exp(), list(net.parameters()))))
    for one, other in zip(*found, strict=True):
        assert_near(one.nan_to_num(neginf=-99.0), other.nan_to_num(neginf=-99.0), 1e-12)
    ours = found[0][0].exp()
    assert_near(ours.sum(-1), torch.ones(3, 3, dtype=torch.float64), 1e-12)
    for b, n in enumerate(lengths.tolist()):
        follow = [n if t == 5 else t for t in targets[b].tolist()]
        expected, _ = by_hand(net, inputs[b, :n], follow, 3, visit_once)
        assert not ours[b, :, n:5].any(), "padding gets exactly 0"
        real = [*range(n), 5] if stop else [*range(n)]
        assert_near(ours[b][:, real], expected.exp().detach(), 1e-10)


@pytest.mark.parametrize("visit_once", [False, True])
def test_greedy_with_a_stop(visit_once: bool) -> None:
    stopped = 0
    for seed in range(12):
        net, inputs = built(seed, 2.0), points(4, 5, seed)
        ours = net.point(inputs, mask_visited=visit_once)
        assert ours.log_probs.shape == (4, 6, 6)
        assert ours.indices.shape == (4, 6)
        for b in range(4):
            expected, taken = by_hand(net, inputs[b], None, 6, visit_once)
            assert ours.indices[b].tolist() == taken
            assert_near(ours.log_probs[b].exp(), expected.exp().detach(), 1e-10)
            if 5 in taken:
                first = taken.index(5)
                stopped += first < 5
                assert taken[first:] == [5] * (6 - first)
    assert stopped > 3


def test_it_runs_on_more_inputs_than_before() -> None:
    net = built()
    for n in (1, 2, 9):
        assert net.point(points(n=n)).log_probs.shape == (3, n + 1, n + 1)
        assert net.point(points(n=n), steps=4).indices.shape == (3, 4)
    assert built(stop=False).point(points(n=4)).indices.shape == (3, 4)


# -- permutations and beams --------------------------------------------------------------------------------------------


def test_masking_visited_inputs_gives_permutations() -> None:
    net, inputs = built(stop=False), points(200, 6)
    masked, free = (net.point(inputs, mask_visited=visited).indices.sort(-1).values for visited in (True, False))
    assert torch.equal(masked, torch.arange(6).expand(200, -1))
    assert not torch.equal(free, masked)
    beamed, _ = net.beam(inputs[:20], 3, mask_visited=True)
    assert torch.equal(beamed.sort(-1).values, torch.arange(6).expand(20, -1))
    lengths = torch.tensor([6, 2, 4])
    for indices in (
        net.point(inputs[:3], lengths=lengths, mask_visited=True).indices,
        net.beam(inputs[:3], 3, lengths=lengths, mask_visited=True)[0],
    ):
        for row, n in zip(indices.tolist(), lengths.tolist(), strict=True):
            assert sorted(row[:n]) == [*range(n)]
            assert row[n:] == [-1] * (6 - n), "nothing is left"


@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("visit_once", [False, True])
def test_a_beam_of_one_is_greedy(stop: bool, visit_once: bool) -> None:
    for seed in range(5):
        net, inputs = built(seed, stop=stop), points(6, 4, seed)
        greedy = net.point(inputs, mask_visited=visit_once)
        indices, total = net.beam(inputs, 1, mask_visited=visit_once)
        assert torch.equal(indices, greedy.indices)
        taken = greedy.log_probs.gather(-1, greedy.indices[..., None]).sum((1, 2))
        assert_near(total, taken.detach(), 1e-10)


def orders(n: int, steps: int, stop: bool) -> list[tuple[int, ...]]:
    """Return all outputs of so many steps; only stops follow a stop (slot 3)."""
    every = itertools.product([*range(n), 3] if stop else range(n), repeat=steps)
    return [order for order in every if 3 not in order or set(order[order.index(3) :]) == {3}]


@pytest.mark.parametrize("stop", [True, False])
def test_a_wide_beam_finds_the_best_of_all(stop: bool) -> None:
    """A beam as wide as there are outputs is exhaustive search."""
    better = 0
    for seed in range(12):
        net, inputs, lengths = built(seed, 1.5, stop=stop), points(2, 3, seed), torch.tensor([3, 2])
        indices, total = net.beam(inputs, 100, lengths=lengths, steps=4)
        better += int((total > net.beam(inputs, 1, lengths=lengths, steps=4)[1] + 1e-9).sum())
        for b, n in enumerate(lengths.tolist()):
            every = torch.tensor(orders(n, 4, stop))
            follow = every.masked_fill((every == 3).cumsum(-1) > 1, -1)
            beside = inputs[b : b + 1].expand(len(every), -1, -1)
            found = net.point(beside, follow, lengths=torch.full((len(every),), n)).log_probs
            each = found.gather(-1, follow.clamp(min=0)[..., None])[..., 0].masked_fill(follow < 0, 0.0)
            best = each.sum(-1).max(0)
            assert abs(total[b].item() - best.values.item()) < 1e-10
            assert indices[b].tolist() == every[best.indices].tolist()
    assert better > 0


# -- loss, parameters, refusals ----------------------------------------------------------------------------------------


def test_the_loss() -> None:
    net, inputs, targets = built(), points(), torch.tensor([[1, 5, -1], [0, 2, 5], [3, 1, 2]])
    found = net.point(inputs, targets)
    expected = [-found.log_probs[b, i, targets[b, i]] for b in range(3) for i in range(3) if targets[b, i] >= 0]
    assert abs(pointer_loss(found, targets) - sum(expected) / 8) < 1e-12
    assert all(grad.isfinite().all() for grad in gradients(pointer_loss(found, targets), list(net.parameters())))


def test_rows_with_nothing_left_have_no_gradient() -> None:
    net, inputs, targets = built(stop=False), points(2, 4), torch.tensor([[1, 3, 0, 2], [1, 0, -1, -1]])
    lengths = torch.tensor([4, 2])
    loss = pointer_loss(net.point(inputs, targets, lengths=lengths, mask_visited=True), targets)
    alone = [(inputs[i : i + 1, :n], targets[i : i + 1, :n]) for i, n in enumerate((4, 2))]
    apart = [pointer_loss(net.point(one, target, mask_visited=True), target) for one, target in alone]
    expected = gradients((4 * apart[0] + 2 * apart[1]) / 6, list(net.parameters()))
    for one, other in zip(gradients(loss, list(net.parameters())), expected, strict=True):
        assert_near(one, other, 1e-10)


def test_weights_start_as_in_the_paper() -> None:
    net = PointerNetwork(2, 64)
    values = torch.cat([parameter.flatten() for parameter in net.parameters()])
    assert values.abs().max() <= 0.08
    assert abs(values.std() - 0.16 / math.sqrt(12)) < 1e-3
    assert PointerNetwork().hidden == 256
    assert PointerNetwork().encoder.input_size == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [({"in_dim": 0}, "in_dim=0"), ({"hidden": 0}, "hidden=0"), ({"stop": "yes"}, "stop='yes' must be True or False")],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        PointerNetwork(**options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"inputs": points(width=3)}, r"inputs must be \(B, N, C=2\)"),
        ({"inputs": points()[0]}, r"inputs must be \(B, N, C=2\)"),
        ({"inputs": points(n=0)}, "with N > 0"),
        ({"lengths": torch.tensor([1, 2])}, r"lengths must be \(B=3,\), each in 1..5; got \[1, 2\]"),
        ({"lengths": torch.tensor([1, 2, 0])}, "each in 1..5"),
        ({"lengths": torch.tensor([1, 2, 6])}, "each in 1..5"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 2, "targets": torch.zeros(3, 2, dtype=torch.long)}, "steps=2 must be None with targets"),
        ({"targets": torch.zeros(2, 2, dtype=torch.long)}, r"targets must be \(B=3, S\)"),
        ({"targets": torch.zeros(3, 0, dtype=torch.long)}, "with S > 0"),
        ({"targets": torch.zeros(3, dtype=torch.long)}, r"targets must be \(B=3, S\)"),
        ({"targets": torch.full((3, 2), 6)}, "slots in 0..5, or -1"),
        ({"targets": torch.full((3, 2), -2)}, "slots in 0..5, or -1"),
    ],
)
def test_bad_calls(call: dict, message: str) -> None:
    with pytest.raises((ShapeError, OptionError), match=message):
        built().point(**{"inputs": points(), **call})


def test_bad_calls_elsewhere() -> None:
    with pytest.raises(ShapeError, match="slots in 0..4, or -1"):
        built(stop=False).point(points(), torch.full((3, 2), 5))
    with pytest.raises(OptionError, match="width=0"):
        built().beam(points(), 0)
    with pytest.raises(ShapeError, match="inputs must be"):
        built().beam(points(width=3), 2)
    with pytest.raises(OptionError, match="steps=0"):
        built().beam(points(), 2, steps=0)


# -- sorting, beside a sequence-to-sequence model with a fixed dictionary ----------------------------------------------


class FixedDictionary(nn.Module):
    """The paper's second baseline: the same LSTMs with attention to the input, and a softmax over `words` positions."""

    def __init__(self, hidden: int, words: int) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.LSTM(1, hidden, batch_first=True), nn.LSTMCell(1, hidden)
        self.w1, self.w2 = (nn.Linear(hidden, hidden, bias=False) for _ in range(2))
        self.v = nn.Parameter(0.1 * torch.randn(hidden))
        self.start, self.out = nn.Parameter(torch.zeros(1)), nn.Linear(2 * hidden, words)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        e, (h, c) = self.encoder(inputs)
        state, given, found = (h[0], c[0]), self.start.expand(len(inputs), 1), []
        for step in range(targets.shape[1]):
            state = self.decoder(given, state)
            weights = pointer_scores(e, state[0][:, None], self.w1.weight, self.w2.weight, self.v).exp()
            read = torch.cat([state[0], (weights @ e)[:, 0]], -1)
            found.append(torch.log_softmax(self.out(read), -1))
            given = inputs[torch.arange(len(inputs)), targets[:, step].clamp(max=inputs.shape[1] - 1)]
        return torch.stack(found, 1)


def trained(net: nn.Module, lengths: tuple[int, ...], steps: int, seed: int) -> nn.Module:
    random = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
    for step in range(steps):
        inputs, targets = planar_batch("sort", 128, lengths[step % len(lengths)], random)
        if isinstance(net, PointerNetwork):
            loss = pointer_loss(net.point(inputs, targets), targets)
        else:
            loss = F.nll_loss(net(inputs, targets).flatten(0, 1), targets.flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 2.0)
        optimiser.step()
    return net


@torch.no_grad()
def accuracy(net: nn.Module, n: int) -> float:
    """Return the share of right positions under teacher forcing."""
    inputs, targets = planar_batch("sort", 1000, n, torch.Generator().manual_seed(99))
    log_probs = net.point(inputs, targets).log_probs if isinstance(net, PointerNetwork) else net(inputs, targets)
    return (log_probs.argmax(-1) == targets).double().mean().item()


def a_net(kind: str, words: int, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return PointerNetwork(1, 64, stop=False) if kind == "pointer" else FixedDictionary(64, words)


@pytest.mark.slow
def test_sorting_numbers_of_more_lengths_than_were_seen(claim) -> None:
    """Pointing generalises to more inputs; a dictionary of positions has no entry for a seventh."""
    mixed, fixed = (trained(a_net(kind, 6), (3, 4, 5, 6), 300, 0) for kind in ("pointer", "fixed"))
    claim(
        "a pointer network trained to sort 3 to 6 numbers sorts 8: right positions under teacher forcing",
        ours=accuracy(mixed, 8), baseline=accuracy(fixed, 8), better="higher", margin=0.3,
        baseline_name="sequence to sequence with a dictionary of 6", seed=0,
    )  # fmt: skip
    five = trained(a_net("pointer", 5), (5,), 900, 0)
    assert accuracy(five, 5) >= 0.9
    claim(
        "training on 3 to 6 numbers generalises better than on 5 alone: right positions of 8",
        ours=accuracy(mixed, 8), baseline=accuracy(five, 8), better="higher", margin=0.2,
        baseline_name="trained on 5, for three times as long", seed=0,
    )  # fmt: skip
    assert accuracy(five, 8) > 0.16, "chance is 0.125"


@pytest.mark.slow
def test_sorting_ten_numbers(claim) -> None:
    """Both learn to sort 5 numbers; the gap grows with the number."""
    found = {kind: accuracy(trained(a_net(kind, 10), (10,), 300, 0), 10) for kind in ("pointer", "fixed")}
    claim(
        "a pointer network sorts ten numbers after 300 steps: right positions under teacher forcing",
        ours=found["pointer"], baseline=found["fixed"], better="higher", margin=0.1,
        baseline_name="sequence to sequence with attention and a dictionary of 10", seed=0,
    )  # fmt: skip


def test_it_learns_to_sort() -> None:
    net = trained(a_net("pointer", 3), (3,), 60, 0)
    assert accuracy(net, 3) > 0.75
    inputs, targets = planar_batch("sort", 300, 3, torch.Generator().manual_seed(5))
    for found in (net.point(inputs, mask_visited=True).indices, net.beam(inputs, 3, mask_visited=True)[0]):
        assert (found == targets).all(-1).double().mean() > 0.7
