"""A fresh process knows the model types that Foveate saves."""

from __future__ import annotations

import subprocess
import sys


def test_the_loader_knows_what_train_saves() -> None:
    code = "import foveate.bench.loading.load; from transformers import AutoConfig; AutoConfig.for_model('foveate')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
