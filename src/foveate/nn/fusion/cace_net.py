"""Co-guidance attention of sound and sight, and a loss that keeps a video's events from its background.

CACE-Net: Co-guidance Attention and Contrastive Enhancement for Effective Audio-Visual Event Localization (2024),
arXiv 2408.01952. These are the two parts that the paper adds. The localiser around them (recurrences, cross-modal
layers and heads) is that of earlier work, and is not here.
"""

from __future__ import annotations

from typing import Self, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import masks, validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.core.scoring import safe_softmax
from foveate.nn.base.fusion import Fusion, Stream


@final
class CoGuidedAttention(Fusion):
    """Sound says where and at which channels to look, `v`; what is seen says how loud each channel of sound is, `a`.

    Per segment, with U the grid V after attention to itself:
    `v = (1 + beta sigmoid(s)) v0`, where `v0 = sum_p m_p V'_p`, `V' = V (1 + c)`, s is U's own summary, and sound makes
    the channel gate c and the map m. Over segments: `a = A (1 + psi sigmoid(G))`, where G is read from all segments'
    sound, with the seen as query. Time O(T (HW)² C + T² C). The wrong choice where sound and picture do not belong
    together, and in causal models, since a segment hears later ones.

    Streams are the grids `video` `(B, T, H, W, Cv)` and `audio` `(B, T, Ca)`; outputs are `video` `(B, T, Cv)` and
    `audio` `(B, T, Ca)`, zeros for segments that are not real. **Guidance by what is missing adds nothing**: without
    sound a segment's gate is closed (`V' = V`) and its map is uniform over the real places; without a picture a
    segment's sound stays as it is.

    Args:
        video_dim: Cv, at least 4; audio_dim: Ca.
        hidden: the width of the gates.
        beta: the share of the grid's own summary in `v`.
        psi: the share of sight's guidance in `a`; 0 is attention guided by sound only. The release's flag is 0 unless
            set, and 0.3 in the run that it reports.
        dropout: the share of self-attention's outputs that training drops.

    Raises:
        OptionError: an option out of range.

    As in the release, attention has no scale, and one LayerNorm serves both copies of the grid's self-attention.
    """

    def __init__(
        self, video_dim: int = 512, audio_dim: int = 128, hidden: int = 256, *, beta: float = 0.4, psi: float = 0.3,
        dropout: float = 0.2,
    ) -> None:  # fmt: skip
        validate.count("video_dim", video_dim, 4)
        validate.count("audio_dim", audio_dim, 1)
        validate.count("hidden", hidden, 1)
        validate.between("dropout", dropout, 0, 1)
        super().__init__(
            (Stream("video", video_dim, ("T", "H", "W")), Stream("audio", audio_dim, ("T",))),
            (Stream("video", video_dim, ("T",)), Stream("audio", audio_dim, ("T",))),
        )
        self.beta, self.psi = beta, psi
        self.drop = nn.Dropout(dropout)
        self.look = UnscaledAttention(video_dim, video_dim // 4)
        self.look_for_audio = UnscaledAttention(video_dim, video_dim // 4)
        self.video_norm = nn.LayerNorm(video_dim)
        self.summary = SummaryMap(video_dim, hidden)
        self.channels = ChannelGate(video_dim, audio_dim, hidden)
        self.places = SpatialMap(video_dim, audio_dim, hidden)
        self.listen = UnscaledAttention(audio_dim, audio_dim)
        self.audio_norm = nn.LayerNorm(audio_dim)
        self.seen_to_heard = UnscaledAttention(audio_dim, audio_dim, video_dim)

    @classmethod
    def example(cls) -> Self:
        return cls(8, 6, 5, psi=0.7)

    def _fuse(self, x: dict[str, Tensor], real: dict[str, Tensor]) -> dict[str, Tensor]:
        video, seen = x["video"].flatten(2, 3), real["video"].flatten(2, 3)
        return {
            "video": self._guide_video(video, seen, x["audio"], real["audio"]),
            "audio": self._guide_audio(video, seen, x["audio"], real["audio"]),
        }

    def _guide_video(
        self, video: Float[Tensor, "b t p c"], seen: Bool[Tensor, "b t p"], audio: Float[Tensor, "b t e"],
        heard: Bool[Tensor, "b t"],
    ) -> Float[Tensor, "b t c"]:  # fmt: skip
        """Return v: what sound makes of each segment's grid."""
        attended = self._attended(self.look, video, seen)
        summary = self.summary(attended, seen)
        gated = video * (1 + self.channels(attended, seen, audio, heard))
        guided = _weighed(self.places(gated, seen, audio, heard), gated)
        return guided + self.beta * torch.sigmoid(summary) * guided

    def _guide_audio(
        self, video: Float[Tensor, "b t p c"], seen: Bool[Tensor, "b t p"], audio: Float[Tensor, "b t e"],
        heard: Bool[Tensor, "b t"],
    ) -> Float[Tensor, "b t e"]:  # fmt: skip
        """Return a: what the seen makes of each segment's sound."""
        query = _mean(self._attended(self.look_for_audio, video, seen), seen)
        attended = self.audio_norm(audio + self.drop(self.listen(audio, heard)))
        gate = torch.sigmoid(self.seen_to_heard(attended, heard, query)).masked_fill(~seen.any(-1, keepdim=True), 0.0)
        return audio + self.psi * gate * audio

    def _attended(self, attention: UnscaledAttention, video: Tensor, seen: Tensor) -> Float[Tensor, "b t p c"]:
        return self.video_norm(video + self.drop(attention(video, seen)))


@final
class UnscaledAttention(nn.Module):
    """Attention `softmax(Q Kᵀ) V` without a scale, of one head, to the real tokens.

    Args:
        dim: width of the tokens and of the output.
        width: width of queries and keys.
        query_dim: width of what asks; None for the tokens themselves.
    """

    def __init__(self, dim: int, width: int, query_dim: int | None = None) -> None:
        super().__init__()
        self.q = nn.Linear(dim if query_dim is None else query_dim, width)
        self.k = nn.Linear(dim, width)
        self.v = nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "*b n c"], real: Bool[Tensor, "*b n"], query: Float[Tensor, "*b m e"] | None = None
    ) -> Float[Tensor, "*b m c"]:
        logits = self.q(x if query is None else query) @ self.k(x).mT
        return safe_softmax(logits.masked_fill(~real[..., None, :], masks.NEG_INF)) @ self.v(x)


