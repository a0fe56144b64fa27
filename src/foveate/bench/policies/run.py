"""The reference run: models under every cache policy at several budgets, what each keeps, loses and costs."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from foveate._version import __version__
from foveate.bench.comparison.turns import Progress
from foveate.bench.loading import find, load
from foveate.bench.methods import Contender
from foveate.bench.parts import digest
from foveate.bench.parts.folder import claimed
from foveate.bench.parts.journal import Journal
from foveate.bench.parts.plaindata import write_atomic
from foveate.bench.parts.timing import threads
from foveate.bench.policies import answers, losses, times
from foveate.bench.policies.calibrate import Lessons
from foveate.bench.policies.desk import Desk
from foveate.bench.policies.plan import Plan
from foveate.bench.policies.summary import Summary
from foveate.host.hf.model import host

FORMAT = "foveate.policies/1"
JOURNAL, RESULTS = "journal.jsonl", "policies.json"


def run(
    models: Sequence[str],
    plan: Plan,
    out: Path,
    watch: Progress,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    fresh: bool = False,
) -> dict[str, Any]:
    """Measure what is not known yet, and return the summary that is also written to `out / RESULTS`.

    Args:
        models: folders, GGUF files or hub ids of decoders.
        plan: what to measure.
        out: folder of the journal and the results. Every answer, loss and round of times is written down once it is
            there; the same call again takes up where an interrupted one stopped.
        watch: told about every step.
        dtype, device: what the models compute in, and where. Processors without bfloat16 instructions read a prompt
            several times faster in float32.
        fresh: whether to measure again what the journal knows.
    """
    for model in models:
        find(model)  # what is not there is refused before the first model has worked for an hour
    with claimed(out), threads() as count:
        journal = Journal(out / JOURNAL, fresh)
        found = [_one(model, plan, journal, watch, dtype, device) for model in models]
        made = {**versions(), "threads": count, "device": device}
        result = {"format": FORMAT, "made": made, "plan": asdict(plan), "models": found}
        write_atomic(out / RESULTS, json.dumps(result, indent=1) + "\n")
        return result


def _one(named: str, plan: Plan, journal: Journal, watch: Progress, dtype: str, device: str) -> dict[str, Any]:
    watch.say(f"loading {named}")
    model, tokenizer, folder = load(named, device, dtype, note=watch.say)
    here = host(model)
    lessons = Lessons(
        here, tokenizer, _beside(named, folder, journal), lambda at, of, note: watch.say(f"{at} of {of}: {note}")
    )
    contenders = [Contender(key, here, budget) for key, budget in plan.contenders]
    world = digest.of(digest.of_model(model), digest.of_code(), versions(), dtype, device)
    desk = Desk(model, tokenizer, plan, journal, contenders, watch, world)
    for contender in contenders:
        desk.attempt(contender, lambda: contender.learn(lessons))  # noqa: B023
    watch.start(times.steps(desk) + answers.steps(desk) + losses.steps(desk))
    times.measure(desk)
    answers.answer(desk)
    losses.measure(desk)
    return Summary(desk).model(
        Path(named).resolve().stem if folder is None else folder.resolve().name, lessons.seconds()
    )


def _beside(named: str, folder: Path | None, journal: Journal) -> Path:
    """Where what is learnt about a model is kept: beside it, or beside the journal for one from a hub."""
    if folder is None and Path(named).is_file():
        return Path(named).parent
    return folder or journal.file.parent / named.replace("/", "--")


def versions() -> dict[str, str]:
    """What the figures were made with."""
    return {
        "foveate": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(), "machine": platform.machine(),
    }  # fmt: skip
