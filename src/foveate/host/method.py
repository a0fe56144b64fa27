"""The seam of methods: what one may do at an attention call of a pretrained model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from foveate.core import validate

if TYPE_CHECKING:
    from torch import Tensor

    from foveate.core.selection import Selection
    from foveate.host.hf.model import Host
    from foveate.host.site import Site
    from foveate.host.slots.ends import Ends
    from foveate.host.slots.slots import Slots


class Method:
    """An intervention on a model's attention, applied with `foveate.apply(model, method, ...)`.

    A method overrides only the hooks that it needs, and the host takes the cheapest path that these allow: with none
    overridden the model's own fused kernel runs. Hooks are called once per attention call, in this order. What a method
    remembers between calls goes to `site.memory(self)` (of a layer and a sequence) or `site.step` (of one forward
    pass), never to `self`: one object may serve many sequences.
    """

    #: Whether the method keeps its own record of a layer's slots, so that the host has to store them one by one.
    evicts: ClassVar[bool] = False

    #: Whether the method acts on a cache, so that causal calls without one are refused.
    needs_cache: ClassVar[bool] = False

    #: Whether a full layer's tokens should lie in one buffer with room at its end. An ordinary cache copies all of them
    #: for every new one.
    in_place: ClassVar[bool] = False

    #: Whether calls of few queries go to the kernel with a group's query heads side by side; see `foveate.Packed`.
    packs: ClassVar[bool] = False

    #: Whether the method only finds out how a model is made, so that nothing has to be known of that before.
    is_probe: ClassVar[bool] = False

    def __new__(cls, *args: Any, **options: Any) -> Self:
        validate.options(cls, args, options)
        return super().__new__(cls)

    def bind(self, host: Host) -> None:
        """Once, when the method is applied: read the model's sizes, calibrate. Raise `OptionError` for a misfit."""

    def at(self, site: Site) -> bool:
        """Whether the method acts at this call at all; cheap, since where it says no the fast path stays open."""
        return True

    def select(self, site: Site) -> Selection | None:
        """Choose which of `site`'s keys each query sees; None for all. Selections of several methods intersect."""
        return None

    def attend(self, site: Site) -> Tensor | None:
        """The per-head output `(B, Hq, Nq, Dv)` in place of attention; None to leave it."""
        return None

    def edit_logits(self, site: Site, logits: Tensor) -> Tensor:
        """Logits `(B, Hq, Nq, Nk)` after scale and soft cap, before mask and softmax. Forces the whole matrix."""
        return logits

    def edit_weights(self, site: Site, weights: Tensor) -> Tensor:
        """Weights `(B, Hq, Nq, Nk)` after the softmax. Forces the whole matrix."""
        return weights

    def edit_output(self, site: Site, out: Tensor) -> Tensor:
        """The per-head output `(B, Hq, Nq, Dv)`, before the output projection."""
        return out

    def read(self, site: Site, out: Tensor) -> None:
        """Look, change nothing. `out` is what the call gives; `site.weights` is set where a method made them."""

    def keep(self, site: Site) -> Tensor | Ends | None:
        """After the call: which slots survive, bool `(B, Hkv, S)` beside `site.positions`; None for all.

        A method that keeps the first and the last tokens of sequences without padding says so with `Ends`, which is
        cheaper.
        """
        return None

    def fold(self, site: Site, dropped: Slots, summary: Slots | None) -> Slots | None:
        """Make the new summary of the slots that `keep` drops, given the one so far; None for no summary."""
        return None


#: What the host calls at an attention call.
HOOKS = ("select", "attend", "edit_logits", "edit_weights", "edit_output", "read", "keep", "fold")


def overrides(method: Method, hook: str) -> bool:
    """Whether a method defines this hook itself."""
    return getattr(type(method), hook) is not getattr(Method, hook)


def describe(method: Method) -> dict[str, Any]:
    """A method's options, for reports."""
    return {name: value for name, value in vars(method).items() if not name.startswith("_")}
