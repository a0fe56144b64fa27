"""CACE-Net: co-guidance by hand, its limits, what a missing modality does, the contrast, and localisation."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.errors import OptionError, ShapeError
from foveate.nn.fusion.cace_net import CoGuidedAttention, background_event_contrast
from tests.support.tensors import assert_near

B, T, H, W, CV, CA = 2, 4, 3, 2, 8, 6


def made(seed: int = 0, **options) -> CoGuidedAttention:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CoGuidedAttention(CV, CA, 5, **options).double().eval()


def clip(seed: int = 1) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    video = torch.randn(B, T, H, W, CV, generator=random, dtype=torch.float64)
    return video, torch.randn(B, T, CA, generator=random, dtype=torch.float64)


# -- the mechanism by hand ---------------------------------------------------------------------------------------------


def normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean()
    return norm.weight * centred / (centred.square().mean() + norm.eps).sqrt() + norm.bias


def attended(attention: nn.Module, norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Attention of tokens to each other, without a scale, and LayerNorm of the sum, token by token."""
    rows = []
    for token in x:
        logits = torch.stack([attention.q(token) @ attention.k(other) for other in x])
        mixed = sum(w * attention.v(other) for w, other in zip(logits.softmax(0), x, strict=True))
        rows.append(normed(norm, token + mixed))
    return torch.stack(rows)


