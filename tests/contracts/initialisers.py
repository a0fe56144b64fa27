"""Every initialiser of the catalogue with its example, and further ways through some of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from foveate.train import Initialiser, MimeticInit, MimeticInitSSM
from tests.contracts.objectives import listed

Made = tuple[Initialiser, nn.Module, Mapping[str, Any]]
CLASSES = listed(Initialiser)


class SelfAttention(nn.Module):
    """PyTorch's attention as a network of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.out(self.inner(input, input, input, need_weights=False)[0])


def mamba() -> nn.Module:
    return MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=16, state_size=8, num_hidden_layers=2))


EXTRA: dict[str, Callable[[], Made]] = {
    "MimeticInit on PyTorch's attention": lambda: (
        MimeticInit(beta_qk=0.2), SelfAttention(), {"input": torch.linspace(-1, 1, 48).view(1, 6, 8)},
    ),
    "MimeticInitSSM on Mamba": lambda: (MimeticInitSSM(a_log=-4.0), mamba(), {"input_ids": torch.arange(10)[None]}),
    "MimeticInitSSM in part": lambda: (
        MimeticInitSSM(tie_bc=False, identity_conv=False), mamba(), {"input_ids": torch.arange(10)[None]},
    ),
}  # fmt: skip

CASES: dict[str, Callable[[], Made]] = {**{name: cls.example for name, cls in CLASSES.items()}, **EXTRA}


def make(name: str, dtype: torch.dtype = torch.float32) -> Made:
    """Make an initialiser, a model with parameters from a seed, and inputs of the model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        initialise, model, inputs = CASES[name]()
    inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}
    return initialise, model.to(dtype).eval(), inputs
