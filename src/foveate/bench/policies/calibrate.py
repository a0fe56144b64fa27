"""What policies learn about a model once: kept beside the model, with the time that it took."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from foveate.core.catalog import system
from foveate.host import Host
from foveate.kv.base import Policy, Progress
from foveate.kv.duo_attention import DuoAttention, duo_train
from foveate.kv.parts import calibration_store as learnt
from foveate.kv.razor_attention import RazorAttention, head_scores
from foveate.tasks.text.passkeys import Passkeys

#: Sizes that suit a model of half a billion parameters on two cores: each takes a few minutes there.
GATES = {"steps": 40, "rate": 0.08, "reg": 0.3, "sink": 4, "recent": 48}
PASSKEYS = {"length": 800, "count": 3, "words": 6}
RANDOM = 512  # tokens that Razor's probe repeats four times
_TOOK = "calibration.json"


class Lessons:
    """Gives each policy what it has learnt about a model, and lets it learn where nothing is kept yet.

    Args:
        host: the model.
        tokenizer: of it.
        folder: where files are kept, `KEY.safetensors` each, as `foveate compare` finds them beside a checkpoint.
        say: told how far the work is.
    """

    def __init__(self, host: Host, tokenizer: Any, folder: Path, say: Progress) -> None:
        self.host, self.tokenizer, self.folder, self.say = host, tokenizer, folder, say
        self._model = learnt.model_digest(host.model)

    def __call__(self, cls: type[Policy], key: str) -> dict[str, Tensor]:
        file = self.folder / f"{key}.safetensors"
        found = learnt.load(file, self._model)
        if found is not None:
            return found
        begun = time.perf_counter()
        found = self._learn(cls, key)
        if found:
            learnt.save(found, file, self._model)
            self._note(key, time.perf_counter() - begun)
        return found

    def seconds(self) -> dict[str, float]:
        """How long each policy took to learn, by its key."""
        file = self.folder / _TOOK
        return json.loads(file.read_text("utf-8")) if file.is_file() else {}

    def _learn(self, cls: type[Policy], key: str) -> dict[str, Tensor]:
        if cls is DuoAttention:
            partial = self.folder / f"{key}.partial.safetensors"
            return {"gates": duo_train(self.host.model, self._data(), **GATES, partial=partial, progress=self.say)}
        if cls is RazorAttention:
            self.say(0, 1, f"{system(key).title.split(':')[0]}: heads that repeat what they saw")
            return head_scores(self.host, length=RANDOM)
        return cls.calibrate(self.host, self._data(), self.say)

    def _data(self) -> Iterator[tuple[Tensor, Tensor]]:
        def encode(text: str) -> list[int]:
            return list(self.tokenizer(text, add_special_tokens=False).input_ids)

        begins = self.tokenizer("", verbose=False).input_ids  # models that begin with a mark say so here
        return iter(Passkeys(encode, **PASSKEYS, begin=tuple(begins)))

    def _note(self, key: str, seconds: float) -> None:
        took = {**self.seconds(), key: round(seconds, 1)}
        (self.folder / _TOOK).write_text(json.dumps(took, indent=1) + "\n", "utf-8")
