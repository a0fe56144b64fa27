"""`foveate.attend` and `plan`: inputs, sizes, drawn parameters, and messages that name the nearest valid option."""

from __future__ import annotations

import threading

import pytest
import torch

import foveate
from foveate.core.errors import OptionError, ShapeError, UnknownKey
from foveate.ops import GTA, HiP, MonotonicLocationAttention, SlidingWindow, Softmax, TaylorAttention
from tests.support.tensors import assert_near, qkv


@pytest.fixture
def heads() -> tuple[torch.Tensor, ...]:
    return tuple(x.float() for x in qkv(12, heads=4, kv_heads=2, width=8))


def test_an_operator_by_key_by_class_and_built(heads) -> None:
    expected = SlidingWindow(window=5)(*heads, causal=True)
    for op, options in (("sliding_window", {"window": 5}), (SlidingWindow, {"window": 5}), (SlidingWindow(5), {})):
        assert torch.equal(foveate.attend(*heads, op, causal=True, **options), expected)
        assert foveate.plan(*heads, op, causal=True, **options) == SlidingWindow(5).plan(*heads, causal=True)


def test_inputs_of_tokens_reach_the_call(heads) -> None:
    poses = GTA.example_input("poses", 2, 4, 12).float()
    made = GTA(8, {"se3": 8})
    expected = made(*heads, poses=poses)
    assert not torch.allclose(expected, Softmax()(*heads), atol=1e-3)
    named = foveate.attend(*heads, "gta", dims={"se3": 8}, inputs={"poses": poses})
    assert torch.equal(named, expected), "head_dim is filled in from q"
    assert torch.equal(foveate.attend(*heads, "gta", dims={"se3": 8}, poses=poses), expected), "as a keyword too"
    assert torch.equal(foveate.attend(*heads, made, poses=poses), expected)
    assert foveate.plan(*heads, "gta", dims={"se3": 8}, poses=poses) == made.plan(*heads, poses=poses)
    with pytest.raises(OptionError, match="takes no input 'pose'; did you mean \"poses\""):
        foveate.attend(*heads, made, inputs={"pose": poses})


def test_the_same_call_gives_the_same_output(heads) -> None:
    before = torch.get_rng_state()
    one, two = (foveate.attend(*heads, "monotonic_location_attention", mix=True) for _ in range(2))
    assert torch.equal(one, two), "parameters are drawn from a fixed seed"
    assert torch.equal(torch.get_rng_state(), before), "and not from PyTorch's own generator"
    drawn = [
        foveate.attend(*heads, "monotonic_location_attention", mix=True, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], one)


