"""Foveate: every published way to attend, under one interface.

`import foveate` itself imports nothing heavy: each name below is fetched from its room when it is first touched
(PEP 562), so that `foveate --help` need not wait for torch and an operator's user need not wait for transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from foveate._version import __version__

_ROOMS = (
    "core", "ops", "nn", "models", "host", "kv", "steer", "lens", "tasks", "gaze", "train", "studies", "labs",
    "bench", "report",
)  # fmt: skip

# public name -> the module it is fetched from
_HOME = {
    "attend": "foveate.ops.calls",
    "plan": "foveate.ops.calls",
    "Operator": "foveate.ops.operator",
    "Selection": "foveate.core.selection",
    "Plan": "foveate.core.call",
    "apply": "foveate.host.entry",
    "Method": "foveate.host.method",
    "Context": "foveate.host.context",
    "Packed": "foveate.host.packed",
    "Site": "foveate.host.site",
    "look": "foveate.lens.lens",
    "tune": "foveate.bench.tuning.run",
    "save": "foveate.bench.recipes.files",
    "load": "foveate.bench.recipes.files",
    "System": "foveate.core.catalog",
    "system": "foveate.core.catalog",
    "systems": "foveate.core.catalog",
    "cite": "foveate.core.cite",
    "FoveateError": "foveate.core.errors",
    "ShapeError": "foveate.core.errors",
    "OptionError": "foveate.core.errors",
    "UnknownKey": "foveate.core.errors",
    "UnsupportedPattern": "foveate.core.errors",
    "UnsupportedEngine": "foveate.core.errors",
    "UnsupportedModel": "foveate.core.errors",
    "TaskError": "foveate.core.errors",
    "CatalogError": "foveate.core.errors",
}

__all__ = ["__version__", *_ROOMS, *_HOME]  # noqa: PLE0604  the two tables hold strings

if TYPE_CHECKING:  # the same table, for type checkers; `as` says that a name is meant to be fetched from here
    from foveate import (
        bench as bench,
        core as core,
        gaze as gaze,
        host as host,
        kv as kv,
        labs as labs,
        lens as lens,
        models as models,
        nn as nn,
        ops as ops,
        report as report,
        steer as steer,
        studies as studies,
        tasks as tasks,
        train as train,
    )
    from foveate.bench.recipes.files import load as load, save as save
    from foveate.bench.tuning.run import tune as tune
    from foveate.core.call import Plan as Plan
    from foveate.core.catalog import System as System, system as system, systems as systems
    from foveate.core.cite import cite as cite
    from foveate.core.errors import (
        CatalogError as CatalogError,
        FoveateError as FoveateError,
        OptionError as OptionError,
        ShapeError as ShapeError,
        TaskError as TaskError,
        UnknownKey as UnknownKey,
        UnsupportedEngine as UnsupportedEngine,
        UnsupportedModel as UnsupportedModel,
        UnsupportedPattern as UnsupportedPattern,
    )
    from foveate.core.selection import Selection as Selection
    from foveate.host.context import Context as Context
    from foveate.host.entry import apply as apply
    from foveate.host.method import Method as Method
    from foveate.host.packed import Packed as Packed
    from foveate.host.site import Site as Site
    from foveate.lens.lens import look as look
    from foveate.ops.calls import attend as attend, plan as plan
    from foveate.ops.operator import Operator as Operator
else:

    def __getattr__(name: str) -> object:
        if name in _ROOMS:
            return import_module(f"foveate.{name}")
        if name not in _HOME:
            from foveate.core.public import hint

            raise AttributeError(f"module 'foveate' has no attribute {name!r}{hint(name, __all__)}", name=name)
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value  # the next access is a plain look-up
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
