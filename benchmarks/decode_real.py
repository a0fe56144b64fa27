"""Decoding a pretrained model: what each cache policy saves of the time per token, next to the ideal and to kvpress.

The contenders take turns, block by block, each on its own copy of one densely read prompt. The ideal is the model on a
plain cache of the kept length with packed heads; a policy's figure is the share of the ideal saving that it reaches,
from `(plain - policy) / (plain - ideal)` of the time in the attention modules. That is where the saving is: on a small
model the rest of a token takes most of the time, is the same for all, and its noise would hide the difference. Goals:
at least 0.85 at 4,096 tokens and more, never slower than plain, and ahead of kvpress' same method, which drops nothing
after the prompt. `apply` without a method stays within 1 % of a token's time.

kvpress needs transformers before 5.3, so that it runs in a process of its own and in the same turns, next to the plain
model of that process:

    python3 -m venv OTHER && OTHER/bin/pip install torch==2.13.0 kvpress 'transformers<5.3'
    python benchmarks/decode_real.py --kvpress OTHER/bin/python
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
import foveate
from _kvpress_worker import Clock, Worker, attention_modules
from _report import finish
from foveate.bench.loading import load
from foveate.core.catalog import system
from foveate.host import Host, Method
from foveate.tasks.parts.corpus import text
from real.fetch import MODELS

POLICIES = ("sink_recent", "razor_attention", "duo_attention", "token_select", "tidal_decode", "recycled_attention")
#: What kvpress does: nothing is dropped after the prompt.
AFTER = "sink_recent, evict after prompt"
#: Decodes a block: for each token its seconds, and those in attention.
Block = Callable[[], list[tuple[float, float]]]


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    name = options.model or str(MODELS["qwen2.5-coder-0.5b-instruct"].file)
    rows, ratios = [], {}
    model, tokenizer, _ = load(name, dtype="float32")
    prompt = tokenizer(text("heldout"), return_tensors="pt").input_ids
    caches = _read(model, prompt, options.lengths)
    if options.kvpress:  # another version of transformers reads a plain folder
        options.folder = tempfile.mkdtemp()
        model.save_pretrained(options.folder)
    for dtype in options.dtypes:
        model, _, _ = load(name, dtype=dtype)
        for length in options.lengths:
            for budget in options.budgets:
                blocks = _contenders(model, prompt[:, :length], caches[length], budget, options)
                times = _in_turns(blocks, options.rounds)
                more, figures = _figures(times, f"{dtype} {length} at {budget}")
                rows += more
                ratios |= figures
                print(f"done: {dtype}, {length} tokens, budget {budget}", file=sys.stderr)
    finish(rows, ratios)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or GGUF file; default: Qwen2.5-Coder 0.5B as `make real` keeps it")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192, 16384])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25, 0.1])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--steps", type=int, default=12, help="timed tokens in a block")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--kvpress", help="a Python that has kvpress")
    parser.add_argument("--kvpress-up-to", type=int, default=4096, help="longest prompt that it reads, twice each time")
    return parser.parse_args()


@torch.inference_mode()
def _read(model: PreTrainedModel, prompt: Tensor, lengths: list[int]) -> dict[int, DynamicCache]:
    """The caches of the prompt's first tokens, read once and in float32: many processors read halves slowly."""
    cache = DynamicCache(config=model.config)
    for piece in prompt[:, : max(lengths)].split(1024, 1):
        model(piece, past_key_values=cache, logits_to_keep=1)
    return {length: _first(cache, length, torch.float32) for length in lengths}


def _first(cache: DynamicCache, tokens: int, dtype: torch.dtype) -> DynamicCache:
    """A copy of a cache's first tokens."""
    other = copy.deepcopy(cache)
    for layer in other.layers:
        layer.keys, layer.values = (x[:, :, :tokens].to(dtype, copy=True) for x in (layer.keys, layer.values))
        layer.dtype = dtype
    return other


