"""A mask as a description: transformers' own mask, computed at the positions that a layer really holds.

transformers makes one mask for all layers of a kind before any of them runs. Layers that keep different tokens per head
each need a mask of their own. So Foveate's mask function returns a description, and every site computes from it what it
needs. For a model's own code the description is a tensor.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

from foveate.core import masks
from foveate.host.slots.slots import EMPTY, SUMMARY

_aten = torch.ops.aten
#: Operations that return the same mask.
_SAME = (_aten.detach.default, _aten.alias.default, _aten.clone.default)


class MaskPlan(Tensor):
    """The arguments of transformers' mask functions, from which masks are computed on request.

    `native(implementation)` is the result of that implementation's mask function (None if the kernel needs no mask).
    `dense()` is the bool mask `(B, 1, Nq, kv_length)` over keys `kv_offset ...`, `rows` some rows of it, and
    `at(positions)` the mask of any slots. `rule()` and `real_tokens()` describe the mask without computing it.

    A model may use it as the tensor that it replaces: read its shape, type and device, index it, add to it. The result
    of a computation is an ordinary tensor. The first keys, `mask[..., :n]`, are a description again, so that a kernel
    that needs no mask still gets none.
    """

    arguments: dict[str, Any]

    @staticmethod
    def __new__(cls, **arguments: Any) -> Self:
        size = (arguments["batch_size"], 1, arguments["q_length"], arguments["kv_length"])
        eager = _implementation(arguments) == "eager"
        dtype = arguments.get("dtype", torch.float32) if eager else torch.bool
        return Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=arguments.get("device"))

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.first_key = int(arguments.get("kv_offset", 0))
        self.n_keys = int(arguments["kv_length"])
        #: The description whose first keys this one has: itself, if it was not cut.
        self.whole = self
        self._native: dict[str, Any] = {}
        self._dense: Tensor | None = None
        self._begins: Tensor | None = None
        self._real: Tensor | None = None
        self._knows_real = False

    # torch's types of the next three are those that its decorators leave: without names of arguments, no class method
    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        plan = args[0] if args else None
        if isinstance(plan, MaskPlan):
            if func in _SAME:
                return plan.first(plan.n_keys)
            if func is _aten.slice.Tensor and (keys := _first_keys(plan, *args[1:])) is not None:
                return plan.first(keys)
        args, kwargs = tree_map(_built, (args, kwargs or {}))
        return func(*args, **kwargs)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"MaskPlan({self.rule() or 'other'}, queries={self.arguments['q_length']}, keys={self.n_keys})"

    def built(self) -> Tensor:
        """Return the tensor of the model's own mask function, also if that function may return None."""
        implementation = _implementation(self.arguments)
        native = self.native(implementation) if implementation in ALL_MASK_ATTENTION_FUNCTIONS else None
        return native if isinstance(native, Tensor) else self.dense()

    def first(self, keys: int) -> MaskPlan:
        """Return the description of the first keys."""
        cut = MaskPlan(**{**self.arguments, "kv_length": keys})
        cut.whole = self.whole
        if keys == self.n_keys:
            cut._native = self._native
        return cut

    def native(self, implementation: str) -> Any:
        """Build the mask of this implementation; None if its kernel needs none, or it has no mask function."""
        if implementation not in self._native:
            known = implementation in ALL_MASK_ATTENTION_FUNCTIONS
            made = ALL_MASK_ATTENTION_FUNCTIONS[implementation](**self.arguments) if known else None
            self._native[implementation] = made
        return self._native[implementation]

    def keys(self) -> Bool[Tensor, "b 1 1 k"] | None:
        """Return a mask of the keys that are no padding; None if none is padding."""
        real = self.real_tokens()
        return None if real is None else real[:, None, None, self.first_key :]

    def is_plain_causal(self) -> bool:
        """Return whether the mask hides the future and the padding, and nothing else."""
        if self.arguments.get("mask_function") is not causal_mask_function:
            return False
        return self.first_key == 0

    def sees_all(self) -> bool:
        """Return whether there is a single query and it sees every key."""
        return self.arguments["q_length"] == 1 and self.native("sdpa") is None

    def real_tokens(self) -> Bool[Tensor, "b n"] | None:
        """Return a mask of the tokens that are no padding, from the start to the last key; None if none is padding."""
        real = self.arguments.get("attention_mask")
        if not self._knows_real and real is not None and not self._has_no_padding(real):
            end = self.first_key + self.n_keys
            real = F.pad(real.bool(), (0, max(0, end - real.shape[1])))[:, :end]
            self._real = None if bool(real.all()) else real
        self._knows_real = True
        return self._real

    def _has_no_padding(self, real: Tensor) -> bool:
        """Return whether `native("sdpa")` has shown that no token is padding, so that the device is not asked again."""
        is_last = int(self.arguments.get("q_offset", 0)) + 1 == self.n_keys <= real.shape[1]
        return self.first_key == 0 and is_last and self.sees_all()

    def begins(self, batch: int, device: torch.device) -> Int[Tensor, " b"]:
        """Return the start of each sequence: the position of its first token that is not padding."""
        if self._begins is None:
            real = self.arguments.get("attention_mask")
            if real is None:
                self._begins = torch.zeros(batch, dtype=torch.long, device=device)
            else:
                self._begins = real.to(torch.uint8).argmax(-1)
        return self._begins.to(device)

    def rule(self) -> Literal["causal", "full"] | None:
        """Return the name of the mask without the padding: "causal", "full", or None for another, such as a window."""
        function, end = self.arguments.get("mask_function"), self.first_key + self.n_keys
        if function is bidirectional_mask_function:
            return "full"
        window = self.arguments.get("local_size")  # a window that is not full yet hides nothing
        roomy = window is not None and end < window and bool(self.arguments.get("allow_is_causal_skip"))
        aligned = int(self.arguments.get("q_offset", 0)) + self.arguments["q_length"] == end
        return "causal" if aligned and (roomy or function is causal_mask_function) else None

    def dense(self) -> Bool[Tensor, "b 1 q k"]:
        if self._dense is None:
            self._dense = self.rows(slice(None))
        return self._dense

    def rows(self, rows: slice) -> Bool[Tensor, "b 1 r k"]:
        """Compute `dense()` for some queries only."""
        start, stop, _ = rows.indices(self.arguments["q_length"])
        some = {"q_length": stop - start, "q_offset": self.arguments.get("q_offset", 0) + start}
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        mask = sdpa_mask(**{**self.arguments, **some, **skips})
        assert mask is not None
        return mask

    def part(self, start: int, stop: int, later: int) -> MaskPlan | Tensor:
        """Return the mask of some queries, without the last `later` keys."""
        some = {"q_length": stop - start, "q_offset": self.whole.arguments.get("q_offset", 0) + start}
        return MaskPlan(**{**self.whole.arguments, **some, "kv_length": self.whole.n_keys - later})

    def real_queries(self, queries: int) -> Bool[Tensor, "b nq"] | None:
        """Return a mask of the queries that are no padding; None if none is, or if it is unknown."""
        real, first = self.real_tokens(), int(self.arguments.get("q_offset", 0))
        if real is None:
            return None
        real = real[:, first : first + queries]
        return real if real.shape[1] == queries else None

    def at(self, positions: Int[Tensor, "b h s"]) -> Bool[Tensor, "b h q s"]:
        """Return a mask of the slots that each query sees. No query sees an empty slot, every query sees a summary."""
        if self.sees_all():
            return (positions != EMPTY)[:, :, None]
        return at_positions(self.whole.dense(), positions, self.first_key)


