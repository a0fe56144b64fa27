"""Skim-Attention: weights from boxes alone, computed once, for all layers and for another model's mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import masks
from foveate.core.errors import OptionError, ShapeError
from foveate.nn import MultiHeadAttention
from foveate.nn.sequence.skim_attention import LayoutEmbedding, SkimAttention, Skimformer, SkimLayer, skimming_mask
from tests.support.tensors import assert_near


def boxes(batch: int = 2, n: int = 7, seed: int = 0) -> Tensor:
    corners = torch.randint(0, 500, (batch, n, 2), generator=torch.Generator().manual_seed(seed))
    sides = torch.randint(0, 500, (batch, n, 2), generator=torch.Generator().manual_seed(seed + 1))
    return torch.cat([corners, corners + sides], -1)


def shaken(module: nn.Module) -> nn.Module:
    """Randomise every parameter, in float64."""
    module = module.double()
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
            parameter.add_(0.3 * noise)
    return module


def norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt() * module.weight + module.bias


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return x @ layer.weight.mT + layer.bias


def skim(**options) -> SkimAttention:
    torch.manual_seed(0)
    return shaken(SkimAttention(**{"layout_dim": 10, "heads": 3, "head_dim": 4, **options}))


# -- weights -----------------------------------------------------------------------------------------------------------


def test_a_layout_by_hand() -> None:
    layout, bbox = shaken(LayoutEmbedding(10)), boxes()
    rows = [
        layout.x.weight[a] + layout.y.weight[b] + layout.x.weight[c] + layout.y.weight[d]
        + layout.h.weight[d - b] + layout.w.weight[c - a]
        for a, b, c, d in bbox.flatten(0, 1).tolist()
    ]  # fmt: skip
    assert_near(layout(bbox), norm(layout.norm, torch.stack(rows).unflatten(0, (2, 7))), 1e-12)
    middles = shaken(LayoutEmbedding(10, "centre"))
    rows = [
        middles.x.weight[(a + c) // 2] + middles.y.weight[(b + d) // 2] for a, b, c, d in bbox.flatten(0, 1).tolist()
    ]
    assert_near(middles(bbox), norm(middles.norm, torch.stack(rows).unflatten(0, (2, 7))), 1e-12)
    assert not any(name.startswith(("h.", "w.")) for name, _ in middles.named_parameters())
    assert layout.x.num_embeddings == layout.h.num_embeddings == 1024


def test_weights_by_hand() -> None:
    attention, bbox = skim(), boxes()
    layout, found = attention.layout(bbox), attention(bbox)
    assert found.shape == (2, 3, 7, 7)
    for h in range(3):
        own = slice(4 * h, 4 * h + 4)
        scores = linear(attention.q, layout)[..., own] @ linear(attention.k, layout)[..., own].mT / 2
        assert_near(found[:, h], scores.exp() / scores.exp().sum(-1, keepdim=True), 1e-12)


def test_padding_is_not_seen() -> None:
    attention, bbox = skim(), boxes()
    there = masks.padding(torch.tensor([7, 4]), 7)
    found = attention(bbox, there)
    assert_near(found[1:, :, :4, :4], attention(bbox[1:, :4]), 1e-12)
    assert not found[1, :, :, 4:].any()
    assert not attention(bbox, torch.zeros(2, 1, 1, 7, dtype=torch.bool)).any(), "nothing to see"


def test_equal_boxes_share_alike() -> None:
    bbox = torch.tensor([10, 20, 60, 40]).expand(2, 7, 4)
    found = skim()(bbox, masks.padding(torch.tensor([7, 4]), 7))
    assert_near(found[0], torch.full((3, 7, 7), 1 / 7, dtype=torch.float64), 1e-12)
    assert_near(found[1, :, :, :4], torch.full((3, 7, 4), 1 / 4, dtype=torch.float64), 1e-12)


def test_tokens_may_come_in_any_order() -> None:
    attention, bbox = skim(), boxes()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(2))
    assert_near(attention(bbox[:, order]), attention(bbox)[:, :, order][:, :, :, order], 1e-12)


def test_defaults() -> None:
    with torch.device("meta"):
        attention, net = SkimAttention(), Skimformer(100)
    assert attention.q.weight.shape == (12 * 64, 768)
    assert attention.q.bias is not None
    assert len(net.layers) == 12
    assert net.layers[0].mlp[0].out_features == 3072
    assert net.skim.layout.x.embedding_dim == 768
    assert Skimformer(9, 12, 1, 3, layout_dim=5).skim.layout.x.embedding_dim == 5


# -- the network -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"head_dim": 5, "hidden": 7}])
def test_a_layer_by_hand(options: dict) -> None:
    layer = shaken(SkimLayer(12, 3, **options))
    x = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.rand(2, 3, 7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    width = options.get("head_dim", 4)
    v = linear(layer.v, x)
    mixed = torch.cat([weights[:, h] @ v[..., width * h : width * (h + 1)] for h in range(3)], -1)
    y = norm(layer.norm, x + linear(layer.out, mixed))
    inside = linear(layer.mlp[0], y)
    y = norm(layer.mlp_norm, y + linear(layer.mlp[2], inside * torch.special.ndtr(inside)))
    assert_near(layer(x, weights), y, 1e-12)


def network() -> Skimformer:
    torch.manual_seed(0)
    return shaken(Skimformer(20, 12, 3, 3, layout_dim=10))


def test_the_network_is_one_matrix_and_layers() -> None:
    net, bbox = network(), boxes()
    ids = torch.randint(20, (2, 7), generator=torch.Generator().manual_seed(0))
    types = torch.arange(7).expand(2, -1) % 2
    there = masks.padding(torch.tensor([7, 4]), 7)
    for given in (None, types):
        kinds = net.types.weight[0] if given is None else net.types.weight[types]
        x = norm(net.norm, net.words.weight[ids] + kinds)
        for layer in net.layers:
            x = layer(x, net.skim(bbox, there))  # once for each layer here, once for all there
        assert_near(net(ids, bbox, there, given), x, 1e-12)


def test_words_do_not_change_the_weights() -> None:
    net, bbox, seen = network(), boxes(), []
    net.layers[2].register_forward_hook(lambda _, given, __: seen.append(given[1]))
    for seed in range(2):
        net(torch.randint(20, (2, 7), generator=torch.Generator().manual_seed(seed)), bbox)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], net.skim(bbox))


def test_words_have_no_positions_of_their_own() -> None:
    net, bbox = network(), boxes()
    ids = torch.randint(20, (2, 7), generator=torch.Generator().manual_seed(0))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(2))
    assert_near(net(ids[:, order], bbox[:, order]), net(ids, bbox)[:, order], 1e-12)


def test_scores_are_computed_once(claim) -> None:
    def products(net: nn.Module, *inputs: Tensor) -> int:
        """Count the calls of projections to queries or keys."""
        calls: list[int] = []
        for name, part in net.named_modules():
            if isinstance(part, nn.Linear) and name.rpartition(".")[2] in ("q", "k"):
                part.register_forward_hook(lambda *_: calls.append(1))
        net(*inputs)
        return len(calls)

    usual = nn.Sequential(*(MultiHeadAttention(12, 3) for _ in range(3)))
    ids = torch.zeros(1, 7, dtype=torch.long)
    claim(
        "queries and keys are projected once for all layers: projections in a call of three layers",
        ours=products(network(), ids, boxes(1)), baseline=products(usual, torch.zeros(1, 7, 12)),
        better="lower", margin=4, baseline_name="three layers of softmax attention", seed=0,
    )  # fmt: skip


# -- as a mask ---------------------------------------------------------------------------------------------------------


def test_a_skimming_mask_by_hand() -> None:
    weights = skim()(boxes())
    for top_k in (1, 3, 7, 50):
        kept = skimming_mask(weights, top_k)
        assert kept.dtype == torch.bool
        for row, found in zip(weights.flatten(0, 2), kept.flatten(0, 2), strict=True):
            heaviest = sorted(range(7), key=lambda j, row=row: -row[j].item())[:top_k]
            assert found.nonzero().flatten().tolist() == sorted(heaviest)


def test_padding_is_never_skimmed() -> None:
    bbox, there = boxes(), masks.padding(torch.tensor([7, 4]), 7)
    weights = skim()(bbox, there)
    for top_k in (2, 5, 7):
        kept = skimming_mask(weights, top_k, there)
        assert kept.sum(-1)[0].unique().tolist() == [top_k]
        assert kept.sum(-1)[1].unique().tolist() == [min(top_k, 4)]
    unpadded = skim()(bbox)
    assert skimming_mask(unpadded, 4, there).sum(-1)[1].unique().numel() > 1, "rows may keep fewer"


def test_a_skimming_mask_restricts_another_model() -> None:
    weights = skim()(boxes())
    torch.manual_seed(0)
    host, x = MultiHeadAttention(12, 3).double(), torch.randn(2, 7, 12, dtype=torch.float64)
    assert_near(host(x, mask=skimming_mask(weights, 7)), host(x), 1e-12)
    assert (host(x, mask=skimming_mask(weights, 2)) - host(x)).abs().max() > 1e-3
    heaviest = weights.argmax(-1)
    v = host.v(x).unflatten(2, (3, 4)).transpose(1, 2)
    alone = v.gather(2, heaviest[..., None].expand(-1, -1, -1, 4)).transpose(1, 2).flatten(2)
    assert_near(host(x, mask=skimming_mask(weights, 1)), host.out(alone), 1e-12)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayoutEmbedding(0), "dim=0"),
        (lambda: LayoutEmbedding(8, "corner"), "boxes='corner'"),
        (lambda: SkimAttention(0), "layout_dim=0"),
        (lambda: SkimAttention(8, 0), "heads=0"),
        (lambda: SkimAttention(8, 2, 0), "head_dim=0"),
        (lambda: SkimAttention(8, 2, 4, boxes="corner"), "boxes='corner'"),
        (lambda: SkimLayer(12, 5), "heads=5 must divide dim=12"),
        (lambda: SkimLayer(0, 5), "dim=0"),
        (lambda: SkimLayer(12, 0), "heads=0"),
        (lambda: SkimLayer(12, 3, 0), "head_dim=0"),
        (lambda: SkimLayer(12, 3, hidden=0), "hidden=0"),
        (lambda: Skimformer(0, 12, 1, 3), "vocab=0"),
        (lambda: Skimformer(9, 0, 1, 3), "dim=0"),
        (lambda: Skimformer(9, 12, 0, 3), "depth=0"),
        (lambda: Skimformer(9, 12, 1, 0), "heads=0"),
        (lambda: Skimformer(9, 12, 1, 5), "heads=5 must divide dim=12"),
        (lambda: skimming_mask(torch.zeros(1, 1, 3, 3), 0), "top_k=0"),
    ],
)
def test_bad_options(make, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


@pytest.mark.parametrize(
    ("bbox", "message"),
    [
        (torch.zeros(2, 7, 3, dtype=torch.long), r"bbox must be whole numbers \(B, N, 4\)"),
        (torch.zeros(7, 4, dtype=torch.long), r"bbox must be whole numbers \(B, N, 4\)"),
        (torch.zeros(2, 7, 4), r"bbox must be whole numbers \(B, N, 4\)"),
        (torch.full((2, 7, 4), 1001), r"bbox must lie in 0..1000; got 1001..1001"),
        (torch.full((2, 7, 4), -1), r"bbox must lie in 0..1000; got -1..-1"),
        (torch.tensor([[[5, 0, 4, 9]]]), "x0 <= x1"),
        (torch.tensor([[[0, 5, 9, 4]]]), "y0 <= y1"),
    ],
)
def test_bad_boxes(bbox: Tensor, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        skim()(bbox)


def test_edges_of_the_page() -> None:
    assert skim()(torch.tensor([[[0, 0, 1000, 1000], [5, 7, 5, 7]]])).isfinite().all()


def test_bad_masks_and_weights() -> None:
    for mask in (torch.ones(2, 1, 7, 7, dtype=torch.bool), torch.zeros(2, 1, 1, 7)):
        with pytest.raises(ShapeError, match=r"mask must be bool \(B, 1, 1, Nk\)"):
            skim()(boxes(), mask)
        with pytest.raises(ShapeError, match=r"mask must be bool \(B, 1, 1, Nk\)"):
            skimming_mask(skim()(boxes()), 2, mask)
    with pytest.raises(ShapeError, match=r"weights must be \(B=2, H=3, N=7, N\); got \(2, 4, 7, 7\)"):
        SkimLayer(12, 3)(torch.zeros(2, 7, 12), torch.zeros(2, 4, 7, 7))


# -- the paper's claims ---------------------------------------------------------------------------------------------

KINDS, ROWS, BLANK = 12, 6, 24


def forms(pages: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Make pages of six rows with a label on the left and its value on the right, half of the values blank.

    Tokens come in any order, so that only boxes show the rows. Targets are -100 except at blanks.
    """
    labels = torch.randint(KINDS, (pages, ROWS), generator=random)
    values = KINDS + (5 * labels + 3) % KINDS
    blank = torch.rand(pages, ROWS, generator=random) < 0.5
    ids = torch.cat([labels, values.masked_fill(blank, BLANK)], 1)
    target = torch.cat([torch.full_like(labels, -100), values.masked_fill(~blank, -100)], 1)
    top = torch.stack([torch.randperm(20, generator=random)[:ROWS] for _ in range(pages)]).repeat(1, 2) * 50
    left = torch.tensor([100, 600]).repeat_interleave(ROWS).expand(pages, -1)
    bbox = torch.stack([left, top, left + 200, top + 20], -1)
    order = torch.rand(pages, 2 * ROWS, generator=random).argsort(-1)
    return ids.gather(1, order), bbox.gather(1, order[..., None].expand(-1, -1, 4)), target.gather(1, order)


