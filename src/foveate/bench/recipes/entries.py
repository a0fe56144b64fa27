"""Methods as JSON data, and back.

An entry is `{"method": key, "options": {...}}` with all options. With a "budget" it stands for the method that uses
that share of each prompt's cache, whatever the prompt's length: `learnt` holds what the method learnt of the model, and
`options` only what differs from `Policy.at_budget`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from torch import Tensor, nn

from foveate.bench.methods import Contender
from foveate.bench.recipes import names, values
from foveate.bench.recipes.values import Tensors
from foveate.core import validate
from foveate.core.errors import FoveateError, OptionError, nearest, shown
from foveate.host import Host, Method
from foveate.host.operator_swap import PrefillSwap
from foveate.ops.operator import Operator

_PARTS = ("method", "options", "budget", "learnt", "layers", "parameters")
_MOST = 32  # objects inside each other


def entry(method: Method, where: str, tensors: Tensors) -> dict[str, Any]:
    """Return a method as JSON data."""
    if isinstance(method, PrefillSwap):
        return _swap_entry(method, where, tensors)
    name = names.name_of(type(method))
    if not is_dataclass(method):
        if vars(method):
            raise OptionError(f"{name} holds data of its own, which a recipe cannot hold")
        return {"method": name, "options": {}}
    some = {item.name: getattr(method, item.name) for item in fields(method) if item.init}
    return {"method": name, "options": _options(some, where, tensors)}


def _swap_entry(swap: PrefillSwap, where: str, tensors: Tensors) -> dict[str, Any]:
    operator = swap.operator
    found: dict[str, Any] = {"method": names.name_of(type(operator))}
    if any(type(value).__name__ == "Generator" for value in vars(operator).values()):
        raise OptionError(f"{found['method']} draws from a generator, which a recipe cannot hold")
    found["options"] = _options(operator.given, where, tensors)
    if swap.layers is not None:
        found["layers"] = list(swap.layers)
    if state := operator.state_dict():
        found["parameters"] = _options(state, f"{where}.parameters", tensors)
    return found


def _options(some: Mapping[str, Any], where: str, tensors: Tensors) -> dict[str, Any]:
    return {
        name: values.to_json(value, f"{where}.{name}", tensors, lambda inner, at: entry(inner, at, tensors))
        for name, value in some.items()
    }


@dataclass(frozen=True)
class Maker:
    """Makes methods from entries.

    Args:
        tensors: the recipe's tensors.
        host: the model; None if no entry has a budget.
        length: the tokens of the prompt, of which budgets are shares.
        renumber: whether positions count the kept tokens.
    """

    tensors: Tensors
    host: Host | None = None
    length: int | None = None
    renumber: bool = False

    def __call__(self, raw: Any, where: str) -> Method:
        """Return the method of an entry.

        Raises:
            FoveateError: the entry is not valid; the message is one line.
        """
        _check(raw, where)
        cls: type[Any] = names.class_of(raw["method"])
        given = raw.get("options", {})
        hints = values.hints_of(cls)
        options = {
            name: values.from_json(value, f"{where}.{name}", hints.get(name), self.tensors, self)
            for name, value in given.items()
        }
        try:
            if raw.get("budget") is not None:
                return with_options(self._at_budget(raw, where), options, raw["method"])
            _check_names(cls, options, raw["method"])
            return self._swap(cls, options, raw, where) if issubclass(cls, Operator) else cls(**options)
        except FoveateError as error:
            raise OptionError(f"{raw['method']}: {error}") from None
        except Exception as error:  # noqa: BLE001  a constructor may fail in any way on a value of the wrong type
            raise OptionError(f"{raw['method']}: {type(error).__name__}: {shown(str(error))}") from None

    def _at_budget(self, raw: dict[str, Any], where: str) -> Method:
        validate.between("budget", raw["budget"], 0.0, 1.0)
        if self.host is None or self.length is None:
            raise OptionError("it has a budget, which needs a model and a length of the prompt")
        learnt = self._tensors(raw.get("learnt", {}), f"{where}.learnt")
        contender = Contender(raw["method"], self.host, float(raw["budget"]), self.renumber)
        contender.calibrate(lambda cls, key: learnt)
        return contender.at(self.length)[0]

    def _tensors(self, raw: Any, where: str) -> dict[str, Tensor]:
        found = {name: values.from_json(value, where, None, self.tensors, self) for name, value in raw.items()}
        if not all(isinstance(value, Tensor) for value in found.values()):
            raise OptionError(f"{where} must hold tensors only")
        return found

    def _swap(self, cls: type[Operator], options: dict[str, Any], raw: dict[str, Any], where: str) -> PrefillSwap:
        operator, state = cls(**options), self._tensors(raw.get("parameters", {}), f"{where}.parameters")
        _load_state(operator, state)
        if self.host is not None:
            operator.to(self.host.model.device, self.host.model.dtype)
        return PrefillSwap(operator.eval(), raw.get("layers") and tuple(raw["layers"]))


def _load_state(operator: nn.Module, state: dict[str, Tensor]) -> None:
    floating = [value for value in state.values() if value.is_floating_point()]
    if floating:
        operator.to(floating[0].dtype)
    try:
        operator.load_state_dict(state)
    except RuntimeError as error:
        raise OptionError(f"its parameters do not fit: {' '.join(str(error).split())[:200]}") from None


def with_options(method: Method, options: Mapping[str, Any], name: str) -> Method:
    """Return the method with some options changed; one that a wrapper takes from its base is changed there."""
    if not options:
        return method
    own = {item.name for item in fields(method) if item.init} if is_dataclass(method) else set[str]()
    here = {key: value for key, value in options.items() if key in own}
    inner = {key: value for key, value in options.items() if key not in own}
    base = here.get("base", getattr(method, "base", None))
    if inner and isinstance(base, Method):
        here["base"], inner = with_options(base, inner, name), {}
    if inner:
        raise OptionError(f"{name} has no option {shown(next(iter(inner)))}")
    return replace(method, **here)  # type: ignore[type-var]  # it has own options, so that it is a dataclass


def _check(raw: Any, where: str) -> None:
    """Refuse an entry of another form."""
    if not isinstance(raw, dict) or not isinstance(raw.get("method"), str):
        raise OptionError(f'method {where} must be an object with a "method"; got {shown(raw)}')
    for part in raw:
        if part not in _PARTS:
            raise OptionError(f"{where} has an unknown part {shown(part)}; known: {', '.join(_PARTS)}")
    for part in ("options", "learnt", "parameters"):
        if not isinstance(raw.get(part, {}), dict):
            raise OptionError(f"{where}.{part} must be an object; got {shown(raw[part])}")
    if not isinstance(raw.get("layers", []), list):
        raise OptionError(f"{where}.layers must be a list of layers; got {shown(raw['layers'])}")


def _check_names(cls: type, options: Mapping[str, Any], method: str) -> None:
    """Refuse options that the class does not have."""
    if is_dataclass(cls):
        known = [item.name for item in fields(cls) if item.init]
    else:
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]
        known = [each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    for name in options:
        if name not in known:
            near = nearest(name, known)
            raise OptionError(f"no option {shown(name)}" + (f"; did you mean {near!r}?" if near else ""))


def check_depth(content: Any) -> None:
    """Refuse JSON data with too many objects inside each other."""
    level = [content]
    for _ in range(_MOST):
        level = [item for each in level for item in _items(each)]
        if not level:
            return
    raise OptionError(f"more than {_MOST} objects are inside each other")


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
