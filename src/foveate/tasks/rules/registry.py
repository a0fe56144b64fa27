"""The benchmarks' rules by name. A rule is a function of the output, the accepted answers and the example's facts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from foveate.core.errors import unknown
from foveate.tasks.rules import babilong, choices, longbench, retrieval, ruler, scbench, trace

BenchmarkRule = Callable[[str, tuple[str, ...], Mapping[str, Any]], float]
#: The name of the score of a file whose examples have different rules.
SEVERAL = "several rules"

RULES: dict[str, BenchmarkRule] = {
    "ruler-all": ruler.every, "ruler-any": ruler.any_of,
    "ruler2-soft": ruler.soft, "ruler2-choice": choices.boxed,
    "longbench-qa": longbench.qa, "longbench-qa-zh": longbench.qa_zh,
    "longbench-rouge": longbench.rouge, "longbench-rouge-zh": longbench.rouge_zh,
    "longbench-classes": longbench.classes, "longbench-retrieval": longbench.retrieval,
    "longbench-count": longbench.count, "longbench-code": longbench.code,
    "longbench2-choice": choices.longbench2,
    "scbench-part": scbench.part, "scbench-part-any-case": scbench.part_any_case, "scbench-share": scbench.share,
    "scbench-characters": scbench.characters, "scbench-number": scbench.number, "scbench-passkey": scbench.passkey,
    "scbench-summary": scbench.summary, "scbench-repository": scbench.repository, "scbench-choice": choices.scbench,
    "nolima": retrieval.nolima, "mrcr": retrieval.mrcr, "babilong": babilong.labels,
    "ndcg": retrieval.ndcg, "code-line": longbench.code, "trace": trace.final,
}  # fmt: skip

#: Rules that need a package, each with an example that imports it.
_PACKAGES = ("longbench-qa-zh", "longbench-rouge-zh", "scbench-summary", "scbench-repository")


def common(rules: Iterable[str]) -> str:
    """Return the name that all examples share, or `SEVERAL`."""
    names = set(rules)
    return names.pop() if len(names) == 1 else SEVERAL


def check(rules: Iterable[str]) -> None:
    """Refuse an unknown rule, and one whose package is not installed, before a model answers."""
    for name in sorted(set(rules)):
        if name not in RULES:
            raise unknown("rule", name, RULES)
        if name in _PACKAGES:
            RULES[name]("a", ("a",), {})
