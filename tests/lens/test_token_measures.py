"""Measures by tokens: they match a count by hand, over calls, with padding, and where tokens are generated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.core.errors import FoveateError
from foveate.host import apply
from foveate.host.fused_statistics import Statistics
from foveate.kv.sink_recent import SinkRecent
from foveate.lens import CopyMass, DuplicateMass, InductionMass, Lens
from foveate.lens.lens import look
from foveate.lens.measures import KeyTokens
from foveate.lens.parts import matching
from foveate.lens.parts.matching import mass_on_equal
from tests.lens.models import eager_maps, image, text, tiny
from tests.support.constructed import VOCAB, induction_lm, recall
from tests.support.tensors import assert_near, qkv

ALL = [DuplicateMass(), InductionMass(), CopyMass()]
NAMES = [measure.name for measure in ALL]


def pairs(ids: Tensor, real: Tensor) -> dict[str, Tensor]:
    """Return which key counts for which query, by loops over one text."""
    n = len(ids)
    found = {name: torch.zeros(n, n, dtype=torch.bool) for name in NAMES}
    for i in range(n):
        for j in range(n):
            if real[i] and real[j]:
                found["duplicate_token"][i, j] = ids[i] == ids[j] and i != j
                found["induction"][i, j] = j > 0 and real[j - 1] and ids[j - 1] == ids[i] and j - 1 != i
                found["copying"][i, j] = i + 1 < n and real[i + 1] and ids[i + 1] == ids[j] and j != i + 1
    return found


def repeated(padding: str = "none", n: int = 40) -> dict[str, Tensor]:
    """Two texts of few different tokens, one of them padded."""
    inputs = text(padding, n)
    return {**inputs, "input_ids": inputs["input_ids"] % 7 + 3}


@pytest.mark.parametrize(
    ("kind", "padding"), [("llama", "none"), ("llama", "left"), ("llama", "right"), ("bert", "right")]
)
def test_masses_and_means_are_those_of_pairs(kind: str, padding: str) -> None:
    model, inputs = tiny(kind), repeated(padding)
    maps, real = eager_maps(model, inputs), inputs["attention_mask"].bool()
    seen = look(model, inputs, measures=ALL)
    for row in range(2):
        for name, pair in pairs(inputs["input_ids"][row], real[row]).items():
            possible = pair.tril() if kind == "llama" else pair
            asks = possible.any(-1)
            assert asks.any() and (kind != "llama" or not asks[real[row]].all())
            for layer, w in enumerate(maps):
                expected = (w[row] * pair).sum(-1)
                assert_near(seen.values(name)[layer][row], expected, 1e-4, f"{name}, layer {layer}")
                assert_near(seen.lens.reduced(name)[layer][row], expected[:, asks].mean(-1), 1e-4, name)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_the_last_row_of_a_call_waits_for_its_next_token(kind: str) -> None:
    """Generation, a token at a time, gives what one pass over the whole text gives, for every token but the last."""
    model, inputs, lens = tiny(kind), repeated("left"), Lens(ALL, phase="all")
    with torch.no_grad(), apply(model, lens):
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None)
    whole = {"input_ids": ids[:, :-1]}
    whole["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones(2, 11, dtype=torch.long)], 1)
    seen = look(model, whole, measures=ALL)
    for name in NAMES:
        for layer, values in seen.values(name).items():
            assert_near(lens.values(name)[layer], values, 1e-4, f"{name}, layer {layer}")
            assert_near(lens.reduced(name)[layer], seen.lens.reduced(name)[layer], 1e-4, name)
    assert lens.values("copying")[0][:, :, 39:-1].abs().max() > 0, "no generated token was copied"


def test_decoding_alone_knows_the_prompt() -> None:
    model, inputs, lens = tiny("llama"), repeated(), Lens(ALL, phase="decode")
    with torch.no_grad(), apply(model, lens):
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    seen = look(model, ids[:, :-1], measures=ALL)
    for name in NAMES:
        assert lens.values(name)[1].shape == (2, 4, 5)
        assert_near(lens.values(name)[1], seen.values(name)[1][:, :, 40:], 1e-4, name)


def test_evicted_layers_count_what_they_hold() -> None:
    model, inputs = tiny("llama"), repeated()
    lens = Lens(["duplicate_token", "received_mass"], phase="decode", keep_maps={(0, 1): [-1]})
    with torch.no_grad(), apply(model, SinkRecent(sink=2, recent=9), lens):
        ids = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    same = ids[:, :41] == ids[:, 40:41]
    same[:, 40] = False
    expected = (lens.map(0, 1)[:, 0] * same).sum(-1)
    assert_near(lens.values("duplicate_token")[0][:, 1, 0], expected, 1e-5)


def test_beams_take_their_tokens_along() -> None:
    """After a reordering of beams the tokens of each row are those of its own beam."""
    model, lens = tiny("llama"), Lens(["duplicate_token"], phase="all", keep_maps={(0, 2): slice(None)})
    inputs = {name: x[:1] for name, x in repeated().items()}
    seen: list[tuple[Tensor, Tensor]] = []
    inner = Lens.read

    def watched(self: Lens, site, out: Tensor) -> None:
        inner(self, site, out)
        if site.layer == 0:
            seen.append((site.notes(self)["ids"].clone(), site.ids))

    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), apply(model, lens):
        patch.setattr(Lens, "read", watched)
        ids = model.generate(**inputs, max_new_tokens=8, num_beams=3, do_sample=False, eos_token_id=None)
    last, _ = seen[-1]
    assert any(torch.equal(row, ids[0, : len(row)]) for row in last)


def test_a_matching_head_looks_at_what_followed() -> None:
    """In the model that copies by hand, the matching head has the induction mass where it predicts the answer."""
    model, (ids, _) = induction_lm(layers=2, heads=4, kv_heads=2, matching=[(1, 2)]), recall(2, length=80, answer=3)
    table = {(row["layer"], row["head"]): row["value"] for row in look(model, ids, measures=["induction"]).measures()}
    best = max(table, key=table.__getitem__)
    assert best == (1, 2) and table[best] > 0.5
    assert max(value for head, value in table.items() if head != best) < 0.3
    assert int(ids.max()) < VOCAB


@pytest.mark.parametrize("size", [1 << 16, 64])
def test_blocks_of_equal_labels_are_complete(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels of any number of members, of queries alone and of keys alone, in blocks and in parts of blocks."""
    monkeypatch.setattr(matching, "TILE", size)
    q, k, _ = qkv(50, 70, dtype=torch.float32)
    draw = torch.Generator().manual_seed(0)
    asked = torch.cat(
        [torch.zeros(2, 23), torch.randint(1, 9, (2, 25), generator=draw), torch.tensor([[77, -3]] * 2)], 1
    )
    told = torch.cat([torch.randint(0, 9, (2, 66), generator=draw), torch.tensor([[88, -3, -4, 0]] * 2)], 1)
    call = Statistics(q, k, 0.7, True)
    w = (
        (0.7 * q @ k.repeat_interleave(2, 1).mT)
        .masked_fill(torch.ones(50, 70, dtype=torch.bool).triu(21), float("-inf"))
        .softmax(-1)
    )
    excluded = torch.arange(50) + 20
    same = (asked[:, :, None] == told[:, None]) & (asked >= 0)[:, :, None] & (torch.arange(70) != excluded[:, None])
    assert_near(mass_on_equal(call, asked.long(), told.long(), excluded), (w * same[:, None]).sum(-1), 1e-5)


def test_unknown_tokens_match_nothing() -> None:
    w = torch.full((1, 1, 3, 3), 1 / 3)
    tokens = KeyTokens(torch.arange(3).expand(1, 1, 3), None, torch.arange(3), torch.tensor([[-1, 5, -1]]))
    for measure in ALL:
        assert not measure.from_weights(w, tokens).any() and not measure.applies(tokens, False).any()


def test_models_without_ids_are_refused() -> None:
    with pytest.raises(FoveateError, match="induction: tokens are compared, whose ids are unknown here") as caught:
        look(tiny("vit"), image(), measures=["induction"])
    assert "\n" not in str(caught.value)
    model = tiny("llama")
    with pytest.raises(FoveateError, match="ids are unknown"):
        look(model, {"inputs_embeds": model.get_input_embeddings()(text()["input_ids"])}, measures=["copying"])
