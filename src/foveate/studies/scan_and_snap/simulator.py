"""Training dynamics of one attention layer and a decoder, on tokens: Scan and Snap.

Scan and Snap: Understanding Training Dynamics and Token Composition in 1-layer Transformer (2023), arXiv 2305.16380.
The gradients are written out as the paper does, without autograd.
"""

from __future__ import annotations

from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.checked import Checked
from foveate.studies.scan_and_snap.dynamics import Dynamics, attended
from foveate.studies.scan_and_snap.token_classes import Sequences, TokenClasses


class Gradients(NamedTuple):
    """Descent directions of the decoder `y (L, M)` and the attention scores `z (Q, L)`, and the mean loss."""

    y: Tensor
    z: Tensor
    loss: float


@final
class ScanAndSnap(Checked):
    """A layer of attention without positions and a decoder, trained to predict the next token from z = 0 and y = 0.

    The last token m of a sequence asks; a token l of the context has the score `z[m, l]`. Attention gives the shares
    `c_l = p_l exp(z[m, l]) / sum`, where p are the tokens' shares of the context. The decoder reads them at length 1:
    the logits of the next token are `yᵀ c / |c|`, and the loss is the cross entropy.

    Args:
        data: the classes of sequences; None draws `TokenClasses.drawn()` from seed 0.
        normalize: False leaves the division by |c| out, for comparison.
    """

    def __init__(self, data: TokenClasses | None = None, normalize: bool = True) -> None:
        self.data = TokenClasses.drawn(generator=torch.Generator().manual_seed(0)) if data is None else data
        self.normalize = normalize

    def run(
        self, eta_y: float = 1.0, eta_z: float = 0.1, steps: int = 2000, *, context: int | None = None,
        batch: int = 128, generator: torch.Generator | None = None,
    ) -> Dynamics:  # fmt: skip
        """Train by gradient descent, and keep the scores of every step.

        Args:
            eta_y, eta_z: the learning rates of decoder and attention. The paper's theory has a decoder that learns
                much faster. (The authors' experiments add a momentum of 0.9.)
            steps: the number of steps.
            context: the number of context tokens of sampled sequences; None takes the exact expectation over sequences
                of infinite length.
            batch: the number of sampled sequences in a step.
            generator: draws the sequences.
        """
        validate.between("eta_y", eta_y, 0, 1e6)
        validate.between("eta_z", eta_z, 0, 1e6)
        for name, value in (("steps", steps), ("context", 1 if context is None else context), ("batch", batch)):
            validate.count(name, value, 1)
        data = self.data
        expected = Sequences(data.p, torch.arange(len(data.p)))
        y = data.p.new_zeros(data.p.shape[1], data.vocabulary)
        z = data.p.new_zeros(data.queries, data.p.shape[1])
        scores, losses = [z], list[float]()
        for _ in range(steps):
            seen = expected if context is None else data.sample(batch, context, generator)
            found = gradients(seen, data.query[seen.classes], y, z, self.normalize)
            y, z = y + eta_y * found.y, z + eta_z * found.z
            scores.append(z)
            losses.append(found.loss)
        return Dynamics(data, eta_y, eta_z, torch.stack(scores), torch.tensor(losses, dtype=torch.float64))


def gradients(
    seen: Sequences, query: Int[Tensor, " b"], y: Float[Tensor, "l m"], z: Float[Tensor, "q l"], normalize: bool = True
) -> Gradients:
    """Return the descent directions of the mean cross entropy over sequences.

    Args:
        seen: the sequences.
        query: the query token of each.
        y, z: the decoder and the scores.
        normalize: see `ScanAndSnap`.
    """
    c = attended(seen.shares, z[query])
    length = c.norm(dim=-1, keepdim=True) if normalize else torch.ones_like(c[:, :1])
    f = c / length
    log_p = (f @ y).log_softmax(-1)
    target = F.one_hot(seen.classes, y.shape[1]).to(y.dtype)
    surprise = (target - log_p.exp()) / len(c)
    back = surprise @ y.mT
    if normalize:
        back = (back - f * (f * back).sum(-1, keepdim=True)) / length  # P_perp(c) / |c|
    own = c * (back - (c * back).sum(-1, keepdim=True))
    loss = -log_p.gather(1, seen.classes[:, None]).mean().item()
    return Gradients(f.mT @ surprise, torch.zeros_like(z).index_add(0, query, own), loss)
