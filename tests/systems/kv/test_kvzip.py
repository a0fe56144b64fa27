"""KVzip: scores by hand, the cache after the second reading, and what it is good for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host import Method, Site, apply
from foveate.kv import KVzip, ScorePolicy, SnapKV
from foveate.kv.base.scored import Heads
from foveate.kv.parts import reconstruction
from foveate.kv.parts.reconstruction import Reconstruction
from tests.conftest import ClaimFixture
from tests.support.constructed import FILLER, KEYS, VALUES, induction_lm
from tests.support.host_models import VOCAB, model, tokens
from tests.systems.kv.test_score_policies import kept

N = 30


class Watch(Method):
    """Notes queries, keys, values and hidden states of each layer."""

    def __init__(self) -> None:
        self.sites: list[Site] = []

    def read(self, site: Site, out: Tensor) -> None:
        self.sites.append(site)


def scores(llama: PreTrainedModel, ids: Tensor, repeat: Tensor, part: range, sink: int, plus: bool) -> list[Tensor]:
    """The scores of a part of a text in each layer, from one reading of the text and its repetition."""
    watch, n, found = Watch(), ids.shape[1], []
    with torch.no_grad(), apply(llama, watch):
        llama(torch.cat([ids, repeat], 1))
    for site in watch.sites:
        columns = [*range(min(sink, part.start)), *part, *range(n, n + repeat.shape[1])]
        k = site.k.repeat_interleave(site.groups, 1)
        logits = site.q[:, :, n:] @ k[:, :, columns].mT * site.scale
        later = torch.tensor(columns)[None] > torch.arange(n, n + repeat.shape[1])[:, None]
        weights = logits.masked_fill(later, -torch.inf).softmax(-1)
        if plus:
            v, o = site.v.repeat_interleave(site.groups, 1), site.module.o_proj.weight
            outputs = torch.einsum("bhsd,ohd->bhso", v, o.unflatten(1, (v.shape[1], -1))).norm(dim=-1)
            weights = weights * outputs[:, :, None, columns] / site.hidden[:, n:].norm(dim=-1)[:, None, :, None]
        first = min(sink, part.start)
        found.append(weights.amax(2).unflatten(1, (-1, site.groups)).amax(2)[0, :, first : first + len(part)])
    return found


def best(found: list[Tensor], share: float, sink: int) -> list[list[list[int]]]:
    """The positions of the best scores over all heads of all layers, sinks first."""
    whole = torch.stack(found)
    whole[..., :sink] = torch.inf
    size = round(share * whole.shape[2]) * whole.shape[0] * whole.shape[1]
    chosen = torch.zeros(whole.numel(), dtype=torch.bool)
    chosen[whole.flatten().sort(descending=True, stable=True).indices[:size]] = True
    return [[head.nonzero()[:, 0].tolist() for head in layer] for layer in chosen.view_as(whole)]


@pytest.mark.parametrize("way", ["kernel", "a few rows at a time"])
@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("chunk", [N, 12])
def test_scores_are_those_of_a_second_reading(
    plus: bool, chunk: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way != "kernel":
        monkeypatch.setattr(reconstruction, "can_use_kernel", lambda site: False)
    llama, ids, found = model("llama"), tokens(1, N), []
    for start in range(0, N, chunk):
        part = range(start, min(start + chunk, N))
        found.append(scores(llama, ids, ids[:, part.start : part.stop], part, 2, plus))
    whole = [torch.cat(parts, -1) for parts in zip(*found, strict=True)]
    made = KVzip(share=0.4, sink=2, chunk=chunk, overlap=0, plus=plus, instruct=False)
    assert kept(llama, ids, made) == best(whole, 0.4, 2)


class Words:
    """A tokenizer whose instruction is one token for each letter."""

    chat_template = None

    def __call__(self, text: str, **options: Any) -> Any:
        return type("Ids", (), {"input_ids": [2 + ord(letter) % (VOCAB - 2) for letter in text]})


def test_the_instruction_stands_before_each_part() -> None:
    """The first part follows one sentence; a later part follows another, and the last tokens before it."""
    llama, ids, words, found = model("llama"), tokens(1, N), Words(), []
    first = torch.tensor([words("\n\nRepeat the previous context exactly.\n").input_ids])
    later = torch.tensor([words("\n\nRepeat the part of the previous context exactly, starting with").input_ids])
    line = torch.tensor([words("\n").input_ids])
    for start, head in ((0, first), (16, torch.cat([later, ids[:, 13:16], line], 1))):
        part = range(start, min(start + 16, N))
        found.append(scores(llama, ids, torch.cat([head, ids[:, part.start : part.stop]], 1), part, 4, False))
    whole = [torch.cat(parts, -1) for parts in zip(*found, strict=True)]
    assert kept(llama, ids, KVzip(share=0.4, chunk=16, overlap=3, tokenizer=words)) == best(whole, 0.4, 4)


@torch.no_grad()
def test_the_cache_holds_what_the_first_reading_stored() -> None:
    llama, ids, full, cache = model("llama"), tokens(1, N), DynamicCache(), DynamicCache()
    llama(ids, past_key_values=full)
    with apply(llama, KVzip(share=0.5, heads="equal", instruct=False)) as run:
        llama(ids, past_key_values=cache)
        assert run.stats.kept == 0.5 and run.stats.cache_bytes * 2 == sum(x.keys.nbytes * 2 for x in full.layers)
        for layer, whole in zip(cache.layers, full.layers, strict=True):
            slots = layer.store.groups[0].slots
            index = slots.positions.long()[..., None].expand_as(slots.k)
            assert torch.equal(slots.k, whole.keys.gather(2, index))
            assert torch.equal(slots.v, whole.values.gather(2, index))
        assert cache.get_seq_length() == N


def test_a_global_budget_moves_tokens_between_layers() -> None:
    llama, ids = model("llama"), tokens(1, N)
    sizes = [sum(map(len, layer)) for layer in kept(llama, ids, KVzip(share=0.4, instruct=False))]
    even = [sum(map(len, layer)) for layer in kept(llama, ids, KVzip(share=0.4, instruct=False, heads="adaptive"))]
    assert sum(sizes) == sum(even) and len(set(even)) == 1 and len(set(sizes)) > 1


@pytest.mark.parametrize("heads", ["adaptive", "global"])
def test_budgets_by_layer_share_one_second_reading(heads: Heads, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each policy keeps what it keeps alone, and in no layer but its own."""
    llama, ids, read = model("llama"), tokens(1, N), Reconstruction._read
    settings = {(0, 2): 0.3, (1,): 0.6}
    policies = [KVzip(share=share, layers=at, instruct=False, heads=heads) for at, share in settings.items()]
    alone = [kept(llama, ids, policy) for policy in policies]
    readings = []
    monkeypatch.setattr(Reconstruction, "_read", lambda *args: readings.append(args) or read(*args))
    together = kept(llama, ids, *policies)
    assert together == [alone[0][0], alone[1][1], alone[0][2]] and len(readings) == 1
    kept(llama, ids, policies[0], KVzip(share=0.6, layers=(1,), instruct=False, chunk=16))
    assert len(readings) == 3  # another chunk is another reading


