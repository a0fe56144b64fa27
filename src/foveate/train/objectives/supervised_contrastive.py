"""The supervised contrastive loss: states with the same label come together.

Supervised Contrastive Learning (2020), arXiv 2004.11362, in the form of Leveraging Graph Structures to Detect
Hallucinations in Large Language Models (2024), arXiv 2407.04485.
"""

from __future__ import annotations

from typing import Self, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.train.base.objective import Batch, Loss, Objective, inputs_of, labels_of


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
    _check_temperature(temperature)
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


@final
class SupervisedContrastive(Objective):
    """`supcon_loss` as an objective: the model's outputs are states, and labels say which belong together.

    Args:
        temperature, own: see `supcon_loss`.
    """

    def __init__(self, temperature: float = 0.07, *, own: bool = True) -> None:
        super().__init__()
        _check_temperature(temperature)
        self.temperature, self.own = temperature, own

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        z = model(**inputs_of(batch))
        return Loss(supcon_loss(z, labels_of(batch), self.temperature, own=self.own), outputs=z)

    def plain(self, model: nn.Module, batch: Batch) -> Loss:
        return self(model, batch)

    @classmethod
    def example(cls) -> tuple[Self, nn.Module, Batch]:
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
        net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        return cls(), net, {"input": x, "labels": torch.arange(6) % 2}


def _check_temperature(temperature: float) -> None:
    if isinstance(temperature, bool) or not temperature > 0:
        raise OptionError(f"temperature={shown(temperature)} must be a number above 0")
