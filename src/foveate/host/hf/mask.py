"""A mask described, not built: what transformers would mask, asked for at the positions that a layer really holds.

The framework makes one mask for all layers of a kind before any of them runs. Layers that keep different tokens, per
head, each need their own; so ours hands down the description, and every site reads from it what it needs. To a model's
own code the description is a tensor.
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
#: Operations that give back the same mask.
_SAME = (_aten.detach.default, _aten.alias.default, _aten.clone.default)


class MaskPlan(Tensor):
    """The arguments of transformers' mask functions, kept until somebody asks.

    `native(implementation)` is what that implementation's mask function gives (None where the kernel needs no mask);
    `dense()` is the bool mask `(B, 1, Nq, kv_length)` over keys `kv_offset ...`, `rows` some rows of it;
    `at(positions)` is that for any slots; `rule()` and `real_tokens()` say the same in words where that can be done.

    A model may treat it as the tensor that it would have had: ask for its shape, type and device, index it, add to it.
    What comes of a computation is an ordinary tensor. Taking the first keys, `mask[..., :n]`, gives a description
    again, so that a kernel that needs no mask still gets none.
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
        #: The description that this one holds the first keys of: itself, if nothing was cut.
        self.whole = self
        self._native: dict[str, Any] = {}
        self._dense: Tensor | None = None
        self._begins: Tensor | None = None
        self._real: Tensor | None = None
        self._asked = False

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
        """The tensor that the model's own mask function would have given, had it not been allowed to leave it out."""
        implementation = _implementation(self.arguments)
        native = self.native(implementation) if implementation in ALL_MASK_ATTENTION_FUNCTIONS else None
        return native if isinstance(native, Tensor) else self.dense()

    def first(self, keys: int) -> MaskPlan:
        """The description of the first keys alone."""
        cut = MaskPlan(**{**self.arguments, "kv_length": keys})
        cut.whole = self.whole
        if keys == self.n_keys:
            cut._native = self._native
        return cut

    def native(self, implementation: str) -> Any:
        """Build the mask of this implementation; None where its kernel needs none, or it has no mask function."""
        if implementation not in self._native:
            known = implementation in ALL_MASK_ATTENTION_FUNCTIONS
            made = ALL_MASK_ATTENTION_FUNCTIONS[implementation](**self.arguments) if known else None
            self._native[implementation] = made
        return self._native[implementation]

    def keys(self) -> Bool[Tensor, "b 1 1 k"] | None:
        """The padding alone; None where there is none."""
        real = self.arguments.get("attention_mask")
        if real is None:
            return None
        real = real[:, self.first_key : self.first_key + self.n_keys].bool()
        return None if bool(real.all()) else real[:, None, None]

    def is_plain_causal(self) -> bool:
        """Whether what is masked is the future and the padding, and nothing else."""
        if self.arguments.get("mask_function") is not causal_mask_function:
            return False
        return self.first_key == 0

    def sees_all(self) -> bool:
        """Whether a single query sees every key there is."""
        return self.arguments["q_length"] == 1 and self.native("sdpa") is None

    def real_tokens(self) -> Bool[Tensor, "b n"] | None:
        """Mark the tokens that are no padding, from the start of the sequence to the last key; None where all are."""
        real = self.arguments.get("attention_mask")
        if not self._asked and real is not None:
            end = self.first_key + self.n_keys
            real = F.pad(real.bool(), (0, max(0, end - real.shape[1])))[:, :end]
            self._real = None if bool(real.all()) else real
        self._asked = True
        return self._real

    def begins(self, batch: int, device: torch.device) -> Int[Tensor, " b"]:
        """The start of each sequence: the position of its first token that is not padding."""
        if self._begins is None:
            real = self.arguments.get("attention_mask")
            if real is None:
                self._begins = torch.zeros(batch, dtype=torch.long, device=device)
            else:
                self._begins = real.to(torch.uint8).argmax(-1)
        return self._begins.to(device)

    def rule(self) -> Literal["causal", "full"] | None:
        """Name what is masked beside the padding: the future, nothing, or (None) something else, such as a window."""
        function, end = self.arguments.get("mask_function"), self.first_key + self.n_keys
        if function is bidirectional_mask_function:
            return "full"
        window = self.arguments.get("local_size")  # one that is not reached yet masks nothing
        roomy = window is not None and end < window and bool(self.arguments.get("allow_is_causal_skip"))
        aligned = int(self.arguments.get("q_offset", 0)) + self.arguments["q_length"] == end
        return "causal" if aligned and (roomy or function is causal_mask_function) else None

    def dense(self) -> Bool[Tensor, "b 1 q k"]:
        if self._dense is None:
            self._dense = self.rows(slice(None))
        return self._dense

    def rows(self, rows: slice) -> Bool[Tensor, "b 1 r k"]:
        """`dense()` of some queries, without making the others."""
        start, stop, _ = rows.indices(self.arguments["q_length"])
        some = {"q_length": stop - start, "q_offset": self.arguments.get("q_offset", 0) + start}
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        mask = sdpa_mask(**{**self.arguments, **some, **skips})
        assert mask is not None
        return mask

    def at(self, positions: Int[Tensor, "b h s"]) -> Bool[Tensor, "b h q s"]:
        """Mark the slots that each query may see. No query sees an empty slot, every query sees a summary."""
        if self.sees_all():
            return (positions != EMPTY)[:, :, None]
        return at_positions(self.whole.dense(), positions, self.first_key)


