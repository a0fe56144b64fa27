"""Measures of saliency maps: values by hand, ties, constant maps, and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from foveate.core.errors import OptionError, ShapeError
from foveate.gaze import (
    CenterBias,
    Fixations,
    SaliencyMap,
    auc_borji,
    auc_judd,
    auc_shuffled,
    cc,
    information_gain,
    kl,
    nss,
    sim,
)

RISING = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
FALLING = torch.tensor([[4.0, 3.0], [2.0, 1.0]])
#: One in the pixel of 4, one in that of 3.
TWO = torch.tensor([[1.5, 1.5], [0.2, 1.9]])


def random_map(height: int = 7, width: int = 9, seed: int = 0) -> Tensor:
    return torch.rand(height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_places(count: int, height: int = 7, width: int = 9, seed: int = 1) -> Tensor:
    drawn = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn * torch.tensor([width, height])


def near(ours: float, expected: float, tolerance: float = 1e-12) -> bool:
    return abs(ours - expected) <= tolerance


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_areas_by_hand() -> None:
    """Of 4 pixels, 3 are under the value 4, which ties with itself; 2 are under 3."""
    assert near(auc_judd(RISING, TWO), (3.5 / 4 + 2.5 / 4) / 2)
    assert near(auc_judd(RISING, TWO, negatives="unfixated"), 1.0)
    assert near(auc_judd(FALLING, TWO, negatives="unfixated"), 0.0)


def test_ties_count_one_half() -> None:
    tied = torch.tensor([[1.0, 1.0], [1.0, 2.0]])
    assert near(auc_judd(tied, torch.tensor([[0.5, 0.5]])), 1.5 / 4)
    assert near(auc_shuffled(tied, torch.tensor([[0.5, 0.5]]), torch.tensor([[1.5, 0.5], [1.5, 1.5]])), 0.5 / 2)


def test_a_place_that_was_fixated_twice_counts_twice() -> None:
    thrice = torch.cat([TWO, TWO[:1]])
    assert near(auc_judd(RISING, thrice), (2 * 3.5 + 2.5) / 12)
    assert near(nss(RISING, thrice), (2 * 1.5 + 0.5) / 3 / math.sqrt(1.25))


def test_x_is_the_column_and_y_the_row() -> None:
    wide = torch.tensor([[0.0, 0.0, 1.0]])
    assert near(auc_judd(wide, torch.tensor([[2.99, 0.99]])), 2.5 / 3)
    assert near(nss(wide, torch.tensor([[2.0, 0.0]])), (1 - 1 / 3) / math.sqrt(2 / 9))


def test_shuffled_area_by_hand() -> None:
    others = torch.tensor([[0.5, 0.5], [1.5, 1.5], [1.5, 0.5], [1.2, 1.2]])  # the values 1, 4, 2, 4
    assert near(auc_shuffled(RISING, TWO, others), ((2 + 1) / 4 + 2 / 4) / 2)


def test_borji_is_judd_on_average() -> None:
    found, places = random_map(), random_places(5)
    generator = torch.Generator().manual_seed(0)
    assert near(auc_borji(found, places, repeats=4000, generator=generator), auc_judd(found, places), 0.01)
    repeat = [auc_borji(found, places, repeats=2, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert repeat[0] == repeat[1]


def test_nss_by_hand() -> None:
    assert near(nss(RISING, TWO), 2 / math.sqrt(5))


def test_correlation_by_hand() -> None:
    other = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    assert near(cc(RISING, other), 6.5 / math.sqrt(5 * 8.75))
    assert near(cc(RISING, FALLING), -1.0)
    assert near(cc(RISING, 3 * RISING - 7), 1.0)


def test_similarity_by_hand() -> None:
    assert near(sim(RISING, FALLING), 0.1 + 0.2 + 0.2 + 0.1)
    assert near(sim(RISING, 5 * RISING), 1.0)
    below = RISING - 2  # -1, 0, 1, 2 is raised to 0, 1, 2, 3
    assert near(sim(below, torch.tensor([[0.0, 1.0], [2.0, 3.0]])), 1.0)


def test_divergence_by_hand() -> None:
    expected = 0.4 * math.log(4) + 0.3 * math.log(1.5) + 0.2 * math.log(2 / 3) + 0.1 * math.log(1 / 4)
    assert near(kl(RISING, FALLING, eps=0), expected)
    assert near(kl(RISING, FALLING), expected, 1e-9)
    assert near(kl(RISING, FALLING, eps=0.1), sum(
        q * math.log(0.1 + q / (p + 0.1)) for p, q in zip((0.1, 0.2, 0.3, 0.4), (0.4, 0.3, 0.2, 0.1), strict=True)
    ))  # fmt: skip


def test_divergence_where_a_density_is_0() -> None:
    half = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert near(kl(RISING, half, eps=0), 0.5 * math.log(5) + 0.5 * math.log(2.5))
    assert kl(half, RISING, eps=0) == math.inf
    assert near(kl(half, half, eps=0), 0.0)
    assert 10 < kl(half, RISING) < math.inf


def test_information_gain_by_hand() -> None:
    density = SaliencyMap.from_scores(RISING)
    assert near(information_gain(density, TWO), (math.log2(0.4 / 0.25) + math.log2(0.3 / 0.25)) / 2)
    base = SaliencyMap.from_scores(FALLING)
    assert near(information_gain(density, TWO, base), (math.log2(0.4 / 0.1) + math.log2(0.3 / 0.2)) / 2)
    assert near(information_gain(density, TWO, density), 0.0)
    half = SaliencyMap.from_scores(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    assert information_gain(half, TWO) == -math.inf
    assert near(information_gain(half, TWO, eps=0.5), (math.log2((1 / 3 + 0.5) / 0.75) + math.log2(0.5 / 0.75)) / 2)


# -- what holds for every map ------------------------------------------------------------------------------------------


def test_areas_by_loops_over_pairs() -> None:
    found, places = (random_map() * 4).round(), random_places(6)  # many ties
    rows, columns = places[:, 1].long(), places[:, 0].long()
    pairs = [
        (found[r, c] > negative).double() + 0.5 * (found[r, c] == negative).double()
        for r, c in zip(rows, columns, strict=True)
        for negative in found.flatten()
    ]
    assert near(auc_judd(found, places), float(torch.stack(pairs).mean()))


def test_areas_do_not_depend_on_the_scale() -> None:
    found, places, others = random_map(), random_places(5), random_places(8, seed=2)
    for changed in (found.exp(), 7 * found - 3, found**3):
        assert near(auc_judd(changed, places), auc_judd(found, places))
        assert near(auc_shuffled(changed, places, others), auc_shuffled(found, places, others))


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e8])
def test_constant_maps(value: float) -> None:
    flat, found, places = torch.full((7, 9), value), random_map(), random_places(5)
    assert auc_judd(flat, places) == 0.5
    assert nss(flat, places) == 0 and cc(flat, found) == 0 and cc(found, flat) == 0 and cc(flat, flat) == 0
    assert near(sim(flat, torch.ones(7, 9)), 1.0, 1e-6)


def test_shuffling_takes_the_centre_bias_away() -> None:
    """Fixations of all images are on the left; a map that says so has no shuffled AUC, and much AUC-Judd."""
    left = torch.linspace(1, 0, 9).expand(7, 9)
    places = random_places(40) * torch.tensor([0.3, 1.0])
    others = random_places(4000, seed=2) * torch.tensor([0.3, 1.0])
    assert auc_judd(left, places) > 0.8
    assert abs(auc_shuffled(left, places, others) - 0.5) < 0.1


def test_densities_and_maps_give_the_same() -> None:
    found, places = random_map(), random_places(5)
    density = SaliencyMap.from_scores(found)
    for measure in (auc_judd, nss):
        assert near(measure(density, places), measure(found, places), 1e-10)
    other = random_map(seed=4)
    for compare in (cc, sim, kl):
        assert near(compare(density, SaliencyMap.from_scores(other)), compare(found, other), 1e-10)


def test_half_precision_maps_are_read_in_double() -> None:
    found, places = random_map().half(), random_places(5)
    assert nss(found, places) == nss(found.double(), places)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", [auc_judd, nss, lambda s, f: auc_shuffled(s, f, TWO)])
@pytest.mark.parametrize(
    ("saliency", "fixations", "error", "says"),
    [
        (RISING[None], TWO, ShapeError, "must be a floating point map"),
        (RISING.long(), TWO, ShapeError, "must be a floating point map"),
        (RISING.log() / 0, TWO, OptionError, "must be finite"),
        (RISING, TWO[0], ShapeError, "must be positions"),
        (RISING, TWO * torch.nan, OptionError, "must be finite"),
        (RISING, TWO[:0], OptionError, "at least one"),
        (RISING, torch.tensor([[2.0, 0.5]]), OptionError, r"within the image \(H, W\)=\(2, 2\)"),
        (RISING, torch.tensor([[0.5, -0.1]]), OptionError, r"\(x, y\)=\(0.5, -0.1\)"),
    ],
)
def test_malformed_calls(
    measure: Callable[[Tensor, Tensor], float], saliency: Tensor, fixations: Tensor, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        measure(saliency, fixations)


def test_other_refusals() -> None:
    with pytest.raises(OptionError, match="negatives='none' must be one of"):
        auc_judd(RISING, TWO, negatives="none")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="needs a pixel without a fixation"):
        auc_judd(RISING[:, :1], TWO * torch.tensor([0.0, 1]) + torch.tensor([[0, 0], [0, -1.0]]), negatives="unfixated")
    with pytest.raises(OptionError, match="others must have at least one"):
        auc_shuffled(RISING, TWO, TWO[:0])
    with pytest.raises(OptionError, match="others must lie within"):
        auc_shuffled(RISING, TWO, TWO + 1)
    for compare in (cc, sim, kl):
        with pytest.raises(ShapeError, match="must be of one size"):
            compare(RISING, torch.ones(2, 3))
    with pytest.raises(OptionError, match="needs densities"):
        information_gain(RISING, TWO)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="needs densities"):
        information_gain(SaliencyMap.uniform((2, 2)), TWO, RISING)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="must be of one size"):
        information_gain(SaliencyMap.uniform((2, 2)), TWO, SaliencyMap.uniform((2, 3)))
    half = SaliencyMap.from_scores(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    with pytest.raises(OptionError, match="baseline must be over 0"):
        information_gain(SaliencyMap.uniform((2, 2)), TWO, half)
    with pytest.raises(OptionError, match="eps=-1 must be at least 0"):
        kl(RISING, RISING, eps=-1)


# -- densities and fixations -------------------------------------------------------------------------------------------


def test_densities() -> None:
    assert torch.equal(SaliencyMap.uniform((2, 4)).density, torch.full((2, 4), 1 / 8, dtype=torch.float64))
    assert torch.allclose(SaliencyMap.from_logits(RISING.log()).density, RISING.double() / 10)
    assert torch.allclose(SaliencyMap.from_scores(RISING).density, RISING.double() / 10)
    assert torch.allclose(SaliencyMap.from_scores(torch.zeros(3, 5)).density, torch.full((3, 5), 1 / 15).double())
    assert SaliencyMap.from_scores(torch.tensor([[0.0, 1.0]])).log_density().tolist() == [[-math.inf, 0.0]]
    with pytest.raises(OptionError, match="adds up to 10"):
        SaliencyMap(RISING)
    with pytest.raises(OptionError, match="at least 0"):
        SaliencyMap(torch.tensor([[-1.0, 2.0]]))


def test_the_centre_bias_by_hand() -> None:
    """Its spread is a share of the image's sides, so that it is wider across a wide image."""
    found = CenterBias(0.5).predict(torch.rand(1, 2, 4)).density
    row, column = math.exp(-0.5 * (0.25 / 0.5) ** 2), [math.exp(-0.5 * (x / 0.5) ** 2) for x in (0.375, 0.125)]
    total = 4 * row * sum(column)
    assert torch.allclose(found[0], torch.tensor([*column, *column[::-1]]) * row / total)
    assert torch.equal(found[0], found[1])
    with pytest.raises(OptionError, match="sigma=0 must be at least"):
        CenterBias(0)


