"""Trained networks on disk: safetensors, the network's `Spec`, and the record of its training."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from foveate.core.errors import OptionError
from foveate.models.base.decoder import Decoder
from foveate.models.base.spec import Spec
from foveate.tasks.base.training_task import TrainingTask
from foveate.tasks.training.language import Language
from foveate.train.loop.loop import History, Schedule
from foveate.train.loop.network import training_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORD = "training.json"
NETWORK = "network.json"
CONFIG = "config.json"
CONTEXT = 8192  # the tokenizer's longest prompt


def save(
    net: nn.Module,
    spec: Spec,
    task: TrainingTask,
    schedule: Schedule,
    history: History,
    folder: Path,
    *,
    seconds: float = 0.0,
) -> None:
    """Write a trained network to `folder`, replacing an earlier one.

    A token network becomes a Hugging Face checkpoint (`foveate compare --model FOLDER`), an image network a
    `model.safetensors` and the network's description. All files are complete before the first is moved into place.

    Args:
        seconds: the training time.

    Raises:
        OptionError: if the folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as made:
            draft = Path(made)
            if spec.image is None:
                assert isinstance(net, Decoder)  # it is what a spec without images builds
                _save_decoder(net, spec, task, draft)
            else:
                weights = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
                save_file(weights, draft / "model.safetensors")
                _write(draft / NETWORK, spec.to_dict())
            measured = {"scores": history.scores, "losses": [round(x, 5) for x in history.losses]}
            _write(draft / RECORD, {**settings(spec, task, schedule), "seconds": round(seconds, 1), **measured})
            _move(draft, folder)


def settings(spec: Spec, task: TrainingTask, schedule: Schedule) -> dict[str, Any]:
    """Return the settings that identify a training, in the form that JSON gives back."""
    found = {"task": task.name, "sizes": _sizes(task), "schedule": asdict(schedule), "network": spec.to_dict()}
    return dict(json.loads(json.dumps(found)))


def load(folder: Path) -> nn.Module:
    """Load the network that `save` wrote: a `Decoder` or an `ImageEncoder`."""
    if (folder / NETWORK).is_file():
        net = Spec.from_dict(json.loads((folder / NETWORK).read_text("utf-8"))).build()
        net.load_state_dict(load_file(folder / "model.safetensors"))
        return net.eval()
    if not (folder / CONFIG).is_file():
        raise OptionError(f"folder={str(folder)!r} must hold a trained network ({NETWORK} or {CONFIG}); it holds none")
    from foveate.models.base.hf_checkpoint import FoveateForCausalLM

    return FoveateForCausalLM.from_pretrained(folder, use_safetensors=True).released().eval()


def record(folder: Path) -> dict[str, Any] | None:
    """Return the training record in `folder`, or None.

    Raises:
        OptionError: if the record cannot be read.
    """
    try:
        found = json.loads((folder / RECORD).read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise OptionError(f"{folder / RECORD} cannot be read: {error}") from None
    if not isinstance(found, dict) or not {"task", "sizes", "losses", "scores"} <= found.keys():
        raise OptionError(f"{folder / RECORD} must be a training record with task, sizes, losses and scores")
    return found


def history_of(found: dict[str, Any]) -> History:
    """Return the losses and scores of a record."""
    return History(list(found["losses"]), {int(step): score for step, score in found["scores"].items()})


def task_of(folder: Path) -> TrainingTask | None:
    """Return the task that the network in `folder` was trained on, or None without a record."""
    found = record(folder)
    return None if found is None else training_task(found["task"], **found["sizes"])


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a failure to write to `folder` into a one-line OptionError."""
    try:
        yield
    except OSError as error:
        raise OptionError(f"out={str(folder)!r} cannot be written: {error.strerror or error}") from None
    except SafetensorError as error:
        raise OptionError(f"out={str(folder)!r} cannot be written: {error}") from None


def check_writable(folder: Path) -> None:
    """Check that a folder can be written; the check leaves nothing behind.

    Raises:
        OptionError: if it is a file, or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"out={str(folder)!r} is a file; it must be a folder")
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".trial-{os.getpid()}"
        trial.touch()
        trial.unlink()
        for path in missing:
            path.rmdir()


def _move(draft: Path, folder: Path) -> None:
    """Move the files of `draft` into `folder`, the record last, and delete those of an earlier network."""
    for name in {NETWORK, CONFIG} - {path.name for path in draft.iterdir()}:
        (folder / name).unlink(missing_ok=True)  # of the other kind of network; `load` would read it first
    for path in sorted(draft.iterdir(), key=lambda path: path.name == RECORD):
        path.replace(folder / path.name)


def _save_decoder(net: Decoder, spec: Spec, task: TrainingTask, folder: Path) -> None:
    from foveate.models.base.hf_checkpoint import FoveateConfig, FoveateForCausalLM

    tokenizer = _tokenizer(task)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = FoveateForCausalLM(FoveateConfig(network=spec.to_dict(), **ids))
    model.adopt(copy.deepcopy(net))
    with _without_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Turn off transformers' progress bar, which would overwrite the command's."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _tokenizer(task: TrainingTask) -> PreTrainedTokenizerBase:
    """Return the byte tokenizer for text; for other tasks, one whose words are the tokens' numbers."""
    from foveate.models.base import byte_tokenizer, number_tokenizer

    return byte_tokenizer.build(CONTEXT) if isinstance(task, Language) else number_tokenizer.build(task.vocabulary)


def _sizes(task: TrainingTask) -> dict[str, Any]:
    return {name: value for name, value in vars(task).items() if not name.startswith("_")}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
