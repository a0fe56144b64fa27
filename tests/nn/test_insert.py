"""Gates behind modules of a network: where they go, what they share with the model, and that they leave no trace."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from foveate.core.errors import OptionError, UnknownKey
from foveate.nn import ULSAM, insert


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm(self.conv(x)))


class Net(nn.Module):
    """Two stages of two blocks, with one ReLU in several places."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), self.act)
        self.layer1 = nn.Sequential(Block(8), Block(8))
        self.wider = nn.Sequential(nn.Conv2d(8, 12, 1, stride=2), self.act)
        self.layer2 = nn.Sequential(Block(12), nn.Sequential(Block(12), nn.Dropout()))
        self.head = nn.Linear(12, 5)
        self.unused = nn.Conv2d(3, 3, 1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.calls += 1
        return self.head(self.layer2(self.wider(self.layer1(self.stem(scale * x)))).mean((2, 3)))


def made() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Net()
        net(images())  # running statistics that are not 0 and 1
    return net


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 11, 9, generator=torch.Generator().manual_seed(1))


def trace(net: nn.Module) -> dict[str, object]:
    """Return everything about a model that inserting could change."""
    return {
        "modules": [(name, id(module)) for name, module in net.named_modules(remove_duplicate=False)],
        "modes": [module.training for module in net.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules()],
        "attributes": [sorted(vars(module)) for module in net.modules()],
        "tensors": [(name, id(x)) for name, x in (*net.named_parameters(), *net.named_buffers())],
        "values": [x.tolist() for x in net.state_dict().values()],
        "keys": list(net.state_dict()),
    }


def test_it_leaves_no_trace() -> None:
    net, x = made(), images()
    net.layer1.eval()
    before, random = trace(net), torch.get_rng_state()
    with insert(net, "ulsam", ["layer1.*.norm", "layer2"], x, num_splits=2) as inserted:
        assert list(inserted.gates) == ["layer1.0.norm", "layer1.1.norm", "layer2"]
        assert [gate.channels for gate in inserted.gates.values()] == [8, 8, 12]
        assert [gate.training for gate in inserted.gates.values()] == [False, False, True]
        assert net.calls == 1, "the probe leaves buffers alone"
        assert len(net.layer2) == len(net.layer2[1]) == 2
        assert "layer1.0.norm.foveate_gate.depthwise.weight" in net.state_dict()
        assert "layer2.1.1.foveate_gate.pointwise.weight" in net.state_dict()
    after = trace(net)
    assert after == before
    inserted.remove()
    assert trace(net) == before
    torch.set_rng_state(random)


def test_the_gate_gates_the_output() -> None:
    net, x = made().eval(), images()
    inserted = insert(net, "ulsam", ["stem", "layer1.0"], x, num_splits=2)
    after_stem, after_block = inserted.gates.values()
    stem = nn.functional.relu(net.stem[1](net.stem[0](x)))
    middle = net.layer1[1](after_block(Block.forward(net.layer1[0], after_stem(stem))))
    expected = net.head(net.layer2(net.wider(middle)).mean((2, 3)))
    assert torch.allclose(net(x), expected, atol=1e-6)


def test_a_shared_last_module_is_left_alone() -> None:
    """`stem` and `wider` end with one ReLU: only the named one gets a gate, as a further child."""
    net, x = made().eval(), images()
    wider = net.wider(torch.ones(1, 8, 4, 4))
    inserted = insert(net, "ulsam", "stem", x, num_splits=2)
    assert list(net.stem._modules) == ["0", "1", "2", "foveate_gate"]
    assert torch.equal(net.wider(torch.ones(1, 8, 4, 4)), wider)
    inserted.remove()
    assert len(net.stem) == 3


def test_an_empty_sequence_is_gated() -> None:
    net = nn.Sequential(nn.Conv1d(2, 4, 1), nn.Sequential()).eval()
    x = torch.randn(2, 2, 6)
    before = net(x)
    with insert(net, ULSAM, "1", x, num_splits=2) as inserted:
        assert torch.equal(net(x), inserted.gates["1"](before))
    assert torch.equal(net(x), before)


def test_the_model_with_gates_is_a_model() -> None:
    net, x = made().eval(), images()
    plain = net(x)
    insert(net, "ulsam", "layer*.*", x, num_splits=2, variant="release")
    expected = net(x)
    assert (expected - plain).abs().max() > 1e-5
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), expected)
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in net.parameters()}
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other = made().eval()
    insert(other, "ulsam", "layer*.*", x, num_splits=2, variant="release")
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), expected)
    assert torch.allclose(net.double()(x.double()), expected.double(), atol=1e-4)


def test_the_model_with_gates_is_one_graph() -> None:
    net, x = made().eval(), images()
    insert(net, "ulsam", "layer*.*", x, num_splits=2, variant="release")
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), net(x), atol=1e-6)


def test_gates_take_dtype_and_device_of_their_places() -> None:
    net = made().to(torch.bfloat16)
    inserted = insert(net, "ulsam", "layer1.0", images().bfloat16())
    assert {p.dtype for p in inserted.gates["layer1.0"].parameters()} == {torch.bfloat16}
    assert net(images().bfloat16()).dtype == torch.bfloat16


