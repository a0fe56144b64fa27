"""The retrieval circuit of a decoder, found from scratch and tested by ablation: `docs/circuits.md` has its results.

Heads and edges come from attribution patching on pairs of texts that differ in who has which pass key. The largest
estimates are compared with true patches; the heads of the largest edges are then removed, and as many random heads.

    python benchmarks/real/circuits.py --model lab                              # two minutes
    python benchmarks/real/circuits.py --model qwen2.5-coder-0.5b-instruct      # an hour on one core

Each run writes docs/measured/circuits/MODEL.json; `python docs/fill.py` puts it into the page.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

import foveate
from benchmarks.real.fetch import MODELS
from foveate.bench.loading import load
from foveate.host import Method
from foveate.lens import (
    EdgeAttributions,
    EdgePatch,
    HeadEdge,
    LogitDifference,
    Patch,
    ablate,
    ablate_edges,
    attribute_edges,
    attribute_heads,
    head_means,
    head_outputs,
    method_effects,
    qk_attribution,
    retrieval_prompts,
    roles,
)
from foveate.lens.parts.rank_correlation import rank_correlation
from foveate.tasks.parts.corpus import text
from foveate.tasks.text.needle import Needle

MEASURED = Path(__file__).parents[2] / "docs" / "measured" / "circuits"
Head = tuple[int, int]


class Study:
    """Pairs of texts that a model answers right, and what its heads give on each.

    Args:
        model, tokenizer: the model.
        count: number of pairs.
        length: characters of a text.
        seed: of the texts.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, count: int, length: int, seed: int) -> None:
        self.model, self.tokenizer, self.pairs = model, tokenizer, list[tuple[Tensor, Tensor, LogitDifference]]()
        self.tried, self.gaps = 0, list[tuple[float, float]]()
        for prompt in retrieval_prompts(20 * count, length, seed):
            clean, corrupt = (self.ids(side) for side in (prompt.clean, prompt.corrupt))
            if clean.shape != corrupt.shape or len(self.pairs) == count:
                continue
            self.tried += 1
            metric = LogitDifference(torch.tensor([[self.last(prompt.answer), self.last(prompt.distractor)]]))
            with torch.no_grad():
                gaps = tuple(float(metric(model(ids, use_cache=False).logits)) for ids in (clean, corrupt))
            if gaps[0] > 0 > gaps[1]:
                self.pairs.append((clean, corrupt, metric))
                self.gaps.append(gaps)  # type: ignore[arg-type]
        self.sent = [head_outputs(model, corrupt) for _, corrupt, _ in self.pairs]

    def ids(self, words: str) -> Tensor:
        return self.tokenizer(words, return_tensors="pt").input_ids

    def last(self, words: str) -> int:
        return int(self.tokenizer(words, add_special_tokens=False).input_ids[-1])

    def mean(self, of: Any) -> Tensor:
        """The mean over pairs of `of(clean, sent, metric)`, a tensor."""
        found = [of(clean, sent, metric) for (clean, _, metric), sent in zip(self.pairs, self.sent, strict=True)]
        return torch.stack([torch.as_tensor(each) for each in found]).double().mean(0)

    def true_heads(self, heads: list[Head]) -> Tensor:
        """The mean change of the logit difference when one head has its output on the other text, for each head."""

        def effects(clean: Tensor, sent: dict[int, Tensor], metric: LogitDifference) -> list[float]:
            patches = {head: Patch({head: sent[head[0]][:, head[1]]}) for head in heads}
            return list(method_effects(self.model, clean, patches, metric).values())

        return self.mean(effects)

    def true_edges(self, sets: list[list[HeadEdge]]) -> Tensor:
        """The same for sets of edges, each patched as a whole."""

        def effects(clean: Tensor, sent: dict[int, Tensor], metric: LogitDifference) -> list[float]:
            patches = {
                n: EdgePatch({e: sent[e.sender[0]][:, e.sender[1]] for e in edges}) for n, edges in enumerate(sets)
            }
            return list(method_effects(self.model, clean, patches, metric).values())

        return self.mean(effects)

    def edges(self, exact: bool) -> EdgeAttributions:
        """Attribution of edges, averaged over pairs."""
        found = [
            attribute_edges(self.model, clean, sent, metric, exact_heads=exact)
            for (clean, _, metric), sent in zip(self.pairs, self.sent, strict=True)
        ]
        heads, logits = (torch.stack([getattr(each, name) for each in found]).mean(0) for name in ("heads", "logits"))
        return EdgeAttributions(heads, logits, sum(each.value for each in found) / len(found))


