"""The supervised contrastive loss: states with the same label come together.

Supervised Contrastive Learning (2020), arXiv 2004.11362, in the form of Leveraging Graph Structures to Detect
Hallucinations in Large Language Models (2024), arXiv 2407.04485.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown


def supcon_loss(
    z: Float[Tensor, "b d"], labels: Int[Tensor, " b"], temperature: float = 0.07, *, own: bool = True
) -> Float[Tensor, ""]:
    """Return the mean over states, and over each state's positives, of `logsumexp_k(s_ik) - s_ij`, s = cosine / T.

    Positives are the other states with the same label. A state without any does not count; 0 if there is no other.

    Args:
        z: states.
        labels: of each state.
        temperature: T.
        own: True counts a state's similarity to itself in the sum, as the release does; False leaves it out, as
            supervised contrastive learning does.
    """
    if z.dim() != 2 or labels.shape != z.shape[:1]:
        raise ShapeError(f"z must be states (B, D) and labels (B,); got {shown(z)} and {shown(labels)}")
    if isinstance(temperature, bool) or not temperature > 0:
        raise OptionError(f"temperature={shown(temperature)} must be a number above 0")
    unit, same = F.normalize(z, dim=-1), torch.eye(len(z), dtype=torch.bool, device=z.device)
    similarity = unit @ unit.mT / temperature
    total = (similarity if own else similarity.masked_fill(same, torch.finfo(z.dtype).min)).logsumexp(-1, keepdim=True)
    positive = (labels[:, None] == labels) & ~same
    counts = positive.sum(-1)
    each = torch.where(positive, total - similarity, 0.0).sum(-1) / counts.clamp_min(1)
    return each.sum() / (counts > 0).sum().clamp_min(1)


def pretrain_embedder(
    embedder: nn.Module, x: Float[Tensor, "n c"], labels: Int[Tensor, " n"], *, epochs: int = 1000, batch: int = 256,
    lr: float = 1e-4, decay: float = 1e-4, temperature: float = 0.07, seed: int = 0,
) -> list[float]:  # fmt: skip
    """Train an embedder in place with `supcon_loss`; return the mean loss of each epoch.

    AdamW, whose rate falls to a fiftieth along a cosine over the epochs. As in the release, the last batch of an epoch
    is left out if it is not full; with fewer examples than a batch, all of them are the batch.

    Args:
        embedder: maps `(B, C)` to `(B, D)`, such as `HallucinationGAT().embedder`.
        x, labels: the training examples.
        epochs, batch, lr, decay, temperature: the release's values.
        seed: of the order of examples.
    """
    validate.count("epochs", epochs, 1)
    validate.count("batch", batch, 2)
    if len(x) != len(labels) or len(x) < 2:
        raise ShapeError(f"x and labels must be two examples or more, as many; got {shown(x)} and {shown(labels)}")
    optimiser = torch.optim.AdamW(embedder.parameters(), lr=lr, weight_decay=decay)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs, eta_min=lr / 50)
    draw, losses = torch.Generator().manual_seed(seed), list[float]()
    size = min(batch, len(x))
    embedder.train()
    for _ in range(epochs):
        found = list[float]()
        for chosen in torch.randperm(len(x), generator=draw).to(x.device).split(size)[: len(x) // size]:
            loss = supcon_loss(embedder(x[chosen]), labels[chosen], temperature)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            found.append(loss.item())
        rates.step()
        losses.append(sum(found) / len(found))
    embedder.eval()
    return losses
