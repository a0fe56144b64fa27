"""Endless decoding: memory and time per token of every cache policy that can be held to a size.

A model of random weights, 2 layers of 4 heads with 16 channels, reads a prompt and decodes 20,000 tokens. Policies that
rank tokens keep 256 in each head and compress again after every 32 new ones; windows are as long. Printed are the bytes
of the cache at the end and the CPU time per token, each over what it was after a tenth of the run: both goals are 1,
within the machine's noise. CPU time of one thread is what other processes change least. The plain model, whose cache
grows, is shown for comparison over a twentieth of the tokens.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent))
import foveate
from _report import finish
from foveate.bench.policies.shared_prefill import live_bytes
from foveate.core.catalog import cache_policies
from foveate.host import Host, Method
from foveate.kv import ScorePolicy, SinkRecent, StreamingLLM

SIZE, EVERY, PROMPT = 256, 32, 512
#: Policies with tensors that have to be learnt, or that choose once for all layers after a prompt.
LEFT_OUT = ("kvzap", "kvzip", "q_filters", "triattention", "attention_matching")


def main() -> None:
    options = _options()
    torch.set_num_threads(1)  # the tensors are small
    model = _model(options.tokens)
    rows, ratios = [_row("plain", model, None, options.tokens // 20)], {}
    for name, method in _policies(model).items():
        if options.policies and name not in options.policies:
            continue
        row = _row(name, model, method, options.tokens)
        rows.append(row)
        ratios[f"{name}: bytes at the end / after a tenth (goal 1)"] = row["bytes, end / early"]
        ratios[f"{name}: live bytes at the end / after a tenth (goal 1)"] = row["live, end / early"]
        ratios[f"{name}: time per token at the end / after a tenth (goal 1)"] = row["time, end / early"]
        print(f"{name}: {row['time, end / early']:.3f}", file=sys.stderr, flush=True)
    finish(rows, ratios)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--policies", nargs="+", help="keys; default: all")
    return parser.parse_args()


def _model(tokens: int) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=256, max_position_embeddings=2 * (tokens + PROMPT), **sizes)
    return LlamaForCausalLM(config).eval()


def _policies(model: PreTrainedModel) -> dict[str, Method]:
    """Every policy that can be held to a size, at that size."""
    found: dict[str, Method] = {"sink_recent": SinkRecent(4, SIZE), "streaming_llm": StreamingLLM(4, SIZE)}
    for row in cache_policies():
        cls = row.load()
        if isinstance(cls, type) and issubclass(cls, ScorePolicy) and row.key not in LEFT_OUT:
            given = inspect.signature(cls).parameters
            limits = {"limit": SIZE, "every": EVERY}
            if limits.keys() <= given.keys():
                found[row.key] = replace(cls.at_budget(0.5, Host(model), PROMPT), **limits)
    return found


@torch.inference_mode()
def _row(name: str, model: PreTrainedModel, method: Method | None, tokens: int) -> dict[str, object]:
    ids, cache, before = torch.randint(0, 256, (1, PROMPT)), DynamicCache(config=model.config), live_bytes(model.device)
    seconds, held, live = [], [], []
    window = EVERY * max(1, tokens // 10 // EVERY)  # whole rounds of compression, also between the two places
    ends = (window, 2 * window, EVERY * (tokens // EVERY))
    with nullcontext() if method is None else foveate.apply(model, method) as run:
        token = ids
        for step in range(tokens):
            begun = time.thread_time()
            token = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
            seconds.append(time.thread_time() - begun)
            if step + 1 in (ends[0], ends[-1]):
                live.append(live_bytes(model.device) - before)
                held.append(run.stats.cache_bytes if run is not None else _bytes(cache))
    first, last = (statistics.mean(seconds[end - window : end]) for end in ends[1:])
    return {
        "policy": name, "tokens": tokens, "MB": held[-1] / 1e6, "bytes, end / early": held[-1] / held[0],
        "live, end / early": live[-1] / live[0], "ms": last * 1e3, "time, end / early": last / first,
    }  # fmt: skip


def _bytes(cache: DynamicCache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


if __name__ == "__main__":
    main()
