"""The reference run as a Markdown page, and as a small table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

Record = dict[str, Any]
_MISSING = "–"
_INTRODUCTION = """\
# Cache policies on real models

Cache policies on pretrained decoders, beside the full cache.{made_by}

- **Retrieval**: tasks as in RULER on real text, {examples} prompts each. A score is the share of the requested items
  that the greedy answer contains, with its 95 % interval (Wilson's if every answer is right or wrong, else a bootstrap
  over prompts). There are few prompts, so mind the intervals.
- **Kept** and **read**: the shares of the full cache's bytes that are stored, and of the keys that decoding queries
  read.
{more}
Policies that need no query of the prompt but its last share one dense prefill, and are applied at the prompt's last
token. Those that need a window of last queries are applied to the last 128 tokens; the others read the prompt
themselves. {versions}, {machine}.
"""


_READ_AS = (
    "Retrieval with its 95% interval. Kept and read are shares of a cache without windows, on the retrieval prompts."
)


_LOSSES = """\
- **Loss**: the mean loss of {horizon} tokens after {texts} texts of each length, and its increase over the full cache,
  compared per token, with a bootstrap over tokens.
"""
_TIMES = """\
- **Memory**: all live tensors beyond the weights, in megabytes.
- **Times**: medians over rounds, in each of which all policies run ({threads} threads, {device}). A ratio refers to the
  full cache in the same round, with the interval of its median over rounds.
