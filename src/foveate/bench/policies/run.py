"""The reference run: quality, memory and time of models under every cache policy at several budgets."""

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
from foveate.bench.comparison.interleaved import Progress
from foveate.bench.loading import find, load
from foveate.bench.methods import Contender
from foveate.bench.parts import digest
from foveate.bench.parts.folder import lock_folder
from foveate.bench.parts.journal import Journal
from foveate.bench.parts.plaindata import write_atomic
from foveate.bench.parts.timing import threads
from foveate.bench.policies.answers import answer_steps, measure_answers
from foveate.bench.policies.calibrate import TimedCalibrationStore
from foveate.bench.policies.losses import check_losses, loss_steps, measure_losses
from foveate.bench.policies.model_run import ModelRun
from foveate.bench.policies.plan import Plan
from foveate.bench.policies.summary import Summary
from foveate.bench.policies.times import measure_times, time_steps
from foveate.host.hf.model import host

FORMAT = "foveate.policies/1"
JOURNAL, RESULTS = "journal.jsonl", "policies.json"


def run(
    models: Sequence[str],
    plan: Plan,
    out: Path,
    progress: Progress,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    fresh: bool = False,
) -> dict[str, Any]:
    """Measure what the journal does not have, and return the summary, which is also written to `out / RESULTS`.

    Args:
        models: folders, GGUF files or hub ids of decoders.
        plan: the measurements to make.
        out: the folder of the journal and the results. Every answer, loss and round of times is recorded at once; the
            same call resumes after an interruption.
        progress: receives the progress.
        dtype, device: the number format and device of the models. Processors without bfloat16 instructions read a
            prompt several times faster in float32.
        fresh: True measures again what the journal has.
    """
    for model in models:
        find(model)  # refuse a missing model now, and not after an hour of work on the first one
    with lock_folder(out), threads() as count:
        journal = Journal(out / JOURNAL, fresh)
        found = [_run_model(model, plan, journal, progress, dtype, device) for model in models]
        made = {**versions(), "threads": count, "device": device}
        result = {"format": FORMAT, "made": made, "plan": asdict(plan), "models": found}
        write_atomic(out / RESULTS, json.dumps(result, indent=1) + "\n")
        return result


def _run_model(name: str, plan: Plan, journal: Journal, progress: Progress, dtype: str, device: str) -> dict[str, Any]:
    progress.say(f"loading {name}")
    model, tokenizer, folder = load(name, device, dtype, note=progress.say)
    target = host(model)
    store = TimedCalibrationStore(
        target,
        tokenizer,
        _calibration_folder(name, folder, journal),
        lambda step, steps, note: progress.say(f"{step} of {steps}: {note}"),
    )
    contenders = [Contender(key, target, budget) for key, budget in plan.contenders]
    environment = digest.of(digest.of_model(model), digest.of_code(), versions(), dtype, device)
    model_run = ModelRun(model, tokenizer, plan, journal, contenders, progress, environment)
    for contender in contenders:
        model_run.attempt(contender, lambda: contender.calibrate(store))  # noqa: B023
    check_losses(model_run)
    progress.start(time_steps(model_run) + answer_steps(model_run) + loss_steps(model_run))
    measure_answers(model_run)
    measure_losses(model_run)
    measure_times(model_run)
    return Summary(model_run).model(
        Path(name).resolve().stem if folder is None else folder.resolve().name, store.seconds()
    )


def _calibration_folder(name: str, folder: Path | None, journal: Journal) -> Path:
    """Return the folder for a model's calibration: the model's own, or one beside the journal for a hub's model."""
    if folder is None and Path(name).is_file():
        return Path(name).parent
    return folder or journal.file.parent / name.replace("/", "--")


def versions() -> dict[str, str]:
    """Return the versions of the packages that produced the results."""
    return {
        "foveate": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(), "machine": platform.machine(),
    }  # fmt: skip
