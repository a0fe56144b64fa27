"""Masks that no base class checks: every public function and method that takes one refuses what does not fit it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

from foveate.core.errors import ShapeError, UnsupportedPattern
from foveate.models.multimodal.mac import MAC
from foveate.nn.channel.multi_dim_attention import MultiDimAttention
from foveate.nn.fusion.co_attention import CoAttention
from foveate.nn.parts.ema import DampedEMA
from foveate.nn.pool.acmil import ACMIL
from foveate.nn.pool.efficient_probing import ProbeHead
from foveate.nn.pool.mean import MeanPool
from foveate.nn.seq2seq.luong_decoder import LuongDecoder
from foveate.nn.seq2seq.pointer_network import pointer_scores
from foveate.nn.seq2seq.show_attend_tell import VisualAttentionLSTM, doubly_stochastic_penalty
from foveate.nn.sequence.interacting import InteractingLayer
from foveate.nn.sequence.neural_memory import NeuralMemory
from foveate.nn.sequence.relational_attention import RelationalAttention
from foveate.nn.sequence.set_transformer import MAB, SetTransformer
from foveate.nn.sequence.skim_attention import SkimAttention, Skimformer, skimming_mask
from foveate.nn.vision.dependency_vit import DependencyAttention
from foveate.nn.vision.gpsa import GatedPositionalAttention
from foveate.nn.vision.pt_dit import PTDiTBlock
from foveate.ops import calls
from foveate.ops.dense.marginal_attention import MarginalAttention, expectation_maximisation
from foveate.ops.dense.monotonic_location_attention import MonotonicLocationAttention
from foveate.ops.memory.titans import Titans
from foveate.ops.sparse.dynamic_mask import dynamic_mask_attention
from foveate.ops.sparse.hyper_attention import HyperAttention
from foveate.ops.sparse.s2_attention import is_kv_efficient
from foveate.train.objectives.attention_at import token_differences

B, N, M, DIM = 3, 3, 5, 8  # as many sequences as queries, so that `(B, M)` would broadcast as a mask of pairs
KEYS, TOKENS, PAIRS = (B, 1, 1, M), (B, M), (B, 1, M)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def boxes() -> Tensor:
    corner = torch.randint(0, 400, (B, M, 2), generator=torch.Generator().manual_seed(0))
    return torch.cat([corner, corner + 50], -1)


@dataclass(frozen=True)
class Case:
    """A call with a mask, and the shape that the mask is to have."""

    call: Callable[[Tensor], object]
    shape: tuple[int, ...]


def seq2seq(method: str) -> Callable[[Tensor], object]:
    decoder, memory, tokens = LuongDecoder(DIM, 7), drawn(B, M, DIM), torch.zeros(B, N, dtype=torch.long)
    if method == "generate":
        return lambda mask: decoder.generate(memory, tokens[:, 0], 2, mask=mask)
    return lambda mask: decoder(memory, tokens, mask)


def heads(length: int) -> Tensor:
    return drawn(B, 2, length, DIM)


def memory() -> Callable[[Tensor], object]:
    layer = NeuralMemory(DIM)
    return lambda seen: layer.go_on(drawn(B, M, DIM), layer.init_state(B), seen)


def relational() -> Callable[[Tensor], object]:
    layer = RelationalAttention(DIM, 2)
    return lambda mask: layer(drawn(B, 2, DIM), drawn(B, M, DIM), drawn(B, M, DIM), mask=mask)


def mac(method: str) -> Callable[[Tensor], object]:
    net, words = MAC(7, 5, DIM, DIM, 2, stem="objects"), torch.zeros(B, N, dtype=torch.long)
    return lambda mask: getattr(net, method)(drawn(B, M, DIM), words, mask=mask)


def go_on() -> Callable[[Tensor], object]:
    op, given = Titans(2, DIM), [heads(M)] * 3
    return lambda mask: op.go_on(*given, op.init_state(B, 2, 2, DIM, DIM), mask=mask)


CASES: dict[str, Case] = {
    "MultiDimAttention.forward": Case(lambda mask: MultiDimAttention(DIM)(drawn(B, M, DIM), mask=mask), TOKENS),
    "MultiDimAttention.weights": Case(lambda mask: MultiDimAttention(DIM).weights(drawn(B, M, DIM), mask=mask), TOKENS),
    "Fusion.forward": Case(
        lambda mask: CoAttention(DIM)(drawn(B, M, DIM), drawn(B, N, DIM), masks={"a": mask}), TOKENS
    ),
    "DampedEMA.forward": Case(lambda seen: DampedEMA(DIM)(drawn(B, M, DIM), seen), TOKENS),
    "Pool.forward": Case(lambda mask: MeanPool(DIM)(drawn(B, M, DIM), mask), TOKENS),
    "Pool.read": Case(lambda mask: MeanPool(DIM).read(drawn(B, M, DIM), mask), TOKENS),
    "Pool.weights": Case(lambda mask: MeanPool(DIM).weights(drawn(B, M, DIM), mask), TOKENS),
    "ProbeHead.forward": Case(lambda mask: ProbeHead(MeanPool(DIM), 2)(drawn(B, M, DIM), mask), TOKENS),
    "ACMIL.forward": Case(lambda mask: ACMIL(DIM, k=0)(drawn(B, M, DIM), mask), TOKENS),
    "NeuralMemory.go_on": Case(memory(), TOKENS),
    "pointer_scores": Case(
        lambda mask: pointer_scores(
            drawn(B, M, DIM), drawn(B, N, DIM), drawn(6, DIM), drawn(6, DIM), drawn(6), mask=mask
        ), PAIRS,
    ),
    "Seq2Seq.forward": Case(seq2seq("forward"), TOKENS),
    "Seq2Seq.generate": Case(seq2seq("generate"), TOKENS),
    "VisualAttentionLSTM.look": Case(
        lambda mask: VisualAttentionLSTM(DIM, DIM, 7).look(
            drawn(B, M, DIM), torch.zeros(B, N, dtype=torch.long), lambda weights: weights, mask
        ), TOKENS,
    ),
    "doubly_stochastic_penalty": Case(
        lambda mask: doubly_stochastic_penalty(drawn(B, N, M).softmax(-1), mask=mask), TOKENS
    ),
    "InteractingLayer.weights": Case(lambda mask: InteractingLayer(DIM).weights(drawn(B, M, DIM), mask), KEYS),
    "token_differences": Case(lambda mask: token_differences(drawn(B, M), mask), TOKENS),
    "RelationalAttention.forward": Case(relational(), KEYS),
    "MAB.forward": Case(lambda mask: MAB(DIM, DIM, DIM, 2)(drawn(B, N, DIM), drawn(B, M, DIM), mask), KEYS),
    "MAB.read": Case(lambda mask: MAB(DIM, DIM, DIM, 2).read(drawn(B, N, DIM), drawn(B, M, DIM), mask), KEYS),
    "SetTransformer.forward": Case(lambda mask: SetTransformer(DIM, 1, dim=DIM, heads=2)(drawn(B, M, DIM), mask), KEYS),
    "SkimAttention.forward": Case(lambda mask: SkimAttention(DIM, 2, 4)(boxes(), mask), KEYS),
    "Skimformer.forward": Case(
        lambda mask: Skimformer(7, DIM, 1, 2)(torch.zeros(B, M, dtype=torch.long), boxes(), mask), KEYS
    ),
    "skimming_mask": Case(lambda mask: skimming_mask(drawn(B, 2, M, M).softmax(-1), 2, mask), KEYS),
    "DependencyAttention.send": Case(lambda mask: DependencyAttention(DIM, 2).send(drawn(B, M, DIM), mask=mask), KEYS),
    "DependencyAttention.dependency": Case(
        lambda mask: DependencyAttention(DIM, 2).dependency(drawn(B, M, DIM), mask=mask), KEYS
    ),
    "GatedPositionalAttention.weights": Case(
        lambda mask: GatedPositionalAttention(DIM, 2).weights(drawn(B, M, DIM), (1, M), mask), KEYS
    ),
    "PTDiTBlock.forward": Case(
        lambda mask: PTDiTBlock(DIM, 2, (1, 2, 2), text_dim=DIM)(
            drawn(B, 4, DIM), (1, 2, 2), drawn(B, 6 * DIM), drawn(B, M, DIM), mask
        ), TOKENS,
    ),
    "MAC.forward": Case(mac("forward"), TOKENS),
    "MAC.reason": Case(mac("reason"), TOKENS),
    "Memory.go_on": Case(go_on(), KEYS),
    "MarginalAttention.evidence": Case(lambda mask: MarginalAttention().evidence(heads(2), heads(M), mask=mask), KEYS),
    "expectation_maximisation": Case(
        lambda mask: expectation_maximisation(MarginalAttention(axis="slot"), heads(2), heads(M), 2, mask=mask), KEYS
    ),
    "MonotonicLocationAttention.walk": Case(
        lambda mask: MonotonicLocationAttention(DIM, 2).walk(heads(2), heads(M), heads(M), mask=mask), KEYS
    ),
    "dynamic_mask_attention": Case(
        lambda mask: dynamic_mask_attention(heads(2), heads(M), heads(M), drawn(B, 2, M), mask=mask), KEYS
    ),
    "HyperAttention.with_lse": Case(
        lambda mask: HyperAttention(DIM).with_lse(heads(2), heads(M), heads(M), mask=mask), KEYS
    ),
    "attend": Case(lambda mask: calls.attend(heads(2), heads(M), heads(M), mask=mask), KEYS),
    "plan": Case(lambda mask: calls.plan(heads(2), heads(M), heads(M), mask=mask), KEYS),
}  # fmt: skip

#: Checked before they are called, by `Layer`, `Seq2Seq` and `Operator`; what a system overrides.
HOOKS = {"project", "attend", "context", "encode", "encode_keys", "step"}
#: The two doors that check, for all layers and operators; the interface of another library; a layout of blocks.
CHECKED = {
    "Layer.forward", "Operator.forward", "Operator.weights", "Operator.plan", "FoveateForCausalLM.forward",
    "is_kv_efficient",
}  # fmt: skip


def takes_masks(room: ModuleType) -> set[str]:
    """Return the public functions and methods of a room with an argument that is a mask."""
    found = set()
    for public in (getattr(room, name) for name in dir(room) if not name.startswith("_")):
        members = [f for name, f in inspect.getmembers(public, inspect.isfunction) if not name.startswith("_")]
        for function in [public] if inspect.isfunction(public) else members if inspect.isclass(public) else []:
            named = {name for name in inspect.signature(function).parameters if name != "mask_visited"}
            is_ours = function.__module__.startswith("foveate.")
            if is_ours and any("mask" in name or name in ("seen", "hidden") for name in named):
                found.add(function.__qualname__)
    return found


@pytest.mark.parametrize("room", ["nn", "ops", "models", "train", "studies"])
def test_no_public_call_with_a_mask_is_left_out(room: str) -> None:
    found = takes_masks(importlib.import_module(f"foveate.{room}"))
    left = {name for name in found if "." not in name or name.split(".")[1] not in HOOKS} - CHECKED
    assert left <= {name.split(",")[0] for name in CASES}


def real(shape: tuple[int, ...]) -> Tensor:
    """Make a mask whose last key is padding in the first sequence."""
    mask = torch.ones(shape, dtype=torch.bool)
    mask[0, ..., -1] = False
    return mask


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_mask_of_its_shape_is_taken(case: Case) -> None:
    torch.manual_seed(0)
    case.call(real(case.shape))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_mask_that_would_broadcast_to_something_else_is_refused(case: Case) -> None:
    shape = KEYS if case.shape == TOKENS else TOKENS
    axes = {KEYS: r"\(B, 1, 1, Nk\)", TOKENS: r"\(B, [NST]\)", PAIRS: r"\(B, 1, N\)"}[case.shape]
    with pytest.raises((ShapeError, UnsupportedPattern), match=f"a mask of keys is {axes}"):
        case.call(real(shape))
    with pytest.raises(ShapeError, match="must"):
        case.call(real((*case.shape[:-1], M + 1)))
    with pytest.raises((ShapeError, UnsupportedPattern), match="bool|kind"):
        case.call(real(case.shape).long())


def test_a_layout_of_blocks_has_three_axes() -> None:
    with pytest.raises(ShapeError, match=r"mask must be \(H, query blocks, key blocks\); got \(4, 4\)"):
        is_kv_efficient(torch.ones(4, 4, dtype=torch.bool))


def test_pointers_do_not_take_sequences_for_outputs() -> None:
    """With as many outputs as sequences a mask `(B, N)` hid, in silence, inputs of other sequences."""
    given = drawn(B, M, DIM), drawn(B, B, DIM), drawn(6, DIM), drawn(6, DIM), drawn(6)
    with pytest.raises(ShapeError, match=r"mask must be bool \(B, S, N\)=\(3, 3, 5\); got \(3, 5\)"):
        pointer_scores(*given, mask=real(TOKENS))
    scores = pointer_scores(*given, mask=real(PAIRS))
    assert (scores[0, :, -1] == float("-inf")).all()
    assert scores[1:].isfinite().all()
    torch.testing.assert_close(pointer_scores(*given, mask=real(PAIRS).expand(B, B, M)), scores)
