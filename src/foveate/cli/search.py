"""Search of the catalogue for a need in plain words: `foveate systems --search "long context without retraining"`.

Nothing is imported and nothing fetched: a row is scored by its title, tags, place in the survey, capabilities and
docstring. A phrase of `needs.toml` counts by the facts that answer it, any other word by where the row has it.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from foveate.cli.card import read_card
from foveate.core import catalog
from foveate.core.catalog_rows import System


@dataclass(frozen=True)
class Need:
    """Something that people look for; `needs.toml` lists them and says what its fields mean."""

    name: str
    phrases: tuple[str, ...]
    strong: tuple[str, ...]
    weak: tuple[str, ...] = ()
    hint: str = ""


@cache
def needs() -> tuple[Need, ...]:
    """Return the table of needs."""
    table = tomllib.loads(Path(__file__).with_name("needs.toml").read_text("utf-8"))
    lists = ("phrases", "strong", "weak")
    return tuple(Need(**{**row, **{name: tuple(row.get(name, ())) for name in lists}}) for row in table["need"])


#: Words that say nothing about attention, here where everything is attention.
_STOP = frozenset(
    """
    of for to in on with and or that this by from at as which what when where who there been want wants need needs
    like how can could would should some any all every more most very much many make makes made use uses using get
    gets have has had me them they one ones something way ways than then if so too also per while into only work works
    working go goes small smaller large larger big bigger less few fewer little new good best not no without attention
    model models system systems method methods mechanism transformer transformers network networks llm llms language
    """.split()
)
#: Words that a phrase may have or lack.
_FILLERS = frozenset("a an the my our your its it is are was be i we do does did".split())
_SUFFIXES = """
    izations isations ization isation ability ibility izing ising ized ised izes ises able ible ions ings ize ise ers
    ies ing ion ity ed er es ly e s y
    """.split()

#: What a hit of a word is worth in each field.
_FIELDS = {"key": 2.5, "title": 2.5, "tags": 2.5, "facts": 1.5, "docstring": 1.2}
_STRONG, _WEAK, _TITLE, _FURTHER = 3.0, 1.2, 1.0, 0.3
#: A row is shown down to this share of the best score, up to so many rows.
_SHARE, _ROWS = 0.45, 10


@dataclass(frozen=True)
class Match:
    """A row that answers a need.

    Args:
        system: the row.
        score: higher is better; comparable within one search.
        why: a reason for each part of the need that the row answers.
    """

    system: System
    score: float
    why: tuple[str, ...]


def search(need: str, rows: Sequence[System] | None = None) -> list[Match]:
    """Return the rows that answer `need`, a phrase in plain words, best first; of the whole catalogue where None."""
    pages = [_page(row) for row in (catalog.systems() if rows is None else rows)]
    spread = Counter(word for page in pages for word in page.words)
    wanted, words = understood(need)
    terms = [word for word in words if word in spread]
    found = []
    for place, page in enumerate(pages):
        hits = [hit for item in wanted if (hit := _answer(page, item)) is not None]
        hits += [hit for word in terms if (hit := _mention(page, word, spread, len(pages))) is not None]
        if hits:
            score = sum(score for score, _ in hits) * len(hits) / (len(wanted) + len(terms))
            found.append((-score, place, Match(page.row, round(score, 3), tuple(why for _, why in hits))))
    matches = [match for *_, match in sorted(found, key=lambda item: item[:2])]
    return [match for match in matches[:_ROWS] if match.score >= _SHARE * matches[0].score]


def needs_of(row: System) -> list[Need]:
    """Return the needs that a row answers well, for pages about it."""
    page = _page(row)
    return [item for item in needs() if any(_evidence(page, fact) for fact in item.strong)]


def understood(need: str) -> tuple[list[Need], list[str]]:
    """Split a query into the needs whose phrases it contains, long phrases first, and the stems of other words."""
    typed = [_corrected(word) for word in _words(need) if word not in _FILLERS]
    stems, matched = [stem(word) for word in typed], []
    for phrase, item in _phrases():
        at = _index(stems, phrase)
        if at is not None:
            matched.append((at, item))
            stems[at : at + len(phrase)] = [""] * len(phrase)  # a word counts once, and the others keep their indices
    named = {item.name: item for _, item in sorted(matched, key=lambda pair: pair[0])}
    others = [stem for stem, word in zip(stems, typed, strict=True) if stem and word not in _STOP]
    return list(named.values()), list(dict.fromkeys(others))


def unknown_words(need: str) -> list[str]:
    """Return the words that no system and no need knows, and that the search left out."""
    known = set(_vocabulary().values())
    words = [word for word in _words(need) if word not in _FILLERS and word not in _STOP]
    return [word for word in words if stem(_corrected(word)) not in known]


def stem(word: str) -> str:
    """Return what the forms of a word share, roughly: cache, caches, caching and cached give "cach"."""
    for suffix in _SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            if suffix in ("s", "es") and word.endswith(("ss", "us", "is")):
                continue
            word = word.removesuffix(suffix)
            doubled = len(word) > 3 and word[-1] == word[-2] and word[-1] not in "ls"
            word = word[:-1] if doubled and suffix in ("ing", "ed", "er", "ers", "ings") else word
            return stem(word) if suffix in ("s", "es", "ers", "ings", "ions") else word
    return word


def stemmed(text: str) -> list[str]:
    """Return the stems of a text's words, in order; parts that a hyphen joins are words."""
    return [stem(word) for word in _words(text)]


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", unicodedata.normalize("NFKD", text).lower())


