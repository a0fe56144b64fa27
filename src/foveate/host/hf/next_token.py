"""The end of a model's forward pass, where methods change the logits of the next token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host.hf.adoption import cache_among, is_recording, prompt_of
from foveate.host.hf.attach import Attached, runs_open_on
from foveate.host.hf.tokens_read import named_inputs, tokens_of
from foveate.host.method import Method, overrides
from foveate.host.model_call import Edit, ModelCall, picked, placed

#: Arguments of a model that a second reading leaves out: what they return is the first reading's.
_LEFT_OUT = ("labels", "output_attentions", "output_hidden_states")


@dataclass(frozen=True, eq=False)
class _Ended:
    """A forward pass that has ended.

    Args:
        model: the model.
        given: the arguments of its call by name.
        logits: all logits that it returned.
        cache: its cache, if it keeps one.
    """

    model: nn.Module
    given: Mapping[str, Any]
    logits: Tensor
    cache: Cache | None

    @property
    def drafts(self) -> bool:
        """Return whether assisted decoding may remove the last tokens again."""
        return self.cache is not None and is_recording(self.cache)

    def places(self, is_encoder_decoder: bool) -> Iterable[int | Tensor]:
        """Return the tokens whose logits are edited, as indices of the logits: the last one, or each draft."""
        if self.drafts:
            return range(-self.logits.shape[1], 0)
        mask, n, held = self.given.get("attention_mask"), tokens_of(self.given), self.logits.shape[1]
        if held == 1 or n is None or is_encoder_decoder:
            return (-1,)
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < n:
            return (-1,)
        later = mask[:, -n:].flip(-1).to(torch.uint8).argmax(-1)  # right padding
        return ((held - 1 - later).clamp_min(0),)


def editing(run: Attached) -> list[Method]:
    """Return the methods of a run that change the logits of the next token."""
    return [method for method in run.methods if overrides(method, "edit_next_token")]


def edited(run: Attached, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Return the output of a model with the logits that the methods of all open runs make of it; None for as it is.

    The first of the runs that edit does it for all of them, in the order in which they were applied.

    Args:
        run: the run whose hook was called.
        model: the model.
        args, kwargs: the arguments of its call.
        output: what it returned.
    """
    open_here = runs_open_on(next(iter(run.passes.layers)))
    runs = [other for other in open_here if editing(other)]
    reads = any(other.passes.here.is_branch or other.passes.here.reader is not None for other in open_here)
    if runs[0] is not run or reads:
        return None
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise UnsupportedModel(
            f"{type(editing(run)[0]).__name__} changes the logits of the next token, and {type(model).__name__} "
            f"returned none (B, N, V); it needs a language-model head, and return_dict=True"
        )
    given = named_inputs(model, args, kwargs)
    cache = cache_among((*given.values(), getattr(output, "past_key_values", None)))
    ended, changed = _Ended(model, given, logits, cache), logits
    for at in ended.places(run.host.config.is_encoder_decoder):
        before = new = picked(changed, at)
        for other in runs:
            call = _call(other, ended, at)
            for method in editing(other):
                new = _checked(method.edit_next_token(new, call), before, method)
        changed = changed if new is before else placed(changed, at, new)
    if changed is logits:
        return None
    output.logits = changed
    return output


def _call(run: Attached, ended: _Ended, at: int | Tensor) -> ModelCall:
    """Return the pass as the methods of a run get it."""
    here, cache, sequences = run.passes.here, ended.cache, ended.logits.shape[0]
    tokens = here.decoded or tokens_of(ended.given) or 1
    if cache is not None and cache not in run.caches.notes:
        run.caches.track(cache)
    prompt = None if cache is None else prompt_of(cache, run.caches.first, here.past)
    spans = run.spans_at(here.past, here.past + tokens, sequences, ended.logits.device)
    # sites have the notes of the first run that hooks attention; see `foveate.host.hf.dispatch`
    sited = next((other for other in runs_open_on(next(iter(run.passes.layers))) if other.has_hooks), run)

    def again(other: Any, edit: Edit | None) -> tuple[Tensor, Any]:
        return _read_again(run, ended, other, edit)

    return ModelCall(
        host=run.host, cache=cache, sequences=sequences, past=here.past, tokens=tokens, spans=spans,
        step=sited.passes.here.step, at=at, drafts=ended.drafts,
        reads_prompt=prompt is None and (here.past == 0 or (tokens > 1 and not ended.drafts)),
        _notes={} if cache is None else run.caches.notes[cache], _again=again, _fresh=here.fresh,
    )  # fmt: skip


def _read_again(run: Attached, ended: _Ended, cache: Any, edit: Edit | None) -> tuple[Tensor, Any]:
    """Call a model once more with the arguments of a call, into another cache."""
    name = next((name for name, value in ended.given.items() if isinstance(value, Cache)), "past_key_values")
    arguments = {key: value for key, value in ended.given.items() if key not in _LEFT_OUT}
    arguments[name] = cache
    with ExitStack() as stack:
        for other in runs_open_on(next(iter(run.passes.layers))):
            stack.enter_context(other.passes.aside(edit if other is run else None))
        output = ended.model(**arguments)
    made = getattr(output, "past_key_values", None)
    return output.logits, cache if made is None else made


def _checked(new: Any, before: Tensor, method: Method) -> Tensor:
    if not isinstance(new, Tensor) or new.shape != before.shape:
        got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
        raise OptionError(f"edit_next_token() of {type(method).__name__} must be {tuple(before.shape)}; got {got}")
    return new


def embedded(run: Attached, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the arguments of a decoder with the embeddings that a second reading changes; None if it changes none.

    Args:
        run: the run whose method reads a second time.
        module: the decoder.
        args, kwargs: its arguments: tokens, or their embeddings.
    """
    edit = run.passes.here.embed
    if edit is None:
        return None
    given = dict(named_inputs(module, args, kwargs))
    embeds, ids = given.get("inputs_embeds"), given.pop("input_ids", None)
    if embeds is None:
        table = module.get_input_embeddings() if hasattr(module, "get_input_embeddings") else None
        if ids is None or table is None:
            raise UnsupportedModel(f"{type(module).__name__} is given neither embeddings nor tokens to embed")
        embeds = table(ids)
    return (), {**given, "inputs_embeds": edit(embeds)}
