"""Every engine equals the oracle on the calls that it accepts, and refuses the others."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.nn import functional as F

from foveate.bench.parts.memory import peak_bytes
from foveate.core import engines, masks, oracle, precision
from foveate.core.call import AttentionCall
from foveate.core.engines import chunked, flex, gather, machine, runs, slices
from foveate.core.engines.work import Work
from foveate.core.errors import ShapeError, UnknownKey, UnsupportedEngine
from foveate.core.scoring import SOFTMAX, SoftmaxScoring, Tile
from foveate.core.selection import Blocks, Indices, Selection
from foveate.core.window_selection import window
from tests.support.tensors import assert_near, gradients, qkv

#: Engines that attend only to the keys of a selection.
SPARSE = ("gather", "slices")


class Capped(SoftmaxScoring):
    """A custom scoring: capped logits with a learned cap."""

    def __init__(self) -> None:
        self.cap = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)

    def parameters(self) -> tuple[Tensor, ...]:
        return (self.cap,)

    def logits(self, q: Tensor, k: Tensor, scale: float, at: Tile) -> Tensor:
        return self.cap * torch.tanh(super().logits(q, k, scale, at) / self.cap)


class Unmerged(Capped):
    """The same, declared as no softmax over rows."""

    is_softmax = False


def a_mask(kind: str | None, n_queries: int, n_keys: int) -> Tensor | None:
    random = torch.Generator().manual_seed(5)
    seen = torch.rand(2, 1, n_queries, n_keys, generator=random) > 0.3
    seen[0, :, 0] = False  # a query that sees nothing
    if kind == "keys":
        return seen[:, :, -1:]
    if kind == "bias":
        return torch.randn(2, 4, n_queries, n_keys, generator=random, dtype=torch.float64).masked_fill(
            ~seen, masks.NEG_INF
        )
    return seen if kind == "pairs" else None


def a_selection(kind: str, heads: int, n_queries: int, n_keys: int) -> Selection:
    random = torch.Generator().manual_seed(6)
    if kind == "blocks":
        chosen = torch.rand(2, heads, -(-n_queries // 4), -(-n_keys // 3), generator=random) > 0.5
        return Blocks(chosen, (4, 3), n_queries, n_keys, lambda b, h, q, k: (q + k + h) % 3 > 0)
    index = torch.rand(1, heads, -(-n_queries // 2), n_keys, generator=random).argsort(-1)[..., :4]
    return Indices(index, n_queries, n_keys, torch.rand(index.shape, generator=random) > 0.2, group=2)


SHAPES = [(9, 9, False), (9, 9, True), (5, 11, False), (5, 11, True), (1, 11, True), (11, 5, False)]
KINDS = [None, "keys", "pairs", "bias"]


@pytest.mark.parametrize("engine", ["reference", "chunked", "fused"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n_queries", "n_keys", "causal"), SHAPES)
def test_dense_engines_are_the_oracle(engine: str, kind: str | None, n_queries: int, n_keys: int, causal: bool) -> None:
    q, k, v = qkv(n_queries, n_keys, value_width=5, grad=True)
    mask = a_mask(kind, n_queries, n_keys)
    expected = oracle.attention(q, k, v, mask=mask, causal=causal, scale=0.7)
    out = engines.run(AttentionCall(q, k, v, 0.7, mask, causal), engine)
    assert_near(out, expected, 1e-12)
    for ours, theirs in zip(gradients(out, (q, k, v)), gradients(expected, (q, k, v)), strict=True):
        assert_near(ours, theirs, 1e-12)


@pytest.mark.parametrize(
    ("engine", "form"),
    [(e, f) for e in ("reference", "chunked", "gather") for f in ("blocks", "indices")] + [("slices", "blocks")],
)
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n_queries", "n_keys", "causal"), SHAPES[:5])
def test_sparse_engines_are_the_oracle(
    engine: str, form: str, heads: int, kind: str | None, n_queries: int, n_keys: int, causal: bool
) -> None:
    """Sparse engines equal the oracle on selections for all heads, per key/value head and per query head."""
    q, k, v = qkv(n_queries, n_keys, value_width=5, grad=True)
    mask, selection = a_mask(kind, n_queries, n_keys), a_selection(form, heads, n_queries, n_keys)
    chosen = selection.for_heads(4).dense()
    expected = oracle.attention(q, k, v, mask=masks.combine(mask, chosen), causal=causal)
    out = engines.run(AttentionCall(q, k, v, 8**-0.5, mask, causal, selection), engine)
    assert_near(out, expected, 1e-12)
    for ours, theirs in zip(gradients(out, (q, k, v)), gradients(expected, (q, k, v)), strict=True):
        assert_near(ours, theirs, 1e-12)


@pytest.mark.parametrize("scoring", [SOFTMAX, Capped(), Unmerged()])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (3, 2), (4, 5), (100, 100)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_any_size(scoring, queries: int, keys: int, causal: bool, kind: str | None) -> None:
    q, k, v = qkv(7, 9, grad=True)
    mask = a_mask(kind, 7, 9)
    if kind == "bias":
        mask.requires_grad_()
    problem = AttentionCall(q, k, v, 1.0, mask, causal, scoring=scoring)
    wanted = [q, k, v, *([mask] if kind == "bias" else []), *getattr(scoring, "parameters", tuple)()]
    out, expected = chunked.attend(problem, queries, keys), engines.run(problem, "reference")
    assert_near(out, expected, 1e-12)
    for ours, theirs in zip(gradients(out, wanted), gradients(expected, wanted), strict=True):
        assert_near(ours, theirs, 1e-12)


class Counted(Unmerged):
    """Counts the pairs whose logits an engine computed."""

    def __init__(self, is_softmax: bool) -> None:
        super().__init__()
        self.is_softmax, self.pairs = is_softmax, 0

    def logits(self, q: Tensor, k: Tensor, scale: float, at: Tile) -> Tensor:
        self.pairs += q.shape[2] * k.shape[2]
        return super().logits(q, k, scale, at)


@pytest.mark.parametrize("is_softmax", [True, False])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(1, 2), (3, 4), (8, 5), (100, 100)])
def test_chunks_skip_unselected_keys(is_softmax: bool, causal: bool, queries: int, keys: int) -> None:
    """Query blocks see two neighbouring blocks of keys; one sees none, and one, under causality, only the future."""
    q, k, v = qkv(22, 23, grad=True)
    row, column = torch.arange(6)[:, None], torch.arange(8)
    chosen = (column == row) | (column == row + 1)
    chosen[2], chosen[4] = False, column > 6
    counted, plain = Counted(is_softmax), Capped()
    problem = AttentionCall(q, k, v, 1.0, None, causal, Blocks(chosen[None, None], (4, 3), 22, 23), counted)
    out = chunked.attend(problem, queries, keys)
    if queries < 4 and not causal:
        assert counted.pairs < 22 * 23 / 2
    expected = engines.run(replace(problem, scoring=plain), "reference")
    assert_near(out, expected, 1e-12)
    ours, theirs = gradients(out, [q, k, v, counted.cap]), gradients(expected, [q, k, v, plain.cap])
    for one, other in zip(ours, theirs, strict=True):
        assert_near(one, other, 1e-12)


def test_chunks_never_keep_the_matrix() -> None:
    q, k, v = qkv(1024, batch=1, heads=1, kv_heads=1, width=4, dtype=torch.float32, grad=True)
    for scoring in (SOFTMAX, Unmerged()):
        problem = AttentionCall(q, k, v, 1.0, causal=True, scoring=scoring)
        work = lambda problem=problem: chunked.attend(problem, 16, 64).sum().backward()  # noqa: E731
        assert peak_bytes(work, q.device) < 4 * 1024**2 / 8


@pytest.mark.parametrize("scoring", [SOFTMAX, Unmerged()])
def test_chunks_in_half_precision_add_up_in_float32(scoring) -> None:
    q, k, v = qkv(300, dtype=torch.bfloat16, grad=True)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = chunked.attend(AttentionCall(q, k, v, 0.35, scoring=scoring), 4, 16)
    expected = engines.run(AttentionCall(*exact, 0.35, scoring=scoring), "reference")
    for ours, theirs in zip(gradients(out, [q, k, v]), gradients(expected, exact), strict=True):
        assert ours.dtype == torch.bfloat16
        assert_near(ours, theirs, 0.02)


def test_chunks_notice_parameters_that_were_swapped() -> None:
    scoring = Capped()
    q, k, v = qkv(4, grad=True)
    out = chunked.attend(AttentionCall(q, k, v, 1.0, scoring=scoring))
    scoring.cap = scoring.cap.detach().clone().requires_grad_()
    with pytest.raises(UnsupportedEngine, match="parameters of its forward pass"):
        out.sum().backward()


@pytest.mark.parametrize("engine", ["reference", "chunked", "fused"])
@pytest.mark.parametrize("causal", [False, True])
def test_huge_scores_stay_finite(engine: str, causal: bool) -> None:
    q, k, v = qkv(9, grad=True, dtype=torch.float32)
    out = engines.run(AttentionCall(q * 1e3, k, v, 1.0, causal=causal), engine)
    assert_near(out, oracle.attention(q * 1e3, k, v, causal=causal, scale=1.0), 1e-3)
    assert all(grad.isfinite().all() for grad in gradients(out, (q, k, v)))


@pytest.mark.parametrize("engine", ["reference", "chunked", "fused"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(engine: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(20, 300, dtype=dtype)
    out = engines.run(AttentionCall(q, k, v, 8**-0.5, causal=True), engine)
    assert out.dtype == dtype
    assert_near(out, oracle.attention(q, k, v, causal=True), 0.02)


@pytest.mark.parametrize("engine", ["reference", "chunked"])
@pytest.mark.parametrize("fast", [False, True])
def test_half_precision_uses_the_fast_dtype(engine: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[torch.dtype] = set()

    class Spied(SoftmaxScoring):
        def logits(self, q: Tensor, k: Tensor, scale: float, at: Tile) -> Tensor:
            seen.add(q.dtype)
            return super().logits(q, k, scale, at)

    monkeypatch.setattr(precision, "_has_halves", lambda dtype: fast)
    q, k, v = qkv(20, dtype=torch.bfloat16, grad=True)
    out = engines.run(AttentionCall(q, k, v, 8**-0.5, causal=True, scoring=Spied()), engine)
    assert seen == {torch.bfloat16 if fast else torch.float32}
    assert out.dtype == torch.bfloat16
    assert all(grad.dtype == torch.bfloat16 for grad in gradients(out, (q, k, v)))
    assert_near(out, oracle.attention(q, k, v, causal=True), 0.02 if fast else 0.004)


@pytest.mark.parametrize("engine", ["reference", "chunked", "fused"])
@pytest.mark.parametrize("shape", [(), (9,), (1, 9), (9, 1), (4, 1, 9)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_a_mask_of_any_rank(engine: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = qkv(9)
    mask = (torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4).to(dtype)
    out = engines.run(AttentionCall(q, k, v, 1.0, mask), engine)
    assert_near(out, oracle.attention(q, k, v, mask=mask, scale=1.0), 1e-12)


@pytest.mark.parametrize("engine", ["reference", "chunked", "fused", "gather", "slices"])
@pytest.mark.parametrize(("batch", "n_queries", "n_keys"), [(2, 0, 4), (2, 3, 0), (0, 3, 4), (2, 0, 0)])
def test_empty_calls(engine: str, batch: int, n_queries: int, n_keys: int) -> None:
    q, k, v = qkv(n_queries, n_keys, batch=batch, value_width=5)
    index = torch.zeros(1, 1, n_queries, 0 if n_keys == 0 else 1, dtype=torch.long)
    tiles = Blocks(torch.ones(1, 1, -(-n_queries // 2), -(-n_keys // 2), dtype=torch.bool), (2, 2), n_queries, n_keys)
    selection = {"gather": Indices(index, n_queries, n_keys), "slices": tiles}.get(engine)
    problem = AttentionCall(q, k, v, 1.0, selected=selection)
    assert engines.plan(problem, engine).density <= 1
    out = engines.run(problem, engine)
    assert out.shape == (batch, 4, n_queries, 5)
    assert n_keys or torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("engine", ["auto", "reference", "chunked", "fused", "gather", "slices"])
@pytest.mark.parametrize("grad", [False, True])
def test_hidden_garbage_never_leaks(engine: str, grad: bool) -> None:
    q, k, v = qkv(9, grad=True)
    seen = masks.causal(9, 9)
    seen[:, 3] = False
    dirty_k, dirty_v = k.detach().clone(), v.detach().clone()
    dirty_k[:, :, 3], dirty_v[:, :, 3] = float("nan"), float("inf")
    selection = window(9, 9, 4, 0, q.device) if engine in SPARSE else None
    clean = engines.run(AttentionCall(q, k, v, 1.0, seen, selected=selection), "auto")
    dirty = AttentionCall(q, dirty_k.requires_grad_(), dirty_v.requires_grad_(), 1.0, seen, selected=selection)
    out = engines.run(dirty, engine)
    assert_near(out, clean, 1e-12)
    if not grad:
        with torch.no_grad():
            assert_near(engines.run(dirty, engine), clean, 1e-12)
        return
    pairs = zip(gradients(out, (q, dirty_k, dirty_v)), gradients(clean, (q, k, v)), strict=True)
    for ours, theirs in pairs:
        assert_near(ours, theirs, 1e-12)


@pytest.mark.parametrize("engine", ["reference", "chunked", "fused", "gather", "slices"])
@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("grad", [False, True])
def test_garbage_reaches_only_queries_that_see_it(engine: str, where: str, grad: bool) -> None:
    clean = qkv(9, kv_heads=4, grad=True)
    q, k, v = (x.detach().clone() for x in clean)
    {"k": k, "v": v}[where][:, :, 4] = float("nan")
    selection = window(9, 9, 3, 0, q.device) if engine in SPARSE else None
    inputs = [x.requires_grad_(grad) for x in (q, k, v)]
    out = engines.run(AttentionCall(*inputs, 1.0, causal=True, selected=selection), engine)
    expected = engines.run(AttentionCall(*clean, 1.0, causal=True, selected=selection), "reference")
    sees = slice(4, 7) if engine in SPARSE else slice(4, None)
    assert out[:, :, sees].isnan().all()
    blind = [i for i in range(9) if i not in range(9)[sees]]
    assert_near(out[:, :, blind], expected[:, :, blind], 1e-12)
    if grad and where == "v":  # rows whose weights are NaN have no gradient that is not
        pairs = zip(gradients(out[:, :, blind], inputs), gradients(expected[:, :, blind], clean), strict=True)
        for ours, theirs in pairs:
            ours, theirs = (x[:, :, :4] for x in (ours, theirs))
            assert_near(ours, theirs, 1e-12)


def test_garbage_in_a_query_stays_in_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(9)
    q[:, :, 3] = float("nan")
    monkeypatch.setattr(chunked, "attend", None)  # it is not needed
    out = engines.run(AttentionCall(q, k, v, 1.0, masks.causal(9, 9)))
    assert out[:, :, 3].isnan().all()
    assert out[:, :, [i for i in range(9) if i != 3]].isfinite().all()


def plain(n: int, device: str = "cpu", grad: bool = False) -> AttentionCall:
    x = torch.zeros(1, 1, n, 4, device=device, requires_grad=grad)
    return AttentionCall(x, x, x, 1.0, causal=True)


def by_head(n: int, heads: int = 4, tile: int = 64) -> AttentionCall:
    """Make a selection in which every head chooses its own eighth of the blocks."""
    random = torch.Generator().manual_seed(2)
    chosen = torch.rand(1, heads, n // tile, n // tile, generator=random) < 1 / 8
    q, k, v = qkv(n, batch=1, heads=heads, kv_heads=heads, width=4, dtype=torch.float32)
    return AttentionCall(q, k, v, 1.0, None, True, Blocks(chosen, (tile, tile), n, n))


def flex_machine() -> machine.Machine:
    """Make a machine on which FlexAttention takes a thousandth of the time of gathering, and that one of slices."""
    rates = {f"{name} float32 {way}": Work(products=cost) for way in ("forward", "backward")
             for name, cost in (("slices", 1.0), ("gather", 1e-3), ("flex", 1e-6))}  # fmt: skip
    return machine.Machine(rates)


def test_auto_chooses_by_the_call() -> None:
    device = torch.device("cpu")
    banded = replace(plain(8192), selected=window(8192, 8192, 64, 0, device))
    listed = replace(plain(8192), selected=Indices(torch.zeros(1, 1, 8192, 1, dtype=torch.long), 8192, 8192))
    short = replace(plain(64), selected=window(64, 64, 8, 0, device))
    assert engines.choose(plain(64))[0] == engines.choose(plain(8192))[0] == "fused"
    assert engines.choose(banded)[0] == engines.choose(short)[0] == "slices"
    assert "of which 100%" in engines.choose(replace(banded, selected=window(8192, 8192, 1024, 0, device)))[1]
    assert "of which 9" in engines.choose(replace(banded, selected=window(8192, 8192, 1024, 4, device)))[1]
    assert engines.choose(listed)[0] == engines.choose(by_head(512))[0] == "gather"
    assert engines.choose(replace(short, q=short.q[:, :, -8:], selected=window(8, 64, 8, 0, device)))[0] == "gather"
    wide = replace(banded, selected=window(8192, 8192, 1024, 0, device))  # for a narrow one both engines take as long
    assert engines.choose(replace(wide, mask=torch.ones(1, 8192)))[0] == "slices"
    assert engines.choose(replace(wide, q=wide.q.clone().requires_grad_()))[0] == "slices"
    assert engines.choose(replace(plain(64), scoring=Capped()))[0] == "reference"
    assert engines.choose(replace(plain(2048), scoring=Capped()))[0] == "chunked"


def test_flex_serves_repeated_long_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of another length may be of the same kind; plans and calls with gradients do not count."""
    monkeypatch.setattr(machine, "current", flex_machine)
    monkeypatch.setattr(flex, "has_compiler", lambda: True)
    monkeypatch.setattr(engines, "LONG", 256)
    monkeypatch.setattr(engines, "_came", Counter())
    ran: list[int] = []
    monkeypatch.setattr(flex, "attend", lambda problem: ran.append(problem.n_queries) or gather.attend(problem))
    for n in (320, 512, 448):
        for _ in range(5):
            assert engines.plan(by_head(n)).engine == "gather"
        engines.run(by_head(128))
        engines.run(by_head(n))
    assert not ran
    with pytest.warns(UserWarning, match="compiling FlexAttention, once, for calls with 4 heads"):
        engines.run(by_head(384))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engines.run(by_head(512))
    assert ran == [384, 512]
    training = by_head(256)
    training.q.requires_grad_()
    assert engines.choose(training)[0] == "gather"
    assert "no backward pass" in engines.choose(training)[1]


