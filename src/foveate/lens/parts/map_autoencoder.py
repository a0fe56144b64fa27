"""An auto-encoder of pictures of attention: a small network that learns to describe each by a few numbers."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class MapAutoencoder(nn.Module):
    """An MLP that encodes pictures in `latent` numbers, and decodes these.

    Args:
        pixels: numbers of a picture.
        latent: numbers that describe it.
        hidden: width of the layer before and after.
        generator: draws the weights.
    """

    def __init__(self, pixels: int, latent: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, latent))
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, pixels))
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter, generator=generator)
            else:
                nn.init.zeros_(parameter)

    def forward(self, x: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
        return self.decoder(self.encoder(x))

    def fit(
        self, x: Float[Tensor, "n p"], steps: int, generator: torch.Generator, batch: int = 128, rate: float = 1e-3
    ) -> float:
        """Train on pictures by their mean squared error, and return that of all of them."""
        optimiser = torch.optim.Adam(self.parameters(), lr=rate)
        with torch.enable_grad():
            for _ in range(steps):
                some = x[torch.randint(len(x), (min(batch, len(x)),), generator=generator).to(x.device)]
                optimiser.zero_grad()
                F.mse_loss(self(some), some).backward()
                optimiser.step()
        with torch.no_grad():
            return float(F.mse_loss(self(x), x))
