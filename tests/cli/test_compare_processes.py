"""`foveate compare` as processes: two in one folder, one that is terminated, and one that resumes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def command(out: Path) -> list[str]:
    options = f"--length 400 --examples 12 --methods sink_recent,token_select --out {out} --json"
    return [sys.executable, "-m", "foveate", "compare", *options.split()]


@pytest.mark.slow
def test_a_second_run_is_refused_and_a_terminated_one_resumes(tmp_path: Path) -> None:
    out, journal = tmp_path / "out", tmp_path / "out" / "answers.jsonl"
    first = subprocess.Popen(command(out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not journal.exists():
            assert first.poll() is None, first.stderr and first.stderr.read()
            time.sleep(0.05)
        first.send_signal(signal.SIGSTOP)  # it holds the folder and pauses while the second one starts
        second = subprocess.run(command(out), check=False, capture_output=True, text=True)
        assert second.returncode == 2 and second.stdout == ""
        assert second.stderr.splitlines()[-1] == (
            f"error: out={out} is in use by another run; wait for it, or name another folder"
        )
        first.send_signal(signal.SIGCONT)
        first.send_signal(signal.SIGTERM)
        stdout, stderr = first.communicate(timeout=120)
    finally:
        first.kill()
    assert first.returncode == 1 and stdout == ""
    kept = len(journal.read_text().splitlines())
    assert f"interrupted: {kept} of 36 answers are kept in {out}; run the same command to resume" in stderr
    assert 0 < kept < 36 and kept % 3 == 0 and not (out / "results.json").exists()
    before = journal.read_text()
    third = subprocess.run(command(out), check=False, capture_output=True, text=True)
    assert third.returncode == 0, third.stderr
    assert [len(row["answers"]) for row in json.loads(third.stdout)["rows"]] == [12, 12, 12]
    lines = journal.read_text().splitlines()
    assert journal.read_text().startswith(before) and sum('"ids"' in line for line in lines) == 36
