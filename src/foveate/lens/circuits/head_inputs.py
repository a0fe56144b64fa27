"""The queries, keys and values of single heads: their record, and changes to one head's own copy of them.

Heads of a group share keys and values. A change to one head's copy leaves the others of its group as they are. All are
taken after the rotary embedding; a change that depends on the position has to reckon with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import UnsupportedModel
from foveate.host.attention import soft_capped
from foveate.host.entry import apply
from foveate.host.hf.model import Host
from foveate.host.method import Method
from foveate.host.site import Site
from foveate.lens.circuits.interventions import Head, checked_heads
from foveate.lens.circuits.residual_stream import Inputs
from foveate.lens.parts.inputs import by_name

#: A query, a key or a value.
Input = Literal["q", "k", "v"]

#: `change(head, input, x (B, N, D), positions (N,))` returns the changed `x`.
Change = Callable[[Head, Input, Tensor, Tensor], Tensor]


@final
@dataclass(eq=False)
class EditInputs(Method):
    """Change what some heads read, each its own copy.

    The heads' logits are computed anew, so that changes by earlier methods to the logits of these heads are lost.

    Args:
        inputs: for each head those of "q", "k", "v" that change.
        change: returns the changed ones, `(B, N, D)`, given the head, the name, the model's own and their positions.
    """

    inputs: Mapping[Head, Iterable[Input]]
    change: Change
    _names: dict[Head, tuple[Input, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        checked_heads(self.inputs)
        self._names = {head: tuple(names) for head, names in self.inputs.items()}
        for names in self._names.values():
            for name in names:
                validate.one_of("inputs", name, ("q", "k", "v"))

    def bind(self, host: Host) -> None:
        host.check_heads(self._names)

    def at(self, site: Site) -> bool:
        return any(layer == site.layer for layer, _ in self._names)

    def edit_logits(self, site: Site, logits: Tensor) -> Tensor:
        logits = logits.clone()
        for (layer, head), names in self._names.items():
            if layer == site.layer and not {"q", "k"}.isdisjoint(names):
                q = self._changed(site, head, "q", site.q[:, head])
                k = self._changed(site, head, "k", site.k[:, head // site.groups])
                logits[:, head] = soft_capped(q @ k.mT * site.scale, site.softcap).to(logits)
        return logits

    def edit_output(self, site: Site, out: Tensor) -> Tensor:
        out = out.clone()
        for (layer, head), names in self._names.items():
            if layer == site.layer:
                if site.weights is None:
                    raise UnsupportedModel("another method replaced attention, so that its inputs cannot be changed")
                if "v" in names:
                    v = self._changed(site, head, "v", site.v[:, head // site.groups])
                    out[:, head] = site.weights[:, head] @ v.to(site.weights)
        return out

    def _changed(self, site: Site, head: int, name: Input, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        if name not in self._names[site.layer, head]:
            return x
        places = site.query_positions if name == "q" else key_places(site, head)
        return self.change((site.layer, head), name, x, places).to(x)


def key_places(site: Site, head: int) -> Int[Tensor, " s"]:
    """Return the positions of the keys that a query head reads; refuse texts of a batch that kept different tokens."""
    places = site.positions[:, head // site.groups]
    if bool((places != places[:1]).any()):
        raise UnsupportedModel("a policy kept different tokens of the texts of a batch; give the texts one at a time")
    return places[0]


@final
@dataclass(eq=False)
class HeadInputs(Method):
    """Record what some heads read and give, while a text is read at once. The model's results stay as they are.

    `found[name, head]` is `(B, N, D)`, for the names "q", "k", "v", and "z" for the output. Methods that come later in
    the same run do not show in "z".

    Args:
        heads: the heads to record.
    """

    heads: Iterable[Head]
    found: dict[tuple[str, Head], Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.heads = tuple(checked_heads(self.heads))

    def bind(self, host: Host) -> None:
        host.check_heads(self.heads)

    def at(self, site: Site) -> bool:
        return any(layer == site.layer for layer, _ in self.heads)

    def edit_output(self, site: Site, out: Tensor) -> Tensor:
        for layer, head in self.heads:
            if layer == site.layer:
                own = head // site.groups
                read = {"q": site.q[:, head], "k": site.k[:, own], "v": site.v[:, own], "z": out[:, head]}
                for name, x in read.items():
                    self.found[name, (layer, head)] = x.detach().clone()
        return out


def replaced_inputs(
    values: Mapping[Head, Float[Tensor, "b n d"]], name: Input, positions: Int[Tensor, " p"] | None = None
) -> EditInputs:
    """Return the method that replaces an input of some heads by given ones, at some positions or all.

    Args:
        values: the new inputs by head, for all tokens of the text.
        name: "q", "k" or "v".
        positions: the tokens whose inputs are replaced, counted from the first; None for all.
    """

    def change(head: Head, _: Input, x: Tensor, places: Tensor) -> Tensor:
        new = values[head].to(x)[:, places]
        if positions is None:
            return new
        return torch.where(torch.isin(places, positions.to(places))[:, None], new, x)

    return EditInputs(dict.fromkeys(values, (name,)), change)


def head_inputs(model: object, inputs: Inputs, heads: Iterable[Head]) -> dict[tuple[str, Head], Tensor]:
    """Run a model once and return what some heads read and give; see `HeadInputs`."""
    record = HeadInputs(heads)
    with torch.no_grad(), apply(model, record) as run:
        run.host.model(**by_name(run.host.model, inputs))
    return record.found
