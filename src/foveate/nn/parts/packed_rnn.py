"""Recurrent layers over sequences of different lengths."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


def run_rnn(rnn: nn.RNNBase, x: Float[Tensor, "b n c"], lengths: Int[Tensor, " b"] | None) -> Float[Tensor, "b n h"]:
    """Return the states of a recurrent layer at the real tokens of each sequence, and zeros after them.

    Args:
        rnn: a layer with `batch_first=True`; a bidirectional one starts at each sequence's own end.
        x: the tokens; what stands behind a sequence's end has no effect.
        lengths: real tokens of each sequence; an empty one counts as one token. None if all are real.
    """
    if lengths is None:
        return rnn(x)[0]
    packed = pack_padded_sequence(x, lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
    return pad_packed_sequence(rnn(packed)[0], batch_first=True, total_length=x.shape[1])[0]
