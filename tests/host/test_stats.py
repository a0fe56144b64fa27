"""A run counts by layer, by cache and over all calls, while it runs."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from foveate.host import Method, Site, apply
from foveate.host.cache_contents import held
from foveate.kv.duo_attention import DuoAttention
from foveate.kv.sink_recent import SinkRecent
from tests.support.host_models import Reads, Recent, feed, model, tokens

GATES = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
SLOT = 2 * 8 * 4  # bytes: a key and a value of width 8 in float32


@torch.no_grad()
def test_by_layer() -> None:
    """Layers with heads that keep everything and layers with a window have different counts."""
    llama, cache = model("llama"), DynamicCache()
    with apply(llama, DuoAttention(GATES, 0.5, 2, 6)) as run:
        feed(llama, tokens(2, 24), torch.ones(2, 24, dtype=torch.long), [20, 1, 1, 1, 1], cache)
        rows = run.stats.table()
        stored = [2 * 2 * 24, 2 * (8 + 24), 2 * 2 * 8]
        assert [row["layer"] for row in rows] == [0, 1, 2] and [row["calls"] for row in rows] == [5] * 3
        assert [row["kept"] for row in rows] == [count / (2 * 2 * 24) for count in stored]
        assert [row["bytes"] for row in rows] == [count * SLOT for count in stored]
        assert rows[0]["read"] == 1.0
        shares = [9 / (20 + step) for step in range(1, 5)]  # the tokens of the streaming heads, and the new one
        assert rows[2]["read"] == pytest.approx(sum(shares) / 4)
        assert rows[1]["read"] == pytest.approx((1.0 + rows[2]["read"]) / 2)
        assert run.stats.read == pytest.approx(sum(row["read"] for row in rows) / 3)
        assert run.stats.cache_bytes == sum(row["bytes"] for row in rows)
        assert run.stats.seconds == pytest.approx(sum(row["seconds"] for row in rows)) and run.stats.seconds > 0


@torch.no_grad()
def test_by_cache_and_over_all() -> None:
    llama, short, long = model("llama"), DynamicCache(), DynamicCache()
    with apply(llama, SinkRecent(2, 6)) as run:
        llama(tokens(1, 10), past_key_values=short)
        llama(tokens(1, 40), past_key_values=long)
        llama(tokens(1, 1), past_key_values=short)
        assert run.stats.of(short).kept == 8 / 11 and run.stats.of(long).kept == 8 / 40
        assert run.stats.kept == run.stats.of(short).kept  # the one that was used last
        assert run.stats.calls == 3 * 3
        assert [run.stats.of(cache).layers[0].calls for cache in (short, long)] == [2, 1]
        assert run.stats.read == run.stats.of(short).read == 9 / 11
        assert run.stats.of(DynamicCache()).layers == {}
        assert run.stats.cache_peak == 2 * SLOT * (2 * 8 + 40)  # the last layer of the long text, before it drops
    assert run.stats.of(long).cache_bytes == 3 * 2 * 8 * SLOT


@torch.no_grad()
def test_readable_while_it_runs() -> None:
    """A method, and so any other thread, can read the statistics between two layers."""
    llama, calls = model("llama"), []
    reads = Reads(lambda site: calls.append(run.stats.calls))
    with apply(llama, reads) as run:
        llama(tokens(1, 9))
        llama(tokens(1, 9))
    assert calls == list(range(6))


@pytest.mark.parametrize("method", [None, Recent(6), DuoAttention(GATES, 0.5, 2, 6)])
@torch.no_grad()
def test_counts_agree_with_the_contents_of_the_cache(method: Method | None) -> None:
    """They agree inside the block and after it, for every kind of layer."""
    llama, cache = model("llama"), DynamicCache()
    with apply(llama, *[method] if method else []) as run:
        llama(tokens(2, 24), past_key_values=cache)
        inside = held(cache)
        assert inside.kept == run.stats.kept
    assert held(cache).kept == inside.kept and held(cache).stored * SLOT == run.stats.cache_bytes
    assert held(cache).nbytes == sum(
        tensor.nbytes for layer in cache.layers for tensor in _tensors(layer)
    ) <= inside.nbytes  # fmt: skip


def _tensors(layer: object) -> list[torch.Tensor]:
    store = getattr(layer, "store", None)
    if store is None:
        return [layer.keys, layer.values]  # type: ignore[attr-defined]
    return [tensor for group in store.groups for tensor in (group._buffer.k, group._buffer.v)]


@torch.no_grad()
def test_statistics_are_those_of_the_decoder_not_the_encoder() -> None:
    bart = model("bart")
    with apply(bart, Recent(3)) as run:
        bart.generate(tokens(2, 9), max_new_tokens=12, min_new_tokens=12, do_sample=False)
        assert run.stats.kept == 3 / 12 and len(run.stats.layers) == 2


@torch.no_grad()
def test_a_static_cache_counts_all_its_memory() -> None:
    llama = model("llama")
    seen: list[Site] = []
    with apply(llama, Reads(seen.append)) as run:
        llama.generate(tokens(1, 10), max_new_tokens=4, do_sample=False, cache_implementation="static")
        assert run.stats.kept == 1.0
        assert run.stats.cache_bytes == 3 * 2 * SLOT * int(seen[-1].cache.layers[0].keys.shape[2])