def by_hand(layer: CoGuidedAttention, video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
    """Guide one clip `(T, H, W, Cv)`, `(T, Ca)`, segment by segment and place by place."""
    relu, v, queries = torch.relu, [], []
    for grid, sound in zip(video.flatten(1, 2), audio, strict=True):
        u = attended(layer.look, layer.video_norm, grid)
        summary, gate, place = layer.summary, layer.channels, layer.places
        g = relu(summary.mean(sum(u) / len(u)))
        s = torch.stack([torch.tanh(summary.score(relu(summary.each(p)) * g)[0]) for p in u]).softmax(0) @ u
        met = sum(relu(gate.audio(sound)) * relu(gate.video(p)) for p in u) / len(u)
        louder = grid * (1 + torch.sigmoid(gate.excite(relu(gate.squeeze(met)))))
        map_ = [torch.tanh(place.score(relu(place.video(p)) * relu(place.audio(sound)))[0]) for p in louder]
        v0 = torch.stack(map_).softmax(0) @ louder
        v.append(v0 + layer.beta * torch.sigmoid(s) * v0)
        other = attended(layer.look_for_audio, layer.video_norm, grid)
        queries.append(layer.seen_to_heard.q(sum(other) / len(other)))
    sounds, a = attended(layer.listen, layer.audio_norm, audio), []
    for query, sound in zip(queries, audio, strict=True):
        logits = torch.stack([query @ layer.seen_to_heard.k(each) for each in sounds])
        read = logits.softmax(0) @ layer.seen_to_heard.v(sounds)
        a.append(sound + layer.psi * torch.sigmoid(read) * sound)
    return torch.stack(v), torch.stack(a)


def test_it_is_the_mechanism() -> None:
    layer, (video, audio) = made(psi=0.7), clip()
    out = layer(video, audio)
    for i in range(B):
        v, a = by_hand(layer, video[i], audio[i])
        assert_near(out["video"][i], v, 1e-12)
        assert_near(out["audio"][i], a, 1e-12)


def test_masked_places_and_segments_are_as_if_cut_out() -> None:
    layer, (video, audio) = made(psi=0.7), clip()
    heard = torch.tensor([[True, True, False, True], [True, False, True, True]])
    seen = torch.ones(B, T, H, W, dtype=torch.bool)
    seen[:, :, 2], seen[:, :, :, 1] = False, False
    seen &= heard[:, :, None, None]
    out = layer(video, audio, masks={"video": seen, "audio": heard})
    for i in range(B):
        cut = layer(video[i : i + 1, heard[i], :2, :1], audio[i : i + 1, heard[i]])
        for name in ("video", "audio"):
            assert_near(out[name][i, heard[i]], cut[name][0], 1e-12)
            assert not out[name][i, ~heard[i]].any()


def test_the_defaults_are_the_papers_sizes() -> None:
    layer = CoGuidedAttention()
    assert [(each.name, each.dim) for each in layer.outputs] == [("video", 512), ("audio", 128)]
    assert (layer.beta, layer.psi, layer.drop.p) == (0.4, 0.3, 0.2)
    assert layer.look.q.out_features == layer.look_for_audio.k.out_features == 128
    attention = 2 * (512 * 512 + 2 * 512 * 128 + 512 + 2 * 128) + 3 * 128 * 128 + 3 * 128
    crossed = (512 + 2 * 128) * 128 + 3 * 128
    gates = 512 * 512 + 128 * 512 + 512 * 256 + 256 * 512 + 3 * 512 + 256
    maps = 3 * 512 * 256 + 128 * 256 + 2 * 256 + 4 * 256 + 2
    assert sum(p.numel() for p in layer.parameters()) == attention + crossed + gates + maps + 2 * (512 + 128)


def test_training_drops_outputs_of_self_attention() -> None:
    layer, (video, audio) = made(psi=0.7, dropout=0.5).train(), clip()
    once, twice = layer(video, audio), layer(video, audio)
    assert not torch.equal(once["video"], twice["video"])
    assert not torch.equal(once["audio"], twice["audio"])
    everything = made(psi=0.7, dropout=1.0).train()
    u = everything.video_norm(video.flatten(2, 3))
    assert_near(everything._attended(everything.look, video.flatten(2, 3), torch.ones(B, T, H * W).bool()), u, 1e-12)


# -- limits ------------------------------------------------------------------------------------------------------------


def zeroed(*linears: nn.Linear) -> None:
    with torch.no_grad():
        for linear in linears:
            linear.weight.zero_()
            linear.bias.zero_()


def test_without_psi_sound_is_unchanged() -> None:
    layer, (video, audio) = made(psi=0.0), clip()
    out = layer(video, audio)
    assert torch.equal(out["audio"], audio)
    assert_near(out["video"], made(psi=0.9)(video, audio)["video"], 0)
    assert (made(psi=0.9)(video, audio)["audio"] - audio).abs().min() > 0


def test_uniform_maps_and_closed_gates_give_the_mean() -> None:
    layer, (video, audio) = made(beta=0.0), clip()
    zeroed(layer.places.score, layer.channels.excite)
    assert_near(layer(video, audio)["video"], 1.5 * video.mean((2, 3)), 1e-6)
    louder = made(beta=0.4)
    zeroed(louder.places.score, louder.channels.excite)
    out = louder(video, audio)["video"] / (1.5 * video.mean((2, 3)))
    assert (out > 1).all()
    assert (out < 1.4).all()


def test_guidance_by_what_is_missing_adds_nothing() -> None:
    layer, (video, audio) = made(psi=0.7, beta=0.0), clip()
    nobody = torch.zeros(B, dtype=torch.bool)
    deaf, blind = layer(video, audio, present={"audio": nobody}), layer(video, audio, present={"video": nobody})
    assert_near(deaf["video"], video.mean((2, 3)), 1e-12)
    assert not deaf["audio"].any()
    assert torch.equal(blind["audio"], audio)
    assert not blind["video"].any()
    with_summary = made(psi=0.7)(video, audio, present={"audio": nobody})["video"] / video.mean((2, 3))
    assert (with_summary > 1).all()


def test_a_segment_without_sound_or_picture_is_guided_by_nothing_of_its_own() -> None:
    layer, (video, audio) = made(psi=0.7, beta=0.0), clip()
    heard, seen = torch.ones(B, T, dtype=torch.bool), torch.ones(B, T, H, W, dtype=torch.bool)
    heard[0, 1], seen[0, 2] = False, False
    out, whole = layer(video, audio, masks={"video": seen, "audio": heard}), layer(video, audio)
    assert_near(out["video"][0, 1], video[0, 1].mean((0, 1)), 1e-12)
    assert_near(out["audio"][0, 2], audio[0, 2], 0)
    assert_near(out["video"][0, [0, 3]], whole["video"][0, [0, 3]], 1e-12)
    assert (out["audio"][0, 0] - whole["audio"][0, 0]).abs().max() > 1e-6, "segment 1 is no longer heard"
    assert_near(out["audio"][1], whole["audio"][1], 1e-12)


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(video_dim=3), "video_dim=3"), (dict(audio_dim=0), "audio_dim=0"), (dict(hidden=0), "hidden=0"),
        (dict(dropout=1.5), "dropout=1.5"), (dict(beta="x"), "beta='x'"),
    ],
)  # fmt: skip
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        CoGuidedAttention(**options)


