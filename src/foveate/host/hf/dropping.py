"""Drop tokens between the blocks of a model: hooks that shorten the stream and tell the blocks behind what is left.

Outside its blocks a model keeps its shapes. Behind the last block each dropped token comes back as it was when it was
dropped, so that logits, labels and features have an entry for each token of the input. The features that an image
encoder hands to a decoder are NaN for dropped tokens, and the decoder drops these before its first block.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from foveate.core.errors import UnsupportedModel
from foveate.host.hf.adoption import cache_among
from foveate.host.hf.attach import Attached, runs_open_on
from foveate.host.hf.block_arguments import Arguments, BlockArguments, followed
from foveate.host.hf.cache import Kept, SlotLayer
from foveate.host.hf.hooks import Hook
from foveate.host.hf.renumber import Rotaries, renumbered, rotaries_of
from foveate.host.hf.stacks import Stack, stacks_of
from foveate.host.method import Method, overrides
from foveate.host.slots.slots import EMPTY
from foveate.host.stack_part import StackPart
from foveate.host.stream import Stream


def dropping(run: Attached, part: StackPart | None = None) -> list[Method]:
    """Return the methods of a run that drop tokens, in one part or in any."""
    found = [method for method in run.methods if overrides(method, "drop")]
    return [method for method in found if part is None or part in method.drops_in]


def parts_of(run: Attached) -> set[StackPart]:
    """Return the parts whose blocks a run hooks."""
    parts: set[StackPart] = {part for method in dropping(run) for part in method.drops_in}
    return {*parts, "text"} if parts and run.host.decoder is not None else parts


def hook_drops(run: Attached, stack: ExitStack) -> None:
    """Hook the blocks from which a run drops tokens.

    Args:
        run: the run.
        stack: collects the steps that remove the hooks.
    """
    for each in stacks_of(run.host, parts_of(run)):
        hooks = _StackHooks(run, each)
        for number, block in enumerate(each.blocks):
            before, after = Hook(partial(hooks.before, number)), Hook(partial(hooks.after, number))
            stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(after, prepend=True).remove)
        end = each.root.register_forward_hook(Hook(hooks.end), prepend=True, always_call=True)
        stack.callback(end.remove)
        for module in rotaries_of(each.root, list(each.blocks)):
            note = module.register_forward_hook(Hook(hooks.rotaries.note), with_kwargs=True)
            stack.callback(note.remove)


class _StackHooks:
    """The hooks on the blocks of one stack. The first of the runs that drop there does it for all of them."""

    def __init__(self, run: Attached, stack: Stack) -> None:
        self.run, self.stack, self.rotaries = run, stack, Rotaries()

    @property
    def runs(self) -> list[Attached]:
        """The open runs that hook this stack."""
        open_here = runs_open_on(self.stack.attention[0])
        return [other for other in open_here if other.drops and self.stack.part in parts_of(other)]

    @property
    def is_first(self) -> bool:
        return self.runs[0] is self.run

    @property
    def stream(self) -> Stream | None:
        return self.run.passes.here.stream

    def set_stream(self, stream: Stream | None) -> None:
        """Set the stream of this thread's pass, for all runs on the model."""
        for other in runs_open_on(self.stack.attention[0]):
            other.passes.here.stream = stream

    # -- before a block ----------------------------------------------------------------------------------------------

    def before(self, number: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """Return the arguments of a block for the tokens that are left; None for the model's own."""
        if not self.is_first:
            return None
        given = BlockArguments(block, args, kwargs)
        hidden = self._begin(given) if number == 0 else given.hidden
        stream = self.stream
        if stream is None:
            return None
        stream.note_block(hidden)
        named = given.named
        cache = cache_among(named.values())
        layer = None if cache is None else self._layer(cache, number)
        shift = _shift(stream, layer)
        if stream.index is None and shift is None:
            return None
        moved = {} if shift is None else renumbered(stream, self.rotaries, shift, block, named)
        if layer is not None:
            _expect(stream, layer)
            layer.is_followed = True

        def changed(name: str, value: Any) -> Any:
            return moved[name] if name in moved else followed(stream, block, name, value, cache is not None)

        return given.replaced(hidden, changed)

    def _begin(self, given: BlockArguments) -> Any:
        """Begin a stream, and return its hidden states without what is dropped before the first block."""
        run, hidden, part = self.run, given.hidden, self.stack.part
        if not isinstance(hidden, Tensor) or hidden.dim() != 3:
            got = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise UnsupportedModel(
                f"tokens can be dropped from hidden states (B, N, C); {type(given.block).__name__} is given {got}"
            )
        batch, tokens = hidden.shape[:2]
        past, device = run.passes.here.past if part == "text" else 0, hidden.device
        # sites have the notes of the first run that hooks attention; see `foveate.host.hf.dispatch`
        sited = next((other for other in runs_open_on(self.stack.attention[0]) if other.has_hooks), run)
        plan = next(iter(given.plans()), None)
        stream = Stream(
            part, len(self.stack.blocks), batch, tokens, past, sited.passes.here.step,
            real=None if plan is None or part == "image" else plan.real_queries(tokens),
            _spans=None if part == "image" else partial(run.spans_at, past, past + tokens, batch, device),
        )  # fmt: skip
        self.set_stream(stream)
        if part == "text":
            hidden = self._without_holes(stream, hidden)
        return self._drop(stream, -1, hidden)

    def _without_holes(self, stream: Stream, hidden: Tensor) -> Tensor:
        """Drop the tokens whose features an image encoder has dropped: they are NaN."""
        methods = [method for other in self.runs for method in dropping(other, "image")]
        if not methods or stream.tokens == 1:
            return hidden
        holes = hidden.isnan().any(-1)
        who = type(methods[-1]).__name__
        renumber = any(method.renumbers for method in methods)
        return stream.narrow(~holes, hidden.masked_fill(holes[..., None], 0.0), who, renumber, holes=True)

    def _layer(self, cache: Cache, number: int) -> SlotLayer:
        """Return the layer of the cache that a block writes to."""
        layer, _ = self.run.passes.layers[self.stack.attention[number]]
        for other in self.runs:
            other.caches.prepare(cache, layer)
        held = cache.layers[layer]
        assert isinstance(held, SlotLayer)
        return held

    # -- behind a block ----------------------------------------------------------------------------------------------

    def after(self, number: int, block: nn.Module, args: Any, output: Any) -> Any:
        """Return the output of a block without the tokens that methods drop behind it; None for the model's own."""
        stream = self.stream
        if not self.is_first or stream is None:
            return None
        hidden = whole = output[0] if isinstance(output, tuple) else output
        is_last = number == len(self.stack.blocks) - 1
        if not is_last or self.stack.part == "image":
            hidden = self._drop(stream, number, hidden)
        if is_last:
            hidden = stream.restore(hidden, self._fill)
            stream.is_done = True
        if hidden is whole:
            return None
        if torch.is_grad_enabled() and block.training and getattr(block, "gradient_checkpointing", False):
            raise UnsupportedModel(
                "gradient checkpointing runs each block by itself in the backward pass, where dropped tokens are "
                "unknown; call model.gradient_checkpointing_disable()"
            )
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _drop(self, stream: Stream, layer: int, hidden: Tensor) -> Tensor:
        """Drop what the methods of all runs choose behind a block, or before the first one (-1)."""
        runs = self.runs
        if any(other.passes.here.reader is not None for other in runs):
            return hidden
        for other in runs:
            for method in dropping(other, stream.part):
                keep = method.drop(layer, hidden, stream)
                if keep is not None:
                    renumber = method.renumbers and stream.part == "text"
                    hidden = stream.narrow(keep, hidden, type(method).__name__, renumber)
        return hidden

    @property
    def _fill(self) -> float | None:
        """The value that stands for dropped tokens in the features of an encoder before a decoder."""
        return math.nan if self.stack.part == "image" and self.run.host.decoder is not None else None

    def end(self, root: nn.Module, args: Any, output: Any) -> None:
        """End a stream: bring the tokens back in the hidden states that the model returns too."""
        stream = self.stream
        if not self.is_first or stream is None:
            return
        self.set_stream(None)
        self.rotaries.clear()
        states = getattr(output, "hidden_states", None)
        if isinstance(states, tuple) and stream.index is not None:
            output.hidden_states = stream.restore_each(states, self._fill)
        stream.release()
        if stream.tokens > 1:
            for other in self.runs:
                other.streams[stream.part] = stream


def _shift(stream: Stream, layer: SlotLayer | None) -> Tensor | None:
    """Return how much earlier the positions of a block's tokens are, `(B, N)` or `(B, 1)`; None for not at all."""
    past = None if layer is None or layer.shift is None or not layer.seen else layer.shift[:, None]
    if past is None or stream.shift is None:
        return stream.shift if past is None else past
    return past + stream.shift


def _expect(stream: Stream, layer: SlotLayer) -> None:
    """Tell a layer of the cache what is left of the pass's tokens."""
    if stream.later_shift is not None:
        layer.shift = stream.later_shift if layer.shift is None else layer.shift + stream.later_shift
    if stream.index is not None:
        positions = torch.where(stream.index < 0, EMPTY, stream.index + layer.seen)
        layer.expect(Kept(positions.to(torch.int32), stream.empty, stream.tokens))
