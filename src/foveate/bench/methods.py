"""Turn a catalogue key into methods that `compare` applies at a budget."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from foveate.bench.comparison.model_context import context_length
from foveate.bench.known import FULL, PACKED
from foveate.bench.parts import digest
from foveate.core.catalog import system
from foveate.host import Host, Method, Packed
from foveate.host.method import describe
from foveate.host.operator_swap import PrefillSwap
from foveate.kv.base.policy import Policy
from foveate.kv.parts.calibration_store import digest as tensors_digest
from foveate.kv.renumbered import Renumbered
from foveate.ops.operator import Operator

#: Returns a policy's calibration for the model, given its class and key.
Calibrations = Callable[[type[Policy], str], dict[str, Tensor]]


class Contender:
    """One entry of a comparison: the methods of a key (none for the full cache) at each prompt's own budget.

    Args:
        key: a catalogue key, or "full".
        host: the model.
        budget: the share of each prompt's cache; 1 for methods that take none, such as the full cache.
        renumber: True lets positions count the kept tokens if the policy evicts. It then keeps at most half of the
            model's context, which leaves room for the next piece of text.
    """

    def __init__(self, key: str, host: Host, budget: float, renumber: bool = False) -> None:
        self.key, self.host, self.renumber = key, host, renumber
        self.title, self.arxiv = "full cache", ""
        self._class: type | None = None
        self._calibration: dict[str, Tensor] = {}
        self._methods: dict[int, tuple[Method, ...]] = {}
        if key == PACKED:
            self.title, self._class = "full cache, grouped heads packed", Packed
        elif key != FULL:
            row = system(key)
            self.title, self.arxiv, self._class = row.title, row.arxiv, row.load()
        self.takes_budget = self._class is not None and _takes_budget(self._class, host)
        self.budget = budget if self.takes_budget else 1.0

    def calibrate(self, calibrations: Calibrations) -> None:
        """Get the policy's calibration for the model; call it before the other methods."""
        if self._class is not None and issubclass(self._class, Policy):
            self._calibration = calibrations(self._class, self.key)

    @property
    def identity(self) -> str:
        """The digest of all that distinguishes two contenders on the same prompt."""
        return digest.of(self.key, self.budget, self.renumber, tensors_digest(self._calibration))

    def at(self, length: int) -> tuple[Method, ...]:
        """Return the methods for a prompt of `length` tokens."""
        if length not in self._methods:
            own = () if self._class is None else (self._create(self._class, self._counted_length(length)),)
            extra = (Renumbered(),) if self.renumber and any(method.evicts for method in own) else ()
            self._methods[length] = (*own, *extra)
        return self._methods[length]

    def _counted_length(self, length: int) -> int:
        """Return the length of which the budget is a share."""
        context = context_length(self.host.config)
        if context is None or not (self.renumber and getattr(self._class, "evicts", False)):
            return length
        return min(length, int(context / 2 / self.budget))

    def options(self, lengths: Iterable[int]) -> dict[str, Any]:
        """Return the methods' settings for prompts of these lengths; `a to b` if they differ."""
        each = [method_options(method) for length in sorted(set(lengths)) for method in self.at(length)[:1]]
        found = {name: _span([options[name] for options in each if name in options]) for name in (each or [{}])[0]}
        extra = {"positions": "of the kept tokens"} if self._renumbers else {}
        return {**found, **extra, **({"arxiv": self.arxiv} if self.arxiv else {})}

    @property
    def _renumbers(self) -> bool:
        return self.renumber and any(
            isinstance(method, Renumbered) for methods in self._methods.values() for method in methods
        )

    def _create(self, cls: type[Any], length: int) -> Method:
        if issubclass(cls, Policy):
            return cls.at_budget(self.budget, self.host, length, **self._calibration)
        if issubclass(cls, Operator):
            return PrefillSwap(_operator(cls, self.host, self.budget, length))
        return cls()


def _takes_budget(cls: type, host: Host) -> bool:
    """Return whether the method is created for a budget."""
    if issubclass(cls, Operator):
        # mypy takes a bound class method for a plain function
        default = cls.at_budget.__func__ is Operator.at_budget.__func__  # type: ignore[attr-defined]
        return not default and not _sizes(cls, host)
    return issubclass(cls, Policy)


def _sizes(cls: type[Operator], host: Host) -> dict[str, Any]:
    """Return the model's sizes that the operator needs; empty if it is created for a budget."""
    sizes = {"heads": host.heads, "kv_heads": host.kv_heads, "head_dim": head_dim(host)}
    accepted = inspect.signature(cls.__init__).parameters
    needs_sizes = any(name in sizes and option.default is option.empty for name, option in accepted.items())
    needed: dict[str, Any] = {name: size for name, size in sizes.items() if name in accepted} if needs_sizes else {}
    if "learned" in accepted:  # without a layer that makes its gates, the operator has to learn its own
        needed["learned"] = (host.heads, head_dim(host))
    return needed


def _operator(cls: type[Operator], host: Host, budget: float, length: int) -> Operator:
    """Create the operator with the model's sizes, if it needs them, and parameters of a fixed seed."""
    needed = _sizes(cls, host)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        operator = cls(**needed) if needed else cls.at_budget(budget, length)
    return operator.to(host.model.device, host.model.dtype).eval()


def head_dim(host: Host) -> int:
    """Return the channels of each head's queries and keys."""
    return int(getattr(host.config, "head_dim", None) or host.config.hidden_size // host.heads)


def method_options(method: Method) -> dict[str, Any]:
    swapped = isinstance(method, PrefillSwap)
    shown = vars(method.operator) if isinstance(method, PrefillSwap) else describe(method)
    plain = {name: value for name, value in shown.items() if isinstance(value, int | float | str | tuple)}
    options = {name: value for name, value in plain.items() if not name.startswith("_") and name != "training"}
    for name, value in shown.items():
        if isinstance(value, Tensor) and value.dtype == torch.bool:
            options[name] = f"{int(value.sum())} of {value.numel()}"
    if swapped:
        options["while"] = "reading the prompt"
    if isinstance(method, PrefillSwap) and (count := sum(x.numel() for x in method.operator.parameters())):
        options["parameters"] = f"{count:,}, untrained"
    return options


def _span(values: list[Any]) -> Any:
    if all(value == values[0] for value in values):
        return values[0]
    if all(isinstance(value, int | float) for value in values):
        return f"{min(values):.4g} to {max(values):.4g}"
    return f"{values[0]} to {values[-1]}"
