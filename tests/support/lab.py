"""The shipped lab model, loaded once, and how well it retrieves under methods."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from jaxtyping import Int
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from foveate.bench.comparison.encoding import encoded
from foveate.bench.loading import load
from foveate.host import Method, apply
from foveate.host.hf.model import Host, host
from foveate.labs import LABS
from foveate.tasks.text.needle import Needle


@cache
def lab() -> tuple[LlamaForCausalLM, Any]:
    """Model and tokenizer."""
    model, tokenizer, _ = load(None)
    return model, tokenizer  # type: ignore[return-value]


def lab_ids(text: str) -> Int[Tensor, "1 n"]:
    """Return a text as the lab reads it."""
    return torch.tensor([encoded(lab()[1], text)])


def lab_host() -> Host:
    return host(lab()[0])


def lab_gates() -> Tensor:
    """The gates that DuoAttention learnt about the lab when it was made."""
    return load_file(LABS["lm"].path / "duo_attention.safetensors")["gates"]


@torch.no_grad()
def needles(length: int, count: int, *methods: Method, seed: int = 77) -> tuple[float, float]:
    """Share of needles retrieved by greedy decoding under methods, and the share of the cache that was kept."""
    model, tokenizer = lab()
    task, hits, kept = Needle(length=length, count=count, seed=seed), [], []
    for example in task.examples():
        ids = tokenizer(example.prompt, return_tensors="pt").input_ids
        with apply(model, *methods) as run:
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        hits.append(task.score(example, tokenizer.decode(out[0, ids.shape[1] :])))
        kept.append(run.stats.kept)
    return sum(hits) / count, sum(kept) / count