def test_blocks_that_heads_share_are_never_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of the same shapes as calls with blocks per head, which have come often, stays with slices."""
    monkeypatch.setattr(flex, "has_compiler", lambda: True)
    monkeypatch.setattr(engines, "LONG", 256)
    own = by_head(512)
    monkeypatch.setattr(engines, "_came", Counter({engines._kind(own): engines.OFTEN + 1}))
    shared = replace(own, selected=replace(own.selected, blocks=own.selected.blocks[:, :1]))
    assert engines._kind(shared) == engines._kind(own)
    monkeypatch.setattr(machine, "current", flex_machine)
    assert engines.choose(own)[0] == "flex"
    assert engines.choose(shared)[0] == "gather"
    engines.run(shared)
    assert engines._came[engines._kind(own)] == engines.OFTEN + 1


def test_slices_of_a_window_cost_its_keys() -> None:
    """A window's work and memory, forward and backward, are those of its keys."""
    n, size = 2048, 128
    q, k, v = qkv(n, batch=1, heads=1, kv_heads=1, width=4, dtype=torch.float32, grad=True)
    problem = AttentionCall(q, k, v, 1.0, None, True, window(n, n, size, 4, q.device))
    assert n * size < slices.pairs(problem.selection, True) < 3 * n * size
    assert peak_bytes(lambda: slices.attend(problem).sum().backward(), q.device) < 4 * n**2 / 4


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_slices_with_the_same_pairs_have_a_mask_of_their_own(kind: str) -> None:
    """The runs of a window see the same pairs, and share a bias only if the caller has no mask."""
    q, k, v = qkv(1024, batch=1, heads=1, kv_heads=1, width=4, dtype=torch.float32)
    draw = torch.rand(1024, 1024, generator=torch.Generator().manual_seed(0))
    mask = draw > 0.5 if kind == "bool" else 3 * draw
    problem = AttentionCall(q, k, v, 1.0, mask, True, window(1024, 1024, 100, 0, q.device))
    assert_near(slices.attend(problem), engines.run(problem, "reference"), 1e-5)


