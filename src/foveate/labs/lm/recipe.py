"""The training recipe of the lab language model, run by `foveate labs train lm`.

Retrieval needs induction-like heads, which appear late and abruptly. With Muon for the matrices they appeared after
about 1,000 steps; with AdamW at the same learning rate there were none by 1,200 (one trial of each, not kept). The
context then grows in stages. Judge progress by needle accuracy, not by the loss.
"""

from __future__ import annotations

import json
import platform
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from foveate.host.hf.model import host
from foveate.kv.duo_attention import DuoAttention
from foveate.kv.parts import calibration_store
from foveate.labs.lm.data import batch
from foveate.models.base import byte_tokenizer as tokenizer
from foveate.tasks.parts import corpus
from foveate.tasks.text.needle import Needle
from foveate.tasks.text.passkeys import Passkeys


@dataclass(frozen=True)
class Stage:
    """A number of optimiser steps at one context length."""

    length: int
    batch: int
    steps: int


@dataclass(frozen=True)
class Recipe:
    """All settings of the training; the result also depends on the CPython version's text and on the machine."""

    hidden: int = 192
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    intermediate: int = 512
    context: int = 4096
    stages: tuple[Stage, ...] = (Stage(256, 16, 1500), Stage(512, 8, 500), Stage(1088, 4, 600), Stage(2176, 2, 1000))
    rate: float = 2e-3
    warm_up: int = 100
    cool_down: float = 0.3
    weight_decay: float = 0.1
    seed: int = 0

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def rate_at(self, step: int) -> float:
        """Return the learning rate: warm-up, constant, then linear decay to 5% over the last `cool_down` share."""
        left = (self.steps - step) / (self.cool_down * self.steps)
        return self.rate * min(1.0, (step + 1) / self.warm_up, max(left, 0.05))

    def model(self) -> LlamaForCausalLM:
        torch.manual_seed(self.seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=tokenizer.VOCAB,
                hidden_size=self.hidden,
                intermediate_size=self.intermediate,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.kv_heads,
                head_dim=self.head_dim,
                max_position_embeddings=self.context,
                tie_word_embeddings=True,
                bos_token_id=tokenizer.BOS,
                eos_token_id=tokenizer.EOS,
                pad_token_id=tokenizer.PAD,
            )
        )


Progress = Callable[[int, int, str], None]


def train(
    out: Path, *, recipe: Recipe | None = None, seed: int | None = None, progress: Progress | None = None
) -> dict[str, object]:
    """Train the lab, save a Hugging Face checkpoint to `out`, and return the record saved with it.

    Args:
        out: folder for `model.safetensors`, the configs, the tokenizer and `recipe.json`.
        recipe: sizes and schedule; the default takes about an hour on one core and made the shipped checkpoint.
        seed: replaces the recipe's seed.
        progress: called as `progress(step, steps, note)` after every step.
    """
    recipe = recipe or Recipe()
    if seed is not None:
        recipe = Recipe(**{**recipe.__dict__, "seed": seed})
    model, draw, start, step = recipe.model(), random.Random(recipe.seed), time.time(), 0
    optimisers = _optimisers(model, recipe)
    for stage in recipe.stages:
        for _ in range(stage.steps):
            loss = _step(model, optimisers, batch(draw, stage.batch, stage.length), recipe.rate_at(step))
            step += 1
            if progress is not None:
                progress(step, recipe.steps, f"context {stage.length}, loss {loss:.3f}")
        save(model, recipe, out, {"steps": step, "seconds": round(time.time() - start), **scores(model, stage.length)})
    calibrate_heads(model, out, progress)
    return json.loads((out / "recipe.json").read_text())


def _optimisers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    matrices, others = list[nn.Parameter](), list[nn.Parameter]()
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=recipe.rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _step(
    model: LlamaForCausalLM, optimisers: list[torch.optim.Optimizer], data: tuple[Tensor, Tensor], rate: float
) -> float:
    ids, weights = data[0], data[1][:, 1:].flatten()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids, use_cache=False).logits
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    loss = (losses * weights).sum() / weights.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()
        optimiser.zero_grad()
    return loss.item()


@torch.no_grad()
def scores(model: LlamaForCausalLM, length: int, count: int = 50) -> dict[str, float]:
    """Return needle accuracy at lengths up to `length`, and bits per byte of held-out text."""
    model.eval()
    found = {f"needle {n}": needle_accuracy(model, n, count) for n in (256, 512, 1024, 2048) if n <= length}
    ids = torch.tensor(
        [[tokenizer.BOS, *corpus.text("heldout")[start : start + 1023].encode()] for start in range(0, 65536, 1024)]
    )
    bits = sum(model(row[None], labels=row[None], use_cache=False).loss.item() for row in ids) / len(ids) / 0.6931
    model.train()
    return {**found, "heldout bits per byte": round(bits, 3)}


@torch.no_grad()
def needle_accuracy(model: LlamaForCausalLM, length: int, count: int, seed: int = 1234) -> float:
    """Return the share of needles whose digits are all the likeliest next token, given the digits before."""
    hits = 0
    for example in Needle(length=length, count=count, seed=seed).examples():
        ids = torch.tensor([[tokenizer.BOS, *(example.prompt + example.answer).encode()]])
        digits = len(example.answer) - 1
        guess = model(ids, use_cache=False, logits_to_keep=digits + 1).logits[0, :-1].argmax(-1)
        hits += bool((guess == ids[0, -digits:]).all())
    return hits / count


def calibrate_heads(model: LlamaForCausalLM, out: Path, progress: Progress | None = None) -> None:
    """Train DuoAttention's gates on the trained lab, and save them in its folder, where `compare` looks for them."""
    data = Passkeys(lambda text: list(text.encode()), length=768, count=3, words=6, begin=(tokenizer.BOS,))
    gates = DuoAttention.calibrate(host(model), data, progress)
    digest = calibration_store.model_digest(model)
    calibration_store.save(gates, out / "duo_attention.safetensors", digest)


def save(model: LlamaForCausalLM, recipe: Recipe, out: Path, measured: dict[str, object]) -> None:
    """Write the checkpoint, and a record of its recipe, environment and scores."""
    model.save_pretrained(out)
    tokenizer.build(recipe.context).save_pretrained(out)
    environment = {"python": platform.python_version(), "torch": torch.__version__, "corpus": corpus.digest("train")}
    (out / "recipe.json").write_text(json.dumps({**asdict(recipe), **environment, **measured}, indent=2) + "\n")