def main() -> None:
    options, begun = _options(), time.perf_counter()
    path = None if options.model == "lab" else str(MODELS[options.model].file)
    model, tokenizer, _ = load(path, dtype="float32")
    study, draw = Study(model, tokenizer, options.pairs, options.length, options.seed), random.Random(options.seed)
    clean, corrupt = (sum(gap[side] for gap in study.gaps) / len(study.gaps) for side in (0, 1))
    found: dict[str, Any] = {
        "model": options.model, "pairs": len(study.pairs), "tried": study.tried,
        "tokens": sorted({ids.shape[1] for ids, _, _ in study.pairs}), "clean": clean, "corrupt": corrupt,
    }  # fmt: skip
    _say(
        begun, f"{len(study.pairs)} of {study.tried} pairs answered right; logit difference {clean:.2f}, {corrupt:.2f}"
    )
    found["heads"], found["head rank"] = _heads(study, options.check, draw)
    _say(begun, f"heads: rank correlation {found['head rank']:.2f}")
    plain, exact = study.edges(False), study.edges(True)
    found["edges"], found["edge rank"] = _edges(study, plain, exact, options.check, draw)
    _say(begun, f"edges: rank correlation {found['edge rank']}")
    circuit = [edge for edge, _ in exact.top(options.edges)]
    _save(found)
    found["joint"] = _joint(study, circuit, exact.edges(), clean - corrupt, options.draws, draw)
    _say(begun, f"edges together: {found['joint']}")
    heads = list(dict.fromkeys(h for edge in circuit for h in (edge.sender, edge.receiver) if h is not None))
    found["circuit"] = [_name(head) for head in heads]
    _save(found)
    found["ablation"] = _ablations(model, tokenizer, heads, circuit, exact.edges(), options, draw)
    _say(begun, f"ablation: {found['ablation']}")
    _save(found)
    best = exact.logits.abs().flatten().argmax()
    found["score"] = _score(study, divmod(int(best), exact.logits.shape[1]))
    found["roles"] = _roles(study, heads)
    found["seconds"] = round(time.perf_counter() - begun)
    _save(found)
    print(json.dumps(found))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", choices=["lab", *MODELS], default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--pairs", type=int, default=2, help="pairs of texts")
    parser.add_argument("--length", type=int, default=256, help="characters of a text")
    parser.add_argument("--edges", type=int, default=30, help="edges of the circuit")
    parser.add_argument(
        "--remove", type=int, default=8, help="heads of the circuit to remove, those of the largest edges"
    )
    parser.add_argument(
        "--check", type=int, default=8, help="heads and edges with true patches, and as many random ones"
    )
    parser.add_argument("--needles", type=int, default=6, help="prompts for the ablation")
    parser.add_argument("--needle-length", type=int, default=400, help="their characters")
    parser.add_argument("--draws", type=int, default=2, help="random sets of heads and of edges")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _heads(study: Study, count: int, draw: random.Random) -> tuple[list[dict[str, Any]], float]:
    """The heads with the largest estimates beside their true patches; the rank correlation over random ones too."""
    table = study.mean(lambda clean, sent, metric: attribute_heads(study.model, clean, sent, metric).table)
    order = [divmod(int(number), table.shape[1]) for number in table.abs().flatten().argsort(descending=True)]
    some = order[:count] + draw.sample(order[count:], min(count, len(order) - count))
    true, estimates = study.true_heads(some), torch.stack([table[head] for head in some])
    rows = [
        {"head": _name(head), "estimate": float(estimates[n]), "patch": float(true[n])}
        for n, head in enumerate(some[:count])
    ]
    return rows, _spearman(estimates, true)