"""


def page(found: Record, notes: str = "", made_by: str = "") -> str:
    """Return the whole result as Markdown.

    Args:
        found: the result of `foveate.bench.policies.run`.
        notes: Markdown behind the introduction.
        made_by: a sentence about the command that measured.
    """
    made, plan = found["made"], found["plan"]
    versions = ", ".join(f"{name} {made[name]}" for name in ("foveate", "torch", "transformers", "python"))
    more = (_LOSSES if plan["losses"] else "") + (_TIMES if plan["times"] else "")
    text = _INTRODUCTION.format(
        versions=versions, more=more.format(**made, **plan), made_by=made_by and f"\n{made_by}", **made, **plan
    )
    lines = [*text.splitlines(), *(["", *notes.splitlines()] if notes else [])]
    for model in found["models"]:
        lines += ["", *_model(model)]
    return "\n".join(lines) + "\n"


def short(found: Record, budget: float | None = None, methods: Sequence[str] | None = None) -> str:
    """Return a table for each model with one row per policy, at one budget (by default the nearest to 0.25).

    Args:
        found: the result of `foveate.bench.policies.run`.
        budget: one of its budgets.
        methods: the rows to show; None for all.
    """
    lines, known = [], found["plan"]["budgets"]
    budget = budget or min(known, key=lambda share: abs(share - 0.25))
    for model in found["models"]:
        lengths = [int(each) for each in model["rows"][0].get("times", {})]
        rows = [row for row in model["rows"] if "error" not in row and row["budget"] in (1.0, budget)]
        rows = [row for row in rows if methods is None or row["method"] in methods]
        columns: list[tuple[str, Callable[[Record], str]]] = [
            ("method", _name),
            ("retrieval", lambda row: _score(row["scores"]["all"])),
            ("cache kept", lambda row: _percent(row["kept"])),
            ("keys read", lambda row: _percent(row["read"])),
        ]
        for tokens in sorted(lengths)[-1:]:
            columns += [
                (f"MB at {tokens:,}", _at(str(tokens), lambda times: _number(times.get("decode_live_mb"), "{:.1f}"))),
                ("decode / token", _at(str(tokens), lambda times: _timed(times, "decode"))),
            ]
        lines += [f"**{model['name']}**, budget {budget:.0%}:", "", *_table(columns, rows), ""]
    timed = any(model["rows"][0].get("times") for model in found["models"])
    lines.append(_READ_AS + (" Ratios of time have the interval of their median." if timed else ""))
    return "\n".join(lines)


def _model(model: Record) -> list[str]:
    facts = (
        f"{model['parameters'] / 1e6:,.0f} million parameters, {model['layers']} layers, {model['heads']} query and "
        f"{model['kv_heads']} key/value heads, {model['dtype']}."
    )
    calibration = ", ".join(f"`{key}` {seconds:,.0f} s" for key, seconds in model["learnt_seconds"].items())
    rows = model["rows"]
    good = [row for row in rows if "error" not in row]
    lines = [f"## {model['name']}", "", facts, *([f"Calibrated once: {calibration}."] if calibration else [])]
    lines += ["", "### Retrieval", "", _sizes(model), "", *_table(_retrieval(model), good)]
    if rows[0].get("losses"):
        lines += ["", "### Next-token loss", "", *_table(_losses(rows[0]), good)]
    for tokens in rows[0].get("times", {}):
        lines += ["", f"### Time and memory after {int(tokens):,} tokens", "", *_table(_costs(tokens), good)]
    failed = [row for row in rows if "error" in row]
    if failed:
        lines += ["", "Not run:", "", *(f"- {_name(row)} at {row['budget']:.0%}: {row['error']}" for row in failed)]
    return lines


def _sizes(model: Record) -> str:
    each = ", ".join(f"{name} {about['tokens']:,}" for name, about in model["tasks"].items())
    lost = [name for name, about in model["tasks"].items() if not about["counts"]]
    note = f" The full cache fails {', '.join(lost)}; the policies skip it, and “all” leaves it out."
    return f"Tokens per prompt: {each}.{note if lost else ''}"


Columns = list[tuple[str, Callable[[Record], str]]]


def _retrieval(model: Record) -> Columns:
    def score(task: str) -> Callable[[Record], str]:
        return lambda row: _score(row["scores"][task])

    tasks: Columns = [(task, score(task)) for task in model["tasks"]]
    return [
        ("budget", _budget), ("method", _name), ("all", lambda row: _score(row["scores"]["all"])), *tasks,
        ("kept", lambda row: _percent(row["kept"])), ("read", lambda row: _percent(row["read"])),
    ]  # fmt: skip


def _losses(full: Record) -> Columns:
    def cell(tokens: str, row: Record) -> str:
        loss = row["losses"][tokens]
        if "more" in loss:
            return f"{loss['more']:+.3f} ({loss['low']:+.3f} to {loss['high']:+.3f})"
        return _number(loss["mean"], "{:.3f}")

    each: Columns = [(f"after {int(tokens):,} tokens", partial(cell, tokens)) for tokens in full.get("losses", {})]
    return [("budget", _budget), ("method", _name), *each]


def _costs(tokens: str) -> Columns:
    def figure(name: str) -> Callable[[Record], str]:
        return lambda row: _number(row["times"][tokens].get(name), "{:.1f}")

    return [
        ("budget", _budget), ("method", _name),
        ("stored MB", figure("decode_cache_mb")), ("live MB", figure("decode_live_mb")),
        ("live after the prompt", figure("read_live_mb")),
        ("prefill", lambda row: _timed(row["times"][tokens], "read")),
        ("decode / token", lambda row: _timed(row["times"][tokens], "decode")),
    ]  # fmt: skip


def _table(columns: Columns, rows: Sequence[Record]) -> list[str]:
    lines = ["| " + " | ".join(head for head, _ in columns) + " |"]
    lines.append("|" + "|".join("---" if head in ("method", "budget") else "---:" for head, _ in columns) + "|")
    return lines + ["| " + " | ".join(cell(row) for _, cell in columns) + " |" for row in rows]


def _at(tokens: str, cell: Callable[[Record], str]) -> Callable[[Record], str]:
    return lambda row: cell(row["times"][tokens])


def _name(row: Record) -> str:
    return f"`{row['method']}`"


def _budget(row: Record) -> str:
    return "" if row["budget"] == 1.0 else f"{row['budget']:.0%}"


def _score(score: Record) -> str:
    if score["mean"] is None:
        return _MISSING
    span = "" if score["low"] is None else f" ({100 * score['low']:.0f}–{100 * score['high']:.0f})"
    return f"{score['mean']:.0%}{span}"


def _timed(times: Record, kind: str) -> str:
    taken, ratio = times.get(f"{kind}_ms"), times.get(f"{kind}_ratio")
    if taken is None:
        return _MISSING
    shown = f"{taken / 1e3:.2f} s" if taken >= 1000 else f"{taken:.1f} ms"
    return shown if ratio is None else f"{shown}, {ratio[0]:.2f}× ({ratio[1]:.2f}–{ratio[2]:.2f})"


def _percent(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.0%}"


def _number(value: float | None, pattern: str) -> str:
    return _MISSING if value is None else pattern.format(value)
