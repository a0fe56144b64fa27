"""Every causal architecture of transformers: exact, or refused by name before anything runs. Nothing else."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from foveate.kv.sink_recent import SinkRecent
from tests.contracts.architecture_checks import EXACT, check, generate, oracle, prompts, refusal, verdict_of
from tests.contracts.architectures import build, names

pytestmark = pytest.mark.filterwarnings("ignore")


def _page() -> ModuleType:
    path = Path(__file__).parents[2] / "docs" / "models.py"
    spec = importlib.util.spec_from_file_location("docs_models", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGE = _page()
ROWS = PAGE.rows()


@pytest.mark.parametrize("name", names())
def test_an_architecture_does_what_the_page_says(name: str) -> None:
    verdict = verdict_of(name)
    assert verdict.is_sound, f"{name}: {verdict.plain}, {verdict.evicting}"
    assert PAGE.row(verdict) == ROWS.get(name), "run `make models` and look at what changed"


def test_the_page_has_every_architecture_and_no_other() -> None:
    assert list(ROWS) == names()


def test_most_architectures_are_exact() -> None:
    exact = [name for name, row in ROWS.items() if f"| {EXACT} | {EXACT} |" in row]
    assert len(exact) >= 140
    assert len([row for row in ROWS.values() if "not run" not in row]) >= 180


# -- the checks notice -------------------------------------------------------------------------------------------------


def test_the_checks_notice_another_output() -> None:
    llama = build("llama")

    def nudge(module: nn.Module, args: object, output: Tensor) -> Tensor:
        inside = llama.config._attn_implementation_internal == "foveate"
        return output * (1 + 1e-3) if inside else output

    hook = llama.model.layers[1].mlp.register_forward_hook(nudge)
    assert check("llama", llama).plain.startswith("other logits")
    hook.remove()


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "deepseek_v3", "falcon_h1", "diffllama"])
def test_the_oracle_is_not_the_model(name: str) -> None:
    """It hides tokens, so that agreement with it says something."""
    model = build(name)
    with torch.no_grad():
        plain, hidden = generate(name, model, *prompts()), oracle(name, model, *prompts())
    assert torch.allclose(plain.logits[:, 0], hidden.logits[:, 0], atol=1e-4)
    assert not torch.allclose(plain.logits[:, -1], hidden.logits[:, -1], atol=1e-2)


def test_a_policy_that_drops_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.host.hf.dispatch.evict", lambda *_: None)
    assert check("llama", build("llama")).evicting.startswith("other logits than the oracle")


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if "| exact | refused |" in row])
def test_refusals_come_before_anything_runs(name: str) -> None:
    model, ran = build(name), []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    assert refusal(model, SinkRecent()).startswith("refused: ")
    assert not ran
    assert refusal(model) == ""
