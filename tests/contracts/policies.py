"""Small models, padded batches and a count of live memory, for the contracts of policies and other methods."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from foveate.core.catalog import cache_policies
from foveate.host import Host
from foveate.host.hf.model import host
from foveate.kv import KIVI
from foveate.kv.base.encoding import EncodingPolicy
from foveate.kv.base.policy import Policy

VOCAB = 64
_SIZES = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, head_dim=8,
    num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    initializer_range=0.3,
)  # fmt: skip
_LFM = {name: value for name, value in _SIZES.items() if name != "head_dim"}
_KINDS = ["sliding_attention", "full_attention", "full_attention", "full_attention"]

_MAKE: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES)),
    "deep": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**{**_SIZES, "num_hidden_layers": 20})),
    # one layer with a window, soft caps
    "windowed": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(
            **{**_SIZES, "num_hidden_layers": 4}, sliding_window=16, layer_types=_KINDS, attn_logit_softcapping=3.0
        )
    ),
    # two convolutions between layers that attend
    "hybrid": lambda: hf.Lfm2ForCausalLM(
        hf.Lfm2Config(**{**_LFM, "num_hidden_layers": 4}, layer_types=["conv", "full_attention"] * 2)
    ),
}


@cache
def subject(name: str) -> PreTrainedModel:
    """Return a model in float64, so that a policy's choices do not depend on the order of a sum.

    The model is in float32 if transformers' own masks need that.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _MAKE[name]().eval().to(torch.float32 if name == "windowed" else torch.float64)


#: Every policy of the catalogue.
POLICIES: dict[str, type[Policy]] = {row.key: row.load() for row in cache_policies()}

#: Options beside those of `at_budget` that make a policy use another path.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "duo_attention": {"chunks": {"prefill_chunk": 7}},
    "razor_attention": {"ratio": {"ratio": 3.0}, "dropped": {"compensate": False}},
    "token_select": {
        "chunks": {"chunk": 7}, "sparing": {"sim_threshold": 0.3, "chunk": 7}, "pooled": {"pool": 3},
    },
    "tidal_decode": {"head": {"per": "head"}, "layer": {"per": "layer", "reduce": "sum"}},
    "act_qkv": {
        "chunks": {"chunk": 7}, "mean": {"weighting": "mean", "cutoff": "inverse_entropy", "chunk": 5},
        "equal": {"cutoff": "none", "weighting": "last"},
    },
    "recycled_attention": {
        "stride": {"stride": 3, "pool": 0}, "pooled": {"stride": 2, "pool": 5, "k": 6},
        "fixed": {"grow": False, "stride": 5, "phase": 2},
    },
    "attention_matching": {
        "pursuit": {"keys": "pursuit"}, "random": {"reference": "random", "measure": "max", "queries": 20},
    },
    "adakv": {"kvpress": {"variant": "kvpress"}},
    "snapkv": {"global": {"heads": "global"}, "threshold": {"threshold": 0.03}, "limit": {"limit": 6}},
    "kvzip": {"chunks": {"chunk": 7}, "plus": {"plus": True}, "layer": {"heads": "adaptive"}},
    "random_keep": {"global": {"heads": "global"}},
    "criticalkv": {"second": {"first": 0.0}},
    "task_kv": {"deviations": {"deviations": 0.5}, "heads": {"hetero_ratio": 0.5, "last": 3}},
    "simlayerkv": {"threshold": {"threshold": 0.3, "queries": 4, "most": None}},
    "finch": {"heads": {"together": False, "normalised": False}, "gaps": {"renumbered": False, "every": 4}},
    "lagkv": {"cross": {"cross": True}},
    "expected_attention": {"every": {"every": 3}},
    "h2o": {"once": {"every": None, "variant": "kvpress"}, "adaptive": {"heads": "adaptive", "every": 3},
        "global": {"heads": "global", "every": None}},
    "quest": {"group": {"per": "group"}, "mean": {"per": "group", "reduce": "mean", "page": 3, "dense_layers": 1}},
    "rocketkv": {
        "both": {"alpha": None, "ratio": 12.0}, "second": {"alpha": 0.0, "ratio": 6.0},
        "single": {"alpha": 0.6, "ratio": 3.0},
    },
    "turboquant": {
        "paper": {"values": "centroids", "renormalise": False, "rotation": "random", "bits": 3},
        "mixed": {"bits": (2, None, 4), "value_bits": 8},
    },
    "think": {"narrow": {"kept": 0.3, "window": 5}, "quantised": {"base": KIVI(bits=4, residual=3, group=4)}},
    "eight_bit": {"int8": {"format": "int8", "group": 3, "residual": 2}},
    "kivi": {"wide": {"bits": 8, "value_bits": 3}, "mixed": {"bits": (None, 8, 2)}, "ends": {"dense": 1}},
    "longheads": {"chunks": {"chunk": 3, "attention_length": 12}},
    "qada": {"every": {"most": None, "local": 3, "sink": 2}, "some": {"most": 2, "local": 3, "tau": 0.4}},
}  # fmt: skip
CASES = [(key, "") for key in POLICIES] + [(key, name) for key, some in VARIANTS.items() for name in some]


