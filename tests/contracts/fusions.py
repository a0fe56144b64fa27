"""The fusions of the catalogue, and others with options that take another path, for the contract."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from foveate.core.catalog import systems
from foveate.nn.base.fusion import Fusion, Stream
from foveate.nn.fusion.co_attention import CoAttention
from foveate.nn.fusion.daft import DAFTAttention

BATCH = 3
#: Sizes of the axes, in the order in which a fusion's streams name them.
SIZES = ((3, 4, 2, 5), (1, 1, 1, 1), (5, 1, 3, 2))

SYSTEMS: dict[str, type[Fusion]] = {
    row.key: found
    for row in systems("nn")
    if isinstance(found := row.load(), type) and issubclass(found, Fusion)
}  # fmt: skip

#: Fusions whose row in the catalogue is another system's, and options that take another path.
EXTRA: dict[str, Callable[[], Fusion]] = {
    "co_attention": CoAttention.example,
    "co_attention-max": lambda: CoAttention(6, 5, pool="max", activation="tanh"),
    "co_attention-mean": lambda: CoAttention(6, 5, pool="mean"),
    "daft-rk4": lambda: DAFTAttention(6, "rk4"),
    "daft-euler": lambda: DAFTAttention(6, "euler", steps=1, learned_start=False),
}
MAKERS: dict[str, Callable[[], Fusion]] = {**{key: cls.example for key, cls in SYSTEMS.items()}, **EXTRA}
KEYS = list(MAKERS)


def example(key: str) -> Fusion:
    """Make the fusion's example with the same parameters each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MAKERS[key]().double().eval()


def places(stream: Stream, fusion: Fusion, batch: int = BATCH, sizes: tuple[int, ...] = SIZES[0]) -> tuple[int, ...]:
    """Return the sizes of a stream's batch and axes."""
    axes = list(dict.fromkeys(axis for each in fusion.streams for axis in each.axes))
    return (batch, *(sizes[axes.index(axis)] for axis in stream.axes))


def shape(stream: Stream, fusion: Fusion, batch: int = BATCH, sizes: tuple[int, ...] = SIZES[0]) -> tuple[int, ...]:
    width = () if stream.dim is None else (stream.dim,)
    return (*places(stream, fusion, batch, sizes), *width)


def inputs(
    fusion: Fusion, batch: int = BATCH, sizes: tuple[int, ...] = SIZES[0], *, seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:  # fmt: skip
    """Make normally distributed streams."""
    random = torch.Generator().manual_seed(seed)
    return {
        stream.name: torch.randn(shape(stream, fusion, batch, sizes), generator=random, dtype=torch.float64).to(dtype)
        for stream in fusion.streams
    }


def masks(fusion: Fusion, seed: int = 0) -> dict[str, Tensor]:
    """Make a mask for each stream: about a third of all places, and everything of the last example."""
    random = torch.Generator().manual_seed(seed)
    found = {each.name: torch.rand(places(each, fusion), generator=random) > 1 / 3 for each in fusion.streams}
    for mask in found.values():
        mask[0].view(-1)[:1] = True
        mask[-1] = False
    return found


def soiled(given: Mapping[str, Tensor], real: Mapping[str, Tensor], garbage: float) -> dict[str, Tensor]:
    """Return the streams with garbage in places that are not real."""
    made = {}
    for name, x in given.items():
        mask = real[name].view(*real[name].shape, *[1] * (x.dim() - real[name].dim()))
        made[name] = x.masked_fill(~mask, garbage)
    return made


def total(out: Mapping[str, Tensor], seed: int = 5) -> Tensor:
    """Return a random projection of all outputs that have gradients."""
    random = torch.Generator().manual_seed(seed)
    parts = []
    for x in out.values():
        direction = torch.randn(x.shape, generator=random, dtype=torch.float64)
        if x.is_floating_point():
            parts.append((x * direction.to(x.dtype)).sum())
    return torch.stack(parts).sum()
