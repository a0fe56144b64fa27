"""Speech encoders: local heads, codes that languages share, layers that tell languages apart, and sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, Wav2Vec2Config, Wav2Vec2ForPreTraining

from foveate.core.errors import FoveateError
from foveate.lens import (
    attention_maps,
    code_histograms,
    code_similarity,
    frame_codes,
    head_locality,
    layer_probe,
    resampling_ratios,
    sample_probs,
)
from foveate.lens.parts.linear_probe import LinearProbe, folds
from tests.conftest import ClaimFixture
from tests.support.tensors import assert_near

T = 24


def band(width: int, t: int = T) -> Tensor:
    """Return a map that is even over the frames within `width`."""
    place = torch.arange(t)
    near = ((place[:, None] - place).abs() <= width).double()
    return near / near.sum(-1, keepdim=True)


def speech_model() -> Wav2Vec2ForPreTraining:
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, conv_dim=(16, 16),
        conv_kernel=(8, 4), conv_stride=(4, 4), num_feat_extract_layers=2, num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4, num_codevectors_per_group=12, num_codevector_groups=2, codevector_dim=8,
        proj_codevector_dim=8,
    )  # fmt: skip
    return Wav2Vec2ForPreTraining(config).eval()


WAVES = torch.randn(2, 400, generator=torch.Generator().manual_seed(0))


# -- locality ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 3, T, 2 * T])
def test_limits_of_locality(k: int) -> None:
    maps = torch.stack([torch.eye(T).double(), torch.full((T, T), 1 / T).double()])[None]
    found = head_locality(maps, k)
    place = torch.arange(T)
    inside = ((place[:, None] - place).abs() <= k).sum(-1).double()
    assert float(found.window_mass[0, 0]) == pytest.approx(1.0, abs=1e-6) and float(found.mean_distance[0, 0]) == 0.0
    assert float(found.window_mass[0, 1]) == pytest.approx(float(inside.mean() / T), abs=1e-6)
    assert found.uniform == pytest.approx(float(inside.mean() / T), abs=1e-6)
    assert (
        found.uniform_distance
        == pytest.approx((T * T - 1) / (3 * T))
        == pytest.approx(float(found.mean_distance[0, 1]))
    )
    assert float(found.lift[0, 1]) == pytest.approx(1.0, abs=1e-6)
    assert float(found.lift[0, 0]) == pytest.approx(float((T / inside).mean()), abs=1e-6)
    if k >= T:
        assert found.uniform == pytest.approx(1.0, abs=1e-6)


def test_bands_are_found_and_random_rows_are_uniform(claim: ClaimFixture) -> None:
    draw = torch.Generator().manual_seed(0)
    random = torch.rand(64, T, T, generator=draw, dtype=torch.float64)
    maps = torch.stack([band(3).expand(64, T, T), random / random.sum(-1, keepdim=True)], 1)[:, None]
    found = head_locality(maps, 3)
    assert float(found.window_mass[0, 0]) >= 0.99 and found.local_share() == 0.5
    assert float(found.window_mass[0, 1]) == pytest.approx(found.uniform, rel=0.02)
    assert float(head_locality(maps, 2).window_mass[0, 0]) < 0.85
    claim(
        "mass within three frames of a head that is even over them",
        ours=float(found.window_mass[0, 0]), baseline=found.uniform, better="higher", margin=0.5,
        baseline_name="uniform attention", seed=0,
    )  # fmt: skip


def test_lift_by_hand() -> None:
    """All look at the first of four frames: frames 0 and 1 have it in their window, of 2 and 3 frames."""
    maps = torch.zeros(1, 1, 4, 4)
    maps[..., 0] = 1.0
    found = head_locality(maps, 1)
    assert float(found.window_mass) == 0.5 and float(found.mean_distance) == 1.5
    assert float(found.lift) == pytest.approx((4 / 2 + 4 / 3) / 4)


def test_padding_changes_nothing() -> None:
    draw, n = torch.Generator().manual_seed(0), 15
    maps = torch.rand(2, 3, 4, n, n, generator=draw).softmax(-1)
    padded = torch.rand(2, 3, 4, T, T, generator=draw)
    padded[0, ..., :n, :n], padded[1, ..., 5 : 5 + n, 5 : 5 + n] = maps
    mask = torch.zeros(2, T, dtype=torch.bool)
    mask[0, :n] = mask[1, 5 : 5 + n] = True
    found, expected = head_locality(padded, 4, mask), head_locality(maps, 4)
    for name in ("window_mass", "mean_distance", "lift"):
        assert_near(getattr(found, name), getattr(expected, name), 1e-9, name)
    assert found.uniform == pytest.approx(expected.uniform)
    assert found.uniform_distance == pytest.approx(expected.uniform_distance)


def test_a_speech_encoder_is_read_through_the_host() -> None:
    model = speech_model()
    found = attention_maps(model.wav2vec2, {"input_values": WAVES})
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = torch.stack(model.wav2vec2(WAVES, output_attentions=True).attentions, 1)
    assert_near(found, maps, 1e-5)
    assert tuple(head_locality(found, 2).window_mass.shape) == (2, 4)


class Speech:
    """Frames `(B, N, 8)` of eight phonemes with two states each, which last three to five frames; or white noise."""

    def __init__(self, kind: Literal["speech", "noise"], seed: int, n: int = T) -> None:
        self.kind, self.n, self.draw = kind, n, torch.Generator().manual_seed(seed)
        self.states = torch.randn(16, 8, generator=self.draw)

    def sample(self, batch: int) -> Tensor:
        noise = torch.randn(batch, self.n, 8, generator=self.draw)
        return noise if self.kind == "noise" else self._text(batch) + 0.1 * noise

    def _text(self, batch: int) -> Tensor:
        phones = torch.randint(8, (batch, self.n), generator=self.draw)
        states = torch.stack([2 * phones, 2 * phones + 1], -1).flatten(1)
        lasts = torch.randint(3, 6, states.shape, generator=self.draw)
        rows = [s.repeat_interleave(last)[: self.n] for s, last in zip(states, lasts, strict=True)]
        return self.states[torch.stack(rows)]


def masses(kind: Literal["speech", "noise"], seed: int, steps: int = 300) -> tuple[float, float, float]:
    """Return the mean window mass before and after masked prediction, and that of uniform attention."""
    torch.manual_seed(seed)
    model = T5EncoderModel(T5Config(
        vocab_size=4, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, relative_attention_num_buckets=16,
        relative_attention_max_distance=16, dropout_rate=0.0,
    ))  # fmt: skip
    data, blank, head = Speech(kind, seed), nn.Parameter(torch.zeros(8)), nn.Linear(8, 8)
    held = {"inputs_embeds": data.sample(8)}
    before = head_locality(attention_maps(model, held), 3)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters(), blank], lr=1e-2)
    for _ in range(steps):
        frames = data.sample(8)
        hidden = torch.rand(8, T, generator=data.draw) < 0.2
        states = model(inputs_embeds=torch.where(hidden[..., None], blank, frames)).last_hidden_state
        loss = (head(states) - frames)[hidden].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = head_locality(attention_maps(model, held), 3)
    return float(before.window_mass.mean()), float(after.window_mass.mean()), after.uniform


def test_masked_prediction_of_speech_makes_heads_local(claim: ClaimFixture) -> None:
    before, after, uniform = masses("speech", 0)
    assert after > before + 0.1
    claim(
        "mean mass within three frames, trained to predict masked frames of speech",
        ours=after, baseline=2 * uniform, better="higher", baseline_name="twice uniform attention", seed=0,
    )  # fmt: skip
    before, after, _ = masses("noise", 0)
    assert after < before + 0.05, "white noise has no neighbours to look at"


# -- codes -------------------------------------------------------------------------------------------------------------


def test_codes_are_those_that_the_quantiser_takes() -> None:
    model = speech_model()
    codes = frame_codes(model, {"input_values": WAVES})
    with torch.no_grad():
        features = model.wav2vec2(WAVES).extract_features
        expected, _ = model.quantizer(features)
    books = model.quantizer.codevectors.detach().unflatten(1, (2, 12))[0]
    taken = torch.cat([books[group][codes[..., group]] for group in range(2)], -1)
    assert codes.unique().numel() > 3
    assert_near(taken, expected, 1e-6)


def test_histograms_by_hand() -> None:
    codes = torch.tensor([[[0, 2], [1, 2], [0, 1]], [[0, 0], [2, 2], [1, 1]]])
    labels = torch.tensor([[0, 0, 2], [0, -1, 2]])
    found = code_histograms(codes, labels, 3)
    assert_near(found[0], torch.tensor([[2 / 3, 1 / 3, 0], [1 / 3, 0, 2 / 3]]).double(), 1e-6)
    assert_near(found[2], torch.tensor([[0.5, 0.5, 0], [0, 1, 0]]).double(), 1e-6)
    assert float(found[1].sum()) == 0.0
    for kind in ("cosine", "js"):
        alike = code_similarity(found[[0, 2]], kind)
        assert_near(alike.diagonal(), torch.ones(2).double(), 1e-9)
        apart = code_similarity(torch.eye(2).double()[:, None], kind)
        assert_near(apart, torch.eye(2).double(), 1e-9)
    cosine = (2 / 3 * 0.5 + 1 / 3 * 0.5) / (5**0.5 / 3 * 0.5**0.5)
    assert float(code_similarity(found)[0, 2]) == pytest.approx(cosine / 2)  # the other codebook is disjoint
    uneven = torch.tensor([[[0.7, 0.2, 0.1]], [[0.1, 0.1, 0.8]], [[0.0, 1.0, 0.0]]]).double()
    squares = [[1 - jensenshannon(a, b, base=2) ** 2 for b in uneven[:, 0].numpy()] for a in uneven[:, 0].numpy()]
    assert_near(code_similarity(uneven, "js"), torch.tensor(squares), 1e-6)


def test_languages_share_codes_for_shared_sounds(claim: ClaimFixture) -> None:
    """Two languages of eight phonemes share the sounds of five; a phoneme takes three entries of each codebook."""
    draw = torch.Generator().manual_seed(0)
    sounds = torch.randint(40, (11, 2, 3), generator=draw)
    own = {0: list(range(8)), 1: [*range(5), 8, 9, 10]}
    phones = torch.randint(8, (2, 20, 50), generator=draw)
    heard = torch.stack([torch.tensor(own[language])[phones[language]] for language in (0, 1)])
    entry = torch.randint(3, (*heard.shape, 2), generator=draw)
    codes = sounds[heard].gather(-1, entry[..., None])[..., 0]
    noise = torch.rand(codes.shape, generator=draw) < 0.2
    codes = torch.where(noise, torch.randint(40, codes.shape, generator=draw), codes).flatten(0, 1)
    labels = (phones + 8 * torch.arange(2)[:, None, None]).flatten(0, 1)
    for kind in ("cosine", "js"):
        across = code_similarity(code_histograms(codes, labels, 40), kind)[:8, 8:].diagonal()
        claim(
            f"likeness of the codes of a phoneme in two languages, if they share it ({kind})",
            ours=float(across[:5].mean()), baseline=float(across[5:].mean()), better="higher", margin=0.2,
            baseline_name="phonemes that they do not share", seed=0,
        )  # fmt: skip


# -- layers ------------------------------------------------------------------------------------------------------------


def test_the_probe_is_scikits() -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    states = torch.randn(90, 6, generator=draw, dtype=torch.float64) + torch.randn(3, 6, generator=draw)[labels]
    ours = LinearProbe.fit(states * 7 + 3, labels, penalty=0.5)
    scaled = (states - states.mean(0)) / states.std(0, correction=0)
    peer = LogisticRegression(C=2.0, tol=1e-9, max_iter=2000).fit(scaled.numpy(), labels.numpy())
    assert_near(ours.weight, torch.tensor(peer.coef_), 1e-3)
    assert ours.predict(states * 7 + 3).tolist() == peer.predict(scaled.numpy()).tolist()


def test_folds_spread_each_class() -> None:
    labels = torch.tensor([0] * 10 + [1] * 7)
    part = folds(labels, 3)
    for each in (0, 1):
        counts = torch.bincount(part[labels == each], minlength=3)
        assert int(counts.max() - counts.min()) <= 1
    assert not torch.equal(part, folds(labels, 3, seed=1))


def test_the_layer_that_holds_the_language_is_found(claim: ClaimFixture) -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 4
    families = torch.randn(4, 8, generator=draw)
    hidden = torch.stack([
        gain * families[labels] + torch.randn(60, 8, generator=draw) for gain in (0.0, 0.5, 2.0, 0.5, 0.0)
    ])  # fmt: skip
    found = layer_probe(hidden, labels)
    assert int(found.argmax()) == 2
    claim(
        "accuracy of the probe at the layer that separates languages",
        ours=float(found[2]), baseline=float(found[[0, 4]].max()), better="higher", margin=0.3,
        baseline_name="layers that do not", seed=0,
    )  # fmt: skip
    assert float(found[[0, 4]].max()) < 0.5, "held out: nothing is learnt by heart"


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_sampling_by_temperature() -> None:
    hours = [1.0, 16.0, 81.0]
    assert_near(sample_probs(hours, 0.5), torch.tensor([1, 4, 9]).double() / 14, 1e-12)
    assert_near(sample_probs(hours, 1.0), torch.tensor(hours).double() / 98, 1e-12)
    assert_near(sample_probs(hours, 0.0), torch.ones(3).double() / 3, 1e-12)
    assert_near(resampling_ratios(hours, 1.0), torch.ones(3).double(), 1e-12)
    ratios = resampling_ratios(hours)
    assert float(ratios[0]) >= 1 and float(ratios[2]) < 1
    assert float((ratios * torch.tensor(hours)).sum()) == pytest.approx(98)
    assert float(sample_probs(hours)[1]) == pytest.approx(16**0.7 / (1 + 16**0.7 + 81**0.7))


CODES, LABELS = torch.zeros(1, 2, 1, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: head_locality(torch.ones(3, 3)), "(L, H, T, T)"),
        (lambda: head_locality(torch.ones(1, 1, 3, 3), -1), "k="),
        (lambda: head_locality(torch.ones(1, 1, 3, 3), mask=torch.ones(4, dtype=torch.bool)), "mask must be"),
        (lambda: head_locality(torch.ones(1, 1, 3, 3), mask=torch.zeros(3, dtype=torch.bool)), "all padding"),
        (lambda: head_locality(torch.ones(1, 1, 3, 3)).local_share(2.0), "threshold="),
        (lambda: frame_codes(nn.Linear(2, 2), {}), "one quantiser"),
        (lambda: code_histograms(CODES, LABELS[:, :1]), "(B, T, G)"),
        (lambda: code_histograms(CODES + 9, LABELS, 5), "0..4"),
        (lambda: code_similarity(torch.ones(2, 1, 2), "dot"), "kind="),  # type: ignore[arg-type]
        (lambda: layer_probe(torch.ones(2, 4, 3), LABELS[0]), "labels (N,)"),
        (lambda: layer_probe(torch.ones(2, 2, 3), LABELS[0]), "two classes"),
        (lambda: sample_probs([]), "hours="),
        (lambda: sample_probs([1.0, 0.0]), "hours="),
        (lambda: sample_probs([1.0], 2.0), "alpha="),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(FoveateError) as caught:
        make()
    assert message in str(caught.value) and "\n" not in str(caught.value)
