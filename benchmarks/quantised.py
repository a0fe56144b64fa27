"""Encoded caches on pretrained models: bytes, needles found, and next-token loss, for each policy and width.

The loss is the mean over the later tokens of real text that is read in pieces, so that every piece attends to encoded
tokens. A needle's prompt is read whole, but for its last tokens, which are read one at a time. `kept` is the share of
the full cache's bytes after the text: codes, scales, norms, tables and positions count.

    python benchmarks/quantised.py [--model qwen2.5-coder-0.5b-instruct] [--tokens 1024] [--needles 6]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
import foveate
from _report import finish
from foveate.bench.loading import load
from foveate.host import Method
from foveate.tasks.parts.corpus import text
from foveate.tasks.text.needle import Needle
from real.fetch import MODELS

#: What is measured, by name: the methods of one row of the table.
ROWS: dict[str, Callable[[], tuple[Method, ...]]] = {
    "full": tuple,
    **{f"KIVI {bits}": lambda bits=bits: (foveate.kv.KIVI(bits=bits),) for bits in (8, 4, 3, 2)},
    "KIVI 2, 2 dense ends": lambda: (foveate.kv.KIVI(bits=2, dense=2),),
    **{f"TurboQuant {bits}": lambda bits=bits: (foveate.kv.TurboQuant(bits=bits, dense=0),) for bits in (4, 3, 2)},
    **{f"TurboQuant {bits}, 2 dense ends": lambda bits=bits: (foveate.kv.TurboQuant(bits=bits),) for bits in (4, 3)},
    **{form: lambda form=form: (foveate.kv.EightBit(format=form),) for form in ("e4m3", "int8")},
    **{f"ThinK {share}": lambda share=share: (foveate.kv.ThinK(kept=share),) for share in (0.8, 0.6, 0.5)},
    "ThinK 0.6, KIVI 4": lambda: (foveate.kv.ThinK(kept=0.6, base=foveate.kv.KIVI(bits=4)),),
    "SnapKV 50 %": lambda: (foveate.kv.SnapKV(share=0.5),),
    "SnapKV 50 %, KIVI 4": lambda: (foveate.kv.SnapKV(share=0.5), foveate.kv.KIVI(bits=4)),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", action="append", choices=list(MODELS), help="one of them; both by default")
    parser.add_argument("--row", action="append", choices=list(ROWS), help="one of them; all by default")
    parser.add_argument("--tokens", type=int, default=1024, help="length of the text")
    parser.add_argument("--piece", type=int, default=64, help="tokens that are read at once")
    parser.add_argument("--needles", type=int, default=6, help="number of needle prompts of the same length")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    logging.disable_progress_bar()
    rows, ratios = [], {}
    for key in options.model or MODELS:
        model, tokenizer, _ = load(str(MODELS[key].file), dtype=options.dtype)
        base = None
        for name in options.row or ROWS:
            loss, kept = measured_loss(model, tokenizer, ROWS[name](), options.tokens, options.piece)
            base = loss if base is None else base
            found = needles(model, tokenizer, ROWS[name](), options.tokens, options.needles)
            rows.append(
                {"model": key, "cache": name, "kept": f"{kept:.3f}", "loss": f"{loss:.4f}"}
                | {"more loss": f"{loss - base:+.4f}", "needles": f"{found:.2f}"}
            )
            ratios[f"{key}: {name}, kept"], ratios[f"{key}: {name}, loss"] = kept, loss
            ratios[f"{key}: {name}, needles"] = found
            print(f"done: {rows[-1]}", file=sys.stderr, flush=True)
    finish(rows, ratios)


@torch.inference_mode()
def measured_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, methods: tuple[Method, ...], length: int, piece: int
) -> tuple[float, float]:
    """Return the mean loss of the later three quarters of a text, and the share of bytes that is kept after it."""
    ids = tokenizer(text("heldout"), return_tensors="pt").input_ids[:, : length + 1]
    cache, losses = DynamicCache(config=model.config), []
    with foveate.apply(model, *methods) as run:
        for part, following in zip(ids[:, :-1].split(piece, 1), ids[:, 1:].split(piece, 1), strict=True):
            logits = model(part, past_key_values=cache, use_cache=True).logits
            losses.append(F.cross_entropy(logits[0].float(), following[0], reduction="none"))
        return float(torch.cat(losses)[length // 4 :].mean()), run.stats.kept


@torch.inference_mode()
def needles(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, methods: tuple[Method, ...], length: int, count: int
) -> float:
    """Return the mean score of needle prompts of about `length` tokens."""
    task, scores = Needle(length=3 * length, count=count), []
    for example in task.examples():
        ids = tokenizer(example.prompt, return_tensors="pt").input_ids
        new = tokenizer(example.answer, add_special_tokens=False, return_tensors="pt").input_ids.shape[1] + 3
        with foveate.apply(model, *methods):
            scores.append(task.score(example, tokenizer.decode(answer(model, ids, new), skip_special_tokens=True)))
    return statistics.fmean(scores) if scores else float("nan")


def answer(model: PreTrainedModel, ids: Tensor, new: int) -> list[int]:
    """Continue greedily after a prompt, whose last token is read by itself."""
    cache, made = DynamicCache(config=model.config), []
    model(ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = ids[:, -1:]
    for _ in range(new):
        token = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
        made.append(int(token))
    return made


if __name__ == "__main__":
    main()
