"""The outputs of a decoder's MLPs: their record, and their replacement by others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.host.hf.model import host
from foveate.lens.circuits.residual_stream import Inputs, as_mapping, first_tensor


@contextmanager
def patched_mlps(
    modules: Sequence[nn.Module], outputs: Mapping[int, Float[Tensor, "b n c"]], positions: Iterable[int] | None = None
) -> Iterator[None]:
    """Replace the outputs of some MLPs for the length of a block, at some positions or all.

    Args:
        modules: `Trace.mlps`.
        outputs: the new outputs by layer, see `mlp_outputs`.
        positions: the tokens whose outputs are replaced.
    """
    chosen = slice(None) if positions is None else list(positions)

    def change(layer: int) -> Any:
        def hook(_: nn.Module, given: object, made: Any) -> Any:
            whole = _result(made)
            new = whole.clone().view(outputs[layer].shape)
            new[:, chosen] = outputs[layer][:, chosen].to(new)
            new = new.view(whole.shape)
            return new if isinstance(made, Tensor) else (new, *made[1:])

        return hook

    with ExitStack() as stack:
        for layer in outputs:
            handle = modules[layer].register_forward_hook(change(layer))
            stack.callback(handle.remove)
        yield


def mlp_outputs(model: object, modules: Sequence[nn.Module], inputs: Inputs) -> dict[int, Float[Tensor, "b n c"]]:
    """Return the outputs of a decoder's MLPs for all tokens, by layer; `modules` is `Trace.mlps`."""
    run, found = host(model), dict[int, Tensor]()
    given = as_mapping(run, inputs)
    shape = given[run.model.main_input_name].shape[:2]

    def keep(layer: int) -> Any:
        def hook(_: nn.Module, args: object, made: Any) -> None:
            found[layer] = _result(made).detach().reshape(*shape, -1).clone()

        return hook

    with ExitStack() as stack, torch.no_grad():
        for layer, module in enumerate(modules):
            stack.callback(module.register_forward_hook(keep(layer)).remove)
        run.model(**given)
    return found


def _result(made: Any) -> Tensor:
    found = first_tensor(made)
    assert found is not None  # the traced run had one
    return found
