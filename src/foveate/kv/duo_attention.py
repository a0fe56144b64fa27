"""DuoAttention: retrieval heads keep the whole cache, streaming heads keep only sinks and a recent window.

DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads (2024), arXiv 2410.10819. Where
release and paper differ: the release's training step takes the full stream's attention output, detached, in the gated
sum; here, as in the paper, both outputs come from the mixed stream's own q, k, v. The paper leaves open how the squared
distance is reduced over channels; its weight of 0.05 fits the release's mean, which is used here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import ClassVar, Self, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.core.selection import Blocks, Selection
from foveate.core.window_selection import window
from foveate.host import Ends, Host, apply, decoder_inputs
from foveate.host.attention import selected
from foveate.host.hf.layout import layout
from foveate.host.hf.model import host
from foveate.host.method import Method
from foveate.host.padding import tokens
from foveate.host.probing import Progress
from foveate.host.site import Site
from foveate.kv.base.policy import Policy, check_budget, next_item
from foveate.kv.parts.head_split import HeadTable, check_heads, keep_ends, split_at_budget
from foveate.kv.parts.training_state import TrainingState


@final
@dataclass(eq=False)
class DuoAttention(Policy):
    """Heads with a low gate keep sinks and a window; the others keep everything. Gates come from `duo_train`.

    Memory falls to `1 - sparsity · (1 - (sink + recent) / N)` of the cache. Keys keep their original positions.
    Prefill is dense for a prompt in one call. A prompt in several calls is streamed: a streaming head then sees sinks,
    window and the current chunk. The wrong choice without gates that fit the model: a random split loses retrieval.

    Args:
        gates: `(layers, kv_heads)` in 0..1, one for each head.
        sparsity: share of heads that stream, those with the lowest gates; among equal gates, the earlier head streams.
        sink, recent: tokens that streaming heads keep.
        prefill_chunk: size of the chunks into which one call's prompt is cut for streaming heads; None does not cut it.
    """

    gates: Tensor = None  # type: ignore[assignment]  # without them the error names what trains them
    sparsity: float = 0.5
    sink: int = 64
    recent: int = 256
    prefill_chunk: int | None = None
    evicts: ClassVar[bool] = True
    _full: HeadTable | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.gates, Tensor) or self.gates.dim() != 2:
            raise OptionError(
                "gates must be a tensor (layers, kv_heads), such as foveate.kv.duo_train(model, data) returns; got "
                f"{type(self.gates).__name__}"
            )
        validate.between("sparsity", self.sparsity, 0.0, 1.0)
        validate.count("sink", self.sink)
        validate.count("recent", self.recent, 1)
        if self.prefill_chunk is not None:
            validate.count("prefill_chunk", self.prefill_chunk, 1)

    def bind(self, host: Host) -> None:
        check_heads("gates", self.gates, host)
        found = layout(host)
        self._full = HeadTable(full_heads(self.gates.cpu(), self.sparsity, found.table), found)

    def at(self, site: Site) -> bool:
        assert self._full is not None
        return not self._full.holds_all(site)

    def select(self, site: Site) -> Selection | None:
        chunk, n = self.prefill_chunk, site.q.shape[2]
        if chunk is None or n <= chunk or not site.is_causal:
            return None
        assert self._full is not None
        return _chunked(self._full.of(site), site, self.sink, self.recent, chunk)

    def keep(self, site: Site) -> Tensor | Ends | None:
        if site.seen <= self.sink + self.recent:
            return None
        assert self._full is not None
        return keep_ends(site, self.sink, self.recent, self._full.numbers(site))

    @classmethod
    def calibrate(
        cls, host: Host, data: Iterable[tuple[Tensor, Tensor]], progress: Progress | None = None
    ) -> dict[str, Tensor]:
        return {"gates": duo_train(host.model, data, steps=100, rate=0.05, sink=4, recent=64, progress=progress)}

    @classmethod
    def at_budget(cls, budget: float, host: Host, length: int, **learnt: Tensor) -> Self:
        check_budget(budget, length)
        if "gates" not in learnt:
            raise OptionError("duo_attention needs gates for this model: train them with DuoAttention.calibrate")
        may, full, window = split_at_budget(budget, host, length)
        check_heads("gates", learnt["gates"], host)
        gates, sink = learnt["gates"].cpu().masked_fill(~may, -1.0), min(4, window - 1)
        return cls(gates, sparsity=1 - full / int(layout(host).table.sum()), sink=sink, recent=window - sink)


def full_heads(
    gates: Float[Tensor, "l h"], sparsity: float, table: Bool[Tensor, "l h"] | None = None
) -> Bool[Tensor, "l h"]:
    """Return the heads that keep everything: all but the `sparsity` share with the lowest gates.

    Args:
        gates: one for each head.
        sparsity: share of heads that stream.
        table: True for the entries that are heads; None is all.
    """
    chosen = torch.ones_like(gates, dtype=torch.bool) if table is None else table.clone()
    some = chosen.flatten().nonzero()[:, 0]
    lowest = gates.flatten()[some].argsort(stable=True)[: round(sparsity * some.numel())]
    chosen.view(-1)[some[lowest]] = False
    return chosen


def _chunked(full: Bool[Tensor, " hkv"], site: Site, sink: int, recent: int, chunk: int) -> Selection:
    """Select all keys for full heads, and for streaming heads the sinks, the window before a chunk, and the chunk.

    Tokens are counted from each sequence's own first one, whatever the order of the slots.
    """
    n, total, found = site.q.shape[2], site.k.shape[2], tokens(site)
    heads, first = full.repeat_interleave(site.groups), site.seen - n
    if found is None:
        own = site.positions
        query = torch.arange(first, site.seen, device=site.q.device)[None]
        before = query[:, :1]
    else:
        own, query, before = found.own(site.positions), found.rank[:, first:], found.before(first)[:, None]
    begin = (query - before).clamp_min(0) // chunk * chunk + before
    own, begin = own.repeat_interleave(site.groups, 1), begin.expand(site.q.shape[0], -1)
    own = torch.where(heads[:, None], site.seen, own)  # every key counts as recent

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        place = own[b, h, k]
        return (place >= 0) & (place < sink) | (place >= begin[b, q.clamp_max(n - 1)] - recent)

    blocks = torch.ones(1, heads.numel(), -(-n // chunk), 1, dtype=torch.bool, device=site.q.device)
    return Blocks(blocks.expand(site.q.shape[0], -1, -1, -1), (chunk, total), n, total, rule)


class Mixed(Method):
    """A method for training: each head's output becomes `gate · full + (1 - gate) · streaming`.

    Both use the same queries, keys and values. The full output is the model's own: with all gates at 1 nothing changes.
    """

    def __init__(self, gates: Tensor, sink: int, recent: int) -> None:
        self.gates, self.sink, self.recent = gates, sink, recent
        self.rows: dict[int, tuple[int, int]] = {}

    def bind(self, host: Host) -> None:
        check_heads("gates", self.gates, host)
        self.rows = {layer.layer: (row, layer.kv_heads) for row, layer in enumerate(layout(host).layers)}

    def at(self, site: Site) -> bool:
        return site.is_causal and site.layer in self.rows

    def edit_output(self, site: Site, out: Tensor) -> Tensor:
        near = window(site.q.shape[2], site.k.shape[2], self.recent, self.sink, site.q.device)
        streamed, _ = selected(site, [near])
        row, heads = self.rows[site.layer]
        gate = self.gates[row, :heads].to(out.device, out.dtype).repeat_interleave(site.groups)[:, None, None]
        return gate * out + (1 - gate) * streamed


def duo_train(
    model: object,
    data: Iterable[tuple[Tensor, Tensor]],
    *,
    steps: int = 2000,
    rate: float = 0.02,
    reg: float = 0.05,
    sink: int = 128,
    recent: int = 256,
    progress: Progress | None = None,
    partial: Path | None = None,
) -> Float[Tensor, "l hkv"]:
    """Train gates `(layers, kv_heads)` in 0..1 by distillation; the model's weights stay frozen.

    Args:
        model: a decoder.
        data: `(ids (B, N), answers (B, N) bool)`: the loss covers the answers' tokens; see `foveate.tasks.Passkeys`.
        steps: optimiser steps of AdamW, with linear warm-up over the first fifth and linear decay over the last.
        rate: learning rate.
        reg: weight of the mean gate, which pushes heads towards streaming.
        sink, recent: the tokens that streaming heads see in training.
        progress: called as `progress(step, steps, note)`.
        partial: a file for the state of an interrupted training; the same call continues from it. It is deleted when
            the training ends.
    """
    here = host(model)
    validate.at_least("steps", steps, 1)
    found = layout(here)
    check_heads("gates", found.table, here)
    with torch.inference_mode(False):
        gates = torch.ones(found.table.shape, requires_grad=True)
    optimiser = torch.optim.AdamW([gates], lr=rate, weight_decay=0.0)
    state = None if partial is None else TrainingState(partial, f"{steps} {rate} {reg} {sink} {recent}")
    done = 0 if state is None else state.load(gates, optimiser)
    stream = islice(data, done, None)
    frozen = [p for p in here.model.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        for step in range(done, steps):
            ids, answers = next_item(stream, step, steps)
            optimiser.param_groups[0]["lr"] = rate * _schedule(step, steps)
            distance = _backward(here, Mixed(gates, sink, recent), ids, answers, reg)
            optimiser.step()
            optimiser.zero_grad()
            gates.data.clamp_(0.0, 1.0)
            if state is not None:
                state.save(step + 1, gates, optimiser)
            if progress is not None:
                progress(step + 1, steps, f"distance {distance:.4f}, mean gate {gates.mean().item():.2f}")
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    if state is not None:
        state.file.unlink(missing_ok=True)
    return gates.detach()


def _backward(here: Host, mixing: Mixed, ids: Tensor, answers: Tensor, reg: float) -> float:
    """Compute the gates' gradient on one batch, and return the squared distance of the two streams."""
    with torch.inference_mode(False), torch.enable_grad():
        with torch.no_grad():
            full = _states(here, ids, answers)
        with apply(here.model, mixing, on="decoder"):
            mixed = _states(here, ids, answers)
        distance = (mixed - full).float().square().mean().cpu()
        (distance + reg * mixing.gates[layout(here).table].abs().mean()).backward()
    return distance.item()


def _states(here: Host, ids: Tensor, answers: Tensor) -> Float[Tensor, "n c"]:
    """Return the decoder's last hidden states at the answers."""
    assert here.decoder is not None
    whole = here.decoder is here.model  # in that case it returns logits, and its states on request
    out = here.decoder(**decoder_inputs(here, ids), use_cache=False, output_hidden_states=whole)
    states = out.hidden_states[-1] if whole else out.last_hidden_state
    return states[answers.to(states.device)]


def _schedule(step: int, steps: int) -> float:
    fifth = max(1, steps // 5)
    return min(1.0, max((step + 1) / fifth, 0.1), max((steps - step) / fifth, 0.1))
