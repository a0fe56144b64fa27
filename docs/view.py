"""Write build/view.html, the view whose picture is in docs/from-bertviz.md: the lab model asked for a pass key."""

from __future__ import annotations

from pathlib import Path

from foveate.bench.loading import load
from foveate.lens import attention_view

TEXT = "The pass key of olive is 47110. Lists may be sorted. The pass key of olive is"


def main() -> None:
    model, tokenizer, _ = load(None)
    view = attention_view(model, tokenizer(TEXT, return_tensors="pt").input_ids, tokenizer=tokenizer)
    path = Path(__file__).parents[1] / "build" / "view.html"
    path.parent.mkdir(exist_ok=True)
    path.write_text(view.head(3, heads=[3]).html(), "utf-8")


if __name__ == "__main__":
    main()
