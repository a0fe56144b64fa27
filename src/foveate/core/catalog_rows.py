"""The rows of the catalogue, one for each published system, and the shelf of rows that a room's file holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from foveate.core.errors import CatalogError

ROOMS = (
    "core", "ops", "nn", "models", "host", "kv", "steer", "lens", "train", "tasks", "gaze", "studies", "labs", "bench",
    "dist", "report",
)  # fmt: skip

#: The survey's four categories, each with its values.
CATEGORIES = {
    "sequences": ("self", "distinctive", "co-attention"),
    "levels": ("single", "multi"),
    "positions": ("soft", "hard", "local"),
    "representations": ("single", "multi-representational", "multi-dimensional"),
}


@dataclass(frozen=True)
class Taxonomy:
    """The values of a system in the categories of An Attentive Survey of Attention Models (2019), arXiv 1904.02874.

    A category may hold several.

    sequences: queries and keys of the same sequence, of different ones, or two sequences that attend to each other.
    levels: one level of abstraction, or attention over the outputs of attention.
    positions: all of them, softly; some, chosen by the input; or a neighbourhood.
    representations: one for each token, several, or a weight for each of its features.
    """

    sequences: tuple[str, ...] = ("self",)
    levels: tuple[str, ...] = ("single",)
    positions: tuple[str, ...] = ("soft",)
    representations: tuple[str, ...] = ("single",)


@dataclass(frozen=True)
class System:
    """One row of the catalogue: a published system and the modules that hold it.

    Args:
        key: the name that a user types.
        title: the paper's title.
        authors: the paper's authors, in its order.
        year: the year of first publication.
        arxiv: "2309.17453", or "" if there is none.
        room: the package under `foveate` that its object lives in.
        object: "module:Name" of the class or function.
        test: the test file that checks its paper's claims.
        tags: family and traits, to filter by.
        taxonomy: its place in the survey's categories.
        parts: "module:Name" of everything else that belongs to it: its layer, its network, its loss.
        example: a line or a few that a reader can paste.
    """

    key: str
    title: str
    authors: tuple[str, ...]
    year: int
    arxiv: str
    room: str
    object: str
    test: str
    tags: tuple[str, ...]
    taxonomy: Taxonomy
    parts: tuple[str, ...] = ()
    example: str = ""

    @property
    def url(self) -> str:
        """The paper's address on arXiv, or "" if it has none."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""

    def load(self) -> Any:
        """Import and return the class or function. This imports torch."""
        module, _, name = self.object.partition(":")
        try:
            return getattr(import_module(module), name)
        except AttributeError:
            raise CatalogError(f'system "{self.key}": module {module} has no {name}') from None
        except ModuleNotFoundError as error:
            if not (f"{module}.").startswith(f"{error.name}."):
                raise  # our module exists; a package that it needs is not installed
            raise CatalogError(f'system "{self.key}": no module {error.name}') from None


@dataclass(frozen=True)
class Shelf:
    """The content of the catalogue's file of one room.

    Args:
        systems: the rows, in the file's order.
        public: public names that belong to no system, each with the module that defines it.
    """

    systems: tuple[System, ...] = ()
    public: Mapping[str, str] = field(default_factory=dict)
