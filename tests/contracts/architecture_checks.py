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
from tests.contracts.architectures import build

PROMPT, STEPS, SINK, RECENT, PADDING = 14, 6, 2, 5, 3
EXACT = "exact"
TOKENS = (2, 60)

#: What generate() needs beyond the usual.
_MUSIC = {"guidance_scale": 1, "decoder_start_token_id": 1}
GENERATION: dict[str, dict[str, Any]] = {"musicgen": _MUSIC, "musicgen_melody": _MUSIC}


#: What does not run by itself.
NOT_RUN = {
    "gemma3n": "its vision tower needs timm; see gemma3n_text",
    "gemma4_assistant": "it drafts for another model, whose keys it reads",
    "gemma4_unified_assistant": "it drafts for another model, whose keys it reads",
    "musicgen": "its generate() needs a text encoder's output",
}


@dataclass
class Verdict:
    """What one architecture does: `plain` under no method, `evicting` under one that evicts, with reasons and notes."""

    name: str
    plain: str = ""
    evicting: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """Exact, or refused; or a model that does not run by itself."""
        return all(s == EXACT or s.startswith(("refused: ", "not run: ")) for s in (self.plain, self.evicting) if s)


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
        ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False, pad_token_id=0, return_dict_in_generate=True,
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
    """The largest difference, as a share of the largest number."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-9))


def verdict_of(name: str) -> Verdict:
    """Everything, on an architecture by its name."""
    if name in NOT_RUN:
        return Verdict(name, f"not run: {NOT_RUN[name]}")
    return check(name, build(name))


@torch.no_grad()
def check(name: str, model: PreTrainedModel) -> Verdict:
    """Everything, on one model. What holds is "exact" or "refused: …"; anything else is a fault, in words."""
    verdict, plain = Verdict(name), {0: generate(name, model, *prompts())}
    try:
        plain[PADDING] = generate(name, model, *prompts(PADDING))
    except Exception:  # noqa: BLE001  whatever the model's own code raises
        verdict.notes.append("the model takes no padding")
    verdict.plain = _no_method(name, model, plain)
    if verdict.plain == EXACT:
        verdict.evicting = _evicts(name, model, plain[0], verdict)
    if verdict.evicting == EXACT and PADDING in plain:
        verdict.evicting = _padded(name, model, plain, verdict)
    return verdict


def refusal(model: PreTrainedModel, *methods: Method) -> str:
    """Why these methods are refused on entering, before anything runs; empty where they are not."""
    try:
        with apply(model, *methods):
            return ""
    except FoveateError as error:
        return f"refused: {error}"


def _no_method(name: str, model: PreTrainedModel, plain: dict[int, Generated]) -> str:
    """No method, no difference in any bit."""
    if why := refusal(model):
        return why
    with apply(model):
        for padding, expected in plain.items():
            got = generate(name, model, *prompts(padding))
            if not torch.equal(got.logits, expected.logits):
                return f"other logits by {difference(got.logits, expected.logits):.1e}, with padding {padding}"
    return EXACT


def _evicts(name: str, model: PreTrainedModel, plain: Generated, verdict: Verdict) -> str:
    """All of it kept: the model's own output. Less: the oracle's, and fewer bytes."""
    roomy = SinkRecent(sink=SINK, recent=3 * PROMPT)
    if why := refusal(model, roomy):
        return why
    with apply(model, roomy):
        full = generate(name, model, *prompts())
    if (off := difference(full.logits, plain.logits)) > 1e-5:
        return f"other logits at full budget by {off:.1e}"
    if off:
        verdict.notes.append("full budget equal to rounding")
    with apply(model, SinkRecent(sink=SINK, recent=RECENT)) as run:
        small = generate(name, model, *prompts())
        kept = run.stats.kept
    expected = oracle(name, model, *prompts())
    if (off := difference(small.logits, expected.logits)) > 1e-4:
        return f"other logits than the oracle by {off:.1e}"
    if difference(plain.logits, expected.logits) < 1e-3:
        return "eviction changes nothing"
    if small.nbytes() >= plain.nbytes() or kept >= 1:
        return f"{small.nbytes()} bytes of {plain.nbytes()}, kept {kept:.2f}"
    return EXACT


def _padded(name: str, model: PreTrainedModel, plain: dict[int, Generated], verdict: Verdict) -> str:
    """Each sequence of a left-padded batch gives the tokens that it gives alone, if the model itself does that."""
    ids, mask = prompts(PADDING)

    def alone(*methods: Method) -> Tensor:
        with apply(model, *methods):
            return generate(name, model, ids[:1, PADDING:], mask[:1, PADDING:]).tokens

    if not torch.equal(plain[PADDING].tokens[:1], alone()):
        verdict.notes.append("padding changes the model's own output")
        return EXACT
    policy = SinkRecent(sink=SINK, recent=RECENT)
    with apply(model, policy):
        together = generate(name, model, ids, mask).tokens
        unpadded = generate(name, model, *prompts()).tokens
    same = torch.equal(together[:1], alone(policy)) and torch.equal(together[1:], unpadded[1:])
    return EXACT if same else "other tokens in a left-padded batch than alone"