def is_given(mask: object) -> bool:
    """Return whether a mask is a tensor of the caller or the model, and not a description."""
    return isinstance(mask, Tensor) and not isinstance(mask, MaskPlan)


def _implementation(arguments: dict[str, Any]) -> str:
    """Return the attention implementation that the model's configuration names."""
    name = getattr(arguments.get("config"), "_attn_implementation", None)
    return getattr(name, "native", None) or "sdpa"


def _built(thing: Any) -> Any:
    return thing.built() if isinstance(thing, MaskPlan) else thing


def _first_keys(
    plan: MaskPlan, dim: int, start: int | None = None, stop: int | None = None, step: int = 1
) -> int | None:
    """Count the keys of a slice of a mask; None if the slice is not the first keys of all queries."""
    size, by_key = plan.shape[dim], dim % 4 == 3
    first, last, step = slice(start, stop, step).indices(size)
    if first != 0 or step != 1 or last <= 0 or (last < size and not by_key):
        return None
    return last if by_key else plan.n_keys


def at_positions(mask: Tensor, positions: Int[Tensor, "b h s"], first: int) -> Tensor:
    """Read a mask `(B or 1, H or 1, Nq, n)` over keys `first ...` at the positions of slots: `(B, H, Nq, S)`."""
    index = positions - first
    real = (index >= 0) & (index < mask.shape[3])
    shape = (*index.shape[:2], mask.shape[2], index.shape[2])
    index = index.clamp(0, mask.shape[3] - 1).long()[:, :, None].expand(shape)
    picked = mask.expand(*shape[:3], mask.shape[3]).gather(3, index)
    hidden, seen = (False, True) if mask.dtype == torch.bool else (masks.NEG_INF, 0.0)
    picked = picked.masked_fill(~real[:, :, None], hidden)
    return picked.masked_fill((positions == SUMMARY)[:, :, None], seen)


def masked_part(mask: Any, start: int, stop: int, later: int) -> Any:
    """Cut a mask to some queries, without its last `later` keys."""
    if isinstance(mask, MaskPlan):
        return mask.part(start, stop, later)
    return None if mask is None else mask[..., start:stop, : mask.shape[-1] - later]


def describe(**arguments: Any) -> MaskPlan:
    """Describe a mask. This is the mask function that Foveate registers with transformers."""
    # a static cache counts in a tensor that its update changes before the mask is computed
    counted = {name: int(x) for name, x in arguments.items() if isinstance(x, Tensor) and x.dim() == 0}
    return MaskPlan(**{**arguments, **counted})