# -- a row as the search sees it ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Page:
    row: System
    fields: dict[str, list[str]]
    facts: frozenset[str]
    words: frozenset[str]


@cache
def _page(row: System) -> _Page:
    facts = {f"room:{row.room}", *(f"tag:{tag}" for tag in row.tags)}
    facts |= {f"{name}:{value}" for name, value in catalog.capabilities(row.key).items() if isinstance(value, str)}
    places = [f"{name}:{place}" for name, places in asdict(row.taxonomy).items() for place in places]
    fields = {
        "key": stemmed(row.key.replace("_", " ")),
        "title": stemmed(row.title),
        "tags": [word for tag in row.tags for word in (*stemmed(tag), "")],
        "facts": [word for fact in sorted(facts) if not fact.startswith("tag:") for word in (*stemmed(fact), "")],
        "docstring": stemmed(_recommended(read_card(row.object).doc)),
    }
    words = frozenset(word for field in fields.values() for word in field if word)
    return _Page(row, fields, frozenset((*facts, *places)), words)


def _recommended(doc: str) -> str:
    """Strip from a docstring the uses that it warns of, the arguments and the formulas."""
    before = re.split(r"\n\s*(?:Args|Raises|Returns|Attributes):\n", doc)[0]
    return re.sub(r"`[^`]*`|\(?[Tt]he wrong choice[^.;]*|\b[Nn]o drop-in[^.;]*", " ", before)


def _answer(page: _Page, need: Need) -> tuple[float, str] | None:
    """Score a row's answer to a need and give the reason; None if it does not answer."""
    strong = list(_found(page, need.strong))
    weak = list(_found(page, need.weak))
    if not strong and not weak:
        return None
    in_title = any(reason.startswith("title") for reason in (*strong, *weak))
    score = (_STRONG if strong else _WEAK) + _FURTHER * (len(strong) + len(weak) / 2 - 1) + _TITLE * in_title
    return score, f"{need.name} ({', '.join((*strong, *weak)[:3])})"


def _found(page: _Page, facts: Iterable[str]) -> Iterator[str]:
    for fact in facts:
        if reason := _evidence(page, fact):
            yield reason


def _evidence(page: _Page, fact: str) -> str:
    """Say in words how a row shows a fact or contains a phrase; "" if it does not."""
    name, colon, value = fact.partition(":")
    if colon:
        return _FACT_TEXTS.get(fact, f'{_NAMES.get(name, name)} "{value}"') if fact in page.facts else ""
    phrase = stemmed(fact)
    for field in ("title", "tags", "docstring"):
        if _index(page.fields[field], phrase) is not None:
            return f'{field} "{fact}"'
    return ""


_NAMES = {"tag": "tag", "room": "room", "growth": "time grows as", "state": "state", "family": "family"}
_FACT_TEXTS = {
    "room:kv": "a cache policy for pretrained models",
    "room:steer": "acts on a pretrained model",
    "room:lens": "looks into a pretrained model",
    "room:studies": "a study",
    "room:tasks": "a task",
    "room:gaze": "about human gaze",
    "state:constant": "streams with a constant state",
    "growth:N": "time grows with N",
    "growth:N log N": "time grows with N log N",
}


def _mention(page: _Page, word: str, spread: Counter[str], total: int) -> tuple[float, str] | None:
    """Score the fields of a row that contain a word, rare words higher; None if no field does."""
    where = [field for field, stems in page.fields.items() if word in stems]
    if not where:
        return None
    rarity = math.log((total + 1) / spread[word]) / math.log(total + 1)
    score = max(_FIELDS[field] for field in where) + _FURTHER * (len(where) - 1)
    return rarity * score, f'"{_written(page, word)}" ({", ".join(where)})'


def _written(page: _Page, word: str) -> str:
    """Return the row's own spelling of the first word with this stem."""
    text = (
        f"{page.row.key.replace('_', ' ')} {page.row.title} {' '.join(page.row.tags)} {read_card(page.row.object).doc}"
    )
    return next((found for found in re.findall(r"[A-Za-z0-9]+", text) if stem(found.lower()) == word), word)


def _corrected(word: str) -> str:
    """Return the word, or the nearest known word if neither the catalogue nor a need has it."""
    known = _vocabulary()
    if len(word) < 5 or word in _STOP or stem(word) in known.values():
        return word
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.85)
    return near[0] if near else word


# -- phrases -----------------------------------------------------------------------------------------------------------


@cache
def _phrases() -> list[tuple[list[str], Need]]:
    """Return all phrases of the needs as stems, the longest first."""
    pairs = [
        ([stem(word) for word in _words(phrase) if word not in _FILLERS], need)
        for need in needs()
        for phrase in need.phrases
    ]
    return sorted(pairs, key=lambda pair: -len(pair[0]))


@cache
def _vocabulary() -> dict[str, str]:
    """Return the words of all needs, titles, tags and docstrings, each with its stem."""
    texts = [phrase for need in needs() for phrase in need.phrases]
    texts += [" ".join((row.title, *row.tags, _recommended(read_card(row.object).doc))) for row in catalog.systems()]
    return {word: stem(word) for text in texts for word in _words(text)}


def _index(stems: list[str], phrase: list[str]) -> int | None:
    """Return the index where a phrase begins, word after word; None if it is absent."""
    size = len(phrase)
    return next((at for at in range(len(stems) - size + 1) if stems[at : at + size] == phrase), None)
