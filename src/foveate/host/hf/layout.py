"""Layout: which layers of a decoder attend, with how many heads, and what their cache holds; read off a short pass."""

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
from foveate.host.hf import dispatch  # noqa: F401  it registers the attention function that the pass goes through
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
        expanded: whether the model makes keys and values out of what the cache holds (a latent, for instance), so that
            its heads share their tokens.
        window: tokens that it sees; None for all.
    """

    layer: int
    heads: int
    kv_heads: int
    expanded: bool
    window: int | None


@dataclass(frozen=True)
class Layout:
    """The layers of a decoder that attend, in order. Tables of heads have one row for each; see `site.order`.

    Layers of a hybrid model that keep a state instead (convolutions, linear attention) are not among them. `aside` are
    the names of modules that attend causally without the cache: a small model within the model, which methods on caches
    leave alone.
    """

    layers: tuple[AttendingLayer, ...]
    aside: frozenset[str] = frozenset()

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
        """Which entries of a table `(layers, kv_heads)` stand for a head; narrower layers leave the last ones out."""
        counts = torch.tensor([layer.kv_heads for layer in self.layers])
        return torch.arange(self.kv_heads) < counts[:, None]

    @property
    def expands(self) -> bool:
        """Whether some layer's heads share what the cache holds."""
        return any(layer.expanded for layer in self.layers)


_KNOWN: WeakKeyDictionary[nn.Module, Layout] = WeakKeyDictionary()


def layout(host: Host) -> Layout:
    """The layout of a model's decoder: one pass over two tokens, remembered as long as the model lives.

    Raises:
        UnsupportedModel: where the model has no decoder, or its decoder cannot read two tokens with a cache.
    """
    if host.model not in _KNOWN:
        _KNOWN[host.model] = _probe(host)
    return _KNOWN[host.model]


class _Looks(Method):
    """Stores tokens slot by slot and notes how each layer is made. Where a bias by position is added, it drops the
    first token: the bias may fit no longer.
    """

    evicts = True
    is_probe = True

    def __init__(self) -> None:
        self.found: list[AttendingLayer] = []
        self.aside: set[nn.Module] = set()
        self.is_biased = False

    def keep(self, site: Site) -> Tensor | None:
        return None if site.position_bias is None else site.positions > 0

    def read(self, site: Site, out: Tensor) -> None:
        if site.cache is None and site.is_causal:
            self.aside.add(site.module)
        self.is_biased = self.is_biased or (site.is_causal and site.position_bias is not None)
        if site.seen > 2 or site.slots is None or site.slots.store is None:
            return
        kv_heads = site.slots.store.n_heads
        self.found.append(AttendingLayer(site.layer, site.q.shape[1], kv_heads, site.expanded, site.slots.window))


def _probe(host: Host) -> Layout:
    decoder, name = host.decoder, type(host.model).__name__
    if decoder is None:
        raise UnsupportedModel(f"{name} has no decoder with a cache, which cache policies need")
    looks = _Looks()
    try:
        with torch.no_grad(), _quiet(host.model), Run(host.model, (looks,), on="decoder"):
            two = torch.ones(1, 2, dtype=torch.long)
            read = decoder(**decoder_inputs(host, two), use_cache=True)
            if looks.is_biased:
                decoder(**decoder_inputs(host, two[:, :1]), past_key_values=read.past_key_values, use_cache=True)
    except FoveateError:
        raise
    except Exception as error:  # noqa: BLE001  whatever the model's own code raises
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UnsupportedModel(f"{name} cannot read two tokens with a cache: {reason}") from None
    if not looks.found:
        raise UnsupportedModel(f"{name} attends without the cache, so that no policy can act on it")
    aside = frozenset(name for name, module in host.model.named_modules() if module in looks.aside)
    return Layout(tuple(looks.found), aside)


def decoder_inputs(host: Host, ids: Tensor) -> dict[str, Any]:
    """What a model's decoder takes to read these tokens by itself, on its own device."""
    assert host.decoder is not None
    first = next(host.decoder.parameters())
    inputs: dict[str, Any] = {"input_ids": ids.to(first.device)}
    if host.config.is_encoder_decoder:
        width = host.config.hidden_size
        inputs["encoder_hidden_states"] = torch.zeros(ids.shape[0], 2, width, device=first.device, dtype=first.dtype)
    return inputs


@contextmanager
def _quiet(model: PreTrainedModel) -> Iterator[None]:
    """In evaluation mode, with the state of the random numbers put back."""
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
