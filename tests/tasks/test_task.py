"""Examples and tasks: accepted answers, and the score of a task that names none."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from foveate.tasks.base.task import Example, Task


class Ask(Task):
    name = "ask"

    def examples(self) -> list[Example]:
        return [Example("2 and 2 are", " four", accepted=(" four", " 4"))]


def test_an_answer_is_accepted_if_the_output_begins_with_it() -> None:
    task = Ask()
    (example,) = task.examples()
    assert example.answers == (" four", " 4") and task.metric == "begins"
    assert [task.score(example, output) for output in (" four.", " 4!", " five")] == [1.0, 1.0, 0.0]
    assert Example("2 and 2 are", " four").answers == (" four",)


def test_an_example_does_not_change() -> None:
    example = Example("a", "b")
    with pytest.raises(FrozenInstanceError):
        example.answer = "c"  # type: ignore[misc]