def test_samples_follow_the_density() -> None:
    drawn = SaliencyMap.from_scores(torch.tensor([[0.0, 1.0, 3.0]])).sample(4000, torch.Generator().manual_seed(0))
    assert set(map(tuple, drawn.tolist())) == {(1.5, 0.5), (2.5, 0.5)}
    assert near(float((drawn[:, 0] == 2.5).double().mean()), 0.75, 0.03)


def fixations() -> Fixations:
    xy = torch.tensor([[1.0, 1.0], [3.9, 0.2], [10.0, 4.0], [1.0, 1.4]])
    return Fixations(xy, torch.tensor([0, 0, 1, 0]), torch.tensor([[2, 4], [6, 16]]))


def test_counts_are_those_of_pixels() -> None:
    assert fixations().counts(0).tolist() == [[0, 0, 0, 1], [0, 2, 0, 0]]
    assert float(fixations().counts(1).sum()) == 1 and float(fixations().counts(1)[4, 10]) == 1


def test_fixations_elsewhere_are_scaled_to_the_image() -> None:
    assert torch.allclose(fixations().elsewhere(0), torch.tensor([[2.5, 4 / 3]]))
    expected = torch.tensor([[4.0, 3.0], [15.6, 0.6], [4.0, 4.2]])
    assert torch.allclose(fixations().elsewhere(1), expected)


