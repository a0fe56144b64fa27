"""The report on a ViT's attention: maps set by hand, its limits, and what reconstruction does to trained ViTs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ViTConfig, ViTModel

from foveate.core.errors import FoveateError
from foveate.lens import VitAttentionReport, attention_maps, linear_cka
from tests.conftest import ClaimFixture
from tests.lens.models import eager_maps, image, tiny
from tests.support.tensors import assert_near

SIDE = 8
PLACES = [(y, x) for y in range(SIDE) for x in range(SIDE)]
STEPS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}


def maps(*of_patches: Tensor, cls: float = 0.0) -> Tensor:
    """Return one image's weights `(1, 1, heads, 65, 65)`; patches put `cls` on CLS, which attends to itself."""
    found = torch.zeros(1, 1, len(of_patches), 65, 65)
    found[..., 0, 0] = 1.0
    for head, weights in enumerate(of_patches):
        left = weights.sum(1) * (1 - cls)
        found[0, 0, head, 1:, 1:] = weights * (1 - cls)
        found[0, 0, head, 1:, 0] = 1 - left
    return found


def shift(down: int, right: int) -> Tensor:
    """Return weights on the patch one step aside; queries at the border, which have none, attend to nothing."""
    weights = torch.zeros(64, 64)
    for query, (y, x) in enumerate(PLACES):
        if (y + down, x + right) in PLACES:
            weights[query, PLACES.index((y + down, x + right))] = 1.0
    return weights


UNIFORM = torch.full((64, 64), 1 / 64)
HEADS = {"self": torch.eye(64), **{name: shift(*step) for name, step in STEPS.items()}, "uniform": UNIFORM,
         "cls": torch.zeros(64, 64), "far": shift(0, 3)}  # fmt: skip


def test_heads_set_by_hand_are_named_rightly() -> None:
    peaks = VitAttentionReport(maps(*HEADS.values())).peaks()
    found = dict(zip(HEADS, peaks, strict=True))
    assert [name for name in HEADS if found[name].is_offset_local] == list(STEPS)
    assert [name for name in HEADS if found[name].is_local] == ["self", *STEPS]
    for name, step in STEPS.items():
        assert found[name].offset == step
        assert found[name].strength == pytest.approx(7 / 8)
    assert found["far"].offset == (0, 3) and found["far"].strength == pytest.approx(5 / 8)
    assert found["self"].offset == (0, 0) and found["self"].strength == 1.0
    near, next_to_it = shift(0, 1), shift(0, 2)
    mixed = maps(0.6 * near + 0.4 * next_to_it, 0.7 * near + 0.3 * next_to_it, 0.25 * near + 0.75 * UNIFORM)
    strong = [peak.is_offset_local for peak in VitAttentionReport(mixed).peaks()]
    assert strong == [False, True, False], "0.6 is no twice 0.4"
    assert VitAttentionReport(mixed).peaks(0.2)[2].is_offset_local


def test_distances_in_closed_form() -> None:
    place = torch.tensor(PLACES) / 7
    among = torch.cdist(place, place).mean()
    found = VitAttentionReport(maps(*HEADS.values(), cls=0.25)).attention_distance()[0, 0]
    by_name = dict(zip(HEADS, found.tolist(), strict=True))
    assert by_name["uniform"] == pytest.approx(among.item(), abs=1e-6)
    assert by_name["self"] == 0.0 and by_name["cls"] == 0.0
    for name in STEPS:
        assert by_name[name] == pytest.approx(7 / 8 / 7, abs=1e-6), "an eighth of the queries have no such neighbour"
    assert by_name["far"] == pytest.approx(5 / 8 * 3 / 7, abs=1e-6)


