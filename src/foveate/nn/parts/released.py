"""Parameters of a paper's release under this library's names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from foveate.core.errors import OptionError

#: Pairs of a regular expression and its replacement, applied in order.
Names = Sequence[tuple[str, str]]
#: Pairs of a regular expression and the replacements for the equal parts of a parameter, along its first axis.
Parts = Sequence[tuple[str, Sequence[str]]]


def renamed(released: Mapping[str, Tensor], names: Names, parts: Parts = ()) -> dict[str, Tensor]:
    """Return the parameters of a release under our names.

    Args:
        released: the release's state dict.
        names: how names become ours; a name that becomes empty is left out.
        parts: parameters that hold several of ours, such as one projection to queries, keys and values. The first
            expression that is found in the name, after `names`, cuts its parameter.

    Raises:
        OptionError: two parameters would get one name.
    """
    out: dict[str, Tensor] = {}
    for name, x in released.items():
        ours = name
        for pattern, replacement in names:
            ours = re.sub(pattern, replacement, ours)
        for key, part in _parts(ours, x, parts):
            if key in out:
                raise OptionError(f"the released parameters have two that would be called {key!r}")
            if key:
                out[key] = part
    return out


def load(module: nn.Module, given: Mapping[str, Tensor]) -> None:
    """Load a release's parameters, under our names, into `module`; all or none.

    Raises:
        OptionError: parameters that the module lacks, or has alone, or has in another shape.
    """
    own = module.state_dict()
    astray = {
        "missing": own.keys() - given.keys(),
        "unknown": given.keys() - own.keys(),
        "of another shape": {name for name in own.keys() & given.keys() if own[name].shape != given[name].shape},
    }
    found = [f"{len(names)} {what} ({min(names)})" for what, names in astray.items() if names]
    if found:
        raise OptionError(f"the released parameters do not fit this {type(module).__name__}: {', '.join(found)}")
    module.load_state_dict(given)


def _parts(name: str, x: Tensor, parts: Parts) -> list[tuple[str, Tensor]]:
    for pattern, replacements in parts:
        if re.search(pattern, name):
            if not x.dim() or x.shape[0] % len(replacements):
                count, shape = len(replacements), tuple(x.shape)
                raise OptionError(
                    f"the released parameter {name!r} must have {count} equal parts; its shape is {shape}"
                )
            cut = x.chunk(len(replacements))
            return [(re.sub(pattern, each, name), part) for each, part in zip(replacements, cut, strict=True)]
    return [(name, x)]