@pytest.mark.parametrize("sinks", [0, 2])
def test_slices_do_not_copy_keys(sinks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that sees one range of keys reads the caller's memory; sinks are a separate range."""
    seen: list[tuple[int, int]] = []
    kernel = F.scaled_dot_product_attention

    def spy(q, k, v, *args, **kwargs):
        seen.append((k.untyped_storage().data_ptr(), k.shape[2]))
        return kernel(q, k, v, *args, **kwargs)

    q, k, v = qkv(1024, batch=1, heads=1, kv_heads=1, width=4, dtype=torch.float32)
    problem = AttentionCall(q, k, v, 1.0, None, True, window(1024, 1024, 100, sinks, q.device))
    expected = engines.run(problem, "reference")
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    assert_near(slices.attend(problem), expected, 1e-5)
    assert max(width for _, width in seen) == runs.TALL + 99 + sinks
    copied = [where != k.untyped_storage().data_ptr() for where, _ in seen]
    assert copied == [sinks > 0 and i > 0 for i in range(len(seen))]


@pytest.mark.parametrize(
    ("engine", "change", "message"),
    [
        ("fused", {"scoring": Capped()}, "softmax over dot products only"),
        ("fused", {"selected": window(64, 64, 8, 0, torch.device("cpu"))}, "waste the selection"),
        ("gather", {}, "needs a selection"),
        ("gather", {"scoring": Capped()}, "softmax over dot products only"),
        ("flex", {}, "needs a selection of blocks"),
        ("slices", {}, "needs a selection of blocks"),
        ("slices", {"scoring": Capped()}, "softmax over dot products only"),
        ("flex", {"selected": window(64, 64, 8, 0, torch.device("cpu")), "mask": torch.ones(64)}, "no tensor mask"),
        ("chunked", {"dropout": 0.5}, "cannot drop any"),
    ],
)
def test_an_engine_refuses_unsupported_calls(engine: str, change: dict, message: str) -> None:
    problem = replace(plain(64), **change)
    for call in (engines.run, engines.plan):
        with pytest.raises(UnsupportedEngine, match=message) as caught:
            call(problem, engine)
        assert f'engine="{engine}"' in str(caught.value)


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(UnknownKey, match='unknown engine "fuse"; did you mean "fused"'):
        engines.run(plain(4), "fuse")


def test_a_selection_for_another_call_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"selection is for \(Nq, Nk\)=\(8, 8\); the call has \(9, 9\)"):
        replace(plain(9), selected=window(8, 8, 2, 0, torch.device("cpu")))