def test_aligned_maps_are_sums_over_offsets() -> None:
    torch.manual_seed(0)
    attn = torch.rand(2, 3, 2, 13, 13).softmax(-1)
    report = VitAttentionReport(attn, grid=(3, 4))
    inner = attn[..., 1:, 1:] / attn[..., 1:, 1:].sum(-1, keepdim=True)
    expected, pairs = torch.zeros(3, 2, 5, 7), torch.zeros(5, 7)
    for query in range(12):
        for key in range(12):
            y, x = key // 4 - query // 4 + 2, key % 4 - query % 4 + 3
            expected[:, :, y, x] += inner[..., query, key].mean(0)
            pairs[y, x] += 1
    assert_near(report.aligned(), expected / 12, 1e-6)
    assert_near(report.aligned().sum((2, 3)), torch.ones(3, 2), 1e-5)
    assert_near(report.aligned("overlap"), expected / pairs, 1e-6)
    whole = VitAttentionReport(maps(shift(0, 1))).aligned("overlap")[0, 0]
    assert whole[7, 8] == 1.0 and whole.sum() == 1.0


def test_deviation_and_mass_on_tokens() -> None:
    torch.manual_seed(1)
    attn = torch.rand(2, 1, 3, 17, 17).softmax(-1)
    report = VitAttentionReport(attn)
    assert_near(report.position_deviation(), attn[..., 1:, 1:].std(3, unbiased=True).mean(3), 1e-6)
    same = maps(UNIFORM, torch.eye(64)[[5]].expand(64, 64))
    assert_near(VitAttentionReport(same).position_deviation(), torch.zeros(1, 1, 2), 1e-7)
    assert_near(report.cls_attention(), attn[..., 1:, 0].mean(-1), 1e-6)
    assert VitAttentionReport(maps(UNIFORM, cls=0.25)).cls_attention().item() == pytest.approx(0.25)
    assert_near(report.attention_on_tokens(), attn.mean((0, 3)), 1e-6)
    assert_near(report.attention_on_tokens("cls"), attn[..., 0, :].mean(0), 1e-6)
    assert_near(report.attention_on_tokens("patches"), attn[..., 1:, :].mean((0, 3)), 1e-6)
    pure = report.attention_on_tokens("patches only")
    assert_near(pure[..., 0], torch.zeros(1, 3), 0.0)
    assert_near(pure[..., 1:], (attn[..., 1:, 1:] / attn[..., 1:, 1:].sum(-1, keepdim=True)).mean((0, 3)), 1e-6)


def test_agreement_is_the_overlap_of_the_strongest_patches() -> None:
    attn, mask = torch.zeros(1, 1, 1, 65, 65), torch.zeros(1, 8, 8, dtype=torch.bool)
    attn[..., 0, 0] = 0.5  # not a patch
    for place, weight in ((3, 0.2), (4, 0.15), (5, 0.1), (6, 0.05)):
        attn[..., 0, 1 + place] = weight
    attn[..., 1:, 1 + 60] = 1.0
    mask[0, 0, 3:5] = mask[0, 1, 0] = True
    report = VitAttentionReport(attn)
    assert report.agreement(mask).item() == pytest.approx(2 / 3), "0.4 and 0.3 of the patches' mass reach 0.6"
    assert report.agreement(mask, keep=0.75).item() == pytest.approx(2 / 4)
    assert report.agreement(mask, queries="patches").item() == 0.0
    mask[0, 7, 4] = True
    assert report.agreement(mask, queries="patches").item() == pytest.approx(1 / 4)


def test_maps_of_a_model_are_those_of_its_eager_attention() -> None:
    model = tiny("vit")
    found = attention_maps(model, image())
    assert_near(found, torch.stack(eager_maps(model, image()), 1), 1e-5)
    assert VitAttentionReport(found).grid == (4, 4)


def test_cka() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y, other = (torch.randn(500, 32, generator=draw) for _ in range(3))
    x = x * torch.linspace(0.1, 3, 32) + 2.0
    turn = torch.linalg.qr(torch.randn(32, 32, generator=draw))[0]
    assert linear_cka(x, x) == pytest.approx(1.0, abs=1e-9)
    assert linear_cka(x, 3 * x @ turn - 5.0) == pytest.approx(1.0, abs=1e-5)
    assert linear_cka(x, y) < 0.5
    mixed = torch.cat([y, other], 1)
    centred = [each.double() - each.double().mean(0) for each in (y, mixed)]
    kernels = [each @ each.T for each in centred]
    expected = (kernels[0] * kernels[1]).sum() / (kernels[0].norm() * kernels[1].norm())
    assert linear_cka(y, mixed) == pytest.approx(expected.item(), abs=1e-9)


