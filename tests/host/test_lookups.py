"""The slots that the last queries look up, beside the whole matrix, and whether the same heads see them in a run."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from foveate.core.selection import Indices, Selection
from foveate.host import Method, Site, apply, lookups
from foveate.host.lookups import LookUpReader, LookUps, VisibilityReader
from foveate.kv import DuoAttention, SinkRecent
from foveate.ops import HiP
from tests.support.lab import lab, lab_host

IDS = torch.randint(97, 120, (1, 90), generator=torch.Generator().manual_seed(0))
ANSWER = torch.randint(97, 120, (1, 4), generator=torch.Generator().manual_seed(1))


def look(first: int = 4, last: int = 60, **options: float) -> LookUps:
    reader = LookUpReader(4, first, last, **options)  # type: ignore[arg-type]
    model, _ = lab()
    with torch.inference_mode(), apply(model, reader):
        model(torch.cat([IDS, ANSWER[:, :-1]], 1), past_key_values=DynamicCache(config=model.config))
    return reader.found()


def whole() -> Tensor:
    """Return the weights `(layers, heads, 4, 93)` of the last four queries, from the whole matrix."""
    model, _ = lab()
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            found = model(torch.cat([IDS, ANSWER[:, :-1]], 1), output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    return torch.stack([each[0, :, -4:] for each in found])


def watch(*methods: Method, wanted: LookUps) -> Tensor:
    """Return whether a run on the same tokens sees the look-ups."""
    model, _ = lab()
    reader, cache = VisibilityReader(wanted, IDS.shape[1]), DynamicCache(config=model.config)
    with torch.inference_mode(), apply(model, *methods, reader):
        for piece in (IDS, *ANSWER[:, :-1].split(1, 1)):
            model(piece, past_key_values=cache)
    return reader.seen


def test_look_ups_are_the_largest_weights_of_the_matrix() -> None:
    found, weights = look(least=0.01), whole()
    expected = weights[found.layer, found.head, found.step, found.slot]
    torch.testing.assert_close(found.mass, expected, rtol=1e-3, atol=1e-5)
    far = weights.clone()
    far[..., :4], far[..., 60:] = 0.0, 0.0
    top = far.topk(8, -1).values
    assert len(found) == int((top >= 0.01).sum()) > 20
    assert found.mass.sum() == pytest.approx(top[top >= 0.01].sum().item(), rel=1e-3)
    assert ((found.slot >= 4) & (found.slot < 60)).all()


def test_only_the_rows_of_those_queries_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, original = [], lookups.weight_tile

    def counted(site: Site, some: slice) -> object:
        rows.append((some, site.q.shape[2]))
        return original(site, some)

    monkeypatch.setattr(lookups, "weight_tile", counted)
    found = look()
    assert rows and all(some == slice(n - 4, n) for some, n in rows)
    watch(wanted=found)
    assert all(some.stop - some.start == 1 for some, _ in rows[len(rows) // 2 :])


def every(slots: list[int]) -> LookUps:
    """Return an entry for each layer, head, query and slot."""
    host = lab_host()
    parts = torch.cartesian_prod(
        torch.arange(host.layers), torch.arange(host.heads), torch.arange(4), torch.tensor(slots)
    )
    return LookUps(*parts.unbind(1), torch.ones(len(parts)))


def test_the_full_cache_sees_everything() -> None:
    assert watch(wanted=look()).unique().tolist() == [1]


def test_an_evicted_slot_is_not_seen() -> None:
    """The prompt's last query sees all; later ones see sinks and the last tokens before the call, and themselves."""
    wanted = every([0, 3, 4, 30, 69, 70, 72, 89])
    seen = watch(SinkRecent(4, 20), wanted=wanted).bool()
    # after the call that ends at position p, the positions above p - 20 are kept; the next query sees them
    newest = wanted.slot >= IDS.shape[1] + wanted.step - 1 - 20
    expected = (wanted.step == 0) | (wanted.slot < 4) | newest
    assert torch.equal(seen, expected) and 0 < seen.sum() < len(wanted)


def test_heads_are_told_apart() -> None:
    host = lab_host()
    gates = torch.zeros(host.layers, host.kv_heads)
    gates[1, 0] = gates[2, 1] = 1.0
    sparsity = 1 - 2 / gates.numel()
    wanted = every([30])
    seen = watch(DuoAttention(gates, sparsity=sparsity, sink=4, recent=20), wanted=wanted).bool()
    group = host.heads // host.kv_heads
    full = gates.bool()[wanted.layer, wanted.head // group]
    assert torch.equal(seen, full | (wanted.step == 0)) and full.any()


@dataclass(eq=False)
class Even(Method):
    """Lets queries see only slots with an even position, and heads of the second half none but the first."""

    def select(self, site: Site) -> Selection | None:
        keys = site.k.shape[2]
        index = torch.arange(0, keys, 2).expand(1, site.q.shape[1], 1, -1).clone()
        index[:, site.q.shape[1] // 2 :] = 0
        return Indices(index, site.q.shape[2], keys, None, site.q.shape[2])


def test_a_slot_that_is_not_selected_is_not_seen() -> None:
    wanted = every([0, 30, 31, 50])
    seen = watch(Even(), wanted=wanted).bool()
    upper = wanted.head >= lab_host().heads // 2
    assert torch.equal(seen, ((wanted.slot % 2 == 0) & ~upper) | (wanted.slot == 0))


def test_what_an_operator_reads_is_unknown() -> None:
    wanted = every([30])
    model, _ = lab()
    reader, cache = VisibilityReader(wanted, IDS.shape[1]), DynamicCache(config=model.config)
    with torch.inference_mode(), apply(model, HiP(keep=32), reader):
        for piece in (IDS, *ANSWER[:, :-1].split(1, 1)):
            model(piece, past_key_values=cache)
    assert reader.seen[wanted.step == 0].unique().tolist() == [-1]
    assert reader.seen[wanted.step > 0].unique().tolist() == [1]
