"""The contract that every layer has to keep."""

from __future__ import annotations

import copy

import pytest
import torch

from foveate.core import masks
from foveate.core.errors import OptionError, ShapeError, UnsupportedPattern
from foveate.nn import Block, MultiHeadAttention
from foveate.nn.base.layer import StreamingLayer
from foveate.nn.parts import build
from foveate.ops.operator import Operator
from tests.contracts.layers import (
    BATCH,
    DIM,
    HEADS,
    KEYS,
    LENGTH,
    MEMORY,
    SYSTEMS,
    Call,
    calls,
    example,
    example_inputs,
    is_real,
    layers,
    main_call,
)
from tests.contracts.operators import CLASSES
from tests.support.tensors import assert_near, gradients

# -- visibility --------------------------------------------------------------------------------------------------------


@calls()
def test_tokens_in_tokens_out(call: Call) -> None:
    x, source = call.tokens()
    out = call(example(call.key), x, source)
    assert out.shape == (BATCH, LENGTH, DIM)
    assert out.isfinite().all()


@calls()
def test_other_tokens_have_an_effect(call: Call) -> None:
    """Other tokens change an output; a layer without mixing would pass many tests below."""
    x, source = (t if t is None else t.requires_grad_() for t in call.tokens())
    layer = example(call.key)
    (grad,) = gradients(call(layer, x, source)[:, LENGTH // 2], [x if source is None else source])
    others = grad if source is not None else grad[:, : LENGTH // 2]
    assert others.abs().sum() > 0


def chooses_together(layer: torch.nn.Module) -> bool:
    """Whether a token may change what earlier ones read, as `Capabilities.selection_group` of the operator says."""
    return isinstance(getattr(layer, "op", None), Operator) and layer.op.capabilities.selection_group is None


@calls(causal=True)
def test_the_future_does_not_reach_back(call: Call) -> None:
    layer, (x, _) = example(call.key), call.tokens()
    if chooses_together(layer):
        x.requires_grad_()
        for at in (1, LENGTH // 2, LENGTH - 1):
            (grad,) = torch.autograd.grad(call(layer, x)[:, :at].square().sum(), x)
            assert grad[:, :at].any() and not grad[:, at:].any(), "no weight is on a later key"
        return
    out = call(layer, x)
    for at in (1, LENGTH // 2, LENGTH - 1):
        changed = x.clone()
        changed[:, at:] = 3 * call.tokens(seed=9)[0][:, at:]
        assert_near(call(layer, changed)[:, :at], out[:, :at], 1e-12)


@calls(causal=True)
def test_garbage_in_the_future_does_not_reach_back(call: Call) -> None:
    layer, (x, _) = example(call.key), call.tokens()
    if chooses_together(layer):  # garbage changes what is chosen
        return
    out = call(layer, x)
    for garbage in (float("nan"), float("inf")):
        for at in (LENGTH // 2, LENGTH - 1):
            changed = x.clone()
            changed[:, at:] = garbage
            assert_near(call(layer, changed)[:, :at], out[:, :at], 1e-12)


def hiding(call: Call, keys: slice) -> torch.Tensor:
    """Return a mask of the call's kind that hides these keys from all queries."""
    shape = (BATCH, 1, 1, call.n_keys) if call.mask_kind == "keys" else (BATCH, HEADS, LENGTH, call.n_keys)
    seen = torch.ones(shape, dtype=torch.bool)
    seen[..., keys] = False
    return masks.as_bias(seen, torch.float64) if call.mask_kind == "bias" else seen


@calls(masked=True)
def test_masked_keys_have_no_effect(call: Call) -> None:
    layer, hidden = example(call.key), slice(call.n_keys - 3, call.n_keys)
    outs = []
    for garbage in (float("nan"), float("inf"), 7.0):
        x, source = call.tokens()
        (x if source is None else source)[:, hidden] = garbage
        outs.append(call(layer, x, source, hiding(call, hidden)))
    seen = slice(None) if "cross" in call.pattern else slice(0, LENGTH - 3)
    for out in outs[:2]:
        assert_near(out[:, seen], outs[-1][:, seen], 1e-12)


@layers(lambda layer: "keys" in layer.capabilities.masks and not layer.capabilities.grid)
def test_padding_has_no_effect(key: str) -> None:
    """Hidden tokens at the end give the output of a call without them."""
    for pattern in sorted(example(key).capabilities.patterns - {"cross"}):
        call = Call(key, pattern, "keys")
        layer, (x, _) = example(key), call.tokens()
        padded = call(layer, x, mask=hiding(call, slice(LENGTH - 4, LENGTH)))
        inputs = example_inputs(key)
        cut = {name: i[:, : LENGTH - 4] if isinstance(i, torch.Tensor) else i for name, i in inputs.items()}
        assert_near(padded[:, : LENGTH - 4], layer(x[:, : LENGTH - 4], causal=call.causal, **cut), 1e-10)


@layers()
def test_batch_items_are_independent(key: str) -> None:
    call = main_call(key)
    layer, (x, source) = example(key), call.tokens()
    together = call(layer, x, source)
    inputs = example_inputs(key)
    for i in range(BATCH):
        own = {name: t[i : i + 1] if isinstance(t, torch.Tensor) else t for name, t in inputs.items()}
        alone = layer(x[i : i + 1], None if source is None else source[i : i + 1], causal=call.causal, **own)
        assert_near(alone, together[i : i + 1], 1e-12)


# -- gradients, numbers, state -----------------------------------------------------------------------------------------


@layers()
def test_gradients(key: str) -> None:
    call = main_call(key)
    layer, (x, source) = example(key), call.tokens()
    x.requires_grad_()
    random = torch.Generator().manual_seed(5)
    out = call(layer, x, source)
    toward = torch.randn(out.shape, generator=random, dtype=torch.float64)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    grads = torch.autograd.grad((out * toward).sum(), wanted, allow_unused=True)
    step = 1e-6
    for leaf, grad in zip(wanted, grads, strict=True):
        assert grad is not None, "a parameter without a say"
        way = torch.randn(leaf.shape, generator=random, dtype=torch.float64)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                leaf += sign * step * way
                ends.append((call(layer, x, source) * toward).sum())
                leaf -= sign * step * way
        assert_near((ends[0] - ends[1]) / (2 * step), (grad * way).sum(), 1e-4 * (1 + (grad * way).sum().abs().item()))


@pytest.mark.parametrize("key", [*KEYS, *(key for key in CLASSES if key not in KEYS)])
def test_no_parameter_is_left_without_a_gradient(key: str) -> None:
    """Every parameter gets a gradient, in a layer or operator with its defaults, or in an example if it has none."""
    torch.manual_seed(0)
    try:
        built = SYSTEMS[key](64, 4) if key in KEYS else build.create(key, 64, 4)
    except (KeyError, TypeError, OptionError):
        built = example(key) if key in KEYS else MultiHeadAttention(64, 4, op=CLASSES[key].example(4, 16, LENGTH))
    built = built.float().train()
    pattern = next(p for p in ("self", "causal self", "cross") if p in built.capabilities.patterns)
    source = torch.randn(BATCH, MEMORY, built.dim) if pattern == "cross" else None
    given = {} if key not in SYSTEMS else SYSTEMS[key].example_inputs(BATCH, LENGTH)
    op = getattr(built, "op", None)
    if isinstance(op, Operator):
        given |= {
            name: op.example_input(name, BATCH, 4, LENGTH).float() for name in built.capabilities.inputs - set(given)
        }
    given = {name: i.float() if is_real(i) else i for name, i in given.items()}
    out = built(torch.randn(BATCH, LENGTH, built.dim), source, causal=pattern == "causal self", **given)
    (out * torch.randn(out.shape)).sum().backward()
    assert not [name for name, p in built.named_parameters() if p.requires_grad and p.grad is None]


@calls()
def test_bfloat16(call: Call) -> None:
    layer = example(call.key).bfloat16()
    x, source = call.tokens(dtype=torch.bfloat16)
    out = call(layer, x, source)
    assert out.dtype == torch.bfloat16
    wide = copy.deepcopy(layer).double()
    expected = call(wide, x.double(), None if source is None else source.double())
    assert (out.double() - expected).norm() < 0.05 * expected.norm()


@layers(lambda layer: layer.capabilities.streaming == "exact")
def test_token_by_token_is_the_causal_call(key: str) -> None:
    call = Call(key, "causal self")
    layer, (x, _) = example(key), call.tokens()
    state, out = layer.init_state(BATCH, dtype=torch.float64), []
    for t in range(LENGTH):
        y, state = layer.step(x[:, t : t + 1], state)
        out.append(y)
    expected = call(layer, x)
    assert_near(torch.cat(out, 1), expected, 1e-10)
    first, state = layer.prefill(x[:, :-3])
    assert_near(first, expected[:, :-3], 1e-10)
    for t in range(LENGTH - 3, LENGTH):
        y, state = layer.step(x[:, t : t + 1], state)
        assert_near(y, expected[:, t : t + 1], 1e-10)


@layers(lambda layer: layer.capabilities.streaming is None)
def test_layers_without_streaming_refuse(key: str) -> None:
    layer = example(key)
    if not isinstance(layer, StreamingLayer):
        assert not hasattr(layer, "init_state"), "no stub"
        return
    with pytest.raises(UnsupportedPattern, match="cannot go one token at a time"):
        layer.init_state(BATCH)


@layers()
def test_a_state_dict_makes_a_twin(key: str) -> None:
    call = main_call(key)
    layer, (x, source) = example(key), call.tokens()
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    twin.load_state_dict(layer.state_dict())
    assert_near(call(twin, x, source), call(layer, x, source), 0)


@layers()
def test_it_fits_a_block(key: str) -> None:
    call = main_call(key)
    if "cross" in call.pattern:
        return
    layer, (x, _) = example(key), call.tokens()
    block = Block(layer).double()
    out = block(x, causal=call.causal, **example_inputs(key))
    mixed = x + call(layer, block.norm(x))
    assert_near(out, mixed + block.mlp(block.mlp_norm(mixed)), 1e-12)


# -- refusals ----------------------------------------------------------------------------------------------------------


@layers()
def test_undeclared_patterns_are_refused(key: str) -> None:
    layer, x = example(key), torch.zeros(BATCH, LENGTH, DIM, dtype=torch.float64)
    for pattern in {"self", "causal self", "cross", "causal cross"} - layer.capabilities.patterns:
        source = x if "cross" in pattern else None
        with pytest.raises(UnsupportedPattern, match=f'does not define "{pattern}" attention; it does'):
            layer(x, source, causal=pattern.startswith("causal"), **example_inputs(key))


@layers()
def test_undeclared_masks_are_refused(key: str) -> None:
    call = main_call(key)
    layer, (x, source) = example(key), call.tokens()
    for kind in {"keys", "pairs", "bias"} - layer.capabilities.masks:
        shaped = Call(key, call.pattern, kind)
        with pytest.raises(UnsupportedPattern, match=f'mask of kind "{kind}"; it takes'):
            call(layer, x, source, hiding(shaped, slice(0, 1)))


@layers()
def test_malformed_calls(key: str) -> None:
    call = main_call(key)
    layer, (x, source) = example(key), call.tokens()
    inputs = example_inputs(key)
    with pytest.raises(ShapeError, match=rf"x must be \(B, N, C={DIM}\)"):
        layer(x[..., 1:], source, causal=call.causal, **inputs)
    with pytest.raises(ShapeError, match=r"x must be \(B, N, C"):
        layer(x[0], source, causal=call.causal, **inputs)
    with pytest.raises(OptionError, match="causal=1 must be True or False"):
        layer(x, source, causal=1, **inputs)
    with pytest.raises(OptionError, match="takes no input 'nonsense'"):
        layer(x, source, causal=call.causal, nonsense=x, **inputs)
    if layer.capabilities.grid:
        with pytest.raises(ShapeError, match=r"size=\(5, 7\) must be \(H, W\)"):
            layer(x, source, causal=call.causal, **{**inputs, "size": (5, 7)})
    else:
        with pytest.raises(OptionError, match="takes no grid"):
            layer(x, source, causal=call.causal, size=(3, 4), **inputs)
    if layer.capabilities.masks:
        with pytest.raises(ShapeError, match="mask must broadcast"):
            call(layer, x, source, torch.ones(BATCH, 1, 1, 77, dtype=torch.bool))
