"""A setting: policies with their options, each at a budget, on some layers or on all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from foveate.bench.parts import digest
from foveate.bench.recipes.recipe import Recipe
from foveate.bench.recipes.values import Tensors
from foveate.host import Host, Method
from foveate.kv.parts import calibration_store

#: Tensors that each policy learnt of the model, by its key.
Learnt = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Arm:
    """A policy with options, without a budget.

    Args:
        key: the policy's key in the catalogue.
        options: options that differ from those of `Policy.at_budget`, by name.
    """

    key: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        return ", ".join([self.key, *(f"{name}={value}" for name, value in self.options)])

    def with_option(self, name: str, value: Any) -> Arm:
        return replace(self, options=tuple(sorted({**dict(self.options), name: value}.items())))


@dataclass(frozen=True)
class Part:
    """An arm at a budget, on some layers; None is all of them."""

    arm: Arm
    budget: float
    layers: tuple[int, ...] | None = None

    def entry(self, learnt: Mapping[str, Any]) -> dict[str, Any]:
        """Return the part as an entry of a recipe."""
        options: dict[str, Any] = dict(self.arm.options)
        if (base := options.get("base")) is not None:
            options["base"] = {"method": base, "budget": self.budget}
        if self.layers is not None:
            options["layers"] = list(self.layers)
        found = {"method": self.arm.key, "budget": self.budget, "options": options}
        return {**found, "learnt": dict(learnt)} if learnt else found


@dataclass(frozen=True)
class Setting:
    """One part, or several; where two act on a layer, a token stays if both keep it.

    Without a part it is the full cache.

    Args:
        parts: what drops tokens.
        codec: what holds the tokens that stay encoded, with its options; None leaves them in full precision.
    """

    parts: tuple[Part, ...] = ()
    codec: Arm | None = None

    @classmethod
    def of(cls, arm: Arm, budget: float) -> Setting:
        """Return the arm at one budget for all layers."""
        return cls((Part(arm, budget),)) if budget < 1 else cls()

    @classmethod
    def by_layer(cls, arm: Arm, budgets: Mapping[int, float], base: Setting | None = None) -> Setting:
        """Return the arm with a budget for each layer of the cache, beside a base; 1 keeps what the base does."""
        levels = sorted(set(budgets.values()))
        parts = () if base is None else base.parts
        if len(levels) == 1:
            return cls((*parts, *cls.of(arm, levels[0]).parts))
        chosen = {level: tuple(layer for layer in sorted(budgets) if budgets[layer] == level) for level in levels}
        return cls((*parts, *(Part(arm, level, layers) for level, layers in chosen.items() if level < 1)))

    @property
    def label(self) -> str:
        shares: dict[str, list[str]] = {}
        for part in self.parts:
            where = "" if part.layers is None else f" in {_numbers(part.layers)}"
            shares.setdefault(part.arm.label, []).append(f"{part.budget:.3g}{where}")
        names = [f"{arm} at {', '.join(each)}" for arm, each in shares.items()]
        return " + ".join(names + ([self.codec.label] if self.codec else [])) or "full cache"

    def recipe(self, learnt: Learnt) -> Recipe:
        """Return the recipe, which names no model yet."""
        tensors, entries = Tensors(), []
        for number, part in enumerate(self.parts):
            own = learnt.get(part.arm.key, {})
            named = {name: {"tensor": tensors.add(f"{number}.{name}", x)} for name, x in own.items()}
            entries.append(part.entry(named))
        if self.codec is not None:
            entries.append({"method": self.codec.key, "options": dict(self.codec.options)})
        return Recipe(entries, tensors)

    def methods(self, host: Host, length: int, learnt: Learnt) -> tuple[Method, ...]:
        """Return the methods for a prompt of `length` tokens."""
        return self.recipe(learnt).at(host, length)

    def identity(self, learnt: Learnt) -> str:
        """Return the digest of all that distinguishes two settings on the same prompt."""
        own = {part.arm.key: calibration_store.digest(learnt.get(part.arm.key, {})) for part in self.parts}
        codec = () if self.codec is None else ((self.codec.key, self.codec.options),)
        return digest.of([part.entry({}) for part in self.parts], own, *codec)


def _numbers(layers: tuple[int, ...]) -> str:
    """Write layers as ranges: 0-3, 7."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    shown = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"layer {shown}" if len(layers) == 1 else f"layers {shown}"
