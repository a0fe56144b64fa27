"""The outputs of heads as they are added to the residual stream, averaged over tokens of a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import OptionError, ShapeError, shown
from foveate.host import Method, apply, host
from foveate.host.output_projection import projected_heads
from foveate.host.site import Site

#: The tokens of a prompt to average over: "all" that are no padding, the "last" of these, or those with this id (the
#: placeholder of an image's patches, for instance).
Averaged = Literal["all", "last"] | int


def head_writes(
    model: object, inputs: Tensor | Mapping[str, Any], tokens: Averaged = "all"
) -> dict[int, Float[Tensor, "b h c"]]:
    """Run a decoder once and return what each head adds to the residual stream, averaged over tokens, by layer.

    A head's output goes through its part of the output projection, without the projection's bias. A norm that a model
    applies after its projection is left out.

    Args:
        model: a decoder with linear output projections.
        inputs: token ids `(B, N)`, or a mapping with "input_ids", and "attention_mask" if there is padding.
        tokens: the tokens to average over.
    """
    given = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.numel():
        raise ShapeError(f"inputs must be token ids (B, N), or a mapping with input_ids; got {shown(ids)}")
    record = _Writes(_shares(ids, torch.ones_like(ids) if mask is None else mask, tokens))
    found = host(model).model
    with torch.no_grad(), apply(found, record, on="decoder"):
        found(**{**given, "use_cache": False})
    return record.found


def _shares(ids: Tensor, mask: Tensor, tokens: Averaged) -> Float[Tensor, "b n"]:
    """Return each token's weight in the average of its prompt."""
    real = mask.bool()
    if tokens == "last":
        chosen = real & (real.flip(1).cumsum(1).flip(1) == 1)
    elif tokens == "all":
        chosen = real
    elif isinstance(tokens, int) and not isinstance(tokens, bool):
        chosen = real & (ids == tokens)
    else:
        raise OptionError(f'tokens={shown(tokens)} must be "all", "last" or the id of a token')
    if not bool(chosen.any(1).all()):
        raise OptionError(f"tokens={shown(tokens)} must be in every prompt; one has none")
    return chosen / chosen.sum(1, keepdim=True)


@final
class _Writes(Method):
    """A method that averages the outputs of heads over tokens and projects them."""

    def __init__(self, shares: Float[Tensor, "b n"]) -> None:
        self.shares = shares
        self.found: dict[int, Tensor] = {}

    def at(self, site: Site) -> bool:
        return not site.crosses and (site.is_causal or site.q.shape[2] == 1)

    def read(self, site: Site, out: Tensor) -> None:
        if out.shape[0] != self.shares.shape[0] or out.shape[2] != self.shares.shape[1]:
            raise ShapeError(f"inputs must be as long as what attention reads, {out.shape[2]}; {self.shares.shape[1]}")
        mean = torch.einsum("bhnd,bn->bhd", out.detach().float(), self.shares.to(out.device))
        self.found[site.layer] = projected_heads(site, mean).cpu()
