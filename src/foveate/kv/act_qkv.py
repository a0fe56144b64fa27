"""ActQKV: a probe query chooses the blocks of the cache to read, and layers share one budget by their density.

Activation-aware Probe-Query: Effective Key-Value Retrieval for Long-Context LLMs Inference (2025), arXiv 2502.13542.
There is no release. Reconstructed, and arguments where there is a choice: the activation bias is averaged over
channels and heads; a block is represented by means of its keys; scores are a mean over heads, so that their softmax is
about as sharp as one head's; a layer's share of the budget is the entropy of that softmax (`cutoff`), measured at the
step before, since a step's later layers are not known when its first one reads.
Positions are kept: the paper's fixed distance of retrieved keys, which extends the trained length, needs keys from
before the rotary embedding, and a site's keys have it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.core.scoring import dot_product, safe_softmax
from foveate.core.selection import Indices, Selection
from foveate.host.attention import selected
from foveate.host.hf.model import Host
from foveate.host.padding import attend_unpadded, tokens
from foveate.host.site import Site
from foveate.kv.base.policy import Policy
from foveate.kv.parts.block_means import mean_keys
from foveate.kv.parts.head_split import check_reach, far_numbers
from foveate.kv.parts.last_query import has_everything
from foveate.kv.parts.layer_budgets import layer_budgets
from foveate.kv.parts.probe_query import Weighting, probe_query


@final
@dataclass(eq=False)
class ActQKV(Policy):
    """Each step and each window of a prompt reads the sinks, a local window, and blocks that its probe query retrieves.

    The probe of a window is the mean of its queries, weighted by how far each is from the mean: tokens that carry
    information decide, and filler does not dilute them. While decoding, the query is its own probe, and layers whose
    scores are spread over many blocks get more blocks than layers whose scores are concentrated.

    Nothing is evicted: memory grows by the mean keys (`representatives / block` of the keys), and reads fall to about
    `(sink + local + budget + block / 2) / N` plus one scoring pass over the mean keys. Works on a frozen model without
    calibration. The budgets make the host wait for the device once a step. The wrong choice if memory is the limit, if
    the heads of a layer need different blocks (they share them), or if the needed tokens are scattered, one to a block.
    Drafts of assisted decoding share budgets from before the draft, so that the text may differ from that of plain
    decoding. Layers with a window of their own, or from which another method evicts, read all that they hold.

    Args:
        chunk: number of queries of a prompt that share one probe; also for prompts in one call.
        block: tokens of a block.
        budget: tokens of the retrieved blocks, in a layer on average.
        sink: number of first tokens that are always read.
        local: number of tokens before the query, or before its window, that are always read; with those after the last
            full block.
        representatives: mean keys of a block; its score is that of its best one.
        weighting: how the queries of a window make its probe.
        cutoff: what a layer's share of the budget grows with while decoding: "entropy", "inverse_entropy", or "none"
            for equal shares.
        spread: the largest factor by which a layer's share may differ from the average.
    """

    chunk: int = 512
    block: int = 128
    budget: int = 2048
    sink: int = 128
    local: int = 1024
    representatives: int = 4
    weighting: Weighting = "activation"
    cutoff: Literal["entropy", "inverse_entropy", "none"] = "entropy"
    spread: float = 2.0
    in_place: ClassVar[bool] = True
    _row: dict[int, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, least in (("chunk", 1), ("block", 1), ("budget", 1), ("sink", 0), ("local", 0)):
            validate.count(name, getattr(self, name), least)
        validate.count("representatives", self.representatives, 1)
        validate.one_of("weighting", self.weighting, ("activation", "mean", "last"))
        validate.one_of("cutoff", self.cutoff, ("entropy", "inverse_entropy", "none"))
        validate.at_least("spread", self.spread, 1)
        if self.budget % self.block:
            raise OptionError(f"budget={self.budget} must be a multiple of block={self.block}")
        if self.block % self.representatives:
            raise OptionError(f"block={self.block} must be a multiple of representatives={self.representatives}")

    @property
    def reads(self) -> int:
        """Number of earlier tokens up to which a step reads everything."""
        return self.sink + self.local + self.budget

    @property
    def tables(self) -> float:
        """See `Policy.tables`. Each block has its representatives, keys without values."""
        return self.representatives / (2 * self.block)

    def bind(self, host: Host) -> None:
        super().bind(host)
        check_reach("sink, local, budget: act_qkv", self.reads + self.block, host)
        self._row = {layer: row for row, layer in enumerate(sorted(far_numbers(host)))}

    def at(self, site: Site) -> bool:
        return site.layer in self._row and site.seen - 1 > self.reads and has_everything(site)

    def attend(self, site: Site) -> Tensor | None:
        """Attend in a padded prompt sequence by sequence: windows count from its own first token."""
        if site.q.shape[2] == 1 or tokens(site) is None:
            return None
        return attend_unpadded(site, lambda part, rows: self._attend_rows(site, part, rows))

    def _attend_rows(self, site: Site, part: Site, rows: Tensor) -> Tensor:
        whole, all_layers = self._density(site), (id(self), None)
        part.all_notes[all_layers] = {"density": whole[rows]}
        selection = self.select(part) if self.at(part) else None
        out, _ = selected(part, [] if selection is None else [selection.for_heads(part.q.shape[1])])
        site.notes(self, all_layers=True)["density"] = whole.index_copy(0, rows, part.all_notes[all_layers]["density"])
        return out

    def select(self, site: Site) -> Selection | None:
        n, total = site.q.shape[2], site.k.shape[2]
        if n == 1:
            return self._padded_step(site) if tokens(site) is not None else self._step(site)
        starts = range(0, n, self.chunk)
        if total - n + starts[-1] <= self.reads:
            return None
        lists = [self._window(site, start, min(start + self.chunk, n)) for start in starts]
        longest = max(index.shape[1] for index in lists)
        index = torch.stack([F.pad(index, (0, longest - index.shape[1])) for index in lists], 1)
        valid = torch.stack(
            [torch.arange(longest, device=index.device).expand(len(index), -1) < one.shape[1] for one in lists], 1
        )
        return Indices(index[:, None], n, total, valid[:, None], self.chunk)

    def _window(self, site: Site, start: int, stop: int) -> Int[Tensor, "b n"]:
        """Return the keys that a window of a prompt without padding reads."""
        batch, device = site.q.shape[0], site.q.device
        past, end = (site.k.shape[2] - site.q.shape[2] + x for x in (start, stop))
        if past <= self.reads:
            return torch.arange(end, device=device).expand(batch, -1)
        probe = probe_query(site.q[:, :, start:stop], self.weighting)
        full = torch.full((batch,), self._full_blocks(past), device=device)
        chosen = self._choose(site, probe, past, full, self.budget // self.block)
        near = torch.arange(self.sink + self._full_blocks(past) * self.block, end, device=device)
        return torch.cat([self._of_blocks(chosen, device), near.expand(batch, -1)], 1)

    def _step(self, site: Site) -> Indices:
        """Return the keys that a decoding step of sequences without padding reads."""
        past, device, batch = site.k.shape[2] - 1, site.q.device, site.q.shape[0]
        blocks, (budgets, numbers) = self._full_blocks(past), self._budgets(site)
        chosen = self._choose(
            site, site.q[:, :, 0], past, torch.full((batch,), blocks, device=device), min(max(numbers), blocks)
        )
        near = torch.arange(self.sink + blocks * self.block, past + 1, device=device).expand(batch, -1)
        index = torch.cat([self._of_blocks(chosen, device), near], 1)[:, None, None]
        if len(set(numbers)) == 1:
            return Indices(index, 1, past + 1)
        read = (torch.arange(chosen.shape[1], device=device) < budgets[:, None]).repeat_interleave(self.block, 1)
        valid = F.pad(read, (self.sink, near.shape[1]), value=True)[:, None, None]
        mean = sum(min(number, blocks) for number in numbers) / batch
        return Indices(index, 1, past + 1, valid, counted=self.sink + mean * self.block + near.shape[1])

    def _padded_step(self, site: Site) -> Indices:
        """Return the keys that a decoding step of a padded batch reads."""
        past, device, found = site.k.shape[2] - 1, site.q.device, tokens(site)
        assert found is not None
        budgets, numbers = self._budgets(site)
        own = found.before(past)[:, None].long()
        full = ((own - self.sink - self.local) // self.block).clamp_min(0)
        most = max(*numbers, self.budget // self.block)
        chosen = self._choose(site, site.q[:, :, 0], past, full[:, 0], most)
        count = torch.where(own > self.reads, budgets[:, None], full).minimum(full)
        near = own - self.local - self.block + 1 + torch.arange(self.local + self.block, device=device)
        read = (torch.arange(chosen.shape[1], device=device) < count).repeat_interleave(self.block, 1)
        sinks = torch.arange(self.sink, device=device) <= own
        valid = torch.cat([sinks, read, (near >= self.sink + full * self.block) & (near <= own)], 1)
        index = found.at(torch.cat([self._of_blocks(chosen, device), near], 1))
        return Indices(index[:, None, None], 1, past + 1, valid[:, None, None])

    def _full_blocks(self, past: int) -> int:
        """Return the number of full blocks between the sinks and the local window."""
        return max(0, past - self.sink - self.local) // self.block

    def _of_blocks(self, chosen: Int[Tensor, "b c"], device: torch.device) -> Int[Tensor, "b n"]:
        """Return the sinks and the tokens of chosen blocks."""
        inside = torch.arange(self.block, device=device)
        tokens_of = (self.sink + chosen[..., None] * self.block + inside).flatten(1)
        return torch.cat([torch.arange(self.sink, device=device).expand(len(chosen), -1), tokens_of], 1)

    def _choose(
        self, site: Site, probe: Float[Tensor, "b h d"], past: int, full: Int[Tensor, " b"], count: int
    ) -> Int[Tensor, "b c"]:
        """Return the `count` best of each sequence's `full` first blocks, best first; measure the layer's density."""
        means = mean_keys(site, site.notes(self), past, self.sink, self.block // self.representatives)
        means = means[:, :, : means.shape[2] // self.representatives * self.representatives]
        logits = dot_product(probe.unflatten(1, (means.shape[1], -1)), means, site.scale).float()
        scores = logits.mean((1, 2)).unflatten(-1, (-1, self.representatives)).amax(-1)
        candidate = torch.arange(scores.shape[1], device=scores.device) < full[:, None]
        scores = scores.masked_fill(~candidate, float("-inf"))
        self._measure(site, scores, full)
        return scores.topk(min(count, scores.shape[1])).indices

    def _measure(self, site: Site, scores: Float[Tensor, "b n"], full: Int[Tensor, " b"]) -> None:
        """Note the entropy of this layer's scores, for sequences that do not read everything."""
        if self.cutoff == "none":
            return
        weights, density = safe_softmax(scores), self._density(site)
        entropy = -torch.xlogy(weights, weights).sum(-1)
        row = self._row[site.layer]
        noted = torch.where(full > self.budget // self.block, entropy.to(density), density[:, row])
        index = torch.tensor([row], device=density.device)
        site.notes(self, all_layers=True)["density"] = density.index_copy(1, index, noted[:, None])

    def _density(self, site: Site) -> Float[Tensor, "b l"]:
        """Return the last entropy of every layer's scores; 1 where there is none yet."""
        found = site.notes(self, all_layers=True).get("density")
        return torch.ones(site.q.shape[0], len(self._row), device=site.q.device) if found is None else found

    def _budgets(self, site: Site) -> tuple[Int[Tensor, " b"], list[int]]:
        """Return each sequence's blocks in this layer, on the device and as numbers."""
        if self.cutoff == "none":
            same = [self.budget // self.block] * site.q.shape[0]
            return torch.full((len(same),), same[0], device=site.q.device), same
        if self not in site.step:  # once a step, for all layers
            density = self._density(site)
            share = density if self.cutoff == "entropy" else 1 / density.clamp_min(1e-3)
            budgets = layer_budgets(share, self.budget // self.block, self.spread)
            site.step[self] = budgets, budgets.T.tolist()  # the host waits for the device here
        budgets, numbers = site.step[self]
        row = self._row[site.layer]
        return budgets[:, row].to(site.q.device), numbers[row]

    @classmethod
    def at_budget(cls, budget: float, host: Host, length: int, **learnt: Tensor) -> Self:
        """See `Policy.at_budget`. Sinks, local window and blocks share it as by default, 1 : 8 : 16; 4 sinks at least.

        Windows of a prompt are as long in proportion, from 16 queries on: in a long one the few that ask are lost.
        """
        total = cls.tokens(budget, length)
        sink = min(128, max(min(4, total // 4), total // 25))
        local = min(1024, 8 * total // 25)
        rest = max(1, total - sink - local - 1)
        block = min(128, max(min(8, -(-rest // 2)), rest // 128 * 8))
        blocks = max(1, round((rest - block / 2) / block))  # half a block is read with the local window, on average
        chunk = min(512, max(16, 4 * total // 25))
        return cls(chunk, block, blocks * block, sink, local, _parts(block))


def _parts(block: int) -> int:
    """Return the mean keys of a block: four, but none of fewer than eight tokens."""
    return next(parts for parts in (4, 2, 1) if parts == 1 or (block % parts == 0 and block // parts >= 8))
