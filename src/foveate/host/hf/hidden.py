"""The hidden states between the blocks of a decoder, which methods may change."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host.hf.attach import Attached, runs_open_on
from foveate.host.method import Method, overrides


def edits_hidden(run: Attached) -> bool:
    """Return whether a method of a run changes hidden states."""
    return any(overrides(method, "edit_hidden") for method in run.methods)


def edited(run: Attached, layer: int, block: nn.Module, output: Any) -> Any:
    """Return the output of a block with the hidden states that the methods of all open runs make of it; None for as is.

    The first of the runs that edit does it for all of them, so that methods act in the order in which they were
    applied, and transformers' own hooks (`output_hidden_states`) see the result.

    Args:
        run: the run whose hook was called.
        layer: the block's number.
        block: the block.
        output: hidden states `(B, N, C)`, or a tuple that begins with them.
    """
    anchor = next(iter(run.passes.layers))
    runs = [other for other in runs_open_on(anchor) if edits_hidden(other)]
    if runs[0] is not run or any(other.passes.here.reader is not None for other in runs_open_on(anchor)):
        return None
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        got = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise UnsupportedModel(f"{type(block).__name__} must give hidden states (B, N, C) to edit; got {got}")
    changed = hidden
    for other in runs:
        for method in other.methods:
            if overrides(method, "edit_hidden"):
                changed = _edited(other, method, layer, changed)
    if changed is hidden:
        return None
    return (changed, *output[1:]) if isinstance(output, tuple) else changed


def _edited(run: Attached, method: Method, layer: int, hidden: Tensor) -> Tensor:
    past, n, stream, index = run.passes.here.past, hidden.shape[1], run.passes.here.stream, None
    if stream is not None and not stream.is_done:
        n, index = stream.tokens, stream.index
    changed = method.edit_hidden(layer, hidden, run.spans_at(past, past + n, hidden.shape[0], hidden.device, index))
    if not isinstance(changed, Tensor) or changed.shape != hidden.shape:
        got = tuple(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
        raise OptionError(f"edit_hidden() of {type(method).__name__} must be {tuple(hidden.shape)}; got {got}")
    return changed
