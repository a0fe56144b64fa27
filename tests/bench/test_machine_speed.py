"""The calibration of a machine: rates that fit known times, a file that `auto` reads, and damaged ones replaced."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from foveate.bench import machine_speed
from foveate.bench.machine_speed import SETTINGS, Setting, calibrate, fit, made, measure
from foveate.cli import app
from foveate.core import engines
from foveate.core.engines import ENGINES, flex, machine
from foveate.core.engines.work import Work
from foveate.core.errors import OptionError
from tests.support.tensors import assert_near

SMALL = (Setting(64, 2, 1, 8, 16, 0.3, "own"), Setting(96, 2, 2, 8, 16, 0.3, "shared"),
         Setting(128, 1, 1, 8, 16, 0.3, "band", again=True))  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a cache folder, and let the calibration run small calls without a compiler."""
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path))
    monkeypatch.delenv(machine.VARIABLE, raising=False)
    monkeypatch.setattr(machine_speed, "SETTINGS", SMALL)
    monkeypatch.setattr(machine_speed, "DENSE", SMALL)
    monkeypatch.setattr(flex, "has_compiler", lambda: False)
    machine.forget()
    yield tmp_path
    machine.forget()


def test_a_fit_finds_rates_that_made_the_times() -> None:
    true = Work(1e-4, 2e-11, 3e-10, 0.0, 4e-9, 3e-5)
    works = [ENGINES[name].work(made(setting, torch.float32)) for setting in SETTINGS for name in ("slices", "gather")]
    found = fit(works, [work.seconds(true) for work in works])
    assert found == pytest.approx(true, rel=1e-3, abs=1e-14)


def test_a_fit_has_no_rates_below_zero() -> None:
    works = [Work(calls=1, products=10), Work(calls=2, products=10), Work(calls=3, products=10)]
    found = fit(works, [3.0, 2.0, 1.0])
    assert min(found) >= 0
    assert found.calls == 0
    assert found.copied == found.indexed == found.masked == 0


def test_the_calls_tell_the_amounts_apart() -> None:
    """No amount of an engine's work is a fixed multiple of others over all calls."""
    for name in ("slices", "gather"):
        works = torch.tensor([ENGINES[name].work(made(s, torch.float32)) for s in SETTINGS], dtype=torch.float64)
        used = works[:, works.norm(dim=0) > 0]
        scaled = used / used.norm(dim=0)
        assert torch.linalg.svdvals(scaled).min() > 0.02


@pytest.mark.parametrize("setting", SMALL)
@pytest.mark.parametrize("engine", ["slices", "gather"])
def test_what_is_timed_is_right(setting: Setting, engine: str) -> None:
    call = made(setting, torch.float64)
    assert_near(ENGINES[engine].attend(call), engines.run(call, "reference"), 1e-10)
    work, seconds = measure(engine, setting, torch.float32, backward=True)
    assert seconds > 0
    learns = replace(call, q=call.q.clone().requires_grad_())
    assert work == ENGINES[engine].work(learns)
    assert measure(engine, setting, torch.float32, backward=False)[0] == ENGINES[engine].work(call)


def test_a_calibration_is_kept_and_read(folder: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    before = torch.get_num_threads()
    found = calibrate(2, lambda *at: seen.append(at))
    assert torch.get_num_threads() == before
    assert found.machine.source == machine.file(2)
    assert {name.split()[0] for name in found.machine.rates} == {"fused", "slices", "gather"}
    assert found.errors.keys() == found.machine.rates.keys()
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1] == 12
    read = machine.load(machine.file(2), 2)
    assert all(read.rates[name] == rate for name, rate in found.machine.rates.items())
    assert found.notes == calibrate(2).notes == []


def test_auto_reads_the_new_rates_at_once(folder: Path) -> None:
    threads = torch.get_num_threads()
    assert machine.current().source is None
    calibrate()
    assert machine.current().source == machine.file(threads)


def test_a_damaged_file_is_measured_again(folder: Path) -> None:
    machine.file(1).parent.mkdir(exist_ok=True)
    machine.file(1).write_text("{")
    (note,) = calibrate(1).notes
    assert "is damaged" in note
    assert note.endswith("it was measured again")
    assert machine.load(machine.file(1), 1).rates


def test_wrong_threads_and_a_folder_that_is_a_file_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="threads"):
        calibrate(0)
    (folder / "file").write_text("x")
    monkeypatch.setenv("FOVEATE_CACHE", str(folder / "file"))
    with pytest.raises(OptionError, match="cannot write"):
        calibrate()


def test_the_command_prints_rates_and_the_file(folder: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "calibrate", "--threads", "1"])
    assert result.exit_code == 0, result.output
    assert "gather float32 forward" in result.stdout
    assert str(folder) in result.stdout.replace("\n", "")
    machine.file(1).write_text("{")
    result = CliRunner().invoke(app, ["bench", "calibrate", "--threads", "1", "--json"])
    found = json.loads(result.stdout)
    assert found["threads"] == 1
    assert found["rates"]["slices float32 backward"].keys() == {*Work._fields, "median_error"}
    assert "is damaged" in found["notes"][0]
    assert CliRunner().invoke(app, ["bench", "calibrate", "--threads", "0"]).exit_code == 2
