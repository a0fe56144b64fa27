"""Fill the measured sections of README.md and docs/: `python docs/fill.py [compare's results.json]`.

Each section has one file and lies there between `<!-- name -->` and `<!-- /name -->`. The comparison's table comes from
the results file (the one of the last demo where none is named), the real models' from docs/measured/real.json, which
`make real FULL=1` writes, the recall figure from docs/measured/recall, and the speed ratios from the last lines that
`make bench` left in docs/measured/; those of benchmarks/decode_real.py have a table of their own. The circuits come
from docs/measured/circuits, which benchmarks/real/circuits.py writes. A section whose
measurement is missing stays what it is.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from foveate.bench.comparison.results import Comparison
from foveate.bench.recall_figure import Recall
from foveate.report import policies
from foveate.report.table import markdown

ROOT = Path(__file__).parent.parent
MEASURED = ROOT / "docs" / "measured"
#: The policies of the README's table: the plainest, the best known, and those that lose least.
SHOWN = ("full", "sink_recent", "duo_attention", "snapkv", "kvzip", "kivi", "quest", "token_select")
DECODING = "decode_real.json"


_SHARE = ", share of the ideal saving"


def demo(results: Path) -> str:
    """The comparison as a table, and where it was made."""
    found = Comparison.load(results)
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    budgets = ", ".join(f"{budget:.0%}" for budget in found.budgets)
    made = f"{found.examples} prompts of {found.length} bytes, budget {budgets}; {versions}."
    return f"{markdown(found)}\n{made}"


def real(results: Path) -> str:
    """The cache policies on real models at a quarter of the cache, a table for each model."""
    return policies.short(json.loads(results.read_text("utf-8")), methods=SHOWN)


def speed() -> str:
    """One row for each ratio that a benchmark states."""
    lines = ["| benchmark | ratio | value |", "|---|---|---|"]
    for file in sorted(MEASURED.glob("*.json")):
        if file.name == DECODING:
            continue
        for name, value in json.loads(file.read_text()).items():
            if isinstance(value, int | float):
                lines.append(f"| `benchmarks/{file.stem}.py` | {name} | {value:.3g} |")
    return "\n".join(lines)


def decoding() -> str:
    """A row for each contender of `benchmarks/decode_real.py`, a column for each setting."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for name, value in json.loads((MEASURED / DECODING).read_text("utf-8")).items():
        setting, _, rest = name.partition(": ")
        share = rest.endswith(_SHARE)
        contender = rest.removesuffix(_SHARE) if share else rest.removesuffix(" / plain")
        table.setdefault(contender, {}).setdefault(setting, {})["share" if share else "ratio"] = value
    settings = list(dict.fromkeys(setting for row in table.values() for setting in row))
    lines = [f"| | {' | '.join(settings)} |", f"|---|{'---:|' * len(settings)}"]
    for contender, row in table.items():
        cells = (_decoded(row.get(setting, {})) for setting in settings)
        lines.append(f"| {contender} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _decoded(found: dict[str, float]) -> str:
    if "ratio" not in found:
        return "–"
    return f"{found['ratio']:.2f}×" + (f" ({found['share']:.0%})" if "share" in found else "")


def recall() -> str:
    """The recall figure as a table, best first, and how it was made."""
    found = Recall.load(MEASURED / "recall" / "recall.json")
    lines = ["| network | recall | state, bytes | parameters | rate |", "|---|---:|---:|---:|---:|"]
    for point in sorted(found.best(), key=lambda point: -point.accuracy):
        numbers = f"{point.accuracy:.1%} | {point.state_bytes:,} | {point.parameters:,} | {point.rate:g}"
        lines.append(f"| {point.label} | {numbers} |")
    task, schedule = found.task, found.schedule
    made = (
        f"{task['pairs']} pairs in {task['length']} tokens of {task['vocabulary']}; {schedule['steps']} steps of "
        f"{schedule['batch']} sequences, seed {schedule['seed']}, at each rate: `python benchmarks/recall.py`."
    )
    return "\n".join([*lines, "", made])


def circuits(results: Path) -> str:
    """One model's circuit: heads and edges with their estimates and true patches, and what ablation does."""
    found = json.loads(results.read_text("utf-8"))
    tokens, of_edges, joint = found["tokens"], found["edge rank"], found["joint"]
    length = " to ".join(dict.fromkeys(str(each(tokens)) for each in (min, max)))
    lines = [
        (
            f"{found['pairs']} pairs of texts of {length} tokens. The right digit's logit less the wrong one's is "
            f"{found['clean']:.2f}, and {found['corrupt']:.2f} on the other texts.\n"
        ),
        "| head | roles | estimate | patch |\n|---|---|---:|---:|",
    ]
    for row in found["heads"][:10]:
        named = ", ".join(found["roles"].get(row["head"], [])) or "–"
        lines.append(f"| {row['head']} | {named} | {row['estimate']:.2f} | {row['patch']:.2f} |")
    lines.append(f"\nRank correlation with true patches: {found['head rank']:.2f}.\n")
    lines.append("| edge | from gradients | heads exact | patch |\n|---|---:|---:|---:|")
    numbers = "| {edge} | {linear:.2f} | {exact:.2f} | {patch:.2f} |"
    lines.extend(numbers.format(**row) for row in found["edges"])
    lines.append(
        f"\nRank correlation with true patches: {of_edges['linear']:.2f} from gradients, {of_edges['exact']:.2f} with "
        f"exact heads. Together the {joint['edges']} largest of {joint['of']:,} edges carry {joint['share']:.0%} of "
        f"the whole change; as many others carry {_range(joint['random'], '.1%')}. The heads at their ends: "
        f"{', '.join(found['circuit'])}.\n"
    )
    return "\n".join([*lines, _score(found["score"]), *_ablated(found["ablation"])])


def _score(found: dict[str, Any]) -> str:
    """The largest terms of one head's score."""
    terms = "; ".join(f"{one} × {other} {value:.2f}" for one, other, value in found["terms"][:5])
    return (
        f"Head {found['head']} gives {found['weight']:.0%} of the last token's weight to `{found['key']!r}` in "
        f"`{' '.join(found['text'].split())}`. Its score there is {found['score']:.2f}; the largest terms, query × "
        f"key: {terms}.\n"
    )


def _ablated(found: dict[str, Any]) -> list[str]:
    """A table of the results without the circuit, and without as many random heads or edges."""
    lines = [
        (
            f"Without {', '.join(found['heads'])}, the heads of the largest edges, or as many heads that are not in "
            f"the circuit; without the circuit's edges, or as many others:\n"
        ),
        f"| removed | needles found, of {found['needles']} | loss on plain text, nats |\n|---|---:|---:|",
    ]
    for name in ("whole", "circuit heads", "random heads", "circuit edges", "random edges"):
        counts, losses = ([each[key] for each in found[name]] for key in ("found", "loss"))
        shown = "nothing" if name == "whole" else name
        lines.append(f"| {shown} | {', '.join(map(str, counts))} | {_range(losses, '.2f')} |")
    return lines


def _range(values: list[Any], form: str) -> str:
    return " to ".join(dict.fromkeys(format(each(values), form) for each in (min, max)))


def fill(file: Path, name: str, content: str) -> None:
    """Replace the section `name` of a file; the marks stay."""
    text, mark = file.read_text("utf-8"), re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
    if not mark.search(text):
        raise SystemExit(f"{file.name} has no section {name}")
    file.write_text(mark.sub(lambda _: f"<!-- {name} -->\n{content}\n<!-- /{name} -->", text), "utf-8")


def main() -> None:
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "foveate-compare" / "results.json"
    readme = ROOT / "README.md"
    fill(ROOT / "docs" / "recall.md", "recall", recall())
    fill(ROOT / "docs" / "benchmarks.md", "bench", speed())
    for results_of in sorted((MEASURED / "circuits").glob("*.json")):
        if "seconds" not in json.loads(results_of.read_text("utf-8")):
            continue  # the run is not finished
        fill(ROOT / "docs" / "circuits.md", f"circuits {results_of.stem}", circuits(results_of))
    if (MEASURED / DECODING).is_file():
        fill(ROOT / "docs" / "benchmarks.md", "decoding", decoding())
    if results.is_file():
        fill(readme, "demo", demo(results))
    if (MEASURED / "real.json").is_file():
        fill(readme, "real", real(MEASURED / "real.json"))


if __name__ == "__main__":
    main()
