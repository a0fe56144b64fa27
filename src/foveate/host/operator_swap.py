"""Replace a pretrained model's attention by an operator while it reads the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError, shown
from foveate.host.method import Method
from foveate.host.padding import attend_unpadded, tokens
from foveate.host.site import Site
from foveate.ops.operator import Operator


@final
@dataclass(eq=False)
class PrefillSwap(Method):
    """Attend to the prompt with any operator; decoding uses the model's own attention over the full cache.

    Time to the first token falls with the operator's cost. Padded sequences are read one by one, so that the operator
    sees each without its padding. Layers with a sliding window, a soft cap or a mask of the caller's own keep the
    model's attention.

    Args:
        operator: has to define "causal self", and "causal cross" for prompts that are read in several calls.
        layers: numbers of the layers in the cache; None is all. Papers often leave the first few dense.
    """

    operator: Operator
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.operator, Operator):
            raise OptionError(f"operator must be an Operator; got {type(self.operator).__name__}")
        if "causal self" not in self.operator.capabilities.patterns:
            raise OptionError(f'operator={self.operator.name} does not define "causal self" attention')

        if self.layers is not None:
            if not isinstance(self.layers, tuple | list):
                raise OptionError(f"layers={shown(self.layers)} must be a tuple of layers' numbers, or None for all")
            for layer in self.layers:
                validate.count("layers", layer)

    def at(self, site: Site) -> bool:
        chosen = self.layers is None or site.layer in self.layers
        return chosen and site.phase == "prefill" and site.is_causal and site.is_plain_causal

    def attend(self, site: Site) -> Tensor:
        return self._read(site) if tokens(site) is None else attend_unpadded(site, lambda part, rows: self._read(part))

    def _read(self, site: Site) -> Tensor:
        out = self.operator(site.q, site.k, site.v, causal=True, scale=site.scale)
        assert isinstance(out, Tensor)
        return out
