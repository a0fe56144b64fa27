"""The pages for users of BertViz and TransformerLens: what they say is here is here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import foveate
import foveate.lens

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", ["from-bertviz.md", "from-transformerlens.md"])
def test_what_a_page_names_is_here(page: str) -> None:
    rows = re.findall(r"^\| (.*?) \| (.*?) \|$", (DOCS / page).read_text(), re.MULTILINE)[1:]
    assert len(rows) > 7
    named = set()
    for _, ours in rows:
        for name in re.findall(r"`(?:foveate\.(?:lens\.)?)?([A-Za-z]\w+)(?:\(.*?\))?`", ours.split("not here")[0]):
            if name not in OTHERS:
                assert hasattr(foveate.lens, name) or hasattr(foveate, name), name
                named.add(name)
    assert len(named) > 4


#: Options, attributes and other libraries' names in the right columns.
OTHERS = {"keep_maps", "Method", "positions", "model", "generate", "read", "site", "token_type_ids"}