def _edges(
    study: Study, plain: EdgeAttributions, exact: EdgeAttributions, count: int, draw: random.Random
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The same for edges, by both estimates."""
    best = [edge for edge, _ in exact.top(count)]
    some = best + draw.sample([edge for edge in exact.edges() if edge not in best], count)
    true = study.true_edges([[edge] for edge in some])
    estimates = {
        name: torch.tensor([each.of(edge) for edge in some]) for name, each in (("linear", plain), ("exact", exact))
    }
    rows = [
        {"edge": str(edge), "patch": float(true[n])} | {name: float(each[n]) for name, each in estimates.items()}
        for n, edge in enumerate(best)
    ]
    return rows, {name: _spearman(each, true) for name, each in estimates.items()}


def _joint(
    study: Study, circuit: list[HeadEdge], every: list[HeadEdge], gap: float, draws: int, draw: random.Random
) -> dict[str, Any]:
    """The share of the whole change that the circuit's edges carry together, and random sets of as many edges."""
    others = [edge for edge in every if edge not in circuit]
    sets = [circuit, *(draw.sample(others, len(circuit)) for _ in range(draws))]
    shares = (-study.true_edges(sets) / gap).tolist()
    return {"edges": len(circuit), "of": len(every), "share": shares[0], "random": shares[1:]}


def _ablations(
    model: PreTrainedModel, tokenizer: Any, heads: list[Head], circuit: list[HeadEdge], every: list[HeadEdge],
    options: argparse.Namespace, draw: random.Random,
) -> dict[str, Any]:  # fmt: skip
    """Needles found, and the loss on plain text, without the circuit and without as many random heads or edges."""
    ids = tokenizer(text("heldout")[4000:8000], return_tensors="pt", verbose=False).input_ids[:, :384]
    means = head_means(model, [ids[:, :256]])
    rest = [(la, h) for la in range(model.config.num_hidden_layers) for h in range(model.config.num_attention_heads)]
    rest, gone = [head for head in rest if head not in heads], heads[: options.remove]
    plain = [edge for edge in every if edge not in circuit]
    methods: dict[str, list[Method]] = {
        "whole": [ablate([])],
        "circuit heads": [ablate(gone, means)],
        "random heads": [ablate(draw.sample(rest, len(gone)), means) for _ in range(options.draws)],
        "circuit edges": [ablate_edges(circuit, means)],
        "random edges": [ablate_edges(draw.sample(plain, len(circuit)), means) for _ in range(options.draws)],
    }
    examples = Needle(length=options.needle_length, count=options.needles, seed=options.seed + 100).examples()
    result: dict[str, Any] = {"heads": [_name(head) for head in gone], "needles": len(examples)}
    for name, several in methods.items():
        result[name] = [
            {"found": _found(model, tokenizer, examples, method), "loss": _loss(model, ids, method)}
            for method in several
        ]
    return result


@torch.no_grad()
def _found(model: PreTrainedModel, tokenizer: Any, examples: list[Any], method: Method) -> int:
    right = 0
    with foveate.apply(model, method):
        for example in examples:
            ids = tokenizer(example.prompt, return_tensors="pt").input_ids
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0
            )
            right += example.answer.strip() in tokenizer.decode(out[0, ids.shape[1] :])
    return right


@torch.no_grad()
def _loss(model: PreTrainedModel, ids: Tensor, method: Method) -> float:
    with foveate.apply(model, method):
        logits = model(ids, use_cache=False).logits
    return float(F.cross_entropy(logits[0, :-1], ids[0, 1:]))


def _score(study: Study, head: Head) -> dict[str, Any]:
    """The largest terms of a head's score at the last token, for the key that it looks at most."""
    clean = study.pairs[0][0]
    seen = foveate.look(study.model, clean, measures=(), keep_maps={head: [-1]}, use_cache=False).map(*head)
    key = int(seen[0, 0].argmax())
    terms = qk_attribution(study.model, clean, head, -1, key)
    looks = {"head": _name(head), "weight": float(seen[0, 0, key]), "key": study.tokenizer.decode(clean[0, key]),
             "text": study.tokenizer.decode(clean[0, max(0, key - 8) : key + 2])}  # fmt: skip
    return {**looks, "score": float(terms.score[0]), "terms": terms.top(8)}


def _roles(study: Study, heads: list[Head]) -> dict[str, list[str]]:
    """The roles that `foveate.lens.roles` gives to the circuit's heads, on the texts' own form."""
    found: dict[str, list[str]] = {_name(head): [] for head in heads}
    for role in roles(study.model, study.pairs[0][0]):
        if (name := f"{role.layer}.{role.head}") in found:
            found[name].append(f"{role.name} {role.score:.2f}")
    return found


def _spearman(one: Tensor, other: Tensor) -> float:
    return float(rank_correlation(torch.stack([one.double(), other.double()]))[0, 1])


def _name(head: Head) -> str:
    return f"{head[0]}.{head[1]}"


def _save(found: dict[str, Any]) -> None:
    """Write what is measured so far; a finished run has its `seconds`."""
    MEASURED.mkdir(parents=True, exist_ok=True)
    (MEASURED / f"{found['model']}.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def _say(begun: float, words: str) -> None:
    print(f"{time.perf_counter() - begun:6.0f} s  {words}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
