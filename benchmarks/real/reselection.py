"""Layers at which TidalDecode may choose: needles found for each re-selection layer, beside the heads that retrieve.

Heads of layers behind a re-selection read only what that layer chose. So this asks, on a pretrained decoder, which
layers hold retrieval heads, how much the layers' choices have in common, and how many needles a policy finds for each
place of its re-selection, at one share of reads. Each prompt is read once, densely.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1]))
import foveate
from _report import finish
from benchmarks.real.fetch import MODELS
from foveate.bench.loading import load
from foveate.bench.parts.cache_copy import copy_cache
from foveate.host import Method
from foveate.kv import TidalDecode, topk_overlap
from foveate.lens import NeedleCase, needle_span, retrieval_scores, top_heads
from foveate.tasks.base.task import Example
from foveate.tasks.text.needle import Needle

NEW = 8  # tokens that an answer takes


def main() -> None:
    options = _options()
    model, tokenizer, _ = load(str(MODELS[options.model].file), dtype="float32")
    examples = Needle(length=options.characters, count=options.examples, seed=options.seed).examples()
    prompts = [tokenizer(each.prompt, return_tensors="pt", verbose=False).input_ids for each in examples]
    read = [_read(model, ids) for ids in prompts]
    length, layers = prompts[0].shape[1], model.config.num_hidden_layers
    _print_heads(model, tokenizer, examples, prompts)
    overlap = topk_overlap(model, prompts[0], max(1, length // 10))
    print(f"mean overlap of two layers' choices: {float((overlap.sum() - layers) / (layers * (layers - 1))):.2f}")
    rows: list[dict[str, object]] = []
    ratios: dict[str, float] = {}
    for again in [None, *((layer,) for layer in range(3, layers)), *options.pairs]:
        method = None if again is None else _policy(again, options.budget, layers, length)
        found = sum(
            example.answer.strip() in tokenizer.decode(_write(model, ids, cache, method))
            for example, ids, cache in zip(examples, prompts, read, strict=True)
        )
        name = "full cache" if again is None else f"re-selects at {', '.join(map(str, again))}"
        rows.append(
            {"method": name, "tokens": "-" if method is None else method.top_k, "found": found, "of": len(examples)}
        )
        ratios[f"{name}: needles found"] = found / len(examples)
    finish(rows, ratios)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--characters", type=int, default=1800)
    parser.add_argument("--examples", type=int, default=6)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--pairs", type=_layers, nargs="*", default=[(9, 16), (11, 16)], help="such as 9,16")
    return parser.parse_args()


def _layers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _policy(again: tuple[int, ...], budget: float, layers: int, length: int) -> TidalDecode:
    """A policy with two dense layers and a selection, whose sparse layers read what the budget leaves."""
    full = 3 + len(again)
    return TidalDecode(max(1, round((budget * layers - full) / (layers - full) * length)), 2, again)


def _print_heads(model: PreTrainedModel, tokenizer: object, examples: list[Example], prompts: list[Tensor]) -> None:
    cases = []
    for example, ids in zip(examples, prompts, strict=True):
        own = torch.tensor(tokenizer(example.answer, add_special_tokens=False).input_ids)  # type: ignore[operator]
        cases.append(NeedleCase(ids[0], *needle_span(ids[0], own, 1.0)))
    scores = retrieval_scores(model, cases, new=NEW)
    heads = top_heads(scores)
    layers = sorted({layer for layer, _ in heads[:20]})
    print(f"{len(heads)} of {scores.numel()} heads retrieve; the best 20 are in layers {layers}")


@torch.inference_mode()
def _read(model: PreTrainedModel, ids: Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(ids[:, :-1], past_key_values=cache, logits_to_keep=1)
    return cache


@torch.inference_mode()
def _write(model: PreTrainedModel, ids: Tensor, read: DynamicCache, method: Method | None) -> list[int]:
    cache, token, written = copy_cache(read), ids[:, -1:], []
    with foveate.apply(model, *(() if method is None else (method,))):
        for _ in range(NEW):
            token = model(token, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
            written.append(int(token))
    return written


if __name__ == "__main__":
    main()
