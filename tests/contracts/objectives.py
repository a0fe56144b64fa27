"""Every objective of the catalogue with its example, and further ways through some of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from foveate.core.catalog import systems
from foveate.train import (
    AttentionAT,
    CutMix,
    Objective,
    SupervisedContrastive,
    VariationalAttention,
    VariationalObjective,
)

Made = tuple[Objective, nn.Module, Mapping[str, Any]]


def listed(kind: type) -> dict[str, Any]:
    """Return the classes of a kind that rows of the catalogue list, by name."""
    targets = {target for row in systems() for target in (row.object, *row.parts) if ":" in target}
    found = {}
    for module, _, name in (target.partition(":") for target in sorted(targets)):
        if module.startswith("foveate.train."):
            value = getattr(import_module(module), name)
            if isinstance(value, type) and issubclass(value, kind):
                found[name] = value
    return found


CLASSES = listed(Objective)


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, num_labels=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.5,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def texts() -> dict[str, Any]:
    ids = torch.tensor([[3, 7, 9, 4, 2], [5, 1, 8, 0, 0], [6, 6, 2, 11, 0]])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([0, 1, 1])}


def with_batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def variational(objective: Any, **options: Any) -> Made:
    _, _, batch = VariationalObjective.example()
    return VariationalObjective(), VariationalAttention(3, 4, 5, 6, objective=objective, **options), batch


#: Other options, models and paths.
EXTRA: dict[str, Callable[[], Made]] = {
    "AttentionAT along differences": lambda: (AttentionAT(kind="iat"), *AttentionAT.example()[1:]),
    "AttentionAT of the release": lambda: (AttentionAT(kind="iat", difference="batch"), *AttentionAT.example()[1:]),
    "AttentionAT on transformers": lambda: (AttentionAT(kind="iat"), bert(), texts()),
    "CutMix by image": lambda: (CutMix(per_sample=True, generator=seeded()), *CutMix.example()[1:]),
    "CutMix between sides": lambda: (CutMix(minmax=(0.2, 0.8), generator=seeded()), *CutMix.example()[1:]),
    "CutMix of features": lambda: (CutMix(at="1", generator=seeded()), *CutMix.example()[1:]),
    "CutMix with batch norm": lambda: (CutMix(generator=seeded()), with_batch_norm(), CutMix.example()[2]),
    "SupervisedContrastive without itself": lambda: (
        SupervisedContrastive(0.5, own=False), *SupervisedContrastive.example()[1:],
    ),
    "VariationalObjective, exact": lambda: variational("exact"),
    "VariationalObjective, soft": lambda: variational("soft"),
    "VariationalObjective, relaxed": lambda: variational("elbo", estimator="gumbel", generator=seeded()),
}  # fmt: skip

CASES: dict[str, Callable[[], Made]] = {**{name: cls.example for name, cls in CLASSES.items()}, **EXTRA}


def make(name: str) -> Made:
    """Make an objective, a model in training mode and a batch, with parameters from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        objective, model, batch = CASES[name]()
    return objective, model.train(), batch


@dataclass(frozen=True)
class Generators:
    """The generators that an objective and a model hold, at any depth of dictionaries, and their states."""

    states: list[tuple[torch.Generator, torch.Tensor]]

    @classmethod
    def of(cls, objective: Objective, model: nn.Module) -> Generators:
        found: list[torch.Generator] = []

        def search(values: Mapping[str, Any]) -> None:
            for value in values.values():
                if isinstance(value, torch.Generator):
                    found.append(value)
                elif isinstance(value, dict):
                    search(value)

        for owner in (objective, *model.modules()):
            search({name: value for name, value in vars(owner).items() if name != "_modules"})
        return cls([(generator, generator.get_state()) for generator in found])

    def restore(self) -> None:
        for generator, state in self.states:
            generator.set_state(state)
