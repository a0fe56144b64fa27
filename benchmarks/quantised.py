"""Encoded caches on pretrained models: bytes, needles found, and next-token loss, for each policy and width.

The first half of a text, and a needle's prompt but for its last tokens, are read once with the full cache, and each row
goes on from a copy. The rest of the text is read in pieces; the loss is the mean over all of them but the first, after
which the first half is encoded, so that they attend to encoded tokens. So do the last token of a needle's prompt and
the answer. `kept` is the share of the full cache's bytes after the text: codes, scales, norms, tables and positions
count.

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
from transformers import DynamicCache
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
import foveate
from _report import finish
from foveate.bench.loading import load
from foveate.bench.policies.shared_prefill import copy_cache
from foveate.host import Method
from foveate.tasks.parts.corpus import text
from foveate.tasks.text.needle import Needle
from real.fetch import MODELS

#: Tokens at the end of a needle's prompt that are read under the methods.
_LAST = 9
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
    parser.add_argument(
        "--tokens", type=int, default=1024, help="length of the text, and about that of a needle prompt"
    )
    parser.add_argument("--piece", type=int, default=64, help="tokens that are read at once")
    parser.add_argument("--needles", type=int, default=6, help="number of needle prompts")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    logging.disable_progress_bar()
    rows, ratios = [], {}
    for key in options.model or MODELS:
        subject = Subject(key, options)
        for name in options.row or ROWS:
            loss, kept = subject.loss(ROWS[name]())
            found = subject.needles(ROWS[name]())
            more = loss - float(rows[0]["loss"]) if rows and rows[0]["model"] == key else 0.0
            rows.append({"model": key, "cache": name, "kept": f"{kept:.3f}", "loss": f"{loss:.4f}"})
            rows[-1] |= {"more loss": f"{more:+.4f}", "needles": f"{found:.2f}"}
            for measure, value in (("kept", kept), ("loss", loss), ("needles", found)):
                ratios[f"{key}: {name}, {measure}"] = value
            print(f"done: {rows[-1]}", file=sys.stderr, flush=True)
    finish(rows, ratios)


class Subject:
    """A model, with a text and needle prompts that it has read with the full cache."""

    def __init__(self, key: str, options: argparse.Namespace) -> None:
        self.model, self.tokenizer, _ = load(str(MODELS[key].file), dtype=options.dtype)
        self.piece, half = options.piece, options.tokens // 2
        self.ids = self._ids(text("heldout"))[:, : options.tokens + 1]
        self.text = self._read(self.ids[:, :half])
        self.task = Needle(length=3 * options.tokens, count=options.needles)
        self.prompts = [self._ids(example.prompt) for example in self.task.examples()]
        self.read = [self._read(ids[:, :-_LAST]) for ids in self.prompts]

    def _ids(self, words: str) -> Tensor:
        return self.tokenizer(words, return_tensors="pt").input_ids

    @torch.inference_mode()
    def _read(self, ids: Tensor) -> DynamicCache:
        cache = DynamicCache(config=self.model.config)
        self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    @torch.inference_mode()
    def loss(self, methods: tuple[Method, ...]) -> tuple[float, float]:
        """Return the mean loss of the text's second half without its first piece, and the share of bytes kept then."""
        cache, losses, half = copy_cache(self.text), [], self.text.get_seq_length()
        read, expected = self.ids[:, half:-1].split(self.piece, 1), self.ids[:, half + 1 :].split(self.piece, 1)
        with foveate.apply(self.model, *methods) as run:
            for part, following in zip(read, expected, strict=True):
                logits = self.model(part, past_key_values=cache, use_cache=True).logits
                losses.append(F.cross_entropy(logits[0].float(), following[0], reduction="none"))
            return float(torch.cat(losses[1:]).mean()), run.stats.kept

    @torch.inference_mode()
    def needles(self, methods: tuple[Method, ...]) -> float:
        """Return the mean score of the needle prompts."""
        scores = []
        for example, ids, read in zip(self.task.examples(), self.prompts, self.read, strict=True):
            cache, made = copy_cache(read), []
            with foveate.apply(self.model, *methods):
                self.model(ids[:, -_LAST:-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
                token = ids[:, -1:]
                for _ in range(self._ids(example.answer).shape[1] + 2):
                    logits = self.model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                    token = logits[:, -1:].argmax(-1)
                    made.append(int(token))
            scores.append(self.task.score(example, self.tokenizer.decode(made, skip_special_tokens=True)))
        return statistics.fmean(scores)


if __name__ == "__main__":
    main()