def test_a_plan_counts_computed_pairs() -> None:
    whole, half = engines.plan(replace(plain(512), causal=False)), engines.plan(plain(512))
    assert whole.flops == 2 * 512 * 512 * 8
    assert half.flops == 2 * 512 * 513 // 2 * 8
    assert whole.bytes == 4 * 512 * 4 * 4
    assert whole.density == half.density == 1.0
    one = AttentionCall(torch.zeros(1, 2, 1, 4), *torch.zeros(2, 1, 1, 512, 4), 1.0, causal=True)
    few = replace(one, selected=Indices(torch.arange(16)[None, None, None], 1, 512))
    assert engines.plan(few).density == 16 / 512
    assert engines.plan(few).bytes == 4 * (8 + 8 + 2 * 16 * 4)
    assert "gather" in str(engines.plan(few))


@pytest.mark.parametrize(("engine", "form"), [("gather", "blocks"), ("gather", "indices"), ("slices", "blocks")])
def test_a_sparse_engine_never_makes_the_matrix(engine: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError("a sparse call made its dense mask")

    monkeypatch.setattr(Blocks, "dense", refuse)
    monkeypatch.setattr(Indices, "dense", refuse)
    q, k, v = qkv(9)
    for mask in (None, a_mask("bias", 9, 9)):
        engines.run(AttentionCall(q, k, v, 1.0, mask, True, a_selection(form, 2, 9, 9)), engine)


def test_without_a_compiler_flex_is_skipped_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window needs no compiler and gives no warning."""
    banded = replace(plain(8192), selected=window(8192, 8192, 64, 0, torch.device("cpu")))
    monkeypatch.setattr(engines, "LONG", 256)
    monkeypatch.setattr(flex.shutil, "which", lambda name: None)
    flex.has_compiler.cache_clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert engines.choose(banded)[0] == "slices"
        with pytest.warns(UserWarning, match=r"no C\+\+ compiler"):
            assert engines.choose(by_head(256))[0] == "gather"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert engines.choose(by_head(256))[0] == "gather"
        with pytest.raises(UnsupportedEngine, match="no C"):
            engines.plan(banded, "flex")
    finally:
        flex.has_compiler.cache_clear()


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> AttentionCall:
    """Make a call that `auto` runs in FlexAttention."""
    problem = by_head(256)
    monkeypatch.setattr(machine, "current", flex_machine)
    monkeypatch.setattr(flex, "has_compiler", lambda: True)
    monkeypatch.setattr(flex, "_failures", [])
    monkeypatch.setattr(engines, "LONG", 1)
    monkeypatch.setattr(engines, "_came", Counter({engines._kind(problem): engines.OFTEN + 1}))
    assert engines.choose(problem)[0] == "flex"
    return problem


def test_flex_is_never_run_uncompiled(repeated: AttentionCall, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled FlexAttention would attend to every key: `auto` gathers instead, and the named engine raises."""
    monkeypatch.setattr(flex, "_compiled", lambda: flex._kernel)
    assert_near(engines.run(repeated), engines.run(repeated, "reference"), 1e-5)
    with pytest.raises(UnsupportedEngine, match="needs torch.compile"):
        engines.run(repeated, "flex")


def test_a_broken_compiler_counts_as_missing(repeated: AttentionCall, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise TorchDynamoException("CppCompileError: C++ compile error\n\nCommand:\ng++ main.cpp")

    monkeypatch.setattr(flex, "_compiled", lambda: fail)
    expected = engines.run(repeated, "reference")
    with pytest.warns(UserWarning, match=r"could not be compiled: CppCompileError.* error; the flex engine is skipped"):
        assert_near(engines.run(repeated), expected, 1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert engines.choose(repeated)[0] == "gather"
        assert_near(engines.run(repeated), expected, 1e-5)
    with pytest.raises(UnsupportedEngine, match="could not be compiled") as caught:
        engines.run(repeated, "flex")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.skipif(not flex.has_compiler(), reason="needs a C++ compiler")
def test_a_compiler_that_fails_is_noticed(repeated: AttentionCall) -> None:
    from torch._inductor import config

    torch._dynamo.reset()
    flex._compiled.cache_clear()
    with (
        config.patch({"cpp.cxx": ("/bin/false",), "fx_graph_cache": False}),
        pytest.warns(UserWarning, match="skipped"),
    ):
        assert_near(engines.run(repeated), engines.run(repeated, "reference"), 1e-5)
    flex._compiled.cache_clear()


@pytest.mark.slow
@pytest.mark.skipif(not flex.has_compiler(), reason="needs a C++ compiler")
def test_one_kernel_serves_many_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setattr(flex, "_failures", [])
    flex._compiled.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    for n in (300, 512, 333, 257):
        q, k, v = qkv(n, batch=1, heads=2, kv_heads=2, width=16, dtype=torch.float32)
        problem = AttentionCall(q, k, v, 1.0, None, True, window(n, n, 40, 3, q.device))
        assert_near(engines.run(problem, "flex"), engines.run(problem, "reference"), 1e-5)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.skipif(not flex.has_compiler(), reason="needs a C++ compiler")
def test_flex_limits_compiled_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*lengths: int) -> None:
        for n in lengths:
            q, k, v = qkv(n, dtype=torch.float32)
            engines.run(AttentionCall(q, k, v, 1.0, None, True, window(n, n, 7, 0, q.device)), "flex")

    monkeypatch.setattr(flex, "COMPILED", 1)
    with pytest.raises(flex.NotCompiled, match="1 different calls"):
        run(33, 65, 97)


@pytest.mark.slow
@pytest.mark.skipif(not flex.has_compiler(), reason="needs a C++ compiler")
@pytest.mark.parametrize("per_head", [False, True])
def test_compiled_flex_is_the_oracle(per_head: bool) -> None:
    q, k, v = qkv(200, 330, width=16, dtype=torch.float32)
    if per_head:
        chosen = torch.rand(1, 4, 4, 6, generator=torch.Generator().manual_seed(2)) > 0.5
        chosen[:, 1, 0] = False  # queries that see nothing
        selection = Blocks(chosen, (64, 64), 200, 330)
    else:
        selection = window(200, 330, 40, 3, q.device)
    out = engines.run(AttentionCall(q, k, v, 0.25, None, True, selection), "flex")
    assert_near(out, oracle.attention(q, k, v, mask=selection.dense(), causal=True), 1e-5)


def test_fused_equals_torch() -> None:
    q, k, v = qkv(9, kv_heads=4, dtype=torch.float32)
    out = engines.run(AttentionCall(q, k, v, 8**-0.5, causal=True))
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, is_causal=True))
