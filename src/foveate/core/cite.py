"""BibTeX of the published systems that are in use: `foveate.cite(model, "hip")`.

The entries come from the catalogue's rows. A key needs no torch; a module is searched for every system inside it.
"""

from __future__ import annotations

import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from functools import cache
from typing import Any

from foveate.core.catalog import system, systems
from foveate.core.catalog_rows import System
from foveate.core.errors import OptionError

#: Surnames of several words, which look like given names in a plain name. A row may also write
#: "Surname, Given names".
COMPOUND = ("Amo Alonso", "Ray Chowdhury")

#: Words in lower case that belong to the surname behind them.
_PARTICLES = frozenset("al bin da dal de del den der di do dos du el la las le lo los ten ter van von y zu".split())
_SUFFIXES = frozenset({"Jr.", "Jr", "Sr.", "Sr", "II", "III", "IV"})

#: First words of a title that are too common to name an entry by.
_ARTICLES = frozenset({"a", "an", "the"})

_ACCENTS = {
    "\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0304": "=", "\u0306": "u", "\u0307": ".",
    "\u0308": '"', "\u030a": "r", "\u030b": "H", "\u030c": "v", "\u0327": "c", "\u0328": "k",
}  # fmt: skip
_LETTERS = {
    "ß": ("ss", r"{\ss}"), "æ": ("ae", r"{\ae}"), "Æ": ("AE", r"{\AE}"), "œ": ("oe", r"{\oe}"), "Œ": ("OE", r"{\OE}"),
    "ø": ("o", r"{\o}"), "Ø": ("O", r"{\O}"), "ł": ("l", r"{\l}"), "Ł": ("L", r"{\L}"), "đ": ("d", r"{\dj}"),
    "Đ": ("D", r"{\DJ}"), "ı": ("i", r"{\i}"), "–": ("-", "--"), "—": ("-", "---"), "‘": ("", "`"), "’": ("", "'"),
    "“": ("", "``"), "”": ("", "''"), "…": ("", r"\ldots{}"), "\u00a0": (" ", "~"),
    "&": ("", r"\&"), "%": ("", r"\%"), "#": ("", r"\#"), "_": ("", r"\_"), "$": ("", r"\$"),
    "{": ("", r"\{"), "}": ("", r"\}"), "\\": ("", r"\textbackslash{}"), "~": ("", r"\textasciitilde{}"),
    "^": ("", r"\textasciicircum{}"),
}  # fmt: skip
_SCRIPTS = {
    **{chr(code): f"$^{{{digit}}}$" for digit, code in enumerate([0x2070, 0xB9, 0xB2, 0xB3, *range(0x2074, 0x207A)])},
    **{chr(0x2080 + digit): f"$_{{{digit}}}$" for digit in range(10)},
}
_GREEK = {
    character: f"$\\{name}$"
    for character, name in zip(
        "αβγδεζηθικλμνξπρστυφχψω",
        "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi "
        "omega".split(),
        strict=True,
    )
}


class Bibliography(str):
    """BibTeX entries as text, which a prompt and a notebook print without quotes.

    Attributes:
        systems: the catalogue's rows that the entries are of; several rows may share a paper.
    """

    systems: tuple[System, ...] = ()

    def __repr__(self) -> str:
        return str(self)


def cite(*used: Any) -> Bibliography:
    """Return BibTeX of the published systems that are in use, one entry for each paper.

    >>> print(foveate.cite("hip"))
    @misc{lee2024hip,
      title = {{HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning}},
      ...

    Args:
        used: catalogue keys; classes and functions of a system; operators, layers, methods and runs; whole models (all
            their modules are searched). Lists of these count as their elements. An object of no published system gives
            a comment line and no entry.

    Raises:
        UnknownKey: a key that the catalogue does not have.
        OptionError: nothing was given, or nothing that was given belongs to a published system.
    """
    rows: dict[str, System] = {}
    without: list[str] = []
    for thing in _listed(used):
        found = [system(thing)] if isinstance(thing, str) else _systems_in(thing)
        rows.update({row.key: row for row in found})
        if not found:
            without.append(_name(thing))
    if not rows:
        what = ", ".join(without) or "nothing"
        raise OptionError(f"cite() takes keys, classes and objects of published systems; got {what}")
    parts = [f"% no published system: {name}\n" for name in dict.fromkeys(without)]
    parts += [entry(row) for row in _by_paper(rows.values()).values()]
    text = Bibliography("\n".join(parts))
    text.systems = tuple(rows.values())
    return text


