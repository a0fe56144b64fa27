"""A recipe: the methods of a setting, with all that is needed to apply them again to the same model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from foveate._version import __version__
from foveate.bench.parts import digest
from foveate.bench.parts.plaindata import plain, write_atomic
from foveate.bench.recipes.entries import Maker, check_depth, entry
from foveate.bench.recipes.values import Tensors
from foveate.core.errors import FoveateError, OptionError, shown
from foveate.host import Host, Method, PrefillSwap
from foveate.host.hf.model import host
from foveate.kv.parts import calibration_store
from foveate.ops.operator import Operator

FORMAT = "foveate.recipe/1"
SUFFIX = ".json"
_LARGEST = 16 * 2**20  # bytes of the JSON file; tensors are elsewhere


@dataclass(frozen=True)
class Recipe:
    """Methods as JSON data.

    Args:
        entries: the methods, in order; see `entries`.
        tensors: what they learnt.
        model: the digest of the model's weights; "" if the methods fit any model.
        architecture: the model's class, for the reader.
        length: the tokens of the prompts on which a budget was chosen; `at` takes it if no length is given.
        about: notes for the reader, such as the score that was measured.
        version: the version of Foveate that wrote it.
    """

    entries: list[dict[str, Any]]
    tensors: Tensors = field(default_factory=Tensors)
    model: str = ""
    architecture: str = ""
    length: int | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    version: str = __version__

    @classmethod
    def of(
        cls, methods: Sequence[Method | Operator], model: object | None = None, about: Mapping[str, Any] | None = None
    ) -> Recipe:
        """Return the recipe of methods, with all of their options."""
        tensors, entries, swapped = Tensors(), [], []
        for number, each in enumerate(methods):
            method = PrefillSwap(each) if isinstance(each, Operator) else each
            if not isinstance(method, Method):
                raise OptionError(f"methods must be Method and Operator objects; got {type(each).__name__}")
            swapped.append(method)
            entries.append(entry(method, str(number), tensors))
        found = cls(entries, tensors, *identified(model), about=about or {})
        for before, after in zip(swapped, found.at(), strict=True):
            _check_same(before, after)
        return found

    def at(self, host: Host | None = None, length: int | None = None) -> tuple[Method, ...]:
        """Return the methods for a prompt of `length` tokens; the model and the length matter to budgets only."""
        renumber = any(raw.get("method") == "renumbered" for raw in self.entries if isinstance(raw, dict))
        maker = Maker(self.tensors, host, length or self.length, renumber)
        try:
            return tuple(maker(raw, str(number)) for number, raw in enumerate(self.entries))
        except FoveateError as error:
            raise OptionError(f"{error}{self._written()}") from None

    def check(self, host: Host) -> None:
        """Refuse another model than the recipe's, and methods that cannot be made."""
        if self.model and self.model != (found := calibration_store.model_digest(host.model)):
            raise OptionError(
                f"it belongs to another model: a {self.architecture or 'model'} with digest {self.model[:8]}, and this "
                f"is a {type(host.model).__name__} with digest {found[:8]}"
            )
        self.at(host, self.length or 1024)

    def _written(self) -> str:
        """Return a hint if another version wrote the recipe."""
        same = self.version == __version__
        return "" if same else f" (Foveate {shown(self.version).strip(chr(39))} wrote it, and this is {__version__})"

    @cached_property
    def identity(self) -> str:
        """The digest of all that decides what the methods do."""
        return digest.of(self.entries, calibration_store.digest(self.tensors.named))

    @property
    def title(self) -> str:
        """The names of the methods."""
        return " + ".join(dict.fromkeys(str(raw["method"]) for raw in self.entries)) or "full cache"

    # -- files ---------------------------------------------------------------------------------------------------------

    def write(self, path: str | os.PathLike) -> Path:
        """Write the JSON file, and the tensors beside it under the same name with `.safetensors`."""
        target = _path(path)
        held = None
        if self.tensors.named:
            file = target.with_suffix(".safetensors")
            calibration_store.save(self.tensors.named, file, self.model)
            held = {"file": file.name, "digest": calibration_store.digest(self.tensors.named)}
        model = {"digest": self.model, "architecture": self.architecture} if self.model else None
        content = {
            "format": FORMAT, "foveate": self.version, "model": model, "length": self.length, "methods": self.entries,
            "tensors": held, "about": plain(self.about),
        }  # fmt: skip
        return write_atomic(target, json.dumps(content, indent=1, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: str | os.PathLike) -> Recipe:
        """Read a recipe. Nothing in the file is executed.

        Raises:
            OptionError: it is not a recipe that this version can read; the message is one line.
        """
        target = _path(path)
        try:
            content = _parsed(target)
            tensors = Tensors() if content["tensors"] is None else Tensors(_read_tensors(target, content["tensors"]))
            model = content["model"] or {"digest": "", "architecture": ""}
            return cls(
                content["methods"], tensors, model["digest"], model["architecture"], content["length"],
                content["about"], content["foveate"],
            )  # fmt: skip
        except OSError as error:
            raise OptionError(f"cannot read recipe {target}: {error.strerror or error}") from None
        except OptionError as error:
            raise OptionError(f"cannot read recipe {target}: {error}") from None


def identified(model: object | None) -> tuple[str, str]:
    """Return the digest of a model's weights and its class; two empty texts without a model."""
    if model is None:
        return "", ""
    found = host(model).model
    return calibration_store.model_digest(found), type(found).__name__


def _path(path: str | os.PathLike) -> Path:
    if not str(path).endswith(SUFFIX):
        raise OptionError(f"path={shown(str(path))} must end in {SUFFIX}, as recipes do")
    return Path(path)


def _parsed(target: Path) -> dict[str, Any]:
    """Return the content of the file, with each part of the type that it has to be."""
    if target.stat().st_size > _LARGEST:
        raise OptionError("it is too large for a recipe")
    try:
        content = json.loads(target.read_text("utf-8-sig"), parse_constant=_refuse, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, OptionError) else f"not valid JSON: {error}"
        raise OptionError(" ".join(reason.split())) from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        newer = isinstance(found, str) and found.startswith("foveate.recipe/")
        raise OptionError(f'"format" is {shown(found)}, which is newer' if newer else f'"format" must be "{FORMAT}"')
    check_depth(content)
    for part, fits in _FORM.items():
        if part not in content or not fits(content[part]):
            raise OptionError(f'"{part}" is missing or not valid')
    return content


def _texts(*parts: str) -> Any:
    return lambda x: (
        x is None
        or (isinstance(x, dict) and set(x) == set(parts) and all(isinstance(value, str) for value in x.values()))
    )


_FORM: dict[str, Any] = {
    "foveate": lambda x: isinstance(x, str),
    "model": _texts("digest", "architecture"),
    "length": lambda x: x is None or (isinstance(x, int) and not isinstance(x, bool) and 0 < x < 2**40),
    "methods": lambda x: isinstance(x, list),
    "tensors": _texts("file", "digest"),
    "about": lambda x: isinstance(x, dict),
}


def _refuse(name: str) -> None:
    raise OptionError(f"{name} is no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise OptionError("an object has two parts of one name")
    return found


def _read_tensors(target: Path, held: dict[str, str]) -> dict[str, Tensor]:
    """Read the tensors of a recipe from its own folder."""
    name = held["file"]
    if name != Path(name).name or not name.endswith(".safetensors"):
        raise OptionError(f"tensors.file={shown(name)} must be the name of a .safetensors file in the same folder")
    file = target.parent / name
    if not file.is_file():
        raise OptionError(f"its tensors are missing: {file} does not exist")
    try:
        with safe_open(file, "pt") as opened:
            found = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  not a mapping
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise OptionError(f"{file} is not a safetensors file: {' '.join(str(error).split())}") from None
    if calibration_store.digest(found) != held["digest"]:
        raise OptionError(f"{file} holds other tensors than the recipe was written with")
    return found


def _check_same(before: Method, after: Method) -> None:
    """Refuse a method whose options were changed after it was made to something that its constructor does not give."""
    if isinstance(before, PrefillSwap):
        return
    for name, value in vars(before).items():
        other = getattr(after, name, None)
        if isinstance(value, Method):
            _check_same(value, other)  # type: ignore[arg-type]
        elif isinstance(value, bool | int | float | str) and not name.startswith("_") and other != value == value:
            raise OptionError(f"{type(before).__name__}.{name} was changed to {shown(value)} after it was made")