# -- the contrast ------------------------------------------------------------------------------------------------------


def contrast_by_hand(q: Tensor, k: Tensor, event: Tensor, temperature: float) -> float:
    """Compute the loss of one video pair by pair."""
    vectors = [x / x.norm() for x in (*q, *k)]
    count, losses = len(q), []
    for i, own in enumerate(vectors):
        positives, everything = [], 0.0
        for j, other in enumerate(vectors):
            if i == j:
                continue
            closeness = math.exp(float(own @ other) / temperature)
            everything += closeness
            is_copy = i % count == j % count
            if is_copy or (event[i % count] and event[j % count]):
                positives.append(closeness)
        assert len(positives) == (2 * int(event.sum()) - 1 if event[i % count] else 1)
        losses.append(-math.log(sum(positives) / len(positives) / everything))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("temperature", [0.01, 0.5])
@pytest.mark.parametrize("event", [[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]])
def test_contrast_by_hand(event: list[int], temperature: float) -> None:
    q, k = (torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (0, 1))
    events = torch.tensor([event, event[::-1]], dtype=torch.bool)
    expected = sum(contrast_by_hand(q[i], k[i], events[i], temperature) for i in range(2)) / 2
    assert_near(background_event_contrast(q, k, events, temperature), torch.tensor(expected).double(), 1e-5)


def test_contrast_falls_as_events_come_together() -> None:
    random = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 6, generator=random, dtype=torch.float64)
    k = q + 0.01 * torch.randn(1, 4, 6, generator=random, dtype=torch.float64)
    event = torch.tensor([[True, True, False, False]])
    middle = (q[:, :1] + q[:, 1:2]) / 2
    pulled = [torch.cat([x[:, :2].lerp(middle, 0.5), x[:, 2:]], 1) for x in (q, k)]
    pushed = [torch.cat([x[:, :3], x[:, 3:].lerp(middle, 0.5)], 1) for x in (q, k)]
    loss = background_event_contrast(q, k, event, 0.5)
    assert background_event_contrast(*pulled, event, 0.5) < loss - 0.05
    assert background_event_contrast(*pushed, event, 0.5) > loss + 0.05


def test_contrast_is_finite_at_its_temperature() -> None:
    """Cosines over 0.01 overflow an exponential of single precision."""
    q = torch.ones(1, 4, 5, requires_grad=True)
    loss = background_event_contrast(q, q.detach(), torch.tensor([[True, False, True, False]]))
    assert_near(loss, torch.tensor(math.log(7)), 1e-5)
    (grad,) = torch.autograd.grad(loss, q)
    assert grad.isfinite().all()
    lone = background_event_contrast(q[:, :1], q[:, :1], torch.tensor([[True]]))
    assert_near(lone, torch.tensor(0.0), 1e-6)


def test_contrast_refusals() -> None:
    q, event = torch.ones(2, 4, 5), torch.ones(2, 4, dtype=torch.bool)
    for bad in (q[0], q[:, :3], torch.ones(2, 0, 5)):
        with pytest.raises(ShapeError, match=r"q and k must be features \(B, T, C\)"):
            background_event_contrast(bad, q, event)
    with pytest.raises(ShapeError, match=r"event must be bool \(B, T\)=\(2, 4\)"):
        background_event_contrast(q, q, event.float())
    for bad in (0, -1.0, True):
        with pytest.raises(OptionError, match="temperature="):
            background_event_contrast(q, q, event, bad)


# -- events in noise ---------------------------------------------------------------------------------------------------

