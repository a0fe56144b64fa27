"""Records what DeepCTR-Torch makes of a few fields: `deepctr_torch.json`, which `test_deepctr_torch.py` reads.

It is no part of the development environment: one file of it is read. By hand, from here:

    pip download --no-deps --dest /tmp/deepctr deepctr-torch==0.3.0
    unzip -q /tmp/deepctr/*.whl -d /tmp/deepctr
    PYTHONPATH=. .venv/bin/python tests/parity/deepctr_torch_record.py /tmp/deepctr

Both sides make the same fields and the same parameters, from one generator.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

RECORD = Path(__file__).with_name("deepctr_torch.json")
ROWS, FIELDS, DIM, HEADS = 2, 5, 6, 2
NAMES = ("W_Query", "W_key", "W_Value", "W_Res")
CASES = ("paper", "without residual")


def leaves() -> dict[str, Tensor]:
    """Return fields, parameters and the direction of the gradient, in float64."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"x": (ROWS, FIELDS, DIM), **dict.fromkeys(NAMES, (DIM, DIM)), "direction": (ROWS, FIELDS, DIM)}
    return {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}


def record(folder: str) -> dict[str, Any]:
    sys.path.insert(0, folder)
    for name in ("deepctr_torch", "deepctr_torch.layers"):
        package = ModuleType(name)  # without running its `__init__`
        package.__path__ = [str(Path(folder, *name.split(".")))]
        sys.modules[name] = package
    from deepctr_torch.layers.interaction import InteractingLayer  # type: ignore[import-not-found]

    found: dict[str, Any] = {}
    for case in CASES:
        given = leaves()
        layer = InteractingLayer(DIM, HEADS, use_res=case == "paper", scaling=False).double()
        layer.load_state_dict({name: given[name] for name, _ in layer.named_parameters()})
        x = given["x"].requires_grad_()
        out = layer(x)
        (out * given["direction"]).sum().backward()
        grads = {name: p.grad.tolist() for name, p in layer.named_parameters()}
        found[case] = {"out": out.tolist(), "gradients": {**grads, "x": x.grad.tolist()}}
    versions = {
        "deepctr-torch": next(Path(folder).glob("deepctr_torch-*.dist-info")).stem.split("-")[1],
        "torch": importlib.metadata.version("torch"),
    }
    return {"versions": versions, **found}


if __name__ == "__main__":
    RECORD.write_text(json.dumps(record(sys.argv[1])) + "\n", "utf-8")
