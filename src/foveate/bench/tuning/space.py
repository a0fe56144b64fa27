"""The settings to search: policies, budgets, and the options that each policy declares."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin

from foveate.bench.recipes.values import hints_of
from foveate.bench.tuning.setting import Arm
from foveate.core.catalog import system, systems
from foveate.host import Host
from foveate.host.hf.layout import layout
from foveate.kv.adakv import AdaKV
from foveate.kv.base.policy import Policy
from foveate.kv.base.scored import ScorePolicy
from foveate.kv.base.wrapping import Wrapper

#: Shares of the full cache that are tried, and that layers may have.
BUDGETS = (0.03, 0.05, 0.08, 0.12, 0.17, 0.25, 0.35, 0.5, 0.7)
#: Values of numeric options, by name. Options with a list of values or True and False are tried at all of them.
NUMBERS: dict[str, tuple[Any, ...]] = {
    "pool": (1, 9, 17), "recent": (8, 16, 32), "sink": (0, 4), "safeguard": (0.0, 0.5), "first": (0.25, 0.75),
    "newest": (0.25,), "chunk": (4, 10), "epsilon": (0.01,),
}  # fmt: skip
#: The same for policies that split heads: tokens that the heads without the whole text keep.
WINDOWS: dict[str, tuple[Any, ...]] = {"recent": (8, 16, 32), "min_window": (8, 16, 32)}
#: Options that are no matter of quality, or that the search sets itself.
_LEFT_OUT = ("share", "layers", "seed", "every", "variant")
#: Policies whose scores a wrapper may use beside its default.
_BASES = ("expected_attention",)
#: Codecs for the tokens that stay, each from its widest code to its narrowest; groups are small, since few tokens stay.
CODECS: dict[str, tuple[dict[str, Any], ...]] = {
    "eight_bit": ({"format": "int8", "group": 4},),
    "turboquant": tuple({"bits": bits, "dense": 0, "group": 4} for bits in (4, 3, 2)),
    "kivi": tuple({"bits": bits, "residual": 0, "group": 16} for bits in (4, 2)),
}
#: Baselines that nobody would choose.
_BASELINES = ("random_keep",)


def policies() -> list[str]:
    """Return the keys that are searched by default: policies that evict, and so have fewer bytes."""
    return [row.key for row in systems(room="kv") if row.key not in _BASELINES and evicts(row.load())]


def codecs(keys: Collection[str] | None = None) -> list[list[Arm]]:
    """Return the codecs of these keys, or all; each is a list from the widest code to the narrowest."""
    return [
        [Arm(key, tuple(sorted(options.items()))) for options in ladder]
        for key, ladder in CODECS.items()
        if keys is None or key in keys
    ]


def learns(key: str) -> bool:
    """Return whether a policy has to learn about a model first, which may take long."""
    return _learns(system(key).load())


def acts_on_layers(key: str) -> bool:
    """Return whether a policy can act on some layers only."""
    return issubclass(system(key).load(), ScorePolicy)


def variants(arm: Arm) -> Iterator[Arm]:
    """Yield the arm with each other value of each of its declared options, one at a time."""
    cls, given = system(arm.key).load(), dict(arm.options)
    for name, value in _values(cls):
        idle = name == "safeguard" and given.get("heads", "adaptive" if cls is AdaKV else "") != "adaptive"
        if not idle and given.get(name) != value:
            yield arm.with_option(name, value)
    if issubclass(cls, Wrapper) and "base" not in given:
        yield from (arm.with_option("base", base) for base in _BASES)


def layers_of(host: Host) -> list[int]:
    """Return the numbers of the layers that cache policies act on."""
    return [layer.layer for layer in layout(host).layers]


def _values(cls: type[Any]) -> Iterator[tuple[str, Any]]:
    """Yield the options of a class, and of the policy that it wraps, with the values to try."""
    numbers = NUMBERS if issubclass(cls, ScorePolicy) else {}  # elsewhere, numbers of tokens are the budget
    numbers = WINDOWS if _learns(cls) else numbers
    hints, own = hints_of(cls), {option.name for option in fields(cls) if option.init}
    for option in fields(cls):
        if option.name not in own or option.name in _LEFT_OUT:
            continue
        annotation = hints.get(option.name)
        if get_origin(annotation) is Literal:
            tried: tuple[Any, ...] = get_args(annotation)
        else:
            tried = (True, False) if annotation is bool else numbers.get(option.name, ())
        yield from ((option.name, value) for value in tried if value != option.default and _near(value, option.default))
    if issubclass(cls, Wrapper):
        own |= {"heads", "safeguard"}  # a wrapper sets them, or the base has nothing to choose
        yield from ((name, value) for name, value in _values(type(cls().base)) if name not in own)  # type: ignore[call-arg]


def _near(value: Any, default: Any) -> bool:
    """Return whether a number is of the default's size: a name may mean tokens of a text in one policy, and of a block
    in another."""
    sized = type(value) is int and type(default) is int and value and default
    return not sized or (default <= 16 * value and value <= 16 * default)


def _learns(cls: type[Any]) -> bool:
    # mypy takes a bound class method for a plain function
    return cls.calibrate.__func__ is not Policy.calibrate.__func__  # type: ignore[attr-defined]


def evicts(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, Policy) and cls.evicts