@final
class SummaryMap(nn.Module):
    """The grid's own summary `s = sum_p softmax_p(tanh(w · (relu(W' U_p) * g))) U_p` with `g = relu(W mean_p U_p)`."""

    def __init__(self, video_dim: int, hidden: int) -> None:
        super().__init__()
        self.mean = nn.Linear(video_dim, hidden)
        self.each = nn.Linear(video_dim, hidden)
        self.score = nn.Linear(hidden, 1)

    def forward(self, x: Float[Tensor, "b t p c"], seen: Bool[Tensor, "b t p"]) -> Float[Tensor, "b t c"]:
        mean = F.relu(self.mean(_mean(x, seen)))[:, :, None]
        logits = torch.tanh(self.score(F.relu(self.each(x)) * mean)).squeeze(-1)
        return _weighed(safe_softmax(logits.masked_fill(~seen, masks.NEG_INF)), x)


@final
class ChannelGate(nn.Module):
    """The gate `c = sigmoid(W_2 relu(W_1 mean_p[relu(W_a A) * relu(W_v U_p)]))`, 0 in segments without sound."""

    def __init__(self, video_dim: int, audio_dim: int, hidden: int) -> None:
        super().__init__()
        self.video = nn.Linear(video_dim, video_dim)
        self.audio = nn.Linear(audio_dim, video_dim)
        self.squeeze = nn.Linear(video_dim, hidden)
        self.excite = nn.Linear(hidden, video_dim)

    def forward(
        self, x: Float[Tensor, "b t p c"], seen: Bool[Tensor, "b t p"], audio: Float[Tensor, "b t e"],
        heard: Bool[Tensor, "b t"],
    ) -> Float[Tensor, "b t 1 c"]:  # fmt: skip
        met = _mean(F.relu(self.audio(audio))[:, :, None] * F.relu(self.video(x)), seen)
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(met))))
        return gate.masked_fill(~heard[..., None], 0.0)[:, :, None]


