"""A check of all of Foveate's annotations, shapes included, while tests run: FOVEATE_TYPECHECK=1, or `make typecheck`.

jaxtyping decorates each function with `checked` when its module is imported. The check comes after a call has returned,
of its arguments and its result together. Tests give malformed arguments on purpose, and the call itself has to refuse
them. So an error here means that an annotation is wrong, or that a refusal is missing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Self, get_args

import jaxtyping
from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float


def install() -> None:
    """Check every module of Foveate that is imported from now on."""
    jaxtyping.install_import_hook("foveate", "tests.support.typecheck.checked")


def checked(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return jaxtyping's check of a function's arguments and result, or no check of its arguments alone.

    jaxtyping asks for both. The first has the result as a further argument, whose name is `ret` with a number. `Self`,
    which has no meaning outside a class body, and protocols without a test at run time count as Any.
    """
    if not any(name.startswith("ret") and name[3:].isdigit() for name in inspect.signature(call).parameters):
        return call
    for name, annotation in call.__annotations__.items():
        if not _has_test(annotation):
            call.__annotations__[name] = Any
    return _check(call)


def _has_test(annotation: Any) -> bool:
    """Return whether a value can be compared with an annotation."""
    is_protocol = getattr(annotation, "_is_protocol", False) and not getattr(annotation, "_is_runtime_protocol", False)
    return annotation is not Self and not is_protocol and all(_has_test(each) for each in get_args(annotation))
