"""Trained networks on disk: safetensors, the network's `Spec`, and how the training went."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import nn

from foveate.core.errors import OptionError
from foveate.models.spec import Spec
from foveate.tasks.drill import Drill
from foveate.tasks.language import Language
from foveate.train.loop import History, Schedule
from foveate.train.network import drill

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORD = "training.json"
NETWORK = "network.json"
CONTEXT = 8192  # what the tokenizer of text says that prompts may take


def save(net: nn.Module, spec: Spec, task: Drill, schedule: Schedule, history: History, folder: Path) -> None:
    """Write a trained network to `folder`.

    Networks of tokens become Hugging Face checkpoints (`foveate compare --model FOLDER`); of images, a
    `model.safetensors` beside the network's description.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if spec.image is None:
        _save_decoder(net, spec, task, folder)
    else:
        save_file(
            {name: tensor.contiguous() for name, tensor in net.state_dict().items()}, folder / "model.safetensors"
        )
        _write(folder / NETWORK, spec.to_dict())
    record = {"task": task.name, "sizes": _sizes(task), "schedule": asdict(schedule)}
    _write(folder / RECORD, {**record, "scores": history.scores, "losses": [round(x, 5) for x in history.losses]})


def load(folder: Path) -> nn.Module:
    """The network that `save` wrote: a `Decoder` or an `ImageEncoder`."""
    if (folder / NETWORK).is_file():
        net = Spec.from_dict(json.loads((folder / NETWORK).read_text("utf-8"))).build()
        net.load_state_dict(load_file(folder / "model.safetensors"))
        return net.eval()
    if not (folder / "config.json").is_file():
        raise OptionError(f"{folder} holds no trained network ({NETWORK} or config.json)")
    from foveate.models.pretrained import FoveateForCausalLM

    return FoveateForCausalLM.from_pretrained(folder, use_safetensors=True).released().eval()


def task_of(folder: Path) -> Drill | None:
    """The task that a network of tokens in `folder` was trained on; None where the folder has no such record."""
    if not (folder / RECORD).is_file():
        return None
    record = json.loads((folder / RECORD).read_text("utf-8"))
    return drill(record["task"], **record["sizes"])


def _save_decoder(net: nn.Module, spec: Spec, task: Drill, folder: Path) -> None:
    from foveate.models.pretrained import FoveateConfig, FoveateForCausalLM

    tokenizer = _tokenizer(task)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = FoveateForCausalLM(FoveateConfig(network=spec.to_dict(), **ids))
    model.adopt(copy.deepcopy(net))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(task: Drill) -> PreTrainedTokenizerBase:
    """Bytes for text; for other tasks a word for each token, which is its number."""
    from foveate.models import byte_tokenizer, number_tokenizer

    return byte_tokenizer.build(CONTEXT) if isinstance(task, Language) else number_tokenizer.build(task.vocabulary)


def _sizes(task: Drill) -> dict[str, Any]:
    return {name: value for name, value in vars(task).items() if not name.startswith("_")}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