def test_inputs_of_every_form() -> None:
    for inputs in (images(), (images(),), [images(), 2.0], {"x": images(), "scale": 0.5}):
        with insert(made(), "ulsam", "stem.0", inputs) as inserted:
            assert list(inserted.gates) == ["stem.0"]


def test_names_are_matched_between_dots() -> None:
    for where, found in {
        "layer1.*": ["layer1.0", "layer1.1"],
        "layer?.*": None,
        "*.0.conv": ["layer1.0.conv", "layer2.0.conv"],
        "**.conv": ["layer1.0.conv", "layer1.1.conv", "layer2.0.conv", "layer2.1.0.conv"],
        "**0.norm": ["layer1.0.norm", "layer2.0.norm", "layer2.1.0.norm"],
    }.items():
        if found is None:
            with pytest.raises(OptionError, match="must match the name of a module"):
                insert(made(), "ulsam", where, images())
        else:
            with insert(made(), "ulsam", where, images()) as inserted:
                assert list(inserted.gates) == found


def test_a_second_round_sees_the_models_modules_only() -> None:
    net = made()
    insert(net, "ulsam", "layer1.*", images(), variant="release")
    second = insert(net, "ulsam", "**.norm", images())
    assert not any("foveate_gate" in name for name in second.gates)


def test_a_function_makes_gates() -> None:
    net, x = made().eval(), images()
    sizes = []

    def make(channels: int, dims: int, bias: bool) -> nn.Module:
        sizes.append((channels, dims, bias))
        return nn.Conv2d(channels, channels, 1, bias=bias)

    inserted = insert(net, make, ["stem.1", "layer2.0"], x, bias=False)
    assert sizes == [(8, 2, False), (12, 2, False)]
    assert [type(gate) for gate in inserted.gates.values()] == [nn.Conv2d, nn.Conv2d]


class Own(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Tuple(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.pair, self.same = Own(nn.Conv2d(3, 4, 1)), Tuple(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        self.same(x)
        return self.same(self.pair(self.own(x))[0])


@pytest.mark.parametrize(
    ("key", "where", "message"),
    [
        ("ulsam", "layr1.0", "where='layr1.0' must match the name of a module; did you mean \"layer1.0\"?"),
        ("ulsam", ["layer1.0", "zzz"], "where='zzz' must match the name of a module"),
        ("ulsam", [], "must name at least one module"),
        ("ulsam", "head", "'head' must return a feature map (B, C, *space); got Tensor (4, 5)"),
        ("ulsam", "unused", "'unused' must run on the example inputs"),
        ("ulsam", ["layer1", "layer1.1"], "'layer1' has a gate already"),
        ("softmax", "layer1.0", 'system "softmax" must be a feature gate; valid keys: gaam, ulsam, '),
        (nn.Conv2d, "layer1.0", "must be a gate's key, its class, or a function"),
        (nn.ReLU(), "layer1.0", "must be a gate's key, its class, or a function"),
        (3, "layer1.0", "key=3 must be"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(key, where, message: str) -> None:
    net = made()
    before = trace(net)
    with pytest.raises(OptionError) as caught:
        insert(net, key, where, images())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert trace(net) == before


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("own", "Own is a Sequential with a forward of its own"),
        ("pair", "'pair' must return a feature map"),
        ("same", "'same' must return maps of one kind; got Tensor (4, 3, 11, 9) float32 and Tensor (4, 4, 11, 9)"),
    ],
)
def test_modules_without_a_place_are_refused(where: str, message: str) -> None:
    net = Odd()
    before = trace(net)
    with pytest.raises(OptionError) as caught:
        insert(net, "ulsam", where, images())
    assert message in str(caught.value)
    assert trace(net) == before


def test_a_gate_that_does_not_fit_names_its_place() -> None:
    net = made()
    before = trace(net)
    with pytest.raises(OptionError, match="layer1.0: num_splits=3 must divide channels=8"):
        insert(net, "ulsam", ["layer2.0", "layer1.0"], images(), num_splits=3)
    with pytest.raises(OptionError, match='layer1.0: ULSAM has no option "splits"'):
        insert(net, "ulsam", "layer1.0", images(), splits=2)
    with pytest.raises(UnknownKey, match='did you mean "ulsam"'):
        insert(net, "ulsan", "layer1.0", images())
    assert trace(net) == before


def test_a_place_with_a_gate_is_refused() -> None:
    net = made()
    first = insert(net, "ulsam", ["layer1", "stem"], images())
    before = trace(net)
    for where in ("layer1", "layer1.1", "stem"):
        with pytest.raises(OptionError, match="has a gate already"):
            insert(net, "ulsam", where, images())
    assert trace(net) == before
    first.remove()
    insert(net, "ulsam", "layer1.1", images())


def test_a_model_that_fails_is_left_as_it_was() -> None:
    net = made()
    before = trace(net)
    with pytest.raises(RuntimeError):
        insert(net, "ulsam", "layer1.0", torch.zeros(1, 4, 8, 8))
    assert trace(net) == before
