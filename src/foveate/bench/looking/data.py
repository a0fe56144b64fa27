"""Run a model over the texts of a file under a lens: means over texts, from which an interrupted run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from foveate.bench.comparison.model_context import context_length
from foveate.bench.loading import load
from foveate.bench.looking.results import Looked, Over
from foveate.bench.looking.run import DEFAULT, chosen_measures, look_at_tokens, versions
from foveate.bench.looking.state import State
from foveate.bench.looking.texts import Texts, batches, padded, read_texts
from foveate.bench.parts import digest
from foveate.core import validate
from foveate.core.errors import Interrupted
from foveate.host import Host
from foveate.host.hf.model import host
from foveate.host.probing import Progress
from foveate.lens.measures import Measure
from foveate.lens.survey import Survey, surveys

#: Seconds after which the state is written again: a run that is killed loses no more.
_EVERY = 2.0


@dataclass(frozen=True)
class Data:
    """A file of texts, and how it is read.

    Args:
        file: JSON lines, JSON, CSV, Parquet, or a folder of a dataset.
        field: the field of the text, see `foveate.tasks.files.texts.texts`; None finds it.
        texts: the most rows to read; None for all.
        batch: the texts that the model reads together.
        length: the most tokens of a text, of which the rest is cut; None is the model's context.
    """

    file: str
    field: str | None = None
    texts: int | None = None
    batch: int = 4
    length: int | None = None

    def __post_init__(self) -> None:
        validate.count("batch", self.batch, 1)
        for name in ("texts", "length"):
            if getattr(self, name) is not None:
                validate.count(name, getattr(self, name), 1)


def look_at_data(
    model: str | None, data: Data, folder: Path, *, measures: Sequence[str | Measure] = DEFAULT,
    heads: Sequence[tuple[int, int]] = (), fresh: bool = False, device: str = "cpu", dtype: str = "float32",
    trust_remote_code: bool = False, progress: Progress = lambda step, steps, note: None,
    say: Callable[[str], None] = lambda text: None,
) -> Looked:  # fmt: skip
    """Load a decoder, and measure its heads over the texts of a file; each text counts once.

    What is finished is kept in the folder every two seconds, and when the run is interrupted; the same call goes on
    there. A call with another model, file or other settings is refused while it is unfinished. The first text is read
    once more, for the values of single tokens and for maps.

    Args:
        model, measures, heads, device, dtype, trust_remote_code, progress, say: see `look_at`; `heads` are those whose
            maps of the first text to keep.
        data: the file.
        folder: keeps the unfinished run; `finish` writes the results into it.
        fresh: True begins again.

    Raises:
        FoveateError: if anything cannot be run.
        Interrupted: with the number of texts that are finished, and of all.
    """
    chosen = chosen_measures(measures)
    loaded, tokenizer, _ = load(model, device, dtype, trust_remote_code=trust_remote_code, note=say)
    here = host(loaded)
    here.check_heads(heads)
    context = context_length(here.config)
    longest = min(filter(None, (data.length, context)), default=None)
    say("encoding texts")
    texts = read_texts(Path(data.file), tokenizer, field=data.field, most=data.texts, longest=longest, note=say)
    identity = {
        "model": digest.of_model(loaded), "file, field or number of texts": texts.digest(),
        "list of measures": ", ".join(map(repr, chosen)),
        "batch size": str(data.batch), "device": device, "dtype": dtype,
        "version of Foveate, torch or transformers": digest.of(versions(), digest.of_code()),
    }  # fmt: skip
    survey = _survey(here, texts, chosen, data.batch, State(folder, identity), fresh, progress)
    say("the first text")
    first = look_at_tokens(here, tokenizer, texts.ids[0].tolist(), chosen, heads)
    tables = zip(first.measures, survey.value, strict=True)
    return replace(
        first,
        model=model or "lab lm",
        measures=[replace(measure, table=table) for measure, table in tables],
        unseen=dict(survey.unseen or {}),
        settings={"device": device, "dtype": dtype, "batch": str(data.batch), **versions()},
        over=Over(data.file, survey, texts.tokens, texts.notes()),
    )


def finish(found: Looked, folder: Path) -> tuple[Path, Path]:
    """Write the results of `look_at_data`, then remove the unfinished run; return the paths of JSON and table."""
    paths = found.save(folder)
    State(folder, {}).forget()
    return paths


def _survey(
    here: Host, texts: Texts, measures: Sequence[str | Measure], batch: int, state: State, fresh: bool,
    progress: Progress,
) -> Survey:  # fmt: skip
    """Read what is left of the texts, and keep the state."""
    plan, total = batches([len(ids) for ids in texts.ids], batch), len(texts.ids)
    kept: tuple[Survey | None, int] = state.load(fresh)
    device = here.model.device
    inputs = (padded([texts.ids[number] for number in some], device) for some in plan[kept[1] :])
    progress(0 if kept[0] is None else kept[0].texts, total, "reading texts")
    due = time.monotonic() + _EVERY
    try:
        for survey in surveys(here.model, inputs, measures=measures, survey=kept[0]):
            done = kept[1] + 1
            kept = survey, done
            progress(survey.texts, total, "reading texts")
            if time.monotonic() >= due:
                state.save(survey, done)
                due = time.monotonic() + _EVERY
    except KeyboardInterrupt:
        raise Interrupted(_keep(state, kept), total, state.file.parent) from None
    _keep(state, kept)
    assert kept[0] is not None  # there is a text at least
    return kept[0]


def _keep(state: State, kept: tuple[Survey | None, int]) -> int:
    """Keep what is finished, and return the number of texts."""
    if kept[0] is None:
        return 0
    state.save(kept[0], kept[1])
    return kept[0].texts
