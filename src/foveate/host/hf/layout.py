"""Layout: the attending layers of a decoder, their heads and what their cache holds, read from a short pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.core.errors import FoveateError, UnsupportedModel
from foveate.host.hf import dispatch  # noqa: F401  the import registers the attention function that the pass uses
from foveate.host.hf.model import Host
from foveate.host.method import Method
from foveate.host.run import Run
from foveate.host.site import Site


@dataclass(frozen=True)
class AttendingLayer:
    """One layer that attends to its own sequence through a cache.

    Args:
        layer: its number in the cache.
        heads: query heads.
        kv_heads: heads that the cache stores.
        expanded: whether the model computes keys and values from what the cache holds (a latent, for instance), so that
            its heads share their tokens.
        window: tokens that it sees; None for all.
        width, value_width: channels of a stored key and of a stored value.
    """

    layer: int
    heads: int
    kv_heads: int
    expanded: bool
    window: int | None
    width: int = 0
    value_width: int = 0


@dataclass(frozen=True)
class Layout:
    """The layers of a decoder that attend, in order. Tables of heads have one row for each; see `site.order`.

    Layers of a hybrid model that keep a state instead (convolutions, linear attention) are not among them. `excluded`
    has the names of modules that attend causally without the cache, as a small model within the model does. Methods on
    caches do not act on them.
    """

    layers: tuple[AttendingLayer, ...]
    excluded: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def heads(self) -> int:
        """Query heads of the widest layer."""
        return max(layer.heads for layer in self.layers)

    @property
    def kv_heads(self) -> int:
        """Stored heads of the widest layer."""
        return max(layer.kv_heads for layer in self.layers)

    @property
    def table(self) -> Bool[Tensor, "l hkv"]:
        """True for the entries of a table `(layers, kv_heads)` that are heads; narrower layers have fewer."""
        counts = torch.tensor([layer.kv_heads for layer in self.layers])
        return torch.arange(self.kv_heads) < counts[:, None]

    @property
    def expands(self) -> bool:
        """Return whether some layer's heads share what the cache holds."""
        return any(layer.expanded for layer in self.layers)


_KNOWN: WeakKeyDictionary[nn.Module, Layout] = WeakKeyDictionary()


def layout(host: Host) -> Layout:
    """Return the layout of a model's decoder. It takes one pass over two tokens, and is stored while the model lives.

    Raises:
        UnsupportedModel: the model has no decoder, or its decoder cannot read two tokens with a cache.
    """
    if host.model not in _KNOWN:
        _KNOWN[host.model] = _probe(host)
    return _KNOWN[host.model]


class _LayoutProbe(Method):
    """A method that stores tokens in slots and records how each layer is built.

    If a bias by position is added, it drops the first token, to find out whether the bias still fits.
    """

    evicts = True
    is_probe = True

    def __init__(self) -> None:
        self.found: list[AttendingLayer] = []
        self.excluded: set[nn.Module] = set()
        self.is_biased = False

    def keep(self, site: Site) -> Tensor | None:
        return None if site.position_bias is None else site.positions > 0

    def read(self, site: Site, out: Tensor) -> None:
        if site.cache is None and site.is_causal:
            self.excluded.add(site.module)
        self.is_biased = self.is_biased or (site.is_causal and site.position_bias is not None)
        if site.seen > 2 or site.slots is None or site.slots.store is None:
            return
        store = site.slots.store
        slots, window = store.groups[0].slots, site.slots.window
        widths = slots.k.shape[3], slots.v.shape[3]
        self.found.append(AttendingLayer(site.layer, site.q.shape[1], store.n_heads, site.expanded, window, *widths))


def _probe(host: Host) -> Layout:
    decoder, name = host.decoder, type(host.model).__name__
    if decoder is None:
        raise UnsupportedModel(f"{name} has no decoder with a cache, which cache policies need")
    probe = _LayoutProbe()
    try:
        with torch.no_grad(), _quiet(host.model), Run(host.model, (probe,), on="decoder"):
            two = torch.ones(1, 2, dtype=torch.long)
            read = decoder(**decoder_inputs(host, two), use_cache=True)
            if probe.is_biased:
                decoder(**decoder_inputs(host, two[:, :1]), past_key_values=read.past_key_values, use_cache=True)
    except FoveateError:
        raise
    except Exception as error:  # noqa: BLE001  the model's own code may raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UnsupportedModel(f"{name} cannot read two tokens with a cache: {reason}") from None
    if not probe.found:
        raise UnsupportedModel(f"{name} attends without the cache, so that no policy can act on it")
    excluded = frozenset(name for name, module in host.model.named_modules() if module in probe.excluded)
    return Layout(tuple(probe.found), excluded)


def decoder_inputs(host: Host, ids: Tensor) -> dict[str, Any]:
    """Return the arguments with which a model's decoder reads these tokens by itself, on its own device."""
    assert host.decoder is not None
    first = next(host.decoder.parameters())
    inputs: dict[str, Any] = {"input_ids": ids.to(first.device)}
    if host.config.is_encoder_decoder:
        width = host.config.hidden_size
        inputs["encoder_hidden_states"] = torch.zeros(ids.shape[0], 2, width, device=first.device, dtype=first.dtype)
    return inputs


@contextmanager
def _quiet(model: PreTrainedModel) -> Iterator[None]:
    """Put a model in evaluation mode for a block, and restore its mode and the random state afterwards."""
    training = [module for module in model.modules() if module.training]
    devices = [model.device.index or 0] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True
