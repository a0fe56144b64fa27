"""Run a model once under a lens: it reads a text, and may go on with its own."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from foveate._version import __version__
from foveate.bench.comparison.encoding import encoded
from foveate.bench.comparison.model_context import context_length
from foveate.bench.loading import load
from foveate.bench.looking.results import Looked, Measured, Views
from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.host import Host, Method, Site, apply
from foveate.host.hf.model import host, plain_call
from foveate.host.hf.words import end_tokens
from foveate.host.probing import Progress
from foveate.lens.circuits.next_logits import next_logits
from foveate.lens.heads.roles import Role, roles
from foveate.lens.lens import Lens
from foveate.lens.measures import Measure
from foveate.lens.parts.pieces import pieces
from foveate.lens.registry import named
from foveate.lens.survey import NEXT_LOGIT
from foveate.lens.views.capture import attention_view
from foveate.lens.views.head_map import pooled
from foveate.lens.views.joint_matrix import attentionviz_matrix

DEFAULT = ("entropy", "sink_mass", "received_mass")
_REPEAT = 64  # random tokens that come twice, for roles
_LEAST = 8  # tokens of a text for roles
_DELIMITER = re.compile(r"\s*[.,;:!?)\]}\n]+\s*")


def look_at(
    model: str | None, text: str, *, measures: Sequence[str | Measure] = DEFAULT,
    heads: Sequence[tuple[int, int]] = (), generate: int = 0, with_roles: bool = False, with_views: bool = False,
    device: str = "cpu", dtype: str = "float32", trust_remote_code: bool = False,
    progress: Progress = lambda step, steps, note: None, say: Callable[[str], None] = lambda text: None,
) -> Looked:  # fmt: skip
    """Load a decoder, and measure its heads while it reads a text.

    Args:
        model: folder, GGUF file or hub id of a decoder; None is the lab model.
        text: what it reads.
        measures: names from `foveate.lens.MEASURES`, `Measure` objects, or "next_logit" (`foveate.lens.next_logits`).
        heads: the heads `(layer, head)` whose maps to keep.
        generate: the most tokens to generate, greedily; each is read too, the last one included, so that every token
            has its row.
        with_roles: whether heads are named by `foveate.lens.roles`.
        with_views: whether all maps, queries and keys are captured for views, O(N²) memory for each head.
        device, dtype, trust_remote_code: see `foveate.bench.loading.load`.
        progress: called as `progress(step, steps, note)`.
        say: called with messages between steps.
    """
    chosen = chosen_measures(measures)
    if not text.strip():
        raise OptionError("text must not be empty")
    validate.count("generate", generate)
    loaded, tokenizer, _ = load(model, device, dtype, trust_remote_code=trust_remote_code, note=say)
    here, ids = host(loaded), encoded(tokenizer, text)
    here.check_heads(heads)
    _check(here, ids, generate, with_roles)
    found = look_at_tokens(here, tokenizer, ids, chosen, heads, generate, progress)
    named_roles = None
    if with_roles:
        say("roles of heads")
        named_roles = _roles(here, found.ids, tokenizer)
    views = None
    if with_views:
        say("views of all heads")
        views = _views(here, found, tokenizer)
    settings = {"device": device, "dtype": dtype, **versions()}
    return replace(found, model=model or "lab lm", roles=named_roles, settings=settings, views=views)


def chosen_measures(measures: Sequence[str | Measure]) -> list[str | Measure]:
    """Return the measures with names looked up; "next_logit", which no lens takes, stays a name."""
    found = [measure if measure == NEXT_LOGIT else named(measure) for measure in measures]
    if not found:
        raise OptionError("measures must name at least one measure")
    return found


def look_at_tokens(
    here: Host, tokenizer: Any, ids: Sequence[int], measures: Sequence[str | Measure],
    heads: Sequence[tuple[int, int]], generate: int = 0, progress: Progress = lambda step, steps, note: None,
) -> Looked:  # fmt: skip
    """Measure the heads of a loaded decoder while it reads tokens, and others that it generates."""
    lens = Lens(
        [m for m in measures if isinstance(m, Measure)], keep_maps=dict.fromkeys(heads, slice(None)), phase="all"
    )
    whole = _read(here, lens, ids, generate, progress)
    lens.check()
    found = [
        _measured(here, lens, m, len(whole)) if isinstance(m, Measure) else _next_logit(here, whole) for m in measures
    ]
    return Looked(
        model="",
        tokens=pieces(tokenizer, whole),
        prompt=len(ids),
        measures=found,
        maps=[pooled(layer, head, lens.map(layer, head)[0]) for layer, head in heads if layer not in lens.unseen],
        unseen=dict(lens.unseen),
        ids=whole,
    )


def _check(here: Host, ids: Sequence[int], new: int, with_roles: bool) -> None:
    """Refuse a text that is too long or too short."""
    context = context_length(here.config)
    if context is not None and len(ids) + new > context:
        generated = f" + {new} tokens to generate" if new else ""
        raise OptionError(
            f"the text has {len(ids)} tokens{generated}; the model's context holds {context}: give a shorter text"
        )
    if with_roles and len(ids) < _LEAST:
        raise OptionError(f"roles need a text of at least {_LEAST} tokens; this one has {len(ids)}")


class _Layers(Method):
    """Reports each layer's attention call, and changes nothing."""

    def __init__(self, note: str, steps: int, progress: Progress) -> None:
        self.note, self.steps, self.progress = note, steps, progress
        self.done = 0

    def at(self, site: Site) -> bool:
        self.done += 1
        self.progress(min(self.done, self.steps), self.steps, self.note)
        return False


