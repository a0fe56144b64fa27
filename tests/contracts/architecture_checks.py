"""What apply() promises on any decoder, tried on one tiny model: exact, or refused by name before anything runs.

The oracle of an evicting policy is the same model with a full cache, run by an attention function of its own that hides
what the policy has dropped behind the model's mask and then calls the model's own eager attention.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from foveate.core.errors import FoveateError
from foveate.host import Method, apply
from foveate.kv.sink_recent import SinkRecent

PROMPT, STEPS, SINK, RECENT, PADDING = 14, 8, 2, 5, 3
TOKENS = (2, 60)

#: What generate() needs beyond the usual.
GENERATION: dict[str, dict[str, Any]] = {"musicgen": {"guidance_scale": 1}, "musicgen_melody": {"guidance_scale": 1}}


@dataclass
class Verdict:
    """What one architecture does: `plain` under no method, `evicting` under one that evicts, with reasons and notes."""

    name: str
    plain: str = ""
    evicting: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass
class Generated:
    tokens: Tensor
    logits: Tensor
    cache: Any

    def nbytes(self) -> int:
        """Bytes of every tensor that the cache holds on to."""
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors(self.cache)}.values())


def tensors(thing: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor inside some object, through its attributes, lists and dictionaries."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, nn.Module | type | str):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    parts = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple) else ()
    for part in [*parts, *getattr(thing, "__dict__", {}).values()]:
        yield from tensors(part, seen)


def generate(name: str, model: PreTrainedModel, ids: Tensor, mask: Tensor, *methods: Method) -> Generated:
    torch.manual_seed(0)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True,
        output_logits=True, **GENERATION.get(name, {}),
    )  # fmt: skip
    logits = torch.stack(out.logits, 1)
    return Generated(out.sequences[:, ids.shape[1] :], logits, out.get("past_key_values"))


def prompts(padding: int = 0) -> tuple[Tensor, Tensor]:
    """Two prompts of random tokens; with `padding` the first one's beginning is padded."""
    ids = torch.randint(*TOKENS, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :padding], mask[0, :padding] = 0, 0
    return ids, mask


# -- the oracle --------------------------------------------------------------------------------------------------------

_TOTAL = {"tokens": 0}


def _hides_what_was_dropped(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    total, nq, nk = _TOTAL["tokens"], query.shape[2], key.shape[2]
    if query.shape[2] <= nk <= total:
        position, before = torch.arange(total - nk, total), total - nq
        kept = (position < SINK) | (position >= before - RECENT)
        if before <= SINK + RECENT:
            kept = torch.ones_like(kept)
        hidden = torch.zeros(1, 1, nq, nk, dtype=query.dtype).masked_fill(~kept, torch.finfo(query.dtype).min)
        attention_mask = hidden if attention_mask is None else attention_mask[..., -nk:] + hidden
        attention_mask = attention_mask.clamp(min=torch.finfo(query.dtype).min)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return eager(module, query, key, value, attention_mask, **options)


AttentionInterface.register("oracle of sink and recent", _hides_what_was_dropped)
AttentionMaskInterface.register("oracle of sink and recent", eager_mask)


@contextmanager
def _implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values()
    before = [config._attn_implementation_internal for config in configs]

    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            ids = kwargs["inputs_embeds"]
        _TOTAL["tokens"] += ids.shape[1]

    _TOTAL["tokens"] = 0
    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        for config in configs:
            config._attn_implementation_internal = name
        yield
    finally:
        hook.remove()
        for config, old in zip(configs, before, strict=True):
            config._attn_implementation_internal = old


def oracle(name: str, model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Generated:
    with _implementation(model, "oracle of sink and recent"):
        return generate(name, model, ids, mask)


# -- the checks --------------------------------------------------------------------------------------------------------


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-9))


def check(name: str, model: PreTrainedModel) -> Verdict:
    verdict = Verdict(name)
    with torch.no_grad():
        plain = {padding: generate(name, model, *prompts(padding)) for padding in (0, PADDING)}
        verdict.plain = _no_method(name, model, plain)
        if verdict.plain == "exact":
            verdict.evicting = _evicts(name, model, plain[0], verdict)
    return verdict


def refusal(model: PreTrainedModel, *methods: Method) -> str:
    """Why these methods are refused on entering, before anything runs; empty where they are not."""
    try:
        with apply(model, *methods):
            return ""
    except FoveateError as error:
        return f"refused: {error}"


def _no_method(name: str, model: PreTrainedModel, plain: dict[int, Generated]) -> str:
    if why := refusal(model):
        return why
    with apply(model):
        for padding, expected in plain.items():
            got = generate(name, model, *prompts(padding))
            if not torch.equal(got.logits, expected.logits):
                return f"WRONG by {difference(got.logits, expected.logits):.1e} (padding {padding})"
    return "exact"


def _evicts(name: str, model: PreTrainedModel, plain: Generated, verdict: Verdict) -> str:
    ids, mask = prompts()
    roomy = SinkRecent(sink=SINK, recent=3 * PROMPT)
    if why := refusal(model, roomy):
        return why
    with apply(model, roomy):
        full = generate(name, model, ids, mask)
    if (off := difference(full.logits, plain.logits)) > 1e-5:
        return f"WRONG at full budget by {off:.1e}"
    if off:
        verdict.notes.append("full budget to rounding")
    with apply(model, SinkRecent(sink=SINK, recent=RECENT)) as run:
        small = generate(name, model, ids, mask)
    expected = oracle(name, model, ids, mask)
    if (off := difference(small.logits, expected.logits)) > 1e-4:
        return f"WRONG against the oracle by {off:.1e}"
    effect = difference(plain.logits, expected.logits)
    if effect < 1e-3:
        verdict.notes.append("nothing to evict")
    elif small.cache is None or small.nbytes() >= plain.nbytes() or run.stats.kept >= 1:
        return f"WRONG: {small.nbytes()} bytes of {plain.nbytes()}, kept {run.stats.kept:.2f}"
    return _padded(name, model, verdict)


def _padded(name: str, model: PreTrainedModel, verdict: Verdict) -> str:
    """Each left-padded sequence gives the tokens that it gives alone, if the model itself does that."""
    ids, mask = prompts(PADDING)

    def rows(*methods: Method) -> list[Tensor]:
        with apply(model, *methods):
            together = generate(name, model, ids, mask).tokens
            first = generate(name, model, ids[:1, PADDING:], mask[:1, PADDING:]).tokens
            second = generate(name, model, ids[1:], mask[1:]).tokens
        return [together, torch.cat([first, second])]

    if not torch.equal(*rows()):
        verdict.notes.append("the model itself minds padding")
        return "exact"
    return "exact" if torch.equal(*rows(SinkRecent(sink=SINK, recent=RECENT))) else "WRONG with padding"
