"""From a catalogue key to something that `compare` can apply at a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from foveate.core.catalog import System, system, systems
from foveate.core.errors import OptionError, unknown
from foveate.host import Host, Method
from foveate.host.method import describe
from foveate.kv.policy import Policy
from foveate.kv.prefill import PrefillSwap
from foveate.ops.operator import Operator

FULL = "full"
DEFAULT = (
    FULL, "sink_recent", "duo_attention", "razor_attention", "token_select", "tidal_decode", "recycled_attention",
    "hip",
)  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """One line of a comparison: `methods` to apply (none for the full cache), and how to call it."""

    key: str
    title: str
    methods: tuple[Method, ...]
    options: dict[str, Any]


def known() -> list[str]:
    """Keys that `compare` takes: the full cache, cache policies, and operators that can read a prompt."""
    return [FULL, *(row.key for room in ("kv", "steer", "ops") for row in systems(room=room))]


def check(keys: list[str]) -> None:
    """Refuse unknown or repeated keys before anything is loaded."""
    for key in keys:
        if key not in known():
            raise unknown("method", key, known())
    if len(set(keys)) < len(keys):
        raise OptionError(f"methods={','.join(keys)} names one twice")


def candidate(
    key: str, host: Host, budget: float, length: int, learnt: Callable[[type[Policy], str], dict[str, Tensor]]
) -> Candidate:
    """The method of this key, set to the budget for prompts of `length` tokens."""
    if key == FULL:
        return Candidate(key, "full cache", (), {})
    row = system(key)
    cls = row.load()
    if issubclass(cls, Policy):
        method: Method = cls.at_budget(budget, host, length, **learnt(cls, key))
    elif issubclass(cls, Operator):
        method = PrefillSwap(cls.at_budget(budget, length))
    else:
        method = cls()
    return Candidate(key, row.title, (method,), _options(row, method))


def _options(row: System, method: Method) -> dict[str, Any]:
    shown = vars(method.operator) if isinstance(method, PrefillSwap) else describe(method)
    plain = {name: value for name, value in shown.items() if isinstance(value, int | float | str | tuple)}
    options = {name: value for name, value in plain.items() if not name.startswith("_") and name != "training"}
    for name, value in shown.items():
        if isinstance(value, Tensor) and value.dtype == torch.bool:
            options[name] = f"{int(value.sum())} of {value.numel()}"
    if isinstance(method, PrefillSwap):
        options["while"] = "reading the prompt"
    return {**options, **({"arxiv": row.arxiv} if row.arxiv else {})}


class Learnt:
    """What policies learnt about a model: found beside its checkpoint, or in the output folder, or learnt now and
    kept.
    """

    def __init__(
        self,
        host: Host,
        data: Callable[[], Iterator[tuple[Tensor, Tensor]]],
        folders: list[Path],
        note: Callable[[str], None],
    ) -> None:
        self.host, self.data, self.folders, self.note = host, data, folders, note

    def __call__(self, cls: type[Policy], key: str) -> dict[str, Tensor]:
        if cls.calibrate.__func__ is Policy.calibrate.__func__:  # type: ignore[attr-defined]
            return {}
        for folder in self.folders:
            file = folder / f"{key}.safetensors"
            if file.exists():
                return load_file(file)
        found = cls.calibrate(
            self.host, self.data(), lambda step, steps, text: self.note(f"{key}: {step}/{steps} {text}")
        )
        self.folders[-1].mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.contiguous() for name, tensor in found.items()}, self.folders[-1] / f"{key}.safetensors"
        )
        return found