def is_given(mask: object) -> bool:
    """Whether a mask is a tensor of the caller's (or made by the model), not a description."""
    return isinstance(mask, Tensor) and not isinstance(mask, MaskPlan)


def _implementation(arguments: dict[str, Any]) -> str:
    """The attention implementation that the model's configuration stands for."""
    name = getattr(arguments.get("config"), "_attn_implementation", None)
    return getattr(name, "native", None) or "sdpa"


def _built(thing: Any) -> Any:
    return thing.built() if isinstance(thing, MaskPlan) else thing


def _first_keys(
    plan: MaskPlan, dim: int, start: int | None = None, stop: int | None = None, step: int = 1
) -> int | None:
    """Count the keys of a slice of a mask; None where it does more than to take the first ones."""
    size, by_key = plan.shape[dim], dim % 4 == 3
    first, last, step = slice(start, stop, step).indices(size)
    if first != 0 or step != 1 or last <= 0 or (last < size and not by_key):
        return None
    return last if by_key else plan.n_keys


def at_positions(mask: Tensor, positions: Int[Tensor, "b h s"], first: int) -> Tensor:
    """A mask `(B or 1, H or 1, Nq, n)` over keys `first ...`, read at slots: `(B, H, Nq, S)`."""
    index = positions - first
    real = (index >= 0) & (index < mask.shape[3])
    shape = (*index.shape[:2], mask.shape[2], index.shape[2])
    index = index.clamp(0, mask.shape[3] - 1).long()[:, :, None].expand(shape)
    picked = mask.expand(*shape[:3], mask.shape[3]).gather(3, index)
    hidden, seen = (False, True) if mask.dtype == torch.bool else (masks.NEVER, 0.0)
    picked = picked.masked_fill(~real[:, :, None], hidden)
    return picked.masked_fill((positions == SUMMARY)[:, :, None], seen)


def masked_part(mask: Any, start: int, stop: int, later: int) -> Any:
    """Cut a mask to some queries, without its last `later` keys."""
    if isinstance(mask, MaskPlan):
        whole = mask.whole
        some = {"q_length": stop - start, "q_offset": whole.arguments.get("q_offset", 0) + start}
        return MaskPlan(**{**whole.arguments, **some, "kv_length": whole.n_keys - later})
    return None if mask is None else mask[..., start:stop, : mask.shape[-1] - later]


def describe(**arguments: Any) -> MaskPlan:
    """The mask function that Foveate registers with transformers."""
    # a static cache counts in a tensor that its update moves on, before anybody asks
    counted = {name: int(x) for name, x in arguments.items() if isinstance(x, Tensor) and x.dim() == 0}
    return MaskPlan(**{**arguments, **counted})
