"""Reading a long prompt: operators in the place of a pretrained decoder's attention, against its dense attention.

The contenders read the same real text in turns. Operators take their settings at a sixteenth of the keys; SALE, which
has none for a budget, its default threshold without calibration. Of SeerAttention the gates are trained for a few
steps, which is enough to choose blocks, not to choose them well. Printed
are the seconds of each, their ratio to dense attention in the same round, and the loss on the text's last tokens: a
prefill that is fast and wrong is no saving. Where dense attention wins, the ratio is above 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
import foveate
from _report import finish
from foveate.bench.loading import load
from foveate.core.catalog import system
from foveate.host import Host, Method
from foveate.host.operator_swap import PrefillSwap
from foveate.kv.seer_attention import seer_gates
from foveate.tasks.parts.corpus import text
from real.fetch import MODELS

DENSE = "dense"
CONTENDERS = ["hip", "vertical_slash", "flex_prefill", "sale", "seer_attention"]
TAIL = 64  # tokens whose loss is measured


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    model, tokenizer, _ = load(options.model or str(MODELS["qwen2.5-coder-0.5b-instruct"].file), dtype=options.dtype)
    ids = tokenizer(text("heldout"), return_tensors="pt", verbose=False).input_ids
    gates = _gates(model, ids, options.steps) if "seer_attention" in options.contenders else {}
    rows: list[dict[str, object]] = []
    ratios: dict[str, float] = {}
    for length in options.lengths:
        found = _in_turns(model, ids[:, :length], _contenders(model, length, gates, options), options.rounds)
        for name, each in found.items():
            paired = [mine[0] / dense[0] for mine, dense in zip(each, found[DENSE], strict=True)]
            seconds, loss = (statistics.median(part) for part in zip(*each, strict=True))
            rows.append({"tokens": length, "attention": name, "s": seconds, "of dense": statistics.median(paired)})
            rows[-1] |= {"least": min(paired), "most": max(paired), "loss": loss}
            if name != DENSE:
                ratios[f"{name} / dense, {length} tokens"] = statistics.median(paired)
        print(f"done: {length} tokens", file=sys.stderr, flush=True)
    finish(rows, ratios)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", help="folder or GGUF file; default: Qwen2.5-Coder 0.5B as `make real` keeps it")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, help="operators and policies")
    parser.add_argument("--budget", type=float, default=1 / 16, help="share of the keys that a query reads")
    parser.add_argument("--steps", type=int, default=10, help="training steps of SeerAttention's gates")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def _gates(model: PreTrainedModel, ids: Tensor, steps: int) -> dict[str, Tensor]:
    texts = (ids[:, 1024 * turn : 1024 * (turn + 1)] for turn in range(steps))
    return seer_gates(model, texts, steps=steps, block=64, rate=5e-3)


def _contenders(
    model: PreTrainedModel, length: int, gates: dict[str, Tensor], options: argparse.Namespace
) -> dict[str, Method | None]:
    made: dict[str, Method | None] = {DENSE: None}
    for key in options.contenders:
        cls = system(key).load()
        if key == "seer_attention":
            learnt = {**gates, "block": torch.tensor(64)}
            made[key] = cls.at_budget(options.budget, Host(model), length, **learnt)
        else:
            made[key] = PrefillSwap(cls.at_budget(options.budget, length))
    return made


def _in_turns(
    model: PreTrainedModel, ids: Tensor, contenders: dict[str, Method | None], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Each contender's seconds and loss, a pair a round; the order turns with every round."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    _read(model, ids[:, :512], None)
    for turn in range(rounds):
        for name in list(contenders)[:: -1 if turn % 2 else 1]:
            found[name].append(_read(model, ids, contenders[name]))
    return found


@torch.inference_mode()
def _read(model: PreTrainedModel, ids: Tensor, method: Method | None) -> tuple[float, float]:
    cache, begun = DynamicCache(config=model.config), time.perf_counter()
    with nullcontext() if method is None else foveate.apply(model, method):
        logits = model(ids, past_key_values=cache, logits_to_keep=TAIL + 1).logits[0, :-1]
    return time.perf_counter() - begun, F.cross_entropy(logits.float(), ids[0, -TAIL:]).item()


if __name__ == "__main__":
    main()
