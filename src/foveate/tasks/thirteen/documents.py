"""RULER's question answering, `qa_1` and `qa_2` (arXiv 2404.06654), on the documentation of the standard library.

RULER takes SQuAD and HotpotQA, which do not ship with Python. Here documents are descriptions and signatures of
functions, and a question of `qa_2` needs two of them. Scores are not RULER's.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from foveate.core import validate
from foveate.tasks.base.task import Example
from foveate.tasks.base.token_task import TokenTask, divided
from foveate.tasks.parts.library import Function, functions

_NEW_TOKENS = 32
_INTRO = "Answer the question by the documents. Give the name alone.\n\n"


@dataclass(frozen=True)
class Documents(TokenTask):
    """A question about one or two of many documents.

    In `qa_1` a document is a function's documentation; the question is which function has a given description. In
    `qa_2` description and signature are two documents; the question is the first parameter of the function with a given
    description. The score is RULER's: 1.0 if the output contains the name.

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
        known = [f for f in functions() if self.hops == 1 or (f.parameters and len(f.parameters[0]) > 2)]
        asked = draw.choice(known)
        others = [f for f in draw.sample(known, min(size, len(known))) if f is not asked]
        documents = [page for function in (asked, *others) for page in self._pages(function)]
        draw.shuffle(documents)
        context = _INTRO + "\n\n".join(f"Document {number}:\n{page}" for number, page in enumerate(documents, 1))
        question, answer = self._question(asked)
        asked_for = f"\n\nQuestion: {question}\nAnswer:"
        return [divided(context, asked_for, (answer,), rule=self.metric, new_tokens=_NEW_TOKENS)]

    def _pages(self, function: Function) -> list[str]:
        if self.hops == 1:
            return [function.document]
        return [f"{function.name}: {function.summary}", f"def {function.name}({function.signature})"]

    def _question(self, function: Function) -> tuple[str, str]:
        if self.hops == 1:
            return f'Which function is described as "{function.summary}"?', function.name
        return f'What is the first parameter of the function that is described as "{function.summary}"?', (
            function.parameters[0]
        )