class Reader(nn.Module):
    """A Skimformer with a head or, without a layout, a transformer of the same size over words and positions."""

    def __init__(self, layout: bool) -> None:
        super().__init__()
        self.skim = Skimformer(BLANK + 1, 64, 2, 4) if layout else None
        self.words, self.places, self.norm = nn.Embedding(BLANK + 1, 64), nn.Embedding(12, 64), nn.LayerNorm(64)
        layer = nn.TransformerEncoderLayer(64, 4, 256, 0.0, "gelu", batch_first=True)
        self.text, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(64, BLANK)

    def forward(self, ids: Tensor, bbox: Tensor) -> Tensor:
        if self.skim is not None:
            return self.head(self.skim(ids, bbox))
        return self.head(self.text(self.norm(self.words(ids) + self.places.weight)))


def filled(layout: bool, steps: int = 400) -> float:
    """Return the share of blanks that a trained reader fills correctly."""
    torch.manual_seed(0)
    net, random = Reader(layout), torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for _ in range(steps):
        ids, bbox, target = forms(64, random)
        optimiser.zero_grad()
        F.cross_entropy(net(ids, bbox).flatten(0, 1), target.flatten()).backward()
        optimiser.step()
        schedule.step()
    ids, bbox, target = forms(500, torch.Generator().manual_seed(99))
    with torch.no_grad():
        return (net(ids, bbox).argmax(-1) == target)[target >= 0].float().mean().item()


@pytest.mark.slow
def test_the_layout_pairs_labels_and_values(claim) -> None:
    claim(
        "attention from the layout alone fills in forms whose words come in any order: share of blanks filled",
        ours=filled(True), baseline=filled(False), better="higher", margin=0.4,
        baseline_name="a transformer over the words and their order", seed=0,
    )  # fmt: skip