CLASSES, SEGMENTS, SIDE, WIDTH = 4, 10, 4, 16


def clips(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw clips `(B, T, 4, 4, 16)` with sound `(B, T, 16)` and each segment's class, or `CLASSES` for background.

    In an event a place shows what is heard. Another place shows another class all the time, and a third of the event's
    sounds are lost in noise. In the background sound is noise too, and the place of the event is empty.
    """
    random = torch.Generator().manual_seed(seed)
    looks, sounds = (torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(s)) for s in (901, 902))
    of_clip = torch.stack([torch.randperm(CLASSES, generator=random)[:2] for _ in range(count)])
    where = torch.stack([torch.randperm(SIDE * SIDE, generator=random)[:2] for _ in range(count)])
    start = torch.randint(0, 5, (count, 1), generator=random)
    time = torch.arange(SEGMENTS)
    event = (time >= start) & (time < start + 6)
    video = torch.randn(count, SEGMENTS, SIDE * SIDE, WIDTH, generator=random)
    rows = torch.arange(count)
    video[rows, :, where[:, 0]] += 2 * looks[of_clip[:, 0]][:, None] * event[..., None]
    video[rows, :, where[:, 1]] += 2 * looks[of_clip[:, 1]][:, None]
    clean = event & (torch.rand(count, SEGMENTS, generator=random) > 1 / 3)
    audio = 1 + 0.3 * torch.randn(count, SEGMENTS, WIDTH, generator=random)
    audio = audio + sounds[of_clip[:, 0]][:, None] * clean[..., None]
    label = torch.where(event, of_clip[:, :1], CLASSES)
    return video.unflatten(2, (SIDE, SIDE)), audio, label


class Localiser(nn.Module):
    """A head for each segment on guided features, or on plain means of the grid where there is no guidance."""

    def __init__(self, psi: float | None) -> None:
        super().__init__()
        self.guide = None if psi is None else CoGuidedAttention(WIDTH, WIDTH, 32, psi=psi, dropout=0.0)
        self.head = nn.Sequential(nn.Linear(2 * WIDTH, 64), nn.ReLU(), nn.Linear(64, CLASSES + 1))

    def forward(self, video: Tensor, audio: Tensor) -> Tensor:
        seen = video.mean((2, 3))
        if self.guide is not None:
            seen, audio = self.guide(video, audio).values()
        return self.head(torch.cat([seen, audio], -1))


@cache
def accuracy(psi: float | None, seed: int, steps: int) -> float:
    """Train on fresh clips, and return the share of segments of other clips that are labelled right."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Localiser(psi)
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    for step in range(steps):
        video, audio, label = clips(32, 1000 * (seed + 1) + step)
        optimiser.zero_grad()
        F.cross_entropy(net(video, audio).flatten(0, 1), label.flatten()).backward()
        optimiser.step()
    video, audio, label = clips(256, 99)
    with torch.no_grad():
        return (net.eval()(video, audio).argmax(-1) == label).float().mean().item()


STATEMENT = "guidance in both directions labels segments whose sound is partly lost: accuracy"


def test_co_guidance_labels_segments_better(claim) -> None:
    claim(
        f"{STATEMENT}, 80 steps", ours=accuracy(0.4, 0, 80), baseline=accuracy(0.0, 0, 80), better="higher",
        margin=0.02, baseline_name="guidance by sound only", seed=0,
    )  # fmt: skip


@pytest.mark.slow
def test_co_guidance_labels_segments_better_over_seeds(claim) -> None:
    both, sound, mean = (sum(accuracy(psi, seed, 300) for seed in range(3)) / 3 for psi in (0.4, 0.0, None))
    claim(
        f"{STATEMENT}, 3 seeds", ours=both, baseline=sound, better="higher", margin=0.02,
        baseline_name="guidance by sound only", seed=0,
    )  # fmt: skip
    claim(
        "guidance by sound alone labels segments better than the mean of the grid: accuracy, 3 seeds",
        ours=sound, baseline=mean, better="higher", margin=0.05, baseline_name="the mean of the grid, no guidance",
        seed=0,
    )  # fmt: skip
