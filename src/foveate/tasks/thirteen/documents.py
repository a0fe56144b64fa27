"""RULER's question answering, `qa_1` and `qa_2` (arXiv 2404.06654), on the documentation of the standard library.

RULER takes SQuAD and HotpotQA, which do not ship with Python. Here documents describe functions, and a
question of `qa_2` needs two of them. Scores are not RULER's.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

from foveate.core import validate
from foveate.tasks.base.task import Example
from foveate.tasks.base.token_task import TokenTask, divided
from foveate.tasks.parts.library import Function, functions

_NEW_TOKENS, _LONGEST = 32, 70  # tokens of an answer, characters of a description
_INTRO = "Answer the question by the documents. Give the answer alone.\n\n"


@dataclass(frozen=True)
class Documents(TokenTask):
    """A question about one or two of many documents.

    In `qa_1` a document is a function's documentation; the question is what a function does. In `qa_2` an index entry
    and a description are two documents; the question is what the function of an entry does. The score is RULER's: 1.0
    if the output contains the description, without its full stop.

    Args:
        length, count, seed, tokens: see `TokenTask`; 32 tokens are left to the answer, as in RULER.
        hops: documents that the answer needs, 1 or 2.
    """

    hops: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.between("hops", self.hops, 1, 2)

    @property
    def name(self) -> str:
        return f"ruler/qa_{self.hops}"

    @property
    def metric(self) -> str:
        return "ruler-any"

    def _built(self, draw: random.Random, size: int) -> list[Example]:
        known = _known()
        chosen = draw.sample(known, min(size + 1, len(known)))
        entries = draw.sample(range(100, 1000 + len(chosen)), len(chosen))
        documents = [page for pair in zip(entries, chosen, strict=True) for page in self._pages(*pair)]
        draw.shuffle(documents)
        context = _INTRO + "\n\n".join(f"Document {number}:\n{page}" for number, page in enumerate(documents, 1))
        subject = chosen[0].name if self.hops == 1 else f"the function of index entry {entries[0]}"
        question = f"\n\nQuestion: What is the description of {subject}?\nAnswer:"
        answer = chosen[0].summary.rstrip(".")
        return [divided(context, question, (answer,), rule=self.metric, new_tokens=_NEW_TOKENS)]

    def _pages(self, entry: int, function: Function) -> list[str]:
        if self.hops == 1:
            return [function.document]
        return [f"Index entry {entry} is about {function.name}.", f"{function.name}: {function.summary}"]


@cache
def _known() -> tuple[Function, ...]:
    """Return the functions whose description fits into the answer."""
    return tuple(function for function in functions() if len(function.summary) <= _LONGEST)
