"""The time that Foveate adds before the first useful line.

Goals: importing foveate costs at most 1.1 times importing torch, and the command line answers within half a second.
Every measurement is a fresh process, so that nothing is imported already.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable

from _report import finish, interleaved

CODE = {
    "python": "pass",
    "import torch": "import torch",
    "import foveate": "import foveate",
    "import foveate; foveate.attend": "import foveate; foveate.attend",
    "foveate --help": "from foveate.cli import main; main(['--help'])",
    "foveate systems": "from foveate.cli import main; main(['systems'])",
}


def process(code: str) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    seconds = interleaved({name: process(code) for name, code in CODE.items()}, parser.parse_args().repeats)
    torch = seconds["import torch"]
    goals = {
        "import foveate": 1.1 * torch,
        "import foveate; foveate.attend": 1.1 * torch,
        "foveate --help": 0.5,
        "foveate systems": 0.5,
    }
    rows = [
        {"what": name, "seconds": taken, "over torch": taken / torch, "goal (s)": goals.get(name, "")}
        for name, taken in seconds.items()
    ]
    ratios = {f"{name} / import torch": seconds[name] / torch for name in list(goals)[:2]}
    ratios |= {f"{name} / 0.5 s": seconds[name] / 0.5 for name in list(goals)[2:]}
    finish(rows, ratios)


if __name__ == "__main__":
    main()
