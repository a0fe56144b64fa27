"""Several threads on one model in one block each get the same results as alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Thread

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, TextIteratorStreamer

import foveate
from foveate.core.errors import OptionError
from foveate.host import Method, apply
from foveate.kv.duo_attention import DuoAttention
from foveate.kv.recycled_attention import RecycledAttention
from foveate.kv.sink_recent import SinkRecent
from foveate.kv.tidal_decode import TidalDecode
from foveate.kv.token_select import TokenSelect
from tests.support.host_models import model, tokens
from tests.support.lab import lab

GATES = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
METHODS: dict[str, Callable[[], list[Method]]] = {
    "no method": list,
    "packed": lambda: [foveate.Packed()],
    "sink_recent": lambda: [SinkRecent(2, 6)],
    "duo_attention": lambda: [DuoAttention(GATES, 0.5, 2, 6)],
    "token_select": lambda: [TokenSelect(2, 4, 4)],
    "tidal_decode": lambda: [TidalDecode(8, 1, ())],
    "recycled_attention": lambda: [RecycledAttention(8, 4)],
}


def decoded(ids: Tensor, meet: Barrier | None = None) -> tuple[Tensor, DynamicCache]:
    """Take greedy steps on a new cache. Threads with a barrier take every step at the same time."""
    llama, cache, piece, out = model("llama"), DynamicCache(), ids, []
    with torch.no_grad():
        for _ in range(12):
            if meet is not None:
                meet.wait(timeout=60)
            out.append(llama(piece, past_key_values=cache).logits[:, -1:])
            piece = out[-1].argmax(-1)
    return torch.cat(out, 1), cache


@pytest.mark.parametrize("kind", METHODS)
def test_threads_do_not_see_each_other(kind: str) -> None:
    prompts = [tokens(1, 20, seed=1), tokens(2, 31, seed=2)]
    separate, kept = [], []
    for ids in prompts:
        with apply(model("llama"), *METHODS[kind]()) as run:
            logits, cache = decoded(ids)
            separate.append(logits)
            kept.append(run.stats.of(cache).kept)
    meet = Barrier(2)
    with apply(model("llama"), *METHODS[kind]()) as run, ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda ids: decoded(ids, meet), prompts))
        for (logits, cache), expected, share in zip(together, separate, kept, strict=True):
            assert torch.equal(logits, expected)
            assert run.stats.of(cache).kept == share
        assert run.stats.calls == 2 * 12 * 3


def test_another_thread_may_not_enter_a_run() -> None:
    llama = model("llama")
    with apply(llama, SinkRecent(2, 6)), ThreadPoolExecutor(1) as pool:
        with pytest.raises(OptionError, match="another thread is inside foveate.apply"):
            pool.submit(lambda: apply(llama, SinkRecent(2, 6)).__enter__()).result(timeout=60)
        with apply(llama):  # the same thread nests
            decoded(tokens(1, 5))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: apply(llama, SinkRecent(2, 6)).__enter__().__exit__(None, None, None)).result(timeout=60)


def test_a_streamer_reads_while_a_worker_generates() -> None:
    subject, tokenizer = lab()
    inputs = tokenizer("The lamp is green. " * 4, return_tensors="pt")
    with apply(subject, SinkRecent(4, 32)):
        made = subject.generate(**inputs, max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(made[0, inputs.input_ids.shape[1] :])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    with apply(subject, SinkRecent(4, 32)) as run:
        options = dict(**inputs, streamer=streamer, max_new_tokens=12, do_sample=False)
        worker = Thread(target=subject.generate, kwargs=options)
        worker.start()
        assert "".join(streamer) == expected
        worker.join(timeout=60)
        assert run.stats.kept < 0.5