@torch.no_grad()
def _read(here: Host, lens: Lens, ids: Sequence[int], new: int, progress: Progress) -> list[int]:
    """Read the text and up to `new` tokens more; return all tokens."""
    whole, model = list(ids), here.model
    watch = _Layers(f"reading {len(ids):,} tokens", here.layers * (1 + new), progress)
    cache = {"past_key_values": DynamicCache(config=model.config), "use_cache": True} if new else {}
    last = plain_call(model) | cache
    ends = end_tokens(model)
    with apply(model, lens, watch):
        logits = model(_tensor(whole, model), **last).logits
        watch.note = "generating"
        for _ in range(new):
            whole.append(int(logits[0, -1].argmax()))
            logits = model(_tensor(whole[-1:], model), **last).logits
            if whole[-1] in ends:
                break
    return whole


def _tensor(ids: Sequence[int], model: PreTrainedModel) -> Int[Tensor, "1 n"]:
    return torch.tensor([list(ids)], device=model.device)


def _measured(here: Host, lens: Lens, measure: Measure, n: int) -> Measured:
    table = torch.full((here.layers, here.heads), torch.nan)
    values = torch.full((here.layers, here.heads, n), torch.nan)
    for row in lens.table():
        if row["measure"] == measure.name:
            table[row["layer"], row["head"]] = row["value"]
    for layer, found in lens.values(measure).items():
        values[layer, : found.shape[1]] = found[0].float().cpu()
    return Measured(measure.name, measure.over, table, values)


def _views(here: Host, found: Looked, tokenizer: Any) -> Views:
    """Capture all heads once more, and return the view of their maps and the joint pictures of their neurons."""
    whole = _tensor(found.ids, here.model)
    view = attention_view(here.model, whole, tokens=found.tokens, prompt=found.prompt)
    return Views(view, attentionviz_matrix(here.model, whole, tokenizer=tokenizer))


def _next_logit(here: Host, ids: Sequence[int]) -> Measured:
    found = next_logits(here.model, _tensor(ids, here.model))
    values = torch.where(found.counted[:, None, None], found.heads, torch.nan)
    return Measured(NEXT_LOGIT, "queries", found.reduced()[0].float().cpu(), values[0].float().cpu())


def _roles(here: Host, ids: Sequence[int], tokenizer: Any) -> list[Role]:
    """Name the heads that have a role, with the text's own punctuation and line ends as delimiters."""
    context, special = context_length(here.config) or len(ids), set(tokenizer.all_special_ids)
    words = [token for token in range(min(here.vocabulary, len(tokenizer))) if token not in special]
    delimiters = [token for token in set(ids) - special if _DELIMITER.fullmatch(tokenizer.decode([token]))]
    repeat = max(2, min(_REPEAT, (context - 1) // 2, len(words)))
    return roles(here.model, _tensor(ids, here.model), delimiters=delimiters, repeat=repeat, vocabulary=words)


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    return {
        "foveate": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(),
    }  # fmt: skip
