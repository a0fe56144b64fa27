"""REINFORCE for hard attention: locations are sampled, and rewarded by the likelihood of the text that they lead to.

Show, Attend and Tell: Neural Image Caption Generation with Visual Attention (2015), arXiv 1502.03044; its network is
`foveate.nn.VisualAttentionLSTM`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.checked import Checked
from foveate.core.errors import ShapeError, shown
from foveate.nn.seq2seq.show_attend_tell import VisualAttentionLSTM
from foveate.ops.functional.normalizers import sample
from foveate.train.base.objective import Loss


@final
class HardAttentionLoss(Checked, nn.Module):
    """The loss of a caption whose locations s are drawn from alpha, one a step.

    It minimises `-log p(y | s) - reward (log p(y | s) - b) log p(s) - entropy H[alpha]`, in the mean over captions; the
    middle term passes only its gradient on to alpha, with the reward as a constant. b is a moving average of `log p(y |
    s)` over calls, which lowers the variance and leaves the mean of the gradient as it is.

    The gradient is that of a lower bound of `log p(y)`. It is noisy: the wrong choice where soft attention will do.

    Args:
        generator: draws the locations, and the captions that read by the expectation.
        reward: the factor of the reward. The paper chooses it by validation; the release has 0.1.
        entropy: the factor of the entropy of alpha, summed over steps; also chosen by validation, 0 in the release.
        expectation: the probability that a caption reads the mean of the vectors under alpha in place of samples, which
            lowers the variance too. The release draws once a batch, the paper once an image, as here.
        decay: of the average.

    b starts at 0. A call in training mode updates it after use; `state_dict` holds it. By default the release weighs
    each location by the word of its own step alone, over 10 and without b; this is the rule of the paper.
    """

    baseline: Tensor

    def __init__(
        self, generator: torch.Generator, reward: float = 1.0, entropy: float = 0.0, *, expectation: float = 0.5,
        decay: float = 0.9,
    ) -> None:  # fmt: skip
        super().__init__()
        validate.at_least("reward", reward, 0)
        validate.at_least("entropy", entropy, 0)
        validate.between("expectation", expectation, 0, 1)
        validate.between("decay", decay, 0, 1)
        self.generator, self.reward, self.entropy = generator, reward, entropy
        self.expectation, self.decay = expectation, decay
        self.register_buffer("baseline", torch.zeros(()))

    def forward(self, model: VisualAttentionLSTM, batch: Mapping[str, Any]) -> Loss:
        """Return the loss of a batch.

        Args:
            model: the network; in either mode, since the locations are chosen here.
            batch: "memory", "tokens" and, optionally, "mask", as in a call of the model, and the token after each of
                "tokens" under "labels" `(B, T)`; -100 behind a caption's end.
        """
        memory, labels = batch["memory"], batch["labels"]
        if not isinstance(labels, Tensor) or labels.shape != batch["tokens"].shape:
            raise ShapeError(f"labels must be as the tokens, {shown(batch['tokens'])}; got {shown(labels)}")
        expected = _uniform((len(memory),), memory, self.generator) < self.expectation
        looked = model.look(memory, batch["tokens"], drawing(expected, self.generator), batch.get("mask"))
        written = labels >= 0
        log_y = log_likelihood(looked.logits, labels)
        log_s = _log_chosen(looked.weights, looked.chosen, written).masked_fill(expected, 0.0)
        gain = (log_y - self.baseline.to(log_y)).detach() * (log_s - log_s.detach())  # 0, with a gradient
        spread = _entropy(looked.weights, written)
        if self.training:
            self.baseline.lerp_(log_y.detach().mean().to(self.baseline), 1 - self.decay)
        words, locations, spread = -log_y.mean(), -self.reward * gain.mean(), -self.entropy * spread.mean()
        parts = {"words": words.detach(), "locations": locations.detach(), "entropy": spread.detach()}
        return Loss(words + locations + spread, parts, looked)


def drawing(expected: Bool[Tensor, " b"], generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Return a choice of locations for `look`: a sample, or alpha itself for the examples in `expected`."""

    def choose(weights: Float[Tensor, "b s"]) -> Tensor:
        drawn = sample(weights.log(), _uniform((len(weights),), weights, generator))
        return torch.where(expected[:, None], weights, drawn)

    return choose


def log_likelihood(logits: Float[Tensor, "b t v"], labels: Int[Tensor, "b t"]) -> Float[Tensor, " b"]:
    """Return the log-probability of each sequence; labels below 0 do not count."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    each = wide.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return each.masked_fill(labels < 0, 0.0).sum(-1)


def _log_chosen(weights: Tensor, chosen: Tensor, written: Tensor) -> Float[Tensor, " b"]:
    """Return the log-probability of each example's locations, over the steps of its real words."""
    picked = (weights * chosen.detach()).sum(-1)
    return torch.where(written & (picked > 0), picked, 1.0).log().sum(-1)


def _entropy(weights: Tensor, written: Tensor) -> Float[Tensor, " b"]:
    """Return the entropy of each example's distributions, over the steps of its real words."""
    each = -weights * torch.where(weights > 0, weights, 1.0).log()  # `entr` has an infinite gradient at 0
    return each.sum(-1).masked_fill(~written, 0.0).sum(-1)


def _uniform(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device).to(like.device)
