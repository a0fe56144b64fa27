"""Training tasks: the contents of batches, and the held-out data."""

from __future__ import annotations

import pytest
import torch

from foveate.core.errors import OptionError
from foveate.models.base import byte_tokenizer
from foveate.tasks.base.training_task import IGNORED
from foveate.tasks.parts import corpus
from foveate.tasks.parts.token_prompts import TokenPrompts
from foveate.tasks.training import language
from foveate.tasks.training.copying import Copying
from foveate.tasks.training.digits import Digits
from foveate.tasks.training.language import Language
from foveate.tasks.training.mqar import MQAR


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_copying_repeats_its_string() -> None:
    tokens, labels = Copying(vocabulary=9, length=8).sample(50, draw())
    for row, targets in zip(tokens.tolist(), labels.tolist(), strict=True):
        string = row[:4]
        assert row[4:] == [0, *string[:3]]
        assert targets == [IGNORED] * 4 + string
        assert all(1 <= letter < 9 for letter in string)


@pytest.mark.parametrize(
    ("sizes", "message"), [(dict(length=7), "length=7 must be even"), (dict(vocabulary=2), "vocabulary=2")]
)
def test_copying_refuses(sizes: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Copying(**sizes)


@pytest.mark.parametrize("heldout", [False, True])
def test_language_windows_come_from_the_corpus(heldout: bool) -> None:
    tokens, labels = Language(length=40).sample(5, draw(), heldout=heldout)
    assert tokens.shape == labels.shape == (5, 40)
    assert (tokens[:, 0] == byte_tokenizer.BOS).all()
    assert torch.equal(tokens[:, 1:], labels[:, :-1])
    source = corpus.text("heldout" if heldout else "train")
    for row in labels.tolist():
        assert bytes(row).decode() in source


def test_text_is_read_as_the_tokenizer_reads_it() -> None:
    assert (language.BOS, language.VOCABULARY) == (byte_tokenizer.BOS, byte_tokenizer.VOCAB)
    _, labels = Language(length=20).sample(1, draw())
    text = bytes(labels[0].tolist()).decode()
    assert byte_tokenizer.build(64)(text).input_ids == [byte_tokenizer.BOS, *labels[0].tolist()]


def test_digits_are_split_once() -> None:
    images, labels = Digits().heldout()
    assert images.shape == (360, 1, 8, 8)
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    assert sorted(labels.unique().tolist()) == list(range(10))
    assert torch.equal(Digits().heldout(7)[0], images[:7])
    drawn, _ = Digits().sample(500, draw())
    held = {tuple(image.flatten().tolist()) for image in images}
    assert not any(tuple(image.flatten().tolist()) in held for image in drawn)


def test_sequences_become_prompts() -> None:
    task = TokenPrompts(MQAR(vocabulary=40, length=24, pairs=4), count=20)
    assert (task.name, task.length) == ("mqar", 24)
    for example in task.examples():
        tokens = [int(word) for word in example.prompt.split()]
        pairs = dict(zip(tokens[0:8:2], tokens[1:8:2], strict=True))
        assert int(example.answer) == pairs[tokens[-1]]
        assert task.score(example, f"{example.answer} 7") == 1.0
        assert task.score(example, f"{example.answer}1 7") == 0.0
        assert task.score(example, "") == 0.0
    assert task.examples() == task.examples()
    assert TokenPrompts(task.training_task, count=20, seed=1).examples() != task.examples()


def test_held_out_scores_of_all_runs_refer_to_one_batch() -> None:
    """Another seed would make recorded scores incomparable."""
    task = Copying(vocabulary=9, length=8)
    expected = task.sample(5, draw(2_147_483_647), heldout=True)
    assert all(torch.equal(a, b) for a, b in zip(task.heldout(5), expected, strict=True))
    assert not torch.equal(task.heldout(5, seed=1)[0], expected[0])
