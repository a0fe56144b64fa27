"""The end of a model's forward pass, where methods change the logits of the next token."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from foveate.core.errors import UnsupportedModel
from foveate.host.hf.adoption import cache_among, is_recording, prompt_of
from foveate.host.hf.attach import runs_open_on
from foveate.host.hf.tokens_read import named_inputs, tokens_of
from foveate.host.method import Method, overrides
from foveate.host.model_call import Edit, ModelCall, picked, placed

if TYPE_CHECKING:
    from foveate.host.run import Run

#: Arguments of a model that a second reading leaves out: what they return is the first reading's.
_LEFT_OUT = ("labels", "output_attentions", "output_hidden_states")


def editing(run: Run) -> list[Method]:
    """Return the methods of a run that change the logits of the next token."""
    return [method for method in run.methods if overrides(method, "edit_next_token")]


def edited(run: Run, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Return the output of a model with the logits that methods changed; None if they leave it.

    Args:
        run: the run whose methods act.
        model: the model that the run is on.
        args, kwargs: the arguments of its call.
        output: what it returned.
    """
    here = run.passes.here
    if here.is_branch or here.reader is not None:
        return None
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise UnsupportedModel(
            f"{type(editing(run)[0]).__name__} changes the logits of the next token, and {type(model).__name__} returned "
            f"none (B, N, V); it needs a language-model head, and return_dict=True"
        )
    given = named_inputs(model, args, kwargs)
    cache = cache_among((*given.values(), getattr(output, "past_key_values", None)))
    if cache is not None and cache not in run.caches.notes:
        run.caches.track(cache)
    drafts = cache is not None and is_recording(cache)
    places: Iterable[int | Tensor] = range(-logits.shape[1], 0) if drafts else (_last(run, given, logits),)
    changed = logits
    for at in places:
        before = new = picked(changed, at)
        call = _call(run, model, given, cache, logits.shape[0], drafts, at)
        for method in editing(run):
            new = method.edit_next_token(new, call)
        _check(new, before, editing(run))
        changed = changed if new is before else placed(changed, at, new)
    if changed is logits:
        return None
    output.logits = changed
    return output


def _call(
    run: Run, model: nn.Module, given: Any, cache: Cache | None, sequences: int, drafts: bool, at: int | Tensor
) -> ModelCall:
    here = run.passes.here
    tokens = here.decoded or tokens_of(given) or 1
    prompt = None if cache is None else prompt_of(cache, run.caches.first, here.past)

    def again(other: Any, edit: Edit | None) -> tuple[Tensor, Any]:
        return _read_again(run, model, given, other, edit)

    return ModelCall(
        run.host, cache, sequences, here.past, tokens, run.spans_at(here.past, here.past + tokens, sequences), here.step,
        prompt is None and (here.past == 0 or tokens > 1) and not (drafts and here.past > 0), drafts, at,
        {} if cache is None else run.caches.notes[cache], again, here.fresh,
    )  # fmt: skip


def _last(run: Run, given: Any, logits: Tensor) -> int | Tensor:
    """Return the index, in a call's logits, of the last token of each sequence that is no padding."""
    mask, n, held = given.get("attention_mask"), tokens_of(given), logits.shape[1]
    if held == 1 or n is None or run.host.config.is_encoder_decoder:
        return -1
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < n:
        return -1
    later = mask[:, -n:].flip(-1).to(torch.uint8).argmax(-1)
    return (held - 1 - later).clamp_min(0)


def _read_again(run: Run, model: nn.Module, given: Any, cache: Any, edit: Edit | None) -> tuple[Tensor, Any]:
    """Call a model once more with the arguments of a call, into another cache."""
    name = next((name for name, value in given.items() if isinstance(value, Cache)), "past_key_values")
    arguments = {key: value for key, value in given.items() if key not in _LEFT_OUT}
    arguments[name] = cache
    anchor = next(iter(run.passes.layers))
    with ExitStack() as stack:
        for other in runs_open_on(anchor):
            stack.enter_context(other.passes.aside(edit if other is run else None))
        output = model(**arguments)
    made = getattr(output, "past_key_values", None)
    return output.logits, cache if made is None else made


def _check(new: Any, before: Tensor, methods: list[Method]) -> None:
    if not isinstance(new, Tensor) or new.shape != before.shape:
        got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
        names = ", ".join(type(method).__name__ for method in methods)
        raise UnsupportedModel(f"edit_next_token() of {names} must return logits {tuple(before.shape)}; got {got}")


def embedded(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], edit: Edit | None) -> Any:
    """Return the arguments of a decoder with changed embeddings; None if there is no change.

    Args:
        module: the decoder.
        args, kwargs: its arguments: tokens, or their embeddings.
        edit: the change.
    """
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
