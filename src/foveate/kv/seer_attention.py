"""SeerAttention: while the prompt is read, learnt gates choose the blocks of keys that each block of queries sees.

SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs (2024), arXiv 2410.13276. Where release and paper
differ: in the release's default gate the averaged queries are not mapped, and keys have a map for each query head
(`variant="release"` of `seer_gates`); it does not force the diagonal, which is always chosen here. A later paper of the
same group trains other gates for decoding (SeerAttention-R); here decoding stays dense. The paper's fine-tuning of the
model under its gates is left out: the model's weights never change.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Self, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError
from foveate.core.selection import Blocks, Selection
from foveate.host import Host
from foveate.host.attention import selected
from foveate.host.hf.layout import layout
from foveate.host.hf.model import host
from foveate.host.padding import attend_unpadded, tokens
from foveate.host.probing import Progress
from foveate.host.site import Site
from foveate.kv.base.policy import Policy, check_budget, next_item
from foveate.kv.parts.block_gates import Gate, Variant, gates, own_blocks, train_gates


@final
@dataclass(eq=False)
class SeerAttention(Policy):
    """A prompt's blocks of queries see the blocks of keys that a gate of their layer and head picks, exactly.

    A gate compares averaged queries with the largest, smallest and average keys of a block, from before the rotary
    embedding, by maps that `seer_gates` trains on the model's own attention: `N² / block²` scores a head. The cache
    stays whole and decoding dense: this shortens the time to the first token of long prompts, and saves no memory. The
    wrong choice for short prompts, and for a model that nobody has trained gates for. Layers with a sliding window, a
    soft cap or a mask of the caller's own keep the model's attention, and have no gates to train.

    Args:
        k_map: from `seer_gates`.
        q_map: from `seer_gates`; None for gates of `variant="release"`.
        block: tokens in a block; gates are trained for one size.
        threshold: blocks with a larger share of the gate's softmax are seen (5e-4 to 5e-3); 0 sees everything.
        density: the share of causal tiles that is seen, the same number of blocks in every row, instead of `threshold`.
        last_dense: last rows of blocks of a prompt that see everything.
    """

    k_map: Tensor
    q_map: Tensor | None = None
    block: int = 64
    threshold: float | None = None
    density: float | None = None
    last_dense: int = 2
    decodes_densely: ClassVar[bool] = True
    _gates: dict[int, Gate] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, value in (("k_map", self.k_map), ("q_map", self.q_map)):
            if (value is None and name == "k_map") or not (value is None or isinstance(value, Tensor)):
                raise OptionError(f"{name} must be a tensor (layers, heads, ...), from seer_gates; got {value!r}")
        validate.count("block", self.block, 1)
        if (self.threshold is None) == (self.density is None):
            raise OptionError(f"threshold={self.threshold} or density={self.density}: one of them must be given")
        if self.threshold is not None:
            validate.between("threshold", self.threshold, 0.0, 1.0)
        if self.density is not None:
            validate.between("density", self.density, 0.0, 1.0)
        validate.count("last_dense", self.last_dense)

    def bind(self, host: Host) -> None:
        check_gates(self.k_map, self.q_map, host)
        maps = {"k_map": self.k_map} | ({} if self.q_map is None else {"q_map": self.q_map})
        placed = {name: tensor.detach().to(host.model.device, torch.float32) for name, tensor in maps.items()}
        self._gates = gates(placed, host, self.block)

    def at(self, site: Site) -> bool:
        reads = site.phase == "prefill" and site.is_causal and site.q.shape[2] > 1 and site.is_plain_causal
        return reads and site.is_whole and site.layer in self._gates and not (self.threshold == 0 or self.density == 1)

    def select(self, site: Site) -> Selection | None:
        return None if tokens(site) is not None else self._chosen(site)

    def attend(self, site: Site) -> Tensor | None:
        """Read padded sequences one by one, so that each has its own blocks."""
        if tokens(site) is None:
            return None
        return attend_unpadded(site, lambda part, rows: selected(part, [self._chosen(part)])[0])

    def _chosen(self, site: Site) -> Blocks:
        n, total = site.q.shape[2], site.k.shape[2]
        logits = self._gates[site.layer].logits(site)
        diagonal = own_blocks(n, total, self.block, logits.device)
        if self.threshold is not None:
            chosen = logits.softmax(-1) > self.threshold
        else:
            assert self.density is not None
            chosen = _best(logits, blocks_of(self.density, logits.shape[3]))
        chosen = chosen | diagonal
        if self.last_dense:
            chosen[:, :, -self.last_dense :] = True
        return Blocks(chosen & logits.isfinite(), (self.block, self.block), n, total)

    @classmethod
    def calibrate(
        cls, host: Host, data: Iterable[tuple[Tensor, Tensor]], progress: Progress | None = None
    ) -> dict[str, Tensor]:
        """Train gates for a while, with blocks of a 32nd of the first text, at most of 64 tokens."""
        texts = (ids for ids, _ in data)
        first = next_item(texts, 0, 100)
        block = max(2, min(64, 1 << (max(2, first.shape[1] // 32).bit_length() - 1)))
        made = train_gates(host, texts, steps=100, block=block, rate=5e-3, progress=progress)
        return {**made, "block": torch.tensor(block)}

    @classmethod
    def at_budget(cls, budget: float, host: Host, length: int, **learnt: Tensor) -> Self:
        """See `Policy.at_budget`. The budget is the share of a prompt's causal tiles that is read."""
        check_budget(budget, length)
        if "k_map" not in learnt:
            raise OptionError("seer_attention needs gates for this model: train them with SeerAttention.calibrate")
        block = int(learnt.get("block", torch.tensor(64)))
        rows = -(-length // block)
        dense = 2 if 4 / rows <= budget / 4 else 0  # a dense row takes about 2 / rows of all tiles, and so the diagonal
        share = 1.0 if budget >= 1 else max(0.0, budget - 2 * (dense + 1) / rows)
        return cls(learnt["k_map"], learnt.get("q_map"), block, density=share, last_dense=dense)


def blocks_of(density: float, count: int) -> int:
    """Return the blocks in each row such that their causal share is `density`: `n (1 - sqrt(1 - density))`."""
    return max(1, round(count * (1 - math.sqrt(1 - density))))


def _best(logits: Float[Tensor, "b h i j"], count: int) -> Bool[Tensor, "b h i j"]:
    """Return the `count` best blocks of each row."""
    index = logits.topk(min(count, logits.shape[3]), -1).indices
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(3, index, True)


def check_gates(k_map: Tensor, q_map: Tensor | None, host: Host) -> None:
    """Refuse maps that are not those of a model's heads."""
    found = layout(host)
    count = found.heads if q_map is None else found.kv_heads
    width = k_map.shape[-1] if k_map.dim() == 4 else 0
    if tuple(k_map.shape) != (len(found), count, 3 * width, width) or width == 0:
        raise ShapeError(
            f"k_map must be (layers, heads, 3 D, D)=({len(found)}, {count}, 3 D, D); got {tuple(k_map.shape)}"
        )
    if q_map is not None and tuple(q_map.shape) != (len(found), found.heads, width, width):
        raise ShapeError(f"q_map must be {(len(found), found.heads, width, width)}; got {tuple(q_map.shape)}")


def seer_gates(
    model: object, data: Iterable[Tensor], *, steps: int = 200, block: int = 64, rate: float = 1e-3,
    loss_scale: float = 10.0, variant: Variant = "paper", seed: int = 0, progress: Progress | None = None,
    losses: list[float] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Train the gates of a decoder by distillation of its own attention; its weights stay as they are.

    `SeerAttention(**found, block=block, density=0.1)` uses them. See `foveate.kv.parts.block_gates.train_gates` for the
    arguments; the paper takes half a billion tokens of texts of 8k and more.
    """
    return train_gates(
        host(model), data, steps=steps, block=block, rate=rate, loss_scale=loss_scale, variant=variant, seed=seed,
        progress=progress, losses=losses,
    )  # fmt: skip
