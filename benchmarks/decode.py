"""Decoding at 16,384 tokens on a model of random weights: what each cache policy saves, next to its own ideal.

The model has 8 layers of 8 heads with 64 channels. All contenders start from copies of one cache of random keys and
values, read the prompt's last tokens themselves, and take turns block by block. The ideal of a policy is the same model
with packed heads on a plain cache of as many tokens as the policy keeps or reads: what attention alone could save. A
policy's share of its plan is its speed-up over the ideal's, both over the plain model, of the times in the attention
modules. Goals: TokenSelect, TidalDecode and Recycled Attention at 1/16 reach 0.6 of it, evicting policies at 1/8 reach
0.8, and their live bytes are within 10 % of what they keep.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent))
import foveate
from _kvpress_worker import Clock, attention_modules
from _report import finish
from foveate.bench.parts.cache_copy import copy_cache
from foveate.bench.policies.shared_prefill import live_bytes
from foveate.core.catalog import cache_policies, system
from foveate.host import Host, Method
from foveate.kv.base.policy import Policy

LAST = 128  # tokens of the prompt that a policy reads itself
SETTLE = 4  # steps before the timed ones: policies evict, choose and make room
#: Policies that read few of the tokens that they store, by the bytes that they read besides, as a share of the cache:
#: TokenSelect scores all keys.
READING = {"token_select": 0.5, "tidal_decode": 0.0, "recycled_attention": 0.0}
#: Policies for which random weights, or a cache that nobody has read, make no sense; and R-KV, which compares all pairs
#: of a prompt's keys.
LEFT_OUT = (
    "kvzap", "kvzip", "q_filters", "triattention", "moa", "seer_attention", "longheads", "task_kv", "simlayerkv",
    "r_kv",
)  # fmt: skip


@dataclass
class Block:
    """A block of decoded tokens: its seconds in attention per token, and what was kept, read and held."""

    seconds: float
    kept: float = 1.0
    read: float = 1.0
    live: int = 0


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = _model(options.length)
    cache, ids = _random_cache(model, options.length - LAST), torch.randint(0, 256, (1, LAST))
    rows, ratios = [], {}
    for key in options.policies:
        row = _compare(key, 1 / 16 if key in READING else 1 / 8, model, cache, ids, options)
        rows.append(row)
        ratios[f"{key}: speed-up / its plan's (goal {0.6 if key in READING else 0.8})"] = row["of the plan"]
        ratios[f"{key}: live bytes / kept (goal 1.1)"] = row["live / kept"]
        print(f"{key}: {row['speed-up']:.2f} of {row['plan']:.2f}", file=sys.stderr, flush=True)
    finish(rows, ratios)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--policies", nargs="+", default=_policies())
    parser.add_argument("--steps", type=int, default=10, help="timed tokens in a block")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def _policies() -> list[str]:
    """The three that read few tokens, and all that evict; `h2o@32` evicts after every 32 tokens, not after each."""
    keys = [row.key for row in cache_policies() if row.key not in LEFT_OUT]
    return [*(key for key in keys if key in READING or system(key).load().evicts), "h2o@32"]


def _model(length: int) -> PreTrainedModel:
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=256, max_position_embeddings=2 * length, **sizes)
    return LlamaForCausalLM(config).eval()


def _random_cache(model: PreTrainedModel, tokens: int) -> DynamicCache:
    cache, shape = DynamicCache(config=model.config), (1, model.config.num_key_value_heads, tokens, 64)
    for layer in range(model.config.num_hidden_layers):
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    return cache


def _compare(
    key: str, budget: float, model: PreTrainedModel, cache: DynamicCache, ids: Tensor, options: argparse.Namespace
) -> dict[str, object]:
    """Time a policy, the plain model, and the model on a plain cache of what the policy reads, in turns."""
    policy, times = _policy(key, budget, model, options.length), {"plain": [], "policy": [], "plan": []}
    first = _block(model, cache, ids, options.steps, policy, count_memory=True)
    read = first.read + READING[key] if key in READING else first.kept
    short = _random_cache(model, max(1, round(read * options.length) - LAST)) if read * options.length > LAST else None
    for turn in range(options.rounds):
        for name in list(times)[:: 1 if turn % 2 else -1]:
            past, method = (short or DynamicCache(config=model.config), None) if name == "plan" else (cache, None)
            method = policy if name == "policy" else method
            times[name].append(_block(model, past, ids, options.steps, method).seconds)
    median = {name: statistics.median(found) for name, found in times.items()}
    pairs = [plain / mine for plain, mine in zip(times["plain"], times["policy"], strict=True)]
    speed_up, plan = median["plain"] / median["policy"], median["plain"] / median["plan"]
    token = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / (options.length - LAST)
    return {
        "policy": key, "kept": first.kept, "read": read, "plain ms": median["plain"] * 1e3,
        "ms": median["policy"] * 1e3, "speed-up": speed_up, "least": min(pairs), "most": max(pairs), "plan": plan,
        "of the plan": speed_up / plan, "live / kept": first.live / (first.kept * options.length * token),
    }  # fmt: skip


def _policy(key: str, budget: float, model: PreTrainedModel, length: int) -> Method:
    key, _, every = key.partition("@")
    cls, found, learnt = system(key).load(), Host(model), {}
    draw = torch.Generator().manual_seed(0)
    if key == "duo_attention":
        learnt = {"gates": torch.rand((found.layers, found.kv_heads), generator=draw)}
    if key == "razor_attention":
        learnt = {kind: torch.rand((found.layers, found.heads), generator=draw) for kind in ("echo", "induction")}
    assert issubclass(cls, Policy)
    made = cls.at_budget(budget, found, length, **learnt)
    return replace(made, every=int(every)) if every else made


@torch.inference_mode()
def _block(
    model: PreTrainedModel,
    past: DynamicCache,
    ids: Tensor,
    steps: int,
    policy: Method | None,
    count_memory: bool = False,
) -> Block:
    """Read the last tokens of the prompt on a copy of the cache, and decode."""
    before = live_bytes(model.device) if count_memory else 0
    cache, seconds = copy_cache(past), []
    chosen = nullcontext() if policy is None else foveate.apply(model, policy, foveate.Packed())
    with Clock(attention_modules(model)) as clock, chosen as run:
        clock.close_after()
        token = ids
        for _ in range(SETTLE + steps):
            begun = clock.seconds
            token = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
            seconds.append(clock.seconds - begun)
        block = Block(statistics.median(seconds[SETTLE:]))
        if run is not None:
            block.kept, block.read = run.stats.kept, run.stats.read
        if count_memory:
            block.live = live_bytes(model.device) - before
    return block


if __name__ == "__main__":
    main()
