"""The forward passes of a run: what hooks record because the attention function does not receive it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from foveate.core.errors import UnsupportedModel
from foveate.host.hf.adoption import Caches, cache_among, is_recording
from foveate.host.hf.cache import LATEST, SlotLayer
from foveate.host.hf.calls import CROSS, crosses_to, parameters
from foveate.host.hf.tokens_read import TokensRead, cached_tokens, named_inputs, tokens_of
from foveate.host.method import Method
from foveate.host.model_call import Edit
from foveate.host.own_sequence import OwnSequence
from foveate.host.site import Site
from foveate.host.stream import Stream

#: The key of the record of a sequence's tokens among the notes of its cache.
_READ = ("tokens", "read")

#: `at_end(calls with the methods that choose there, tokens of the pass)`.
AtPassEnd = Callable[[list[tuple[Site, list[Method]]], Tensor | None], None]


@dataclass(slots=True)
class _Call:
    """The call of one attention module.

    Args:
        cache: the cache among its arguments, if its keys are the sequence's own.
        hidden: its hidden states.
        layer: its number in the cache.
        crosses: whether its keys are another sequence's.
        sequence: the cache of the queries' sequence.
        finish: called when it ends.
    """

    cache: Cache | None
    hidden: Tensor | None
    layer: int
    crosses: bool = False
    sequence: Cache | None = None
    finish: Callable[[], None] | None = None


@dataclass(slots=True)
class _Pass:
    """The forward pass of one thread.

    Args:
        step: the methods' notes on this pass.
        cache: the cache among the model's arguments.
        logits_to_keep: the caller's value.
        wants_weights: whether the caller asked for attention weights.
        call: the current attention call.
        outermost: the module whose call is the pass.
        ids: the tokens that the pass reads; None if they are unknown.
        own: the queries of the latest call that attended to its own sequence.
        ended: calls at which methods choose what stays when the pass has ended, with these methods.
        reader: the only method, while tokens are read for a measurement.
        past: tokens of the sequences before the pass.
        decoded: tokens that the decoder reads of each sequence.
        read: the record of the sequences' tokens, this pass included; None if they are unknown.
        fresh: an empty cache like that of the pass, at the start of a sequence under a method that edits logits.
        is_branch: whether the pass is a second reading, in which no logits are edited.
        embed: changes the embeddings that the decoder reads, in a second reading.
        stream: the tokens between the blocks that are running, if methods drop tokens.
    """

    step: dict[Any, Any] = field(default_factory=dict)
    cache: Cache | None = None
    logits_to_keep: Any = None
    wants_weights: bool = False
    call: _Call | None = None
    outermost: nn.Module | None = None
    ids: Tensor | None = None
    own: OwnSequence = field(default_factory=OwnSequence)
    ended: list[tuple[Site, list[Method]]] = field(default_factory=list)
    reader: Method | None = None
    past: int = 0
    decoded: int = 0
    read: TokensRead | None = None
    fresh: Cache | None = None
    is_branch: bool = False
    embed: Edit | None = None
    stream: Stream | None = None


class Passes:
    """The forward passes in progress on a run's model, one in each thread.

    Args:
        caches: the caches that the run works on.
        at_end: called when a pass has ended whose calls left a choice to its end; see `Method.keep_all`.
        records: whether to record the tokens that are read, for spans.
        branches: whether a method may read a sequence a second time.

    Attributes:
        layers: each attention module that the run covers, with its number in the cache and its order.
        latest: the record of the tokens of the latest prompt that was read.
    """

    def __init__(self, caches: Caches, at_end: AtPassEnd, records: bool = False, branches: bool = False) -> None:
        self.caches, self._at_pass_end = caches, at_end
        self._records, self._branches = records, branches
        self.latest: TokensRead | None = None
        self.layers: dict[nn.Module, tuple[int, int]] = {}
        self._local = threading.local()

    @property
    def here(self) -> _Pass:
        """The pass of this thread."""
        try:
            return self._local.here
        except AttributeError:
            here = self._local.here = _Pass()
            return here

    def close(self) -> None:
        self._local.__dict__.clear()

    @contextmanager
    def aside(self, embed: Edit | None = None) -> Iterator[None]:
        """Set the pass of this thread aside for a second reading within it.

        Args:
            embed: changes the embeddings that the decoder reads.
        """
        before = self.here
        self._local.here = _Pass(is_branch=True, embed=embed)
        try:
            yield
        finally:
            self._local.here = before

    # -- hooks -------------------------------------------------------------------------------------------------------

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], is_whole: bool) -> None:
        """Begin a pass: clear the methods' notes on it, and track its cache before masks are made.

        Args:
            module: the model, its base or its decoder, which call each other.
            args, kwargs: its arguments.
            is_whole: whether the module is the model that the methods were applied to.
        """
        here = self.here
        if here.outermost is None:
            here.outermost, here.step, here.ended, here.cache, here.own = module, {}, [], None, OwnSequence()
            here.ids = _ids(args, kwargs)
            self._begin_tokens(module, args, kwargs)
        elif self._records:
            here.decoded = tokens_of(named_inputs(module, args, kwargs)) or here.decoded
        if is_whole:
            here.logits_to_keep = kwargs.get("logits_to_keep")
            requested = kwargs.get("output_attentions")
            config: Any = module.config
            here.wants_weights = bool(config.output_attentions if requested is None else requested)
        cache = cache_among((*args, *kwargs.values()))
        if cache is not None:
            here.cache = cache
            self.caches.track(cache)
            self._note_read(here, cache)

    def _begin_tokens(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the tokens that a pass reads, for spans, and make the empty cache of a second reading."""
        here = self.here
        here.past, here.decoded, here.read, here.fresh = 0, 0, None, None
        if not self._records:
            return
        given, config = named_inputs(module, args, kwargs), getattr(module, "config", None)
        cache, tokens = cache_among(given.values()), tokens_of(given)
        here.past = 0 if cache is None else cached_tokens(cache)
        if tokens is None or getattr(config, "is_encoder_decoder", False):
            return
        here.decoded = tokens
        if here.past == 0:
            here.read = TokensRead(module)
            self.latest = self.latest if here.is_branch else here.read
            here.fresh = copy.deepcopy(cache) if self._branches and cache is not None else None
        elif cache is not None:
            here.read = self.caches.notes.get(cache, {}).get(_READ, {}).get("tokens")
        if here.read is not None:
            generated = here.past > 0 and (tokens == 1 or (cache is not None and is_recording(cache)))
            here.read.note(here.past, tokens, None if generated else given)

    def _note_read(self, here: _Pass, cache: Cache | None) -> None:
        """Keep the record of the tokens that are read with their cache."""
        if here.read is not None and cache is not None:
            if cache not in self.caches.notes:
                self.caches.track(cache)
            self.caches.notes[cache].setdefault(_READ, {})["tokens"] = here.read

    def end(self, module: nn.Module, args: object, output: object, has_methods: bool) -> None:
        """End a pass. If the backward pass will repeat it, check there that the run is still open."""
        here, LATEST.layer = self.here, None
        if module is here.outermost:
            ended, here.outermost = here.ended, None
            self._note_read(here, cache_among([getattr(output, "past_key_values", None)]))
            try:
                if ended and output is not None:
                    self._at_pass_end(ended, here.ids)
            finally:
                here.step, here.cache, here.ids, here.ended, here.own = {}, None, None, [], OwnSequence()
                here.past, here.read, here.fresh = 0, None, None
        if (
            has_methods
            and torch.is_grad_enabled()
            and any(getattr(x, "gradient_checkpointing", False) for x in module.modules())
        ):
            for value in output.values() if isinstance(output, dict) else ():
                if isinstance(value, Tensor) and value.requires_grad:
                    value.register_hook(self._check_open)

    def _check_open(self, gradient: Tensor) -> None:
        """Refuse a backward pass with checkpoints after the block: it would run the model again without the methods."""
        if not self.caches.is_open:
            raise UnsupportedModel(
                "gradient checkpointing runs the model again in the backward pass: run that pass inside the block of "
                "foveate.apply(model, ...) too"
            )

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record what the attention function does not receive: the cache and the hidden states."""
        given = {**dict(zip(parameters(type(module).forward), args, strict=False)), **kwargs} if args else kwargs
        cache, layer, index = cache_among(given.values()), self.layers[module][0], given.get("layer_idx")
        if isinstance(index, int):
            layer = index
        sequence, crosses = cache, crosses_to(module, given)
        if any(given.get(name) is not None for name in CROSS):  # the cache of another sequence's keys does not grow
            cache = None
        hidden = given.get("hidden_states", args[0] if args else None)
        self.here.call = _Call(cache, hidden, layer, crosses, sequence)
        LATEST.layer = None
        if cache is not None:
            self.caches.prepare(cache, layer)

    def after(self, module: nn.Module, args: object, output: object) -> None:
        """End a call: drop the tokens that have to be dropped, and release everything recorded about it."""
        here = self.here
        call, here.call = here.call, None
        LATEST.layer = None
        if call is not None and call.finish is not None and output is not None:  # None after an exception
            call.finish()

    def note_end(self, site: Site, methods: list[Method]) -> None:
        """Let methods choose what stays of a layer when the whole pass has ended."""
        self.here.ended.append((site, methods))

    # -- questions of dispatch ---------------------------------------------------------------------------------------

    def at_end(self, finish: Callable[[], None]) -> None:
        """Call a function when the call ends.

        If a module attends several times to what it stored once, only the last function is called.
        """
        call = self.here.call
        if call is None:
            finish()
        else:
            call.finish = finish

    def called(self, module: nn.Module) -> tuple[Cache | None, int]:
        """Return the cache and the layer number of the current call."""
        here = self.here
        if here.call is not None:
            return here.call.cache, here.call.layer
        return here.cache, self.layers[module][0]  # the module has no hooks: see `foveate.host.hf.calls.takes_more`

    def slots(self, module: nn.Module) -> SlotLayer | None:
        """Return the call's layer if it stores its tokens in slots, for this run or an earlier one; else None."""
        if self.here.call is not None and getattr(LATEST, "layer", None) is not None:
            return LATEST.layer
        cache, number = self.called(module)
        if cache is None or len(cache.layers) <= number:
            return None
        layer = cache.layers[number]
        return layer if isinstance(layer, SlotLayer) else None


def _ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the tokens among a model's arguments; None if it is given numbers in their place, or beside them."""
    given = {"input_ids": args[0] if args else None, **kwargs}
    ids = given["input_ids"]
    others = (value for name, value in given.items() if "mask" not in name and isinstance(value, Tensor))
    if not isinstance(ids, Tensor) or ids.dim() != 2 or any(value.is_floating_point() for value in others):
        return None
    return ids
