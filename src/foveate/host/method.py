"""The base class of methods, which act at the attention calls of a pretrained model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from foveate.core.checked import Checked
from foveate.core.errors import OptionError
from foveate.host.stack_part import StackPart

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

    from foveate.core.selection import Selection
    from foveate.host.hf.model import Host
    from foveate.host.model_call import ModelCall
    from foveate.host.pass_end import PassEnd
    from foveate.host.site import Site
    from foveate.host.slots.codec import Coding
    from foveate.host.slots.ends import AtEnd, Ends
    from foveate.host.slots.slots import Slots
    from foveate.host.spans import Spans
    from foveate.host.stream import Stream


class Method(Checked):
    """An intervention on a pretrained model, applied with `foveate.apply(model, method, ...)`.

    A method overrides only the hooks that it needs, and the host takes the cheapest path that these allow: if none is
    overridden, the model's own fused kernel runs. Hooks are called once per attention call, in the order below; the
    last three are called between blocks and at the end of the model. Between calls a method stores what it needs in
    `site.notes(self)` (for a layer and a sequence) or `site.step` (for one forward pass), never in `self`: one object
    may serve many sequences.
    """

    #: True if the method may drop tokens. The host then stores each token in a slot of its own.
    evicts: ClassVar[bool] = False

    #: True if the method acts on a cache. Causal calls without one are then refused.
    needs_cache: ClassVar[bool] = False

    #: True if a full layer's tokens should be stored in one buffer with room at its end. An ordinary cache copies all
    #: of them for every new token.
    in_place: ClassVar[bool] = False

    #: True if the kernel should get a group's query heads as queries of one head, in calls of few queries; see
    #: `foveate.Packed`.
    packs: ClassVar[bool] = False

    #: True if the method acts outside the decoder of its model, so that `apply` needs `on="all"`. `bind` may set it.
    needs_all: bool = False

    #: The parts of a model in which `drop` is called: "text" (decoders, text encoders), "image" (image encoders).
    #: `bind` may set it.
    drops_in: tuple[StackPart, ...] = ("text",)

    #: True if the tokens that `drop` leaves take consecutive positions in the layers that follow. They keep their own
    #: if it is False. Windows count in the sequence either way.
    renumbers: bool = False

    #: True if the method only reads how a model is built. The model's layout then need not be known before.
    is_probe: ClassVar[bool] = False

    def bind(self, host: Host) -> None:
        """Prepare for a model: read its sizes, calibrate. Called once, when the method is applied.

        Raises:
            OptionError: the method does not fit the model.
        """

    def hooks(self, host: Host) -> Iterator[RemovableHandle]:
        """Register hooks on modules of the model, for what attention calls do not show, and yield their handles.

        Called once, after `bind`, which has to do what needs the model to run. The run removes the hooks at its end.
        What they find is for `self`, by thread.
        """
        yield from ()

    def at(self, site: Site) -> bool:
        """Return whether the method acts at this call. Has to be cheap: False leaves the fast path available."""
        return True

    def select(self, site: Site) -> Selection | None:
        """Choose the keys of `site` that each query sees; None for all. Selections of several methods intersect."""
        return None

    def attend(self, site: Site) -> Tensor | None:
        """Return a per-head output `(B, Hq, Nq, Dv)` that replaces attention; None to keep attention."""
        return None

    def edit_logits(self, site: Site, logits: Tensor) -> Tensor:
        """Change logits `(B, Hq, Nq, Nk)` after scale and soft cap, before mask and softmax. Needs the whole matrix."""
        return logits

    def edit_weights(self, site: Site, weights: Tensor) -> Tensor:
        """Change weights `(B, Hq, Nq, Nk)` after the softmax. Needs the whole matrix."""
        return weights

    def edit_output(self, site: Site, out: Tensor) -> Tensor:
        """Change the per-head output `(B, Hq, Nq, Dv)`, before the output projection."""
        return out

    def read(self, site: Site, out: Tensor) -> None:
        """Read the call without changing it. `out` is its output; `site.weights` is set if a method computed them."""

    def keep(self, site: Site) -> Tensor | Ends | AtEnd | None:
        """Choose the slots that stay after the call, bool `(B, Hkv, S)` like `site.positions`; None for all.

        `AT_END` leaves the choice to `keep_all`, for layers that are compared with each other.

        A method that keeps the first and the last tokens of sequences without padding returns `Ends`, which is cheaper
        than a mask and needs no answer from the device.
        """
        return None

    def keep_all(self, end: PassEnd) -> list[Tensor | None]:
        """Choose the slots that stay when a whole pass has ended, for each of `end.sites`, as `keep` does for one.

        Called once for all layers of a pass for which `keep` returned `AT_END`.
        """
        return [None] * len(end.sites)

    def fold(self, site: Site, dropped: Slots, summary: Slots | None, heads: Tensor) -> Slots | None:
        """Return the new summary of the slots that `keep` drops, given the previous one; None for no summary.

        Heads that keep equally many slots come together; `heads (h,)` are their numbers.
        """
        return None

    def refit(self, site: Site, kept: Slots, dropped: Slots, heads: Tensor) -> Slots:
        """Change the slots that stay when `keep` drops some: their values, their weights, or their keys.

        A slot without a token has the position `EMPTY`, and may hold anything. Positions stay. Called for heads that
        drop something; `heads (h,)` are their numbers.
        """
        return kept

    def encode(self, site: Site) -> Coding | None:
        """Choose how the layer holds its older tokens after the call, of those that stay; None as they are."""
        return None

    def edit_hidden(self, layer: int, hidden: Tensor, spans: Spans) -> Tensor:
        """Change the hidden states `(B, N, C)` that a block of the decoder gives to the next one.

        Called after each block, and not at attention calls. Attention keeps its cheapest path.

        Args:
            layer: number of the block in its stack, from 0.
            hidden: hidden states of the tokens that the call reads: the prompt, or a token when it decodes.
            spans: spans of these tokens, bool `(B, N)` by name.
        """
        return hidden

    def drop(self, layer: int, hidden: Tensor, stream: Stream) -> Tensor | None:
        """Choose the tokens that go on to the next block, bool `(B, N)`; None for all.

        Called after each block but the last of a decoder or a text encoder, after each block of an image encoder, and
        before the first block. Later blocks read, compute and cache the tokens that stay, and nothing of the others.
        Behind the last block, the dropped tokens come back as they were when they were dropped, so that outputs have an
        entry for each token. If a decoder reads an image encoder's output, it gets none of the tokens dropped there.

        The last token of each sequence has to stay in a decoder or a text encoder.

        Args:
            layer: number of the block in its stack, from 0; -1 before the first one.
            hidden: hidden states `(B, N, C)` of the tokens that are left.
            stream: what is known of them. What `read` found in the block's attention is in `stream.step`, if it was put
                into `site.step`.
        """
        return None

    def edit_next_token(self, logits: Tensor, call: ModelCall) -> Tensor:
        """Change the logits `(B, V)` of the token after the last one of each sequence.

        Called at the end of each forward pass of the model, once for each drafted token too. `call` is that pass; see
        `foveate.host.Branch` for a second reading to contrast it with.
        """
        return logits


#: Names of the hooks that the host calls at an attention call.
HOOKS = ("select", "attend", "edit_logits", "edit_weights", "edit_output", "read", "keep", "fold", "refit", "encode")


def check_methods(methods: tuple[object, ...]) -> None:
    """Refuse what is no method."""
    for method in methods:
        if not isinstance(method, Method):
            got = f"the class {method.__name__}" if isinstance(method, type) else type(method).__name__
            raise OptionError(f"apply() takes Method and Operator objects; got {got}")


def overrides(method: Method, hook: str) -> bool:
    """Return whether a method defines this hook itself."""
    return getattr(type(method), hook) is not getattr(Method, hook)


def describe(method: Method) -> dict[str, Any]:
    """Return a method's options, for reports."""
    return {name: value for name, value in vars(method).items() if not name.startswith("_")}