@cache
def learnt(key: str, name: str) -> dict[str, Tensor]:
    """Calibrate a policy on a model, with a few random tokens."""
    draw = torch.Generator().manual_seed(0)

    def data() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            ids = torch.randint(2, VOCAB, (1, 24), generator=draw)
            yield ids, torch.arange(24)[None] >= 16

    return POLICIES[key].calibrate(host(subject(name)), data())


def policy(key: str, budget: float, length: int, variant: str = "", name: str = "llama") -> Policy:
    """Make a catalogued policy at a budget, as `compare` does, or at the least one that it can meet."""
    found = host(subject(name))
    budget = max(budget, POLICIES[key].least(found, length))
    made = POLICIES[key].at_budget(budget, found, length, **learnt(key, name))
    return replace(made, **VARIANTS[key][variant]) if variant else made  # type: ignore[type-var]


# -- padded batches ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Sequences of unequal lengths, padded on one side, and the tokens after the prompt."""

    ids: Tensor
    mask: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], side: str, after: int, seed: int = 0) -> Batch:
        """Make prompts of these lengths, and `after` further tokens for each."""
        draw = torch.Generator().manual_seed(seed)
        longest = max(lengths)
        ids, mask = torch.zeros(len(lengths), longest, dtype=torch.long), torch.zeros(len(lengths), longest).long()
        for row, length in enumerate(lengths):
            start = longest - length if side == "left" else 0
            ids[row, start : start + length] = torch.randint(2, VOCAB, (length,), generator=draw)
            mask[row, start : start + length] = 1
        new = torch.randint(2, VOCAB, (len(lengths), after), generator=draw)
        return cls(torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1))

    def row(self, row: int, pieces: Sequence[int]) -> tuple[Batch, list[int]]:
        """Return one sequence without its padding, and the sizes of its pieces."""
        real = self.mask[row].bool()
        own = [int(part.sum()) for part in real.split(list(pieces))]
        return Batch(self.ids[row : row + 1, real], self.mask[row : row + 1, real]), [size for size in own if size]

    def feed(self, model: PreTrainedModel, pieces: Sequence[int]) -> list[Tensor]:
        """Read the batch in pieces of these sizes, and return each sequence's logits."""
        places, cache, end, out = (self.mask.cumsum(1) - 1).clamp_min(0), DynamicCache(config=model.config), 0, []
        for size in pieces:
            begin, end = end, end + size
            step = model(
                self.ids[:, begin:end], attention_mask=self.mask[:, :end], position_ids=places[:, begin:end],
                past_key_values=cache,
            )  # fmt: skip
            out.append(step.logits)
        assert end == self.ids.shape[1]
        logits = torch.cat(out, 1)
        return [row[real] for row, real in zip(logits, self.mask.bool(), strict=True)]


LENGTHS, AFTER = (26, 15), 6
#: Sizes of the pieces in which a prompt of 26 tokens and the later tokens are read.
PIECES = {"whole": [26, *[1] * AFTER], "chunks": [9, 10, 7, *[1] * AFTER], "decode": [16, *[1] * 16]}
#: The padded side and the pieces. Left padding ends within the first call, as in generation: schedules count calls.
PADDINGS = [
    ("left", "whole"),
    ("left", "chunks"),
    ("left", "decode"),
    ("right", "whole"),
    ("right", "chunks"),
    ("none", "chunks"),
]


def batch_error(
    model: PreTrainedModel, side: str, pieces: str, around: Callable[[], Any], lengths: Sequence[int] = LENGTHS
) -> tuple[float, list[Tensor]]:
    """Return the largest difference of a batch's logits from those of its sequences alone, and the batch's logits.

    Args:
        model: a decoder.
        side: "left", "right", or "none", which gives all sequences the length of the first.
        pieces: a name in `PIECES`.
        around: returns the context manager of the block.
        lengths: lengths of the prompts.
    """
    batch = Batch.of([lengths[0]] * len(lengths) if side == "none" else lengths, side, AFTER)
    with torch.no_grad(), around():
        together = batch.feed(model, PIECES[pieces])
        separate = []
        for row in range(len(lengths)):
            single, own = batch.row(row, PIECES[pieces])
            separate += single.feed(model, own)
    return max(float((a - b).abs().max()) for a, b in zip(together, separate, strict=True)), together


# -- traces ------------------------------------------------------------------------------------------------------------


def live_bytes() -> int:
    """Count the bytes of all tensors that Python can reach, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.layout is torch.strided and not thing.is_meta:
            try:
                storage = thing.untyped_storage()
            except (NotImplementedError, RuntimeError):
                continue  # a tensor that wraps others has no memory of its own
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def trace(model: nn.Module) -> dict[str, Any]:
    """Return everything about a model's modules that a method could leave changed."""
    return {
        name: (
            sorted(vars(module)), [len(getattr(module, hooks)) for hooks in vars(module) if hooks.endswith("_hooks")],
            getattr(getattr(module, "config", None), "_attn_implementation", None), module.training,
            [p.requires_grad for p in module.parameters(recurse=False)],
        )
        for name, module in model.named_modules()
    }  # fmt: skip


def encodes(key: str) -> bool:
    """Return whether a policy holds tokens encoded."""
    return issubclass(POLICIES[key], EncodingPolicy)


def here(name: str = "llama") -> Host:
    return host(subject(name))