@final
class SpatialMap(nn.Module):
    """The map `m = softmax_p(tanh(w · (relu(W_v V'_p) * relu(W_a A))))`, uniform in segments without sound."""

    def __init__(self, video_dim: int, audio_dim: int, hidden: int) -> None:
        super().__init__()
        self.video = nn.Linear(video_dim, hidden)
        self.audio = nn.Linear(audio_dim, hidden)
        self.score = nn.Linear(hidden, 1)

    def forward(
        self, x: Float[Tensor, "b t p c"], seen: Bool[Tensor, "b t p"], audio: Float[Tensor, "b t e"],
        heard: Bool[Tensor, "b t"],
    ) -> Float[Tensor, "b t p"]:  # fmt: skip
        met = F.relu(self.video(x)) * F.relu(self.audio(audio))[:, :, None]
        logits = torch.tanh(self.score(met)).squeeze(-1).masked_fill(~heard[..., None], 0.0)
        return safe_softmax(logits.masked_fill(~seen, masks.NEG_INF))


def _mean(x: Float[Tensor, "b t p c"], seen: Bool[Tensor, "b t p"]) -> Float[Tensor, "b t c"]:
    """Return the mean over real places; zeros if there are none."""
    return x.masked_fill(~seen[..., None], 0.0).sum(2) / seen.sum(-1, keepdim=True).clamp(min=1)


def _weighed(weights: Float[Tensor, "b t p"], x: Float[Tensor, "b t p c"]) -> Float[Tensor, "b t c"]:
    return (weights[:, :, None] @ x).squeeze(2)


def background_event_contrast(
    q: Float[Tensor, "b t c"], k: Float[Tensor, "b t c"], event: Bool[Tensor, "b t"], temperature: float = 0.01
) -> Float[Tensor, ""]:
    """Return the loss that draws a video's event segments together and away from its background.

    The 2T vectors of a video are the unit vectors of q and of k, a noisy copy of it. Each gives
    `-log(mean over its positives of exp(s) / sum over all others of exp(s))`, s = cosine / temperature, and the loss is
    the mean. The positives of an event segment are its copy and the video's other event segments with theirs; that of a
    background segment is its copy. The mean stands inside the logarithm, so that an event is content with one near
    positive, unlike in `foveate.train.supcon_loss`.

    Args:
        q: fused features of the segments.
        k: the same of noisy features, in the paper `encoder(f + 0.1 noise)`.
        event: True for segments of the video's event.
        temperature: of the cosines.

    Raises:
        ShapeError: inputs of the wrong shape. OptionError: a temperature that is not above 0.
    """
    if q.dim() != 3 or q.shape != k.shape or not q.numel():
        raise ShapeError(f"q and k must be features (B, T, C) of one shape; got {shown(q)} and {shown(k)}")
    validate.bool_mask("event", event, "B, T", tuple(q.shape[:2]), q.device)
    if isinstance(temperature, bool) or not temperature > 0:
        raise OptionError(f"temperature={shown(temperature)} must be a number above 0")
    event = event.expand(q.shape[:2]).repeat(1, 2)
    unit = F.normalize(torch.cat([q, k], 1), dim=-1)
    similarity = unit @ unit.mT / temperature
    same = torch.eye(2 * q.shape[1], dtype=torch.bool, device=q.device)
    copies = same.roll(q.shape[1], 0)
    positive = (event[:, :, None] & event[:, None] | copies) & ~same
    near = similarity.masked_fill(~positive, masks.NEG_INF).logsumexp(-1) - positive.sum(-1).to(unit.dtype).log()
    others = similarity.masked_fill(same, masks.NEG_INF).logsumexp(-1)
    return (others - near).mean()
