"""The calibration of policies in a reference run, stored beside the model with the time that it took."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.core.catalog import system
from foveate.host import Host
from foveate.host.probing import Progress
from foveate.kv.base.policy import Policy
from foveate.kv.duo_attention import DuoAttention, duo_train
from foveate.kv.parts import calibration_store
from foveate.kv.razor_attention import RazorAttention, head_scores
from foveate.kv.seer_attention import SeerAttention, seer_gates
from foveate.tasks.text.passkeys import Passkeys

#: Sizes for a model of half a billion parameters on two cores, where each calibration takes a few minutes.
GATES: dict[str, Any] = {"steps": 40, "rate": 0.08, "reg": 0.3, "sink": 4, "recent": 48}
PASSKEYS = {"length": 800, "count": 3, "words": 6}
SEER: dict[str, Any] = {"steps": 20, "block": 16, "rate": 5e-3}
PROBE = 512  # random tokens that RazorAttention's probe repeats four times
_SECONDS = "calibration.json"


class TimedCalibrationStore:
    """Loads each policy's calibration for a model, or calibrates it with the sizes above and saves result and time.

    Args:
        host: the model.
        tokenizer: the model's tokenizer.
        folder: the folder of the files, `KEY.safetensors` each, as `foveate compare` finds them in a checkpoint's
            folder.
        say: called with the progress.
    """

    def __init__(self, host: Host, tokenizer: Any, folder: Path, say: Progress) -> None:
        self.host, self.tokenizer, self.folder, self.say = host, tokenizer, folder, say
        self._model = calibration_store.model_digest(host.model)

    def __call__(self, cls: type[Policy], key: str) -> dict[str, Tensor]:
        file = self.folder / f"{key}.safetensors"
        found = calibration_store.load(file, self._model)
        if found is not None:
            return found
        start = time.perf_counter()
        found = self._calibrate(cls, key)
        if found:
            calibration_store.save(found, file, self._model)
            self._save_seconds(key, time.perf_counter() - start)
        return found

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each policy's calibration, by its key."""
        file = self.folder / _SECONDS
        return json.loads(file.read_text("utf-8")) if file.is_file() else {}

    def _calibrate(self, cls: type[Policy], key: str) -> dict[str, Tensor]:
        if cls is DuoAttention:
            partial = self.folder / f"{key}.partial.safetensors"
            return {"gates": duo_train(self.host.model, self._data(), **GATES, partial=partial, progress=self.say)}
        if cls is RazorAttention:
            self.say(0, 1, f"{system(key).title.split(':')[0]}: heads that attend to earlier copies")
            return head_scores(self.host, length=PROBE)
        if cls is SeerAttention:
            texts = (ids for ids, _ in self._data())
            return {
                **seer_gates(self.host.model, texts, **SEER, progress=self.say),
                "block": torch.tensor(SEER["block"]),
            }
        return cls.calibrate(self.host, self._data(), self.say)

    def _data(self) -> Iterator[tuple[Tensor, Tensor]]:
        def encode(text: str) -> list[int]:
            return list(self.tokenizer(text, add_special_tokens=False).input_ids)

        begin = self.tokenizer("", verbose=False).input_ids  # the beginning-of-sequence token, if there is one
        return iter(Passkeys(encode, **PASSKEYS, begin=tuple(begin)))

    def _save_seconds(self, key: str, seconds: float) -> None:
        found = {**self.seconds(), key: round(seconds, 1)}
        (self.folder / _SECONDS).write_text(json.dumps(found, indent=1) + "\n", "utf-8")
