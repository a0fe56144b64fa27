"""The pretrained models that `make real` fetches, one in memory at a time, and what the reference run found."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.real.fetch import MODELS
from benchmarks.real.reference import out
from foveate.bench.loading import load
from foveate.bench.methods import Contender
from foveate.bench.policies import plan
from foveate.bench.policies.calibrate import TimedCalibrationStore
from foveate.bench.policies.run import run
from foveate.core.catalog import system
from foveate.host.hf.model import Host, host
from foveate.tasks.parts.corpus import text


class Quiet:
    """Progress that nobody watches."""

    def start(self, total: int) -> None: ...
    def advance(self, label: str) -> None: ...
    def say(self, label: str) -> None: ...


@dataclass(frozen=True)
class Real:
    """A pretrained model and what its policies have learnt about it."""

    key: str
    model: PreTrainedModel
    tokenizer: Any
    lessons: TimedCalibrationStore

    @property
    def host(self) -> Host:
        return host(self.model)

    def ids(self, tokens: int, start: int = 0) -> torch.Tensor:
        """`(1, tokens)` of text that nothing was trained on, from its begin token on."""
        found = self.tokenizer(text("heldout")[start : start + 8 * tokens], return_tensors="pt", verbose=False)
        return found.input_ids[:, :tokens]

    def policy(self, key: str, budget: float, length: int) -> tuple[Any, ...]:
        """The methods of a policy for prompts of `length` tokens, at the least budget that it can meet or more."""
        least = system(key).load().least(self.host, length)
        contender = Contender(key, self.host, max(budget, least))
        contender.calibrate(self.lessons)
        return contender.at(length)


@pytest.fixture(scope="session", params=list(MODELS))
def real(request: pytest.FixtureRequest) -> Iterator[Real]:
    file = _file(request.param)
    model, tokenizer, _ = load(str(file), "cpu", "float32")
    yield Real(
        request.param, model, tokenizer, TimedCalibrationStore(host(model), tokenizer, file.parent, lambda *_: None)
    )
    del model
    gc.collect()


@pytest.fixture(scope="session")
def found() -> dict[str, Any]:
    """The quick reference run over both models: what `make real` measured just now, or measured here."""
    return run([str(_file(key)) for key in MODELS], plan.quick(), out(), Quiet())


def _file(key: str) -> Path:
    if not MODELS[key].file.is_file():
        pytest.fail(f"{MODELS[key].title} is not there: `make real` fetches it", pytrace=False)
    return MODELS[key].file