def test_embeddings_and_models_without_a_tokenizer_are_refused() -> None:
    llama, ids = model("llama"), tokens(1, N)
    with pytest.raises(OptionError, match="give tokenizer=..., or instruct=False"), apply(llama, KVzip()):
        pass
    embedded = llama.get_input_embeddings()(ids).detach()
    with apply(llama, KVzip(instruct=False)), pytest.raises(UnsupportedModel, match="was given embeddings"):
        llama(inputs_embeds=embedded, past_key_values=DynamicCache())
    with pytest.raises(OptionError, match="every=2 must be None"):
        KVzip(every=2)


def test_one_compressed_text_serves_questions_that_its_end_does_not_ask(claim: ClaimFixture) -> None:
    """Six pairs between fillers are asked for after the text was compressed to a third."""
    lm, draw, right = induction_lm(), torch.Generator().manual_seed(0), {}
    policies: list[ScorePolicy] = [KVzip(share=0.33, sink=1, instruct=False), SnapKV(share=0.33, sink=1, recent=4)]
    for policy in policies:
        found = 0
        for _ in range(8):
            keys = KEYS.start + torch.randperm(len(KEYS), generator=draw)[:6]
            values = VALUES.start + torch.randperm(len(VALUES), generator=draw)[:6]
            filler = torch.randint(FILLER.start, FILLER.start + 2, (7, 8), generator=draw)
            text = [torch.tensor([0]), filler[0]]
            for pair in range(6):
                text += [keys[pair : pair + 1], values[pair : pair + 1], filler[pair + 1]]
            with torch.no_grad(), apply(lm, policy):
                cache = DynamicCache()
                lm(torch.cat(text)[None], past_key_values=cache)
                for pair in range(6):
                    out = lm(keys[None, pair : pair + 1], past_key_values=cache).logits[0, -1]
                    found += int(out.argmax() == values[pair])
        right[type(policy).__name__] = found / 48
    claim(
        "of pairs that a text contains, its repetition keeps those that the queries at its end do not look at",
        ours=right["KVzip"], baseline=right["SnapKV"], better="higher", margin=0.5,
        baseline_name="SnapKV, the text's last queries", seed=0,
    )  # fmt: skip
