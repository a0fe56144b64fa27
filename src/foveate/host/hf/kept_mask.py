"""The mask of a call from which tokens were dropped before this layer, as a description."""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from foveate.core import masks
from foveate.core.errors import UnsupportedModel
from foveate.host.hf.mask import MaskPlan, at_positions
from foveate.host.kept import taken


class KeptMask(MaskPlan):
    """The mask of a whole call, for the tokens that are left of it.

    Queries are the tokens that are left. Without a cache these are the keys too, and the mask is a plain description of
    fewer tokens where order alone decides. In other masks (windows) the distance in the sequence decides, and they are
    read at the original positions. With a cache, keys are the stored slots, and `at` reads the original mask.

    Attributes:
        origin: the mask of the whole call.
        kept: the tokens that are left, `(B, N)`, as indices of the call's tokens; `EMPTY` for none.
        cached: whether a cache stores the keys.
        by_order: whether order alone decides what is seen.
    """

    origin: MaskPlan
    kept: Int[Tensor, "b n"]
    cached: bool
    by_order: bool

    @classmethod
    def of(cls, origin: MaskPlan, index: Int[Tensor, "b n"], cached: bool) -> Self:
        """Describe what is left of a mask.

        Args:
            origin, index, cached: the mask of the whole call, the tokens that are left, whether a cache stores keys.
        """
        rule, first = origin.rule(), int(origin.arguments.get("q_offset", 0))
        some: dict[str, Any] = {**origin.arguments, "q_length": index.shape[1], "kv_length": first + index.shape[1]}
        by_order = rule is not None and first == 0 and origin.first_key == 0
        if by_order:
            some["mask_function"] = causal_mask_function if rule == "causal" else bidirectional_mask_function
            some["attention_mask"] = _kept_real(origin, index)
            some.pop("local_size", None)
        made = cls(**some)
        made.origin, made.kept, made.cached, made.by_order = origin, index, cached, by_order
        return made

    @property
    def tokens(self) -> int:
        """Tokens that the call reads, dropped ones included."""
        return int(self.origin.arguments["q_length"])

    @property
    def past(self) -> int:
        return int(self.origin.arguments.get("q_offset", 0))

    def first(self, keys: int) -> MaskPlan:
        if keys == self.n_keys:
            return KeptMask.of(self.origin, self.kept, self.cached)
        raise UnsupportedModel("a layer that reads a part of its mask cannot follow dropped tokens")

    def part(self, start: int, stop: int, later: int) -> MaskPlan | Tensor:
        if self.cached:
            return KeptMask.of(self.origin, self.kept[:, start:stop], True)
        return self.dense()[:, :, start:stop, : self.n_keys - later]

    def native(self, implementation: str) -> Any:
        if self.by_order:
            return super().native(implementation)
        if implementation not in ("sdpa", "eager"):
            raise UnsupportedModel(
                f"tokens that stay behind dropped ones are nearer than their positions say, which the windows of "
                f'attn_implementation="{implementation}" cannot tell; use "sdpa" or "eager"'
            )
        mask = self.dense()
        if implementation == "sdpa":
            return mask
        dtype = self.arguments.get("dtype", torch.float32)
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)

    def rule(self) -> Literal["causal", "full"] | None:
        return super().rule() if self.by_order else None

    def is_plain_causal(self) -> bool:
        return self.by_order and super().is_plain_causal()

    def sees_all(self) -> bool:
        return False

    def real_tokens(self) -> Bool[Tensor, "b n"] | None:
        return self.origin.real_tokens() if self.cached or not self.by_order else super().real_tokens()

    def real_queries(self, queries: int) -> Bool[Tensor, "b nq"] | None:
        real, filled = self.origin.real_tokens(), self.kept >= 0
        return filled if real is None else filled & taken(real[:, self.past :], self.kept)

    def begins(self, batch: int, device: torch.device) -> Int[Tensor, " b"]:
        return self.origin.begins(batch, device) if self.cached else super().begins(batch, device)

    def query_positions(self) -> Int[Tensor, "b nq"]:
        """Return the original position of each query."""
        return self.kept.clamp_min(0) + self.past

    def rows(self, rows: slice) -> Bool[Tensor, "b 1 r k"]:
        if self.by_order:
            return super().rows(rows)
        positions = torch.where(self.kept < 0, self.kept, self.kept + self.past)
        return self.at(positions[:, None])[:, :, rows]

    def at(self, positions: Int[Tensor, "b h s"]) -> Bool[Tensor, "b h q s"]:
        whole = self.origin.whole.dense()
        some = taken(whole.expand(len(self.kept), *whole.shape[1:]).flatten(0, 1), self.kept)[:, None]
        return at_positions(some, positions, self.origin.first_key)

    def sees_in_order(self, keys: int) -> bool:
        """Return whether the keys are the call's own tokens, each of which sees those up to it, and no padding."""
        is_causal = self.by_order and self.rule() == "causal" and keys == self.kept.shape[1]
        return is_causal and self.arguments.get("attention_mask") is None


def _kept_real(origin: MaskPlan, index: Int[Tensor, "b n"]) -> Bool[Tensor, "b n"] | None:
    """Return which of the tokens that are left are no padding; None if all are."""
    real, filled = origin.real_tokens(), index >= 0
    if real is not None:
        filled = filled & taken(real, index)
    return None if bool(filled.all()) else filled


def kept_mask(mask: Tensor, index: Int[Tensor, "b n"], cached: bool) -> Tensor:
    """Return what is left of a given mask `(B or 1, H or 1, N, K)`: its rows, and without a cache its columns.

    Args:
        mask: bool, or a float bias.
        index: the tokens that are left.
        cached: whether a cache stores the keys, which are then read at their positions.
    """
    rows = taken(mask.expand(len(index), *mask.shape[1:]).transpose(1, 2), index).transpose(1, 2)
    if cached:
        return rows
    columns = taken(rows.permute(0, 3, 1, 2), index).permute(0, 2, 3, 1)
    hidden: Any = False if mask.dtype == torch.bool else masks.NEG_INF
    return columns.masked_fill((index < 0)[:, None, None], hidden)