def entry(row: System) -> str:
    """Return the BibTeX entry of a row's paper."""
    fields = {
        "title": f"{{{latex(row.title)}}}",
        "author": " and ".join(map(_author, row.authors)),
        "year": str(row.year),
    }
    if row.arxiv:
        fields |= {"eprint": row.arxiv, "archivePrefix": "arXiv", "url": row.url}
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
    paper = _paper(row)
    key = _entry_keys().get(paper) or entry_keys([row])[paper]  # the latter for a row outside the catalogue
    return "\n".join([f"@misc{{{key},", *lines, "}"]) + "\n"


def _author(name: str) -> str:
    written = latex(", ".join(part for part in split_name(name) if part))
    return f"{{{written}}}" if name.startswith("{") else written


def split_name(name: str) -> tuple[str, str, str]:
    """Split a person's name into surname, suffix ("Jr.") and given names; the last two may be empty.

    The surname is the last word, together with the words of `COMPOUND` and the particles in lower case ("van der") in
    front of it. A name in braces belongs to a group ("{Gemma Team}") and is a surname as a whole.
    """
    if name.startswith("{"):
        return name.strip("{}"), "", ""
    if "," in name:
        surname, *others = (part.strip() for part in name.split(","))
        return surname, others[0] if len(others) > 1 else "", others[-1]
    words = name.split()
    suffix = words.pop() if len(words) > 2 and words[-1] in _SUFFIXES else ""
    first = max(len(words) - 1, 0)
    for compound in COMPOUND:
        parts = compound.split()
        if words[-len(parts) :] == parts:
            first = len(words) - len(parts)
    while first > 1 and words[first - 1] in _PARTICLES:
        first -= 1
    return " ".join(words[first:]), suffix, " ".join(words[:first])


def latex(text: str) -> str:
    """Return text with its accents and special characters written as LaTeX commands, which every BibTeX reads."""
    found = ""
    for character in text:
        base, *marks = list(unicodedata.normalize("NFD", character))
        if character in _LETTERS:
            found += _LETTERS[character][1]
        elif character in _SCRIPTS or character in _GREEK:
            found += (_SCRIPTS | _GREEK)[character]
        elif marks and all(mark in _ACCENTS for mark in marks) and base.isascii():
            base = "\\" + base if base in "ij" and marks[0] not in "\u0327\u0328" else base
            for mark in marks:
                base = f"\\{_ACCENTS[mark]}{{{base}}}"
            found += f"{{{base}}}"
        else:
            found += character
    return found


def _plain(text: str) -> str:
    """Return the letters and digits of a text in ASCII and lower case, the alphabet of an entry's key."""
    spelt = "".join(_LETTERS.get(character, (character, ""))[0] for character in text)
    return "".join(c for c in unicodedata.normalize("NFKD", spelt).lower() if c.isascii() and c.isalnum())


def _paper(row: System) -> str:
    return row.arxiv or row.title


def _by_paper(rows: Iterable[System]) -> dict[str, System]:
    """Return the first row of each paper."""
    found: dict[str, System] = {}
    for row in rows:
        found.setdefault(_paper(row), row)
    return found