def offset_vit() -> ViTModel:
    """A ViT of one layer whose weights are set by hand: heads look right, up, at themselves, and everywhere.

    The residual stream is the position, one-hot. A query asks for its own number, and a key answers with the number of
    the patch that looks at it.
    """
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=1,
                       num_attention_heads=4, intermediate_size=8)  # fmt: skip
    model = ViTModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.fill_(1.0)
        model.embeddings.position_embeddings[0] = 10 * torch.eye(64)[:17].roll(-1, 0)
        attention = model.layers[0].attention
        for head, (down, right) in enumerate([(0, 1), (-1, 0), (0, 0)]):
            for y in range(4):
                for x in range(4):
                    row, goal = 16 * head + 4 * y + x, (y + down, x + right)
                    attention.q_proj.weight[row, 4 * y + x] = 1.0
                    if max(goal) < 4 and min(goal) >= 0:
                        attention.k_proj.weight[row, 4 * goal[0] + goal[1]] = 1.0
    return model


def test_heads_of_a_vit_set_by_hand_are_named_rightly() -> None:
    model, pictures = offset_vit(), torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    right, up, own, everywhere = VitAttentionReport(attention_maps(model, pictures)).peaks()
    assert right.is_offset_local and right.offset == (0, 1)
    assert up.is_offset_local and up.offset == (-1, 0)
    assert own.is_local and not own.is_offset_local
    assert not everywhere.is_local


def test_aligned_maps_show_offsets_that_mean_maps_do_not(claim: ClaimFixture) -> None:
    draw, hits = torch.Generator().manual_seed(0), {"aligned": 0, "mean": 0}
    steps = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if (down, right) != (0, 0)]
    for _ in range(5):
        noise = -torch.rand(len(steps), 64, 64, generator=draw).log()
        noise = noise / noise.sum(-1, keepdim=True)
        report = VitAttentionReport(maps(*(0.5 * shift(*step) + 0.5 * noise[i] for i, step in enumerate(steps))))
        whole = report.attention_on_tokens("patches only")[0, :, 1:].argmax(-1)
        for step, peak, place in zip(steps, report.peaks(), whole.tolist(), strict=True):
            hits["aligned"] += peak.is_offset_local and peak.offset == step
            hits["mean"] += (place // 8 - 4, place % 8 - 4) == step
    claim(
        "share of planted offset local heads whose offset is read from the map around the query",
        ours=hits["aligned"] / 40, baseline=hits["mean"] / 40, better="higher", margin=0.7,
        baseline_name="the mean map, not aligned with the query", seed=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VitAttentionReport(torch.rand(2, 3, 17, 17)), "attn must be"),
        (lambda: VitAttentionReport(torch.rand(1, 1, 1, 13, 13)), "grid=None must be"),
        (lambda: VitAttentionReport(torch.rand(1, 1, 1, 17, 17), grid=(2, 4)), "grid=(2, 4) must be"),
        (lambda: VitAttentionReport(torch.rand(1, 1, 1, 17, 17), prefix=-1), "prefix="),
        (lambda: VitAttentionReport(torch.rand(1, 1, 1, 16, 16), prefix=0).cls_attention(), "prefix=0"),
        (lambda: VitAttentionReport(torch.rand(1, 1, 1, 17, 17)).aligned("sum"), "normalize="),
        (lambda: VitAttentionReport(torch.rand(1, 1, 1, 17, 17)).peaks(2.0), "tau="),
        (lambda: VitAttentionReport(torch.rand(1, 1, 1, 17, 17)).attention_on_tokens("registers"), "queries="),
        (lambda: VitAttentionReport(torch.rand(1, 1, 1, 17, 17)).agreement(torch.ones(1, 4, 4)), "masks must be"),
        (lambda: linear_cka(torch.rand(3, 2), torch.rand(4, 2)), "x and y must be"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(FoveateError) as caught:
        make()
    assert message in str(caught.value) and "\n" not in str(caught.value)
