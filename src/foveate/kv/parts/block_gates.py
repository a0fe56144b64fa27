"""Gates over blocks: small learnt maps of pooled queries and keys, and the pooled attention that they learn from.

SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs (2024), arXiv 2410.13276.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.core.masks import NEG_INF
from foveate.host import Host, Method, apply, decoder_inputs
from foveate.host.hf.layout import layout
from foveate.host.probing import Progress
from foveate.host.site import Site
from foveate.host.weight_tiles import TILE, weight_tile
from foveate.kv.renumbered import Rotation, rotations

Variant = Literal["paper", "release"]


@dataclass(frozen=True, eq=False)
class Gate:
    """One layer's gate: which blocks of keys matter to each block of queries.

    Args:
        q_map: `(Hq, D, D)` of averaged queries; None leaves them as they are (the release, where `k_map` has Hq heads).
        k_map: `(Hkv or Hq, 3 D, D)` of each block's largest, smallest and average key, side by side.
        block: tokens in a block.
        rotation: the layer's rotary embedding; None for keys that do not rotate.
    """

    q_map: Float[Tensor, "hq d d"] | None
    k_map: Float[Tensor, "hk dd d"]
    block: int
    rotation: Rotation | None

    def logits(self, site: Site) -> Float[Tensor, "b hq i j"]:
        """Return logits of each block of the call's queries and each block of all keys; the future is -inf.

        Queries and keys are rotated back to before their rotary embedding, pooled, mapped, and rotated as the first
        token of their block. The call holds all keys of sequences without padding.
        """
        total, n, heads = site.k.shape[2], site.q.shape[2], site.q.shape[1]
        q, at = self._pooled(site.q.detach(), total - n, ("avg",))
        k, start = self._pooled(site.k.detach(), 0, ("max", "min", "avg"))
        q = q if self.q_map is None else q @ self.q_map
        k = k.repeat_interleave(self.k_map.shape[0] // k.shape[1], 1) @ self.k_map
        q, k = self._turned(q, at), self._turned(k, start).repeat_interleave(heads // self.k_map.shape[0], 1)
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
        last = (at + self.block - 1).clamp_max(total - 1)
        return scores.masked_fill(start > last[:, None], NEG_INF)

    def _pooled(
        self, x: Float[Tensor, "b h n d"], first: int, kinds: tuple[str, ...]
    ) -> tuple[Float[Tensor, "b h i c"], Int[Tensor, " i"]]:
        """Pool positions `first ...` by blocks, the last of which may be short; return each block's first position."""
        places = torch.arange(first, first + x.shape[2], device=x.device)
        plain = self._turned(x.to(self.k_map.dtype), -places)
        rest = -x.shape[2] % self.block
        parts = []
        for kind in kinds:
            fill = {"max": -math.inf, "min": math.inf, "avg": 0.0}[kind]
            blocks = F.pad(plain, (0, 0, 0, rest), value=fill).unflatten(2, (-1, self.block))
            if kind == "avg":
                counts = torch.full((blocks.shape[2], 1), self.block, device=x.device)
                counts[-1] -= rest
                parts.append(blocks.sum(3) / counts)
            else:
                parts.append(blocks.amax(3) if kind == "max" else blocks.amin(3))
        return torch.cat(parts, -1), places[:: self.block]

    def _turned(self, x: Float[Tensor, "b h n d"], by: Int[Tensor, " n"]) -> Float[Tensor, "b h n d"]:
        return x if self.rotation is None else self.rotation(x, by.expand(x.shape[:3]))


