"""The corpus's splits share no text, and the pass-key stream marks its answers."""

from __future__ import annotations

from itertools import islice

import pytest

from foveate.core.errors import OptionError
from foveate.tasks.parts import corpus
from foveate.tasks.text.passkeys import Passkeys


def test_splits_share_no_paragraph() -> None:
    train, heldout = ({p for p in corpus.text(s).split("\n\n") if len(p) > 80} for s in ("train", "heldout"))
    assert len(heldout) > 200 and len(train) > 5 * len(heldout) and not train & heldout


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(OptionError, match="split='test'"):
        corpus.text("test")


def test_passkeys_mark_their_answers() -> None:
    stream = Passkeys(lambda text: list(text.encode()), length=600, count=3, words=4, begin=(256,))
    for ids, answers in islice(stream, 3):
        assert ids.shape == answers.shape and ids[0, 0] == 256
        requested = bytes(ids[answers].tolist()).decode()
        body = bytes(ids[~answers][1:].tolist()).decode()
        keys = [key.strip() for key in requested.split(".")[:-1]]
        assert len(keys) == 3 and all(len(key.split()) == 4 and f"pass key is {key}." in body for key in keys)
