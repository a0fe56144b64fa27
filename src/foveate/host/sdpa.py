"""Catch calls of PyTorch's `scaled_dot_product_attention`, where code has no other place to change its attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Self, final

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class SDPA(NamedTuple):
    """The arguments of one call: `q (B, Hq, Nq, D)`, `k (B, Hkv, Nk, D)`, `v (B, Hkv, Nk, Dv)`, and its options."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    dropout: float
    is_causal: bool
    scale: float | None

    @classmethod
    def of(
        cls, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Self:  # fmt: skip
        """Return a call from arguments as PyTorch names them."""
        return cls(query, key, value, attn_mask, dropout_p, is_causal, scale)


#: Gives the output of a call; the second argument computes it as PyTorch would.
Answer = Callable[[SDPA, Callable[[], Tensor]], Tensor]


@final
class CatchSDPA(TorchFunctionMode):
    """Within a `with` block, and in its thread, `answer` gives the output of every call.

    Calls that `answer` makes itself are not caught again. Blocks nest: the inner one answers first.
    """

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **given)
        return self.answer(SDPA.of(*args, **given), lambda: func(*args, **given))