def own_blocks(n: int, total: int, block: int, device: torch.device) -> Bool[Tensor, "i j"]:
    """Return the blocks of keys that hold the queries' own tokens: the diagonal."""
    first = torch.arange(-(-n // block), device=device)[:, None] * block + total - n
    last = (first + block - 1).clamp_max(total - 1)
    start = torch.arange(-(-total // block), device=device) * block
    return (start <= last) & (start + block > first)


@torch.no_grad()
def pooled_attention(site: Site, block: int) -> Float[Tensor, "b hq i j"]:
    """Return the largest weight of each tile of `block` queries and keys, each row divided by its sum.

    Some rows of the attention matrix are computed at a time; the whole matrix is never made.
    """
    batch, heads, n = site.q.shape[:3]
    total = site.k.shape[2]
    rest, step = -total % block, max(1, TILE // max(1, batch * heads * total * block)) * block
    out = []
    for first in range(0, n, step):
        tile = weight_tile(site, slice(first, min(first + step, n)))
        whole = tile.weights.new_zeros(*tile.weights.shape[:3], total + rest)
        whole[..., tile.keys] = tile.weights
        whole = F.pad(whole, (0, 0, 0, -whole.shape[2] % block))
        out.append(whole.unflatten(3, (-1, block)).amax(4).unflatten(2, (-1, block)).amax(3))
    pooled = torch.cat(out, 2)
    return pooled / pooled.sum(-1, keepdim=True).clamp_min(torch.finfo(pooled.dtype).tiny)


def gates(tensors: dict[str, Tensor], host: Host, block: int) -> dict[int, Gate]:
    """Return the gate of each layer by its number in the cache, from `(layers, heads, ...)` tensors."""
    turning, out = rotations(host), {}
    for row, layer in enumerate(layout(host).layers):
        q_map = tensors["q_map"][row, : layer.heads] if "q_map" in tensors else None
        count = layer.kv_heads if q_map is not None else layer.heads
        out[layer.layer] = Gate(q_map, tensors["k_map"][row, :count], block, turning[layer.layer])
    return out


def train_gates(
    model_host: Host, data: Iterable[Tensor], *, steps: int = 200, block: int = 64, rate: float = 1e-3,
    loss_scale: float = 10.0, variant: Variant = "paper", seed: int = 0, progress: Progress | None = None,
    losses: list[float] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Train the gates of all layers to predict pooled attention; the model is read without gradients.

    The loss is `KL(pooled attention || softmax(gate))`, averaged over all elements and scaled; rows of the first
    quarter of a text do not count. AdamW without decay, 20 steps of warm-up, then a cosine. One layer is in memory at a
    time. The sources do not say where the maps start: here at the product of averaged queries and averaged keys.

    Args:
        model_host: a decoder whose queries and keys rotate by fixed angles, or not at all.
        data: token ids `(B, N)` without padding.
        steps: optimiser steps.
        block: tokens in a block.
        rate: learning rate.
        loss_scale: factor of the loss (10 in the paper, 1 by default in the release; AdamW divides it out).
        variant: "release" has no map of queries, and one of keys for each query head.
        seed: seed of the first maps.
        progress: called as `progress(step, steps, note)`.
        losses: gets the loss of each step, without its factor.

    Returns:
        `q_map (layers, Hq, D, D)` (not for the release) and `k_map (layers, Hkv or Hq, 3 D, D)`.
    """
    validate.count("steps", steps, 1)
    validate.count("block", block, 1)
    validate.one_of("variant", variant, ("paper", "release"))
    rotations(model_host)
    with torch.inference_mode(False), torch.enable_grad():
        stream = iter(data)
        first = next(stream, None)
        if first is None:
            raise OptionError("data must hold at least one tensor of token ids (B, N); got none")
        width = _width(model_host, first)
        tensors = _initial(model_host, width, variant, seed)
        optimiser = torch.optim.AdamW(tensors.values(), lr=rate, weight_decay=0.0)
        for step, ids in enumerate(_chained(first, islice(stream, steps - 1))):
            optimiser.param_groups[0]["lr"] = rate * _schedule(step, steps)
            loss = _backward(model_host, tensors, ids.clone(), block, loss_scale)
            optimiser.step()
            optimiser.zero_grad()
            if losses is not None:
                losses.append(loss)
            if progress is not None:
                progress(step + 1, steps, f"divergence {loss:.5f}")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _chained(first: Tensor, later: Iterable[Tensor]) -> Iterable[Tensor]:
    yield first
    yield from later


def _schedule(step: int, steps: int) -> float:
    warm = min(20, max(1, steps // 5))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _width(host: Host, ids: Tensor) -> int:
    probe = _Widths()
    _read(host, ids[:1, :2], probe)
    if len(probe.found) > 1:
        raise OptionError(f"gates need equally wide heads in all layers; got {sorted(probe.found)}")
    return probe.found.pop()


def _initial(host: Host, width: int, variant: Variant, seed: int) -> dict[str, Tensor]:
    """Start at the product of averaged queries and keys, with small random maps of the largest and smallest keys."""
    found, draw = layout(host), torch.Generator().manual_seed(seed)
    eye = torch.eye(width)
    heads = found.kv_heads if variant == "paper" else found.heads
    ends = torch.randn(len(found), heads, 2 * width, width, generator=draw) * 0.01 * width**-0.5
    made = {"k_map": torch.cat([ends, eye.expand(len(found), heads, -1, -1)], 2)}
    if variant == "paper":
        made["q_map"] = eye.repeat(len(found), found.heads, 1, 1)
    return {name: tensor.to(host.model.device).requires_grad_() for name, tensor in made.items()}


def _backward(host: Host, tensors: dict[str, Tensor], ids: Tensor, block: int, scale: float) -> float:
    """Add the gradient of one text to the maps', layer by layer, and return the mean loss of a layer."""
    teacher = _Teacher(gates(tensors, host, block), scale)
    _read(host, ids, teacher)
    return teacher.loss / max(1, teacher.layers)


def _read(host: Host, ids: Tensor, method: Method) -> None:
    assert host.decoder is not None
    with torch.no_grad(), apply(host.model, method, on="decoder"):
        host.decoder(**decoder_inputs(host, ids), use_cache=False)


class _Teacher(Method):
    """A method that compares each layer's gate with its attention, and adds the gradients at once."""

    def __init__(self, own: dict[int, Gate], scale: float) -> None:
        self.own, self.scale, self.loss, self.layers = own, scale, 0.0, 0

    def at(self, site: Site) -> bool:
        return site.is_causal and site.layer in self.own and site.is_plain_causal

    def read(self, site: Site, out: Tensor) -> None:
        gate = self.own[site.layer]
        target = pooled_attention(site, gate.block)
        with torch.enable_grad():
            found = gate.logits(site).log_softmax(-1).masked_fill(target == 0, 0.0)
            rows = slice(target.shape[2] // 4, None)
            divergence = (torch.xlogy(target, target) - target * found)[:, :, rows]
            loss = divergence.mean()
            (self.scale * loss).backward()
        self.loss, self.layers = self.loss + loss.item(), self.layers + 1


class _Widths(Method):
    """A method that records the widths of the layers' keys."""

    is_probe = True

    def __init__(self) -> None:
        self.found: set[int] = set()

    def read(self, site: Site, out: Tensor) -> None:
        if site.is_causal:
            self.found.add(site.k.shape[-1])
