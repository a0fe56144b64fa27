"""A look at a model's heads as one self-contained web page, and as lines for a terminal."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from markupsafe import Markup
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from foveate.bench.comparison.columns import NOTHING
from foveate.bench.looking import Looked, Measured
from foveate.bench.parts.plaindata import write_atomic
from foveate.pages.skeleton import asset, environment, policy
from foveate.pages.text import visible
from foveate.report.look_data import payload

#: The measures in a reader's words.
MEANINGS = {
    "entropy": "how widely a token’s attention spreads, in nats: 0 on one key, log n over n equal keys",
    "sink_mass": "the share of a token’s attention that goes to the first token",
    "received_mass": "the attention that a token gets from all others together; a head’s number is the share of the "
    "token that gets the most",
    "received_mean": "the attention that a token gets, averaged over the tokens that see it",
    "mean_distance": "how far away the tokens lie that a token attends to, on average",
    "own_token": "the share of a token’s attention that goes to the token itself",
    "previous_token": "the share of a token’s attention that goes to the token before it",
    "within_4": "the share of a token’s attention that goes to tokens at most 4 away",
    "windowed_distance": "how far away the tokens lie that a token attends to, where none counts as more than 10 away",
    "future_influence": "the attention that a token gets from the tokens 10 to 100 after it, on average",
    "duplicate_token": "the share of a token’s attention that goes to other places with the same token; a head has "
    "the mean over tokens that have one",
    "induction": "the share of a token’s attention that goes to what followed the same token before",
    "copying": "the share of a token’s attention that goes to earlier places of the token that comes next",
    "output_norm": "the size of what the head adds to the residual stream",
    "next_logit": "what the head by itself adds to the logit of the token that comes next, less the mean over all",
}
_SHOWN = 4  # heads with the largest and the smallest values


def write(found: Looked, path: str | os.PathLike) -> Path:
    """Write the page to `path`, and return the path.

    It makes no requests. All texts from prompts, models and users are escaped, and a content security policy forbids
    network access and other scripts.
    """
    return write_atomic(path, render(found))


def render(found: Looked) -> str:
    """Return the page as text."""
    templates = environment("foveate.report")
    scripts = [asset(templates, name) for name in ("values.js", "grid.js", "search.js", "map.js", "arcs.js", "look.js")]
    return templates.get_template("look.html.j2").render(
        policy=policy(scripts),
        style=Markup(asset(templates, "page.css") + asset(templates, "heads.css")),
        scripts=[Markup(script) for script in scripts],
        found=found,
        data=payload(found),
        about=_about(found),
        measures=[_words(*each) for each in _extremes(found)],
        maps=[f"{each.layer}.{each.head}" for each in found.maps],
        roles=None if found.roles is None else [_role(role) for role in found.roles],
    )  # fmt: skip


def lines(found: Looked) -> list[Any]:
    """Return the tables for a terminal: the extreme heads of each measure, and the roles if they were asked for."""
    means = "" if found.over is None else ", mean over texts ± its 95 % interval"
    shown = _table("measure", f"largest, layer.head{means}", "smallest")
    for measure, largest, smallest in _extremes(found):
        shown.add_row(Text(measure.name), Text(largest), Text(smallest))
    out: list[Any] = [Text(_about(found)), "", shown]
    out += [] if found.over is None else [Text(note) for note in found.over.notes]
    for layer, why in found.unseen.items():
        out.append(Text(f"layer {layer} is not measured: {visible(why)}"))
    if found.roles is not None:
        out += ["", _roles(found)] if found.roles else ["", "no head has a role at the default thresholds"]
    return out


def _extremes(found: Looked) -> Iterator[tuple[Measured, str, str]]:
    """Yield each measure with its extreme heads, for many texts with the half width of the mean's interval."""
    if found.over is None:
        halves: list[Any] = [None] * len(found.measures)
    else:
        halves = list((found.over.survey.interval()[1] - found.over.survey.value).unbind(0))
    for measure, half in zip(found.measures, halves, strict=True):
        yield measure, *extremes(measure, half)


def extremes(measure: Measured, half: Float[Tensor, "l h"] | None = None) -> tuple[str, str]:
    """Return the heads with the largest and the smallest values of a measure, each as `layer.head value`."""
    heads = [
        (value, f"{layer}.{head}", math.nan if half is None else float(half[layer, head]))
        for layer, row in enumerate(measure.table.tolist())
        for head, value in enumerate(row)
        if math.isfinite(value)
    ]
    heads.sort(key=lambda each: each[0], reverse=True)
    return _listed(heads[:_SHOWN]), _listed(heads[::-1][:_SHOWN])


def _listed(heads: Sequence[tuple[float, str, float]]) -> str:
    parts = []
    for value, name, half in heads:
        around = f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{half:.2g}" if math.isfinite(half) else ""
        parts.append(f"{name}\N{NO-BREAK SPACE}({value:.3g}{around})")
    return ", ".join(parts) or NOTHING


def _about(found: Looked) -> str:
    if found.over is not None:
        texts, tokens = found.over.survey.texts, found.over.tokens
        heads = f"{visible(found.model)}: {found.layers} layers of {found.heads} heads"
        return f"{heads}; {texts:,} texts of {visible(found.over.data)}, {tokens:,} tokens"
    new = len(found.tokens) - found.prompt
    read = f"{found.prompt:,} tokens read" + (f", {new:,} generated" if new else "")
    return f"{visible(found.model)}: {found.layers} layers of {found.heads} heads; {read}"


def _words(measure: Measured, largest: str, smallest: str) -> dict[str, str]:
    name = visible(measure.name)
    meaning = MEANINGS.get(measure.name, f"a value for each of the {measure.over}")
    return {"name": name, "meaning": meaning, "largest": largest, "smallest": smallest}


def _role(role: Any) -> dict[str, str]:
    return {
        "head": f"{role.layer}.{role.head}", "name": visible(role.name), "score": f"{role.score:.3f}",
        "threshold": f"{role.threshold:g}", "reason": visible(role.reason),
    }  # fmt: skip


def _roles(found: Looked) -> Table:
    shown = _table("head", "role", "score", "threshold", "reason")
    for role in found.roles or ():
        shown.add_row(*map(Text, _role(role).values()))
    return shown


def _table(*headings: str) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in headings:
        shown.add_column(heading)
    return shown