def entry_keys(rows: Iterable[System]) -> dict[str, str]:
    """Return the key of each paper's entry: surname, year, first word, and further words where two keys would clash."""
    papers = _by_paper(rows)
    words = {paper: _title_words(row.title) for paper, row in papers.items()}
    names, length = dict.fromkeys(papers, ""), dict.fromkeys(papers, 1)
    while True:
        for paper, row in papers.items():
            surname = _plain(split_name(row.authors[0])[0]) if row.authors else ""
            names[paper] = f"{surname}{row.year}{''.join(words[paper][: length[paper]])}"
        times = Counter(names.values())
        shared = [paper for paper in papers if times[names[paper]] > 1]
        longer = [paper for paper in shared if length[paper] < len(words[paper])]
        if not longer:
            return {paper: name + (_plain(paper) if paper in shared else "") for paper, name in names.items()}
        for paper in longer:
            length[paper] += 1


@cache
def _entry_keys() -> dict[str, str]:
    return entry_keys(systems())


def _title_words(title: str) -> list[str]:
    """Return the words of a title; hyphens and slashes separate words too."""
    parts = title.replace("-", " ").replace("/", " ").split()
    words = [word for word in (_plain(part) for part in parts) if word]
    return words[1:] if len(words) > 1 and words[0] in _ARTICLES else words


# -- systems in use ----------------------------------------------------------------------------------------------------


def _listed(things: Iterable[Any], inside: tuple[int, ...] = ()) -> Iterator[Any]:
    """Flatten lists, tuples and sets; a list inside itself is left out."""
    for thing in things:
        if not isinstance(thing, list | tuple | set | frozenset) or hasattr(thing, "_fields"):
            yield thing
        elif id(thing) not in inside:
            yield from _listed(thing, (*inside, id(thing)))


def _systems_in(thing: Any) -> list[System]:
    """Return the systems of a row, a class, a function, or an object and all that it holds, in order of appearance."""
    if isinstance(thing, System):
        return [thing]
    rows: dict[str, System] = {}
    for found in _definitions(thing):
        rows.update({row.key: row for row in _rows_of(found)})
    return list(rows.values())


def _definitions(thing: Any) -> Iterator[Any]:
    """Yield the classes and functions of an object and of everything it holds: submodules, methods, containers."""
    seen: dict[int, Any] = {}  # a reference to each object keeps its id from being used again
    waiting = [thing]
    while waiting:
        this = waiting.pop()
        if isinstance(this, str | bytes | int | float | complex | None) or id(this) in seen:
            continue
        seen[id(this)] = this
        if isinstance(this, type) or (callable(this) and hasattr(this, "__qualname__")):
            yield this
            continue
        if not isinstance(this, dict | list | tuple | set | frozenset):
            yield type(this)
        waiting += reversed(list(_held(this)))


def _held(this: Any) -> Iterable[Any]:
    """Return the objects inside an object that may be systems.

    These are the elements of containers and the attributes of modules and of our own classes. Objects of other packages
    are not searched, since they may reference the whole program.
    """
    if isinstance(this, dict):
        return this.values()
    if isinstance(this, list | tuple | set | frozenset):
        return this
    nn = sys.modules.get("torch.nn")
    if nn is not None and isinstance(this, nn.Module):
        others = [value for name, value in vars(this).items() if not name.startswith("_")]
        return [*others, *this.children()]
    if is_dataclass(this) or any(cls.__module__.partition(".")[0] == "foveate" for cls in type(this).__mro__):
        return getattr(this, "__dict__", {}).values()
    return ()


def _rows_of(found: Any) -> list[System]:
    """Return the rows that name a class or a function, or the nearest base of a class that a row names."""
    for definition in found.__mro__ if isinstance(found, type) else (found,):
        target = f"{getattr(definition, '__module__', '')}:{getattr(definition, '__qualname__', '')}"
        if rows := _by_target().get(target):
            return rows
    return []


@cache
def _by_target() -> dict[str, list[System]]:
    """Index the rows by "module:Name" of their objects, and of parts that are no row's object."""
    own: dict[str, list[System]] = {}
    parts: dict[str, list[System]] = {}
    for row in systems():
        own.setdefault(row.object, []).append(row)
        for part in row.parts:
            parts.setdefault(part, []).append(row)
    return parts | own


def _name(thing: Any) -> str:
    return getattr(thing, "__qualname__", type(thing).__qualname__)
