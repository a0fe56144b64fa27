"""Windowed distance and future influence: those of the paper's functions, over calls and with padding."""

from __future__ import annotations

import pytest
import torch

from foveate.core.errors import OptionError
from foveate.host import apply
from foveate.lens import FutureInfluence, Lens, WindowedDistance, fai, waad
from foveate.lens.lens import look
from tests.lens.models import eager_maps, text, tiny
from tests.support.tensors import assert_near

MEASURES = [WindowedDistance(4), FutureInfluence(2, 6), FutureInfluence(3, None)]


def test_they_are_the_papers() -> None:
    model, inputs = tiny("llama"), text()
    seen = look(model, inputs, measures=MEASURES)
    for layer, w in enumerate(eager_maps(model, inputs)):
        assert_near(seen.values(MEASURES[0])[layer], waad(w, 4), 1e-4)
        assert_near(seen.values(MEASURES[1])[layer], fai(w, 2, 6), 1e-4)
        assert_near(seen.values(MEASURES[2])[layer], fai(w, 3, None), 1e-4)
        counted = fai(w, 2, 6)[..., :22]  # no token comes two after the last two
        assert_near(seen.lens.reduced(MEASURES[1])[layer], counted.mean(-1), 1e-4)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_does_not_count(padding: str) -> None:
    model, inputs = tiny("llama"), text(padding)
    seen = look(model, inputs, measures=MEASURES)
    real = inputs["attention_mask"][0].bool()
    alone = look(model, {name: x[:1, real] for name, x in inputs.items()}, measures=MEASURES)
    for measure in MEASURES:
        for layer, values in alone.values(measure).items():
            assert_near(seen.values(measure)[layer][:1, :, real], values, 1e-4, measure.name)
            assert_near(seen.lens.reduced(measure)[layer][:1], alone.lens.reduced(measure)[layer], 1e-4, measure.name)


def test_decoding_alone_counts_its_own_queries() -> None:
    """Of a lens that sees four decoded tokens, a key's influence is the mean over those in its range."""
    model, inputs, lens = tiny("llama"), text(), Lens(MEASURES, phase="decode")
    with torch.no_grad(), apply(model, lens):
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    w = eager_maps(model, {"input_ids": ids[:, :-1]})[0]
    asks = torch.arange(28) >= 24
    for measure, span in ((MEASURES[1], (2, 6)), (MEASURES[2], (3, None))):
        expected = torch.stack([fai(each, *span, response=asks) for each in w])
        assert_near(lens.values(measure)[0], expected, 1e-4)
        gaps = torch.arange(28)[:, None] - torch.arange(28)
        last = 99 if span[1] is None else span[1]
        asked = ((gaps >= span[0]) & (gaps <= last) & asks[:, None]).any(0)
        assert_near(lens.reduced(measure)[0], expected[..., asked].mean(-1), 1e-4)


def test_options_are_checked() -> None:
    for wrong in (lambda: WindowedDistance(0), lambda: FutureInfluence(0), lambda: FutureInfluence(5, 4)):
        with pytest.raises(OptionError, match="must be a whole number, at least"):
            wrong()
    names = [measure.name for measure in (*MEASURES, WindowedDistance(), FutureInfluence())]
    assert names == [
        "windowed_distance_4", "future_influence_2_6", "future_influence_3_end", "windowed_distance",
        "future_influence",
    ]  # fmt: skip
