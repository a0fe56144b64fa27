"""GridQA: its pictures and questions by hand, and what its models have learnt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from foveate.core.errors import OptionError
from foveate.host import apply, spans_of
from foveate.labs.grid_qa import GridRecipe, Questions, draw, embedded, load, train
from foveate.labs.grid_qa.questions import (
    ASK_COLOUR,
    ASK_SHAPE,
    BLANK,
    CELL,
    CELLS,
    COLOUR,
    END,
    IMAGE,
    SHAPE,
    VOCAB,
    usual_colour,
)
from foveate.labs.grid_qa.recipe import answer_logits, build
from tests.support.host_models import SameHidden


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_question_by_hand() -> None:
    colours, shapes = torch.arange(16)[None] % 6, torch.arange(16)[None] % 4
    asks = torch.tensor([False])
    questions = Questions(colours, shapes, torch.tensor([9]), asks)
    assert questions.input_ids.tolist() == [[IMAGE] * 16 + [ASK_COLOUR, CELL + 9, END]]
    assert questions.answers.tolist() == [COLOUR + 3] == questions.defaults.tolist()
    pixels = questions.pixel_values
    assert pixels.shape == (1, 3, 16, 16)
    assert pixels[0, :, 8:12, 4:8].amax((1, 2)).tolist() == [1, 1, 0], "cell 9 is yellow: third row, second column"
    assert pixels[0, 0, 8:12, 4:8].tolist() == [[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]], "a frame"
    shape = Questions(colours, shapes, torch.tensor([9]), ~asks)
    assert shape.answers.tolist() == [SHAPE + 1] and int(shape.input_ids[0, 16]) == ASK_SHAPE


def test_draws_keep_to_their_options() -> None:
    plain = draw(4000, generator())
    assert 0.4 < float(plain.asks_shape.double().mean()) < 0.6 and set(plain.cells.tolist()) == set(range(16))
    usual = draw(4000, generator(), asked="colour", usual=0.85)
    right = usual.answers == usual.defaults
    assert 0.83 < float(right.double().mean()) < 0.87 and not usual.asks_shape.any()
    never = draw(4000, generator(), asked="colour", usual=0.0, blank=True)
    assert not (never.answers == never.defaults).any() and not (never.cells == BLANK).any()
    assert (never.colours[:, BLANK] == -1).all() and float(never.pixel_values[:, :, :4, :4].abs().max()) == 0.0
    others = (never.answers - COLOUR - usual_colour(never.cells)) % 6
    assert torch.bincount(others, minlength=6)[1:].min() > 600, "other colours are equally likely"
    assert torch.equal(draw(9, generator()).input_ids, draw(9, generator()).input_ids)
    with pytest.raises(OptionError, match="usual=1.5 must be in"):
        draw(3, generator(), usual=1.5)


@torch.no_grad()
def test_embeddings_are_what_the_model_reads() -> None:
    """Ids with pictures, and embeddings, give the same logits; hidden cells are zeros, and noise has its scale."""
    model, questions = build(), draw(5, generator())
    embeds = embedded(model, questions)
    by_ids = model(input_ids=questions.input_ids, pixel_values=questions.pixel_values).logits[:, -1]
    torch.testing.assert_close(answer_logits(model, questions, embeds), by_ids)
    assert torch.equal(spans_of(model, {"input_ids": questions.input_ids})["image"].sum(1), torch.full((5,), 16))
    hidden = torch.zeros(5, CELLS, dtype=torch.bool)
    hidden[:, 3] = True
    muted = embedded(model, questions, hidden=hidden)
    assert float(muted[:, 3].abs().max()) == 0.0 and torch.equal(muted[:, 4:], embeds[:, 4:])
    noise = embedded(model, questions, noise=2.0, generator=generator()) - embeds
    assert float(noise[:, :CELLS].std() / embeds[:, :CELLS].std()) == pytest.approx(2.0, rel=0.05)
    assert float(noise[:, CELLS:].abs().max()) == 0.0


def test_a_training_is_deterministic_and_is_kept(tmp_path: Path) -> None:
    recipe = GridRecipe(steps=3, batch=8)
    notes: list[str] = []
    first = train(recipe, lambda step, steps, note: notes.append(f"{step}/{steps}"))
    kept, again = load(recipe, tmp_path), load(recipe, tmp_path)
    assert notes == ["1/3", "2/3", "3/3"] and len(list(tmp_path.glob("*.safetensors"))) == 1
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, kept.state_dict()[name]) and torch.equal(weight, again.state_dict()[name]), name
    assert GridRecipe(seed=1).name != GridRecipe().name != GridRecipe(prior=True).name
    assert first.config.text_config.vocab_size == VOCAB and not first.training


@torch.no_grad()
def test_methods_reach_the_model() -> None:
    model, questions = build(), draw(3, generator())
    given = {"input_ids": questions.input_ids, "pixel_values": questions.pixel_values}
    plain = model(**given).logits
    with apply(model, SameHidden()) as run:
        assert torch.equal(model(**given).logits, plain)
        assert int(run.spans["image"].sum()) == 3 * CELLS and int(run.spans["text"].sum()) == 9


def accuracy(recipe: GridRecipe, **options: object) -> tuple[float, float, float]:
    """Return the accuracy on questions of both kinds, and with noise: accuracy, and answers by the usual colour."""
    model, draws = load(recipe), generator(77)
    with torch.no_grad():
        easy = draw(1000, draws, blank=recipe.blank)
        clear = float((answer_logits(model, easy).argmax(-1) == easy.answers).double().mean())
        hard = draw(2000, draws, blank=recipe.blank, asked="colour", usual=0.0)
        said = answer_logits(model, hard, embedded(model, hard, noise=1.4, generator=draws)).argmax(-1)
    right, usual = (said == hard.answers).double().mean(), (said == hard.defaults).double().mean()
    return clear, float(right), float(usual)


def test_the_shipped_model_guesses_the_usual_colour() -> None:
    """Each of the four other wrong colours is said less often."""
    clear, right, usual = accuracy(GridRecipe(prior=True, blank=True))
    assert clear > 0.9
    assert 0.4 < right < 0.7 and usual > 1.5 * (1 - right - usual) / 4


@pytest.mark.slow
def test_a_plain_model_answers_and_has_no_usual_colour() -> None:
    clear, right, usual = accuracy(GridRecipe())
    assert clear > 0.97 and usual < 1.4 * (1 - right - usual) / 4