def _contenders(
    model: PreTrainedModel, ids: Tensor, read: DynamicCache, budget: float, options: argparse.Namespace
) -> dict[str, Block]:
    """The contenders by name: a function that decodes a block and gives its seconds per token."""
    length = ids.shape[1]
    cache = _first(read, length - 2, model.dtype)  # the first step reads the prompt's last two tokens
    short = _first(read, max(1, round(budget * length) - 2), model.dtype)
    run = lambda *chosen: lambda: _block(model, ids, options.steps, *chosen)  # noqa: E731
    blocks = {
        "plain": run(None, cache),
        "apply": run((), cache),
        "packed": run((foveate.Packed(),), cache),
        "ideal": run((foveate.Packed(),), short),
    }
    for key in options.policies:
        blocks[key] = run((foveate.Packed(), _policy(key, model, budget, length)), cache)
    blocks[AFTER] = run((_policy("sink_recent", model, budget, length),), cache, "after prompt")
    if options.kvpress and length <= options.kvpress_up_to:
        worker = Worker(options.kvpress, options.folder, str(model.dtype).removeprefix("torch."), ids, budget, options)
        blocks["kvpress: plain"] = partial(worker.block, "plain")
        blocks["kvpress: StreamingLLM"] = partial(worker.block, "pressed")
    return blocks


def _policy(key: str, model: PreTrainedModel, budget: float, length: int) -> Method:
    """A policy at its budget. Speed hangs on how many heads keep all, not on which: gates are drawn by number."""
    cls, host = system(key).load(), Host(model)
    learnt = {}
    if key == "duo_attention":
        shape = (host.layers, host.kv_heads)
        learnt = {"gates": torch.rand(shape, generator=torch.Generator().manual_seed(0))}
    if key == "razor_attention":
        shape = (host.layers, host.heads)
        draw = torch.Generator().manual_seed(0)
        learnt = {kind: torch.rand(shape, generator=draw) for kind in ("echo", "induction")}
    return cls.at_budget(budget, host, length, **learnt)


@torch.inference_mode()
def _block(
    model: PreTrainedModel, ids: Tensor, steps: int, methods: tuple[Method, ...] | None, past: DynamicCache,
    evict: str = "always",
) -> list[tuple[float, float]]:  # fmt: skip
    """Decode on a copy of the cache: seconds of each step after the first three, in which methods evict and choose."""
    cache, token, seconds = copy.deepcopy(past), ids[:, -2:], []
    applied = nullcontext() if methods is None else foveate.apply(model, *methods, evict=evict)
    with Clock(attention_modules(model)) as clock, applied:
        clock.close_after()
        for _ in range(steps + 3):
            begun, before = time.perf_counter(), clock.seconds
            logits = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
            seconds.append((time.perf_counter() - begun, clock.seconds - before))
    return seconds[3:]


def _in_turns(blocks: dict[str, Block], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Each contender's seconds per token and in attention, a median a round; the order turns with every round."""
    names, times = list(blocks), {name: [] for name in blocks}
    for turn in range(rounds):
        for name in names[:: 1 if turn % 2 else -1]:
            times[name].append(tuple(statistics.median(kind) for kind in zip(*blocks[name](), strict=True)))
    return times


def _figures(
    times: dict[str, list[tuple[float, float]]], where: str
) -> tuple[list[dict[str, object]], dict[str, float]]:
    attention = {name: statistics.median(inside for _, inside in found) for name, found in times.items()}
    rows, ratios = [], {}
    for name, found in times.items():
        plain = "kvpress: plain" if name.startswith("kvpress") else "plain"
        paired = [mine / other for (mine, _), (other, _) in zip(found, times[plain], strict=True)]
        ideal = attention["plain"] - attention["ideal"]
        share = (attention["plain"] - attention[name]) / ideal if ideal > 0 else float("nan")
        rows.append(
            {"setting": where, "contender": name, "ms": statistics.median(whole for whole, _ in found) * 1e3}
            | {"of plain": statistics.median(paired), "least": min(paired), "most": max(paired)}
            | {"attention ms": attention[name] * 1e3, "of the ideal saving": share}
        )
        ratios[f"{where}: {name} / plain"] = statistics.median(paired)
        if name not in ("plain", "apply", "packed", "ideal") and ideal > 0:
            ratios[f"{where}: {name}, share of the ideal saving"] = share
    return rows, ratios


if __name__ == "__main__":
    main()
