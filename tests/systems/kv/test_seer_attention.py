"""SeerAttention does what its paper claims: gates learn where attention goes, and prompts are read by blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from foveate.core.errors import OptionError, ShapeError
from foveate.host import Method, Site, apply
from foveate.host.hf.model import host
from foveate.kv import SeerAttention, seer_gates
from foveate.kv.parts import block_gates
from foveate.kv.parts.block_gates import gates, own_blocks, pooled_attention
from foveate.kv.renumbered import rotations
from foveate.kv.seer_attention import _best, blocks_of
from foveate.tasks.parts.corpus import text
from tests.conftest import ClaimFixture
from tests.support import host_models
from tests.support.lab import lab

BLOCK, LENGTH = 16, 256


def made(name: str = "llama", variant: Any = "paper", block: int = 4) -> dict[str, Tensor]:
    """Gates of a small random model, barely trained."""
    data = [host_models.tokens(1, 32, seed) for seed in range(3)]
    return seer_gates(host_models.model(name), data, steps=3, block=block, rate=0.05, variant=variant)


class Watch(Method):
    """Calls a function on the first call of each layer."""

    def __init__(self, what: Any) -> None:
        self.what = what

    def read(self, site: Site, out: Tensor) -> None:
        self.what(site)


def weights(site: Site) -> Tensor:
    """The whole attention matrix of a small plain call."""
    k = site.k.repeat_interleave(site.groups, 1)
    n = site.q.shape[2]
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    return (site.q @ k.mT * site.scale).masked_fill(hidden, float("-inf")).softmax(-1)


# -- targets and gates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [1 << 20, 200])
def test_targets_are_a_max_pool_of_the_whole_map(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a last short block, and some rows at a time."""
    monkeypatch.setattr(block_gates, "TILE", tile)
    seen = []

    def compare(site: Site) -> None:
        found = pooled_attention(site, 4)
        whole = weights(site)
        for i in range(8):
            row = torch.stack([whole[:, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].amax((2, 3)) for j in range(8)], -1)
            torch.testing.assert_close(found[:, :, i], row / row.sum(-1, keepdim=True))
        torch.testing.assert_close(found.sum(-1), torch.ones(2, 4, 8))
        seen.append(site.layer)

    with torch.no_grad(), apply(host_models.model("llama"), Watch(compare)):
        host_models.model("llama")(host_models.tokens(2, 30), use_cache=False)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_a_gate_by_hand(variant: Any) -> None:
    """Unrotated queries and keys of each block, pooled, mapped, rotated as its first token: by loops."""
    model, maps = host_models.model("llama"), made(variant=variant)
    own, turning = gates(maps, host(model), 4), rotations(host(model))
    assert ("q_map" in maps) == (variant == "paper") and maps["k_map"].shape[1] == (2 if variant == "paper" else 4)

    def compare(site: Site) -> None:
        found, rotation = own[site.layer].logits(site), turning[site.layer]
        assert rotation is not None

        def turned(x: Tensor, by: int) -> Tensor:
            return rotation(x[None, None, None], torch.full((1, 1, 1), by))[0, 0, 0]

        for head in range(4):
            for i, j in ((0, 0), (3, 1), (7, 7), (6, 0)):
                q = torch.stack([turned(site.q[0, head, t], -t) for t in range(4 * i, min(4 * i + 4, 30))]).mean(0)
                k = torch.stack([turned(site.k[0, head // 2, t], -t) for t in range(4 * j, min(4 * j + 4, 30))])
                parts = torch.cat([k.amax(0), k.amin(0), k.mean(0)])
                q = q @ maps["q_map"][site.layer, head] if variant == "paper" else q
                key = parts @ maps["k_map"][site.layer, head // 2 if variant == "paper" else head]
                expected = float(turned(q, 4 * i) @ turned(key, 4 * j)) / 8**0.5
                assert found[0, head, i, j].item() == pytest.approx(expected, abs=1e-4)
        assert torch.equal(found[0, 0].isfinite(), torch.ones(8, 8, dtype=torch.bool).tril())

    with torch.no_grad(), apply(model, Watch(compare)):
        model(host_models.tokens(1, 30), use_cache=False)


def test_training_leaves_the_model_as_it_is() -> None:
    model = host_models.model("qwen2")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.inference_mode():
        losses: list[float] = []
        seer_gates(model, [host_models.tokens(1, 32)] * 40, steps=40, block=4, rate=0.02, losses=losses)
    assert losses[-1] < 0.7 * losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None and parameter.requires_grad


# -- the policy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"density": 1.0}, {"threshold": 0.0}])
def test_everything_seen_is_the_model(options: dict[str, float]) -> None:
    model, ids = host_models.model("llama"), host_models.tokens(2, 30)
    with torch.no_grad(), apply(model, SeerAttention(**made(), block=4, **options)):
        sparse = model(ids).logits
    with torch.no_grad():
        assert torch.equal(sparse, model(ids).logits)


@pytest.mark.parametrize("options", [{"density": 0.3}, {"threshold": 0.1}, {"density": 0.3, "last_dense": 0}])
def test_prompts_are_attended_by_the_chosen_blocks_alone(options: dict[str, Any]) -> None:
    """As by a mask of the blocks; the diagonal and the last rows always count, and decoding sees everything."""
    model, ids, maps = host_models.model("llama"), host_models.tokens(2, 30), made()
    own = gates(maps, host(model), 4)

    class Masks(Method):
        def edit_logits(self, site: Site, logits: Tensor) -> Tensor:
            if site.q.shape[2] == 1:
                return logits
            found = own[site.layer].logits(site)
            if "density" in options:
                blocks = _best(found, blocks_of(0.3, 8))
            else:
                blocks = found.softmax(-1) > options["threshold"]
            blocks = blocks | torch.eye(8, dtype=torch.bool)
            if options.get("last_dense", 2):
                blocks[:, :, -2:] = True
            seen = blocks.repeat_interleave(4, 2).repeat_interleave(4, 3)[..., :30, :30]
            return logits.masked_fill(~seen, float("-inf"))

    def read(method: Method) -> list[Tensor]:
        cache = DynamicCache(config=model.config)
        with torch.no_grad(), apply(model, method):
            return [model(part, past_key_values=cache).logits for part in (ids, ids[:, :1])]

    for a, b in zip(read(SeerAttention(**maps, block=4, **options)), read(Masks()), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert (read(Masks())[0] - model(ids).logits).abs().max() > 1e-2


def test_a_density_is_the_share_of_causal_tiles() -> None:
    for density in (0.1, 0.25, 0.5, 0.9):
        count = blocks_of(density, 200)
        share = sum(min(count, row + 1) for row in range(200)) / (200 * 201 / 2)
        assert share == pytest.approx(density, abs=0.01)
    assert own_blocks(6, 10, 4, torch.device("cpu")).tolist() == [[False, True, False], [False, False, True]]


def test_bad_options_are_refused() -> None:
    maps = made()
    for options, match in (
        ({}, "^threshold=None or density=None: one of them"), ({"density": 0.1, "threshold": 0.1}, "one of them must"),
        ({"density": 2.0}, "^density=2.0"), ({"threshold": -1.0}, "^threshold=-1.0"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=match):
            SeerAttention(**maps, **options)
    other = SeerAttention(torch.zeros(2, 2, 24, 8), torch.zeros(2, 4, 8, 8), density=0.1)
    with pytest.raises(ShapeError, match="^k_map must be"), apply(host_models.model("llama"), other):
        pass
    with pytest.raises(OptionError, match="^data must hold"):
        seer_gates(host_models.model("llama"), [])
    with pytest.raises(OptionError, match="^seer_attention needs gates"):
        SeerAttention.at_budget(0.5, host(host_models.model("llama")), 100)


# -- the claim ---------------------------------------------------------------------------------------------------------


def pages(split: str, count: int, batch: int) -> Tensor:
    _, tokenizer = lab()
    ids = tokenizer(text(split)[: 2 * count * batch * LENGTH], return_tensors="pt", verbose=False).input_ids
    return ids[:, : count * batch * LENGTH].view(count, batch, LENGTH)


def test_gates_recover_more_attention_than_pooled_products_and_windows(claim: ClaimFixture) -> None:
    """The mass that a quarter of the tiles holds, in the lab's last layer; the baselines have as many tiles."""
    model, _ = lab()
    here, losses, rows = host(model), list[float](), LENGTH // BLOCK
    trained = seer_gates(model, pages("train", 120, 4), steps=120, block=BLOCK, rate=4e-3, losses=losses)
    untrained = seer_gates(model, pages("train", 1, 1), steps=1, block=BLOCK, rate=1e-9)
    assert sum(losses[-10:]) / 10 < 0.7 * losses[0]
    causal, diagonal = torch.ones(rows, rows, dtype=torch.bool).tril(), torch.eye(rows, dtype=torch.bool)
    found: dict[str, float] = {}

    def compare(site: Site) -> None:
        if site.layer < 3:
            return
        mass = weights(site).unflatten(3, (rows, BLOCK)).sum(4).unflatten(2, (rows, BLOCK)).mean(3)
        ends = torch.arange(rows) + 100.0 * (torch.arange(rows) == 0)
        k = site.k.repeat_interleave(site.groups, 1)
        pooled = [x.unflatten(2, (rows, BLOCK)).mean(3) for x in (site.q, k)]
        scores = {
            "trained": gates(trained, here, BLOCK)[3].logits(site),
            "untrained": gates(untrained, here, BLOCK)[3].logits(site),
            "products": pooled[0] @ pooled[1].mT, "window": ends.expand_as(mass).clone(),
        }  # fmt: skip
        for name, score in scores.items():
            best = _best(score.masked_fill(~causal, float("-inf")), blocks_of(0.25, rows))
            found[name] = float((mass * ((best | diagonal) & causal))[:, :, rows // 4 :].sum(-1).mean())

    with torch.no_grad(), apply(model, Watch(compare)):
        model(pages("heldout", 1, 4)[0], use_cache=False)
    assert found["trained"] > found["window"] + 0.1
    claim(
        "the attention that a quarter of the tiles holds, chosen by trained gates, in the lab's last layer",
        ours=found["trained"], baseline=max(found["untrained"], found["products"], found["window"]), better="higher",
        margin=0.01, baseline_name="the best of gates before training, products of pooled queries and keys, sinks and "
        "a window", seed=0,
    )  # fmt: skip
