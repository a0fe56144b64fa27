"""Queries, keys and values of a pretrained decoder that reads real text, kept in the cache folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from foveate.bench.comparison.encoding import encoded
from foveate.bench.comparison.model_context import context_length
from foveate.bench.loading import load
from foveate.bench.loading.source import find
from foveate.bench.parts import digest
from foveate.bench.parts.plaindata import draft_and_move
from foveate.core.cache_folder import cache
from foveate.core.errors import OptionError, ShapeError
from foveate.host import Method, Site, apply
from foveate.host.hf.model import host, plain_call
from foveate.tasks.parts.corpus import text

_VERSION = 1  # change it when older files must not be read


class Inputs(NamedTuple):
    """Queries `(B, Hq, N, D)`, keys `(B, Hkv, N, D)` and values `(B, Hkv, N, Dv)`; of a model, B counts layers."""

    q: Tensor
    k: Tensor
    v: Tensor

    def first(self, length: int) -> Inputs:
        """Return the first tokens. Under causality they are what the model computes for the shorter text."""
        return Inputs(*(x[:, :, :length].contiguous() for x in self))


class _Capture(Method):
    """Keeps queries, keys and values of some layers; the scale of the dot products goes into the queries."""

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers, self.found = layers, dict[int, Inputs]()

    def at(self, site: Site) -> bool:
        return site.layer in self.layers

    def read(self, site: Site, out: Tensor) -> None:
        q = site.q * (site.scale * site.q.shape[-1] ** 0.5)
        self.found[site.layer] = Inputs(*(x.detach().float().cpu().clone() for x in (q, site.k, site.v)))


def captured(model: str | None, tokens: int, note: Callable[[str], None] = lambda text: None) -> Inputs:
    """Return the tensors of three layers of a decoder that reads held-out text, in float32.

    The layers are those a quarter, half and three quarters of the way through, of those that attend to the whole past.
    A model is read once; later calls take the file.

    Args:
        model: see `foveate.bench.loading.load`; None is the lab model.
        tokens: the length of the text; a model with a shorter context reads as much as it holds.
        note: called with messages about the progress.
    """
    path = _path(model, tokens)
    if path is not None and path.is_file():
        try:
            return Inputs(**load_file(path))
        except (OSError, SafetensorError, TypeError):
            note(f"{path} is damaged; the model reads the text again")
    note("queries, keys and values of the model")
    found = capture(model, tokens, note)
    if path is not None:
        draft_and_move(path, lambda draft: save_file(found._asdict(), draft))
    return found


@torch.no_grad()
def capture(model: str | None, tokens: int, note: Callable[[str], None] = lambda text: None) -> Inputs:
    """Let the model read, and return what `captured` keeps."""
    loaded, tokenizer, _ = load(model, note=note)
    ids = encoded(tokenizer, text("heldout")[: 16 * tokens])[: min(tokens, context_length(loaded.config) or tokens)]
    method = _Capture(_layers(host(loaded).config))
    with apply(loaded, method):
        loaded(torch.tensor([ids]), **plain_call(loaded))
    if not method.found:
        raise OptionError(f"model={model!r} has no attention whose queries and keys can be read")
    return Inputs(*(torch.cat(layers) for layers in zip(*method.found.values(), strict=True)))


def _layers(config: Any) -> list[int]:
    """Return the layers to read, of those with full attention."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    full = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"] or list(range(len(kinds)))
    return sorted({full[len(full) * quarter // 4] for quarter in (1, 2, 3)})


def _path(model: str | None, tokens: int) -> Path | None:
    """Return the file of a local model's tensors; None for a model on a hub, whose files may change."""
    files = find(model).files
    if not files:
        return None
    facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return cache() / "captured" / f"{digest.of(_VERSION, facts, tokens, text('heldout')[: 16 * tokens])}.safetensors"


def read(path: Path) -> Inputs:
    """Read tensors q, k and v from a file of the user's.

    Raises:
        OptionError: if it cannot be read, or has no such tensors.
        ShapeError: if they do not fit each other.
    """
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise OptionError(f"inputs={path} cannot be read as safetensors: {error}") from None
    if missing := {"q", "k", "v"} - found.keys():
        raise OptionError(f"inputs={path} has no tensor {', '.join(sorted(missing))}; it needs q, k and v")
    inputs = Inputs(found["q"], found["k"], found["v"])
    q, k, v = inputs
    fits = all(x.dim() == 4 for x in inputs) and k.shape[:3] == v.shape[:3] and q.shape[3] == k.shape[3]
    if not fits or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1] or q.shape[0] != k.shape[0]:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise ShapeError(f"inputs={path} must hold q (B, Hq, N, D), k (B, Hkv, N, D), v (B, Hkv, N, Dv); got {shapes}")
    return inputs