def test_the_empirical_density_is_a_gaussian_on_each_fixation() -> None:
    found = fixations().density(0, 0.7).density
    expected = torch.zeros(2, 4, dtype=torch.float64)
    for x, y in fixations().of(0).tolist():
        for row in range(2):
            for column in range(4):
                distance = (column + 0.5 - x) ** 2 + (row + 0.5 - y) ** 2
                expected[row, column] += math.exp(-distance / (2 * 0.7**2))
    assert torch.allclose(found, expected / expected.sum(), atol=1e-9)


def test_refused_fixations() -> None:
    xy, image, sizes = torch.tensor([[1.0, 1.0]]), torch.tensor([0]), torch.tensor([[2, 4]])
    for given, error, says in (
        ((xy, image.float(), sizes), ShapeError, "image must be int64"),
        ((xy, image, sizes[0]), ShapeError, "sizes must be int64"),
        ((xy, image + 1, sizes), OptionError, r"image must be in 0\.\.0"),
        ((xy + 5, image, sizes), OptionError, "xy must lie within the image"),
    ):
        with pytest.raises(error, match=says):
            Fixations(*given)
    with pytest.raises(OptionError, match="image 1 has no fixation"):
        Fixations(xy, image, torch.tensor([[2, 4], [3, 3]])).density(1, 1.0)
