"""A run: methods on a model for the length of a `with apply(...)` block."""

from __future__ import annotations

import threading
from collections import ChainMap
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host.evict import changes, evict_at_end
from foveate.host.hf import hidden, next_token
from foveate.host.hf.adoption import Caches, prompt_of
from foveate.host.hf.attach import attach, runs_open_on
from foveate.host.hf.blocks import blocks_of
from foveate.host.hf.cache import SlotLayer
from foveate.host.hf.dropping import dropping, hook_drops
from foveate.host.hf.hooks import Hook
from foveate.host.hf.model import Host, host, native_attention
from foveate.host.hf.passes import Passes
from foveate.host.hf.reread import read_and_remove
from foveate.host.method import HOOKS, Method, check_methods, overrides
from foveate.host.site import Site
from foveate.host.spans import Place, Spans
from foveate.host.stack_part import StackPart
from foveate.host.stats import Stats
from foveate.host.stream import Stream

#: The part of a model that methods act on.
Part = Literal["auto", "decoder", "all"]

#: The times at which methods drop tokens.
Evict = Literal["always", "after prompt"]

_ENTRY = threading.Lock()


class Run:
    """Methods on a model, for the length of a `with apply(...)` block.

    Args:
        model: a transformers model.
        methods: the methods, in order.
        on, evict: see `foveate.apply`.
        find_excluded: finds the modules that a run with evicting methods leaves unchanged; see
            `foveate.host.Layout.excluded`.

    Attributes:
        methods: the methods, in order.
        stats: counts so far.
        spans: named tokens (`image`, `text`, `system` …) of the latest prompt. The host finds them in the inputs where
            it can (see `spans_of`), and the caller may set others, which then hold for every prompt; see `span_mask`.
        evict: the time at which methods drop tokens.
        tentative: number of tokens at the end of each prompt that will be removed again; see `foveate.Context`.
        evicts: true if some of the methods drop tokens from the cache, or hold them encoded.
        drops: true if some of the methods drop tokens between blocks.
        streams: what is left, and how many tokens each block read, in the latest pass through the blocks of each part
            ("text", "image") from which methods may drop; see `foveate.host.Stream`.
        in_place, packs: true if some of the methods do so; see `Method`.
        is_plain, only_drops: true if methods have no hooks, or only those that are called after attention.
        has_hooks: whether the run hooks all attention modules that it covers; see `foveate.host.hf.calls`.
        caches, passes: the caches that it works on, and the forward passes in progress.
        thread: the thread that entered it.
    """

    def __init__(
        self, model: object, methods: tuple[Method, ...], on: Part = "auto", evict: Evict = "always",
        find_excluded: Callable[[Host], set[nn.Module]] | None = None,
    ) -> None:  # fmt: skip
        check_methods(methods)
        validate.one_of("on", on, ("auto", "decoder", "all"))
        validate.one_of("evict", evict, ("always", "after prompt"))
        self.host: Host = host(model)
        self.methods, self.stats, self.on = list(methods), Stats(), on
        self.evict, self.tentative, self.thread = evict, 0, 0
        self.given_spans: dict[str, Any] = {}
        self.implementations: dict[int, str] = {}
        self.evicts = any(
            method.evicts or overrides(method, "keep") or overrides(method, "encode") for method in methods
        )
        self.drops, self.streams = bool(dropping(self)), dict[StackPart, Stream]()
        _check_encoders(methods)
        self.in_place = any(method.in_place for method in methods)
        used = {hook for hook in HOOKS if any(overrides(method, hook) for method in methods)}
        self.is_plain, self.only_drops = not used, used <= {"keep", "fold", "refit", "encode"}
        self.packs = any(method.packs for method in methods)
        self.has_hooks = self.in_place or self.drops or not self.is_plain
        self.caches = Caches(self.evicts or self.drops, self.in_place)
        self.passes = Passes(self.caches, self._end_pass, bool(methods), bool(next_token.editing(self)))
        self._find_excluded, self._exit, self._entered = find_excluded, ExitStack(), False
        self._natives: dict[nn.Module, tuple[str, Callable[..., Any]]] = {}

    def __enter__(self) -> Self:
        if self._entered:
            raise OptionError("this run was used already; call apply() again")
        self._entered, self.thread = True, threading.get_ident()
        excluded = self._check_cache()
        for method in self.methods:
            method.bind(self.host)
            if method.needs_all and self.on != "all":
                raise OptionError(
                    f"on={self.on!r} covers the decoder alone, and {type(method).__name__} acts outside it: use "
                    f'foveate.apply(model, ..., on="all")'
                )
        with _ENTRY, ExitStack() as stack:  # a failure while entering is undone at once
            attach(self, excluded, stack)
            for method in self.methods:
                for handle in method.hooks(self.host):
                    stack.callback(handle.remove)
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _ENTRY:
            self._exit.close()

    def _check_cache(self) -> set[nn.Module]:
        """Refuse a model from whose cache nothing can be evicted, before it runs; return the excluded modules."""
        if not self.evicts or any(method.is_probe for method in self.methods):
            return set()
        if self.host.decoder is None:
            raise UnsupportedModel(f"{type(self.host.model).__name__} has no decoder with a cache to evict from")
        if any(getattr(module, "is_kv_shared_layer", False) for module in self.host.scope(self.on)):
            raise UnsupportedModel("a method that evicts needs layers with keys of their own; this model shares them")
        if self._find_excluded is None or any(runs_open_on(module) for module in self.host.attention_modules()):
            return set()  # the methods of an outer run would see the pass that finds the modules
        return self._find_excluded(self.host)

    def _end_pass(self, ended: list[tuple[Site, list[Method]]], ids: Tensor | None) -> None:
        """Drop the tokens that methods choose when a whole pass has ended."""
        site, here, decoder = ended[0][0], self.passes.here, self.host.decoder
        assert decoder is not None and site.slots is not None
        seen = site.slots.seen

        def reread(more: Tensor, real: Tensor, reader: Method) -> None:
            past = torch.ones(more.shape[0], seen, dtype=torch.bool, device=more.device)
            if site.real is not None:
                past = site.real[:, : past.shape[1]].clone()
            past[:, site.seen :] = False
            here.reader, here.step, here.cache = reader, {}, site.cache
            try:
                read_and_remove(decoder, site.cache, past, more, real)
            finally:
                here.reader = None

        evict_at_end(ended, None if ids is None else ids[:, : ids.shape[1] - seen + site.seen], reread)
        for each, _ in ended:
            for run in runs_open_on(each.module):
                run.stats.note_drops(each)

    def hook_edits(self, stack: ExitStack) -> None:
        """Hook blocks and the end of the model, for methods that edit or drop there.

        Args:
            stack: collects the steps that remove the hooks.
        """
        model, part = self.host.model, self.host.language_part
        if self.drops:
            hook_drops(self, stack)
        if hidden.edits_hidden(self):
            inside = set(part.modules())
            attending = [module for module in self.host.attention_modules() if module in inside]
            for number, block in enumerate(blocks_of(part, attending, self.host.layers)):
                edit = Hook(lambda block, _, output, number=number: hidden.edited(self, number, block, output))
                stack.callback(block.register_forward_hook(edit, prepend=True).remove)
        if next_token.editing(self):
            last = Hook(lambda *call: next_token.edited(self, *call))
            stack.callback(model.register_forward_hook(last, prepend=True, with_kwargs=True).remove)
            first = Hook(lambda *call: next_token.embedded(self, *call))
            stack.callback(part.register_forward_pre_hook(first, with_kwargs=True).remove)

    # -- spans -------------------------------------------------------------------------------------------------------

    @property
    def spans(self) -> ChainMap[str, Any]:
        latest = self.passes.latest
        found = latest.whole(latest.count) if latest is not None and latest.names() else {}
        return ChainMap(self.given_spans, found)

    @spans.setter
    def spans(self, spans: Mapping[str, Any]) -> None:
        self.given_spans = dict(spans)

    def spans_at(
        self, first: int, stop: int, batch: int, device: torch.device | None = None, index: Tensor | None = None
    ) -> Spans:
        """Return the spans of the tokens at positions `first .. stop` of the sequences that are being read.

        If tokens were dropped, `index` are those of them that are left.
        """
        place = Place(batch, first, stop, self.host.model.device if device is None else device, index)
        return Spans(self.given_spans, self.passes.here.read, lambda: place)

    # -- questions of dispatch ---------------------------------------------------------------------------------------

    def covers(self, module: nn.Module) -> bool:
        """Return whether the methods act on this module."""
        return module in self.passes.layers

    def drops_at(self, site: Site) -> bool:
        """Return whether the methods may drop tokens after this call."""
        return self.evict == "always" or site.reads_prompt

    def drops_nothing(self, module: nn.Module, slots: SlotLayer | None) -> bool:
        """Return whether no token has to be dropped after a call of one token."""
        if slots is None or slots.is_whole or not self.evicts:
            return not self.evicts and (slots is None or slots.window is None)
        cache, layer = self.passes.called(module)
        return self.evict != "always" and cache is not None and prompt_of(cache, layer, slots.seen - 1) is not None

    def native(self, module: nn.Module) -> tuple[str, Callable[..., Any]]:
        """Return the attention implementation that this module uses without Foveate, and its function."""
        found = self._natives.get(module)
        if found is None:
            name = self.implementations[id(module.config)]
            found = self._natives[module] = name, native_attention(module, name)
        return found


def _check_encoders(methods: tuple[Method, ...]) -> None:
    """Refuse a method that changes stored tokens beside one that encodes them: it needs them in full precision."""
    changing, encoding = [m for m in methods if changes(m)], [m for m in methods if overrides(m, "encode")]
    if changing and encoding:
        raise OptionError(
            f"{type(changing[0]).__name__} changes the tokens that it stores, and {type(encoding[0]).__name__} holds "
            f"tokens encoded; apply one of them"
        )
