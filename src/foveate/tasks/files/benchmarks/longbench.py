"""Rows of LongBench (2023, arXiv 2308.14508) and LongBench v2 (2024, arXiv 2412.15204).

Each set has its rule and its number of tokens. Sets without a question in their rows get one of Foveate's own words.
"""

from __future__ import annotations

from foveate.core.errors import TaskError
from foveate.tasks.files.parts import Item, Row, Text, field_text, listed

#: The rule and the number of new tokens of each set.
SETS = {
    "narrativeqa": ("qa", 128), "qasper": ("qa", 128), "multifieldqa_en": ("qa", 64), "multifieldqa_zh": ("qa-zh", 64),
    "hotpotqa": ("qa", 32), "2wikimqa": ("qa", 32), "musique": ("qa", 32), "dureader": ("rouge-zh", 128),
    "gov_report": ("rouge", 512), "qmsum": ("rouge", 512), "multi_news": ("rouge", 512), "vcsum": ("rouge-zh", 512),
    "trec": ("classes", 64), "triviaqa": ("qa", 32), "samsum": ("rouge", 128), "lsht": ("classes", 64),
    "passage_count": ("count", 32), "passage_retrieval_en": ("retrieval", 32),
    "passage_retrieval_zh": ("retrieval", 32),
    "lcc": ("code", 64), "repobench-p": ("code", 64),
}  # fmt: skip
#: A question for sets whose rows have none, and the beginning of an answer; {} is the row's input.
_QUESTIONS = {
    "gov_report": ("Write a summary of the report above.", "\n\nSummary:"),
    "multi_news": ("Write a summary of the news above.", "\n\nSummary:"),
    "vcsum": ("请总结以上会议。", "\n\n总结："),
    "passage_count": ("How many different paragraphs are above?", "\n\nNumber:"),
    "passage_retrieval_en": ("Which paragraph does this describe? {}", "\n\nAnswer: Paragraph"),
    "passage_retrieval_zh": ("以下内容描述哪个段落？{}", "\n\n答案：段落"),
}
#: Sets of worked examples, whose input ends in the beginning of the answer.
_SHOTS = ("trec", "triviaqa", "samsum", "lsht")
_LETTERS = "ABCD"
_DECISION = "The correct answer is ("


def first(row: Row, path: str) -> list[Item]:
    """Read a row of LongBench or LongBench-E."""
    name = str(row["dataset"]).removesuffix("_e")
    context, question, answer = field_text(row, "context"), field_text(row, "input"), listed(row["answers"])
    if name not in SETS:
        return [Item(Text(context, question.strip(), "\n\nAnswer:"), answer, answer_name="answers")]
    if SETS[name][0] == "code":  # the model continues the code, so that nothing may follow it
        parts = Text(context, question, between="")
    elif name in _SHOTS:
        parts = Text(context, question, between="\n\n" if name in ("triviaqa", "samsum") else "\n")
    else:
        pattern, prefix = _QUESTIONS.get(name, ("{}", "\n\nAnswer:"))
        parts = Text(context, pattern.replace("{}", question.strip()), prefix)
    return [_item(parts, answer, name, row)]


def kvpress(row: Row, path: str) -> list[Item]:
    """Read a row of LongBench in kvpress' form, which has the benchmark's instructions in its context."""
    context, question, prefix = (field_text(row, name) for name in ("context", "question", "answer_prefix"))
    parts = Text(context, question, prefix, between="")
    name, answer = str(row["task"]).removesuffix("_e"), listed(row["answers"])
    if name not in SETS:
        return [Item(parts, answer, answer_name="answers")]
    tokens = row.get("max_new_tokens")
    return [_item(parts, answer, name, row, tokens if isinstance(tokens, int) else 0)]


def second(row: Row, path: str) -> list[Item]:
    """Read a row of LongBench v2. The prompt ends in the words that its rule searches, up to the letter."""
    choices = "\n".join(f"({letter}) {field_text(row, f'choice_{letter}').strip()}" for letter in _LETTERS)
    question = f"{field_text(row, 'question').strip()}\n{choices}"
    parts = Text(field_text(row, "context").strip(), question, f"\n\n{_DECISION}")
    facts = {"prefix": _DECISION, "groups": [str(row[name]) for name in ("difficulty", "length") if row.get(name)]}
    return [Item(parts, row["answer"], "longbench2-choice", facts, 128)]


def _bin(row: Row) -> list[str]:
    """Return LongBench-E's group of the row's length in words."""
    words = row.get("length")
    if not str(row.get("dataset", "")).endswith("_e") or not isinstance(words, int):
        return []
    return ["0-4k" if words < 4000 else "4-8k" if words < 8000 else "8k+"]


def _item(parts: Text, answer: object, name: str, row: Row, tokens: int = 0) -> Item:
    rule, new_tokens = SETS[name]
    facts: dict[str, object] = {"dataset": name, "groups": [name, *_bin(row)]}
    if rule == "classes":
        classes = listed(row.get("all_classes")) or []
        if not isinstance(classes, list) or not all(isinstance(each, str) for each in classes):
            raise TaskError(f"all_classes must be a list of texts; got {classes!r:.40}")
        facts["classes"] = classes
    return Item(parts, answer, f"longbench-{rule}", facts, tokens or new_tokens, "answers")