def test_a_generator_goes_to_an_operator_that_draws_for_itself(heads) -> None:
    samples = [
        foveate.attend(*heads, "marginal_attention", estimate="sample", generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_sizes_are_those_of_the_tensors(heads) -> None:
    q, k, v = heads
    out = foveate.attend(q, k, v, "luong_attention", score="general")
    assert out.shape == q.shape
    with pytest.raises(ShapeError, match="built for 4 heads of width 6"):
        foveate.attend(q, k, v, "luong_attention", score="general", head_dim=6)


def test_a_wrong_option_names_the_nearest(heads) -> None:
    with pytest.raises(OptionError, match='operator "hip" has no option "kep"; did you mean "keep"'):
        foveate.attend(*heads, "hip", kep=4)
    with pytest.raises(OptionError, match=r'operator "softmax" has no option "zzz"; options: none'):
        foveate.attend(*heads, zzz=4)
    with pytest.raises(OptionError, match='operator "s2_attention" has no option "shard"; did you mean "shards"'):
        foveate.ops.create("s2_attention", shard=2)
    with pytest.raises(OptionError, match=r"options \['keep'\] go with a key; HiP is already built"):
        foveate.attend(*heads, HiP(), keep=4)
    with pytest.raises(OptionError, match=r'operator "monotonic_location_attention" needs head_dim=\.\.\.'):
        foveate.ops.create("monotonic_location_attention")
    with pytest.raises(UnknownKey, match='unknown system "sofmax"; did you mean "softmax"'):
        foveate.attend(*heads, "sofmax")
    with pytest.raises(OptionError, match='system "moh" must be an operator'):
        foveate.attend(*heads, "moh")
    with pytest.raises(OptionError, match=r"it is a layer, .*: layer = foveate\.nn\.Mega\(dim=\.\.\.\)"):
        foveate.attend(*heads, "mega")
    with pytest.raises(OptionError, match=r"foveate\.apply\(model, foveate\.kv\.SinkRecent\(\)\)"):
        foveate.attend(*heads, "sink_recent")
    with pytest.raises(OptionError, match='system "zoology_mqar" must be an operator; operators: softmax, '):
        foveate.attend(*heads, "zoology_mqar")
    with pytest.raises(OptionError, match="generator=0 must be a torch.Generator or None"):
        foveate.attend(*heads, generator=0)


def test_tensors_print_as_shapes(heads) -> None:
    q = heads[0]
    with pytest.raises(OptionError) as caught:
        foveate.attend(*heads, "sliding_window", causal=True, window=q)
    assert "(2, 4, 12, 8)" in str(caught.value) and "0." not in str(caught.value)
    with pytest.raises(OptionError) as caught:
        foveate.attend(*heads, scale=torch.ones(300))
    assert "(300,)" in str(caught.value) and len(str(caught.value)) < 200


def test_a_mask_of_keys_needs_four_axes(heads) -> None:
    with pytest.raises(ShapeError, match=r"\(B, 1, 1, Nk\)"):
        foveate.attend(*heads, mask=torch.ones(2, 12, dtype=torch.bool))


def test_it_costs_no_parameters_where_there_are_none(heads) -> None:
    assert_near(foveate.attend(*heads, "based"), TaylorAttention()(*heads), 0.0)
    assert MonotonicLocationAttention(8, 4)(*heads).shape == heads[0].shape


def test_a_casing_or_an_argument_of_the_call_is_named(heads) -> None:
    for options, says in (
        ({"casual": True}, 'did you mean "causal"'), ({"key": "hip"}, "the operator itself is op="),
        ({"masks": None}, 'did you mean "mask"'),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=says):
            foveate.attend(*heads, "sliding_window", **options)
    with pytest.raises(OptionError, match='did you mean "poses"'):
        foveate.attend(*heads, "gta", pose=3)
    with pytest.raises(UnknownKey, match='did you mean "hip"'):
        foveate.attend(*heads, "HiP")
    for op in (["softmax"], int, foveate.Operator, 3):
        with pytest.raises(OptionError, match="must be a key of the catalogue, an Operator, or an operator's class"):
            foveate.attend(*heads, op)


def test_inputs_are_named_once_and_are_the_operators(heads) -> None:
    q, k, v = heads
    alpha = torch.full((2, 4, 12), 0.1)
    for op in ("titans", foveate.ops.Titans(8, 8)):
        with pytest.raises(OptionError, match='input "alpha" must be given once'):
            foveate.attend(q, k, v, op, causal=True, alpha=alpha, inputs={"alpha": alpha})
    for inputs, says in (({"mask": alpha}, "takes no input 'mask'"), (alpha, "inputs=Tensor"), ([1], r"inputs=\[1\]")):
        with pytest.raises(OptionError, match=says):
            foveate.attend(q, k, v, inputs=inputs)


def test_grouped_heads_and_optional_generators(heads) -> None:
    q, k, v = heads
    assert foveate.attend(q, k, v, "selective_self_attention", causal=True).shape == q.shape
    with_generator = foveate.attend(q, k, v, "marginal_attention", generator=torch.Generator())
    assert torch.equal(with_generator, foveate.attend(q, k, v, "marginal_attention"))


def test_parameters_are_drawn_under_transforms_and_default_devices(heads) -> None:
    q, k, v = heads
    expected = foveate.attend(q, k, v, "neural_attention", causal=True)
    mapped = torch.vmap(lambda *x: foveate.attend(*x, "neural_attention", causal=True))(*(x[None] for x in heads))
    assert_near(mapped[0], expected, 1e-6)
    with torch.device("meta"):
        assert torch.equal(foveate.attend(q, k, v, "neural_attention", causal=True), expected)


def test_threads_get_the_same_parameters(heads) -> None:
    q, k, v = heads
    expected, found = foveate.attend(q, k, v, "titans", causal=True), []
    threads = [
        threading.Thread(target=lambda: found.extend(foveate.attend(q, k, v, "titans", causal=True) for _ in range(20)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80 and all(torch.equal(out, expected) for out in found)


@pytest.mark.parametrize("key", ["softmax", "sigmoid_attention", "based", "lightning_attention_2"])
def test_a_call_is_one_graph(key: str, heads) -> None:
    op = foveate.ops.create(key)
    compiled = torch.compile(op, backend="eager", fullgraph=True)
    assert_near(compiled(*heads, causal=True), op(*heads, causal=True), 1e-6)
