"""Records what SpeechBrain makes of a few frames: `speechbrain.json`, which `test_speechbrain.py` reads.

It is no part of the development environment, and its own needs are many, so that its files are read without them. By
hand, from here:

    pip download --no-deps --dest /tmp/speechbrain speechbrain==1.1.2
    unzip -q /tmp/speechbrain/*.whl -d /tmp/speechbrain
    PYTHONPATH=. .venv/bin/python tests/parity/speechbrain_record.py /tmp/speechbrain

Both sides make the same frames and the same parameters, from one generator.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

RECORD = Path(__file__).with_name("speechbrain.json")
#: The network of the contract's example, by SpeechBrain's names of the options.
OPTIONS = {
    "lin_neurons": 5, "channels": [16, 16, 16, 16, 12], "attention_channels": 4, "res2net_scale": 4, "se_channels": 4,
}  # fmt: skip
LENGTHS = (1.0, 0.6, 0.2)  # shares of the frames, for the pooling alone
#: What SpeechBrain imports and these parts of it never call.
MISSING = ("torchaudio", "hyperpyyaml", "sentencepiece", "huggingface_hub", "yaml", "soundfile")
PACKAGES = (
    "speechbrain", "speechbrain.lobes", "speechbrain.lobes.models", "speechbrain.dataio", "speechbrain.nnet",
)  # fmt: skip


def frames() -> Tensor:
    return torch.randn(3, 20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def pooled_frames() -> Tensor:
    return torch.randn(3, 12, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def cosines() -> Tensor:
    return torch.rand(6, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2 - 1


def parameters(shapes: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return parameters by SpeechBrain's names, the same from the same names and shapes; variances are above 0."""
    draw = torch.Generator().manual_seed(3)
    made = {}
    for name, shape in sorted(shapes.items()):
        x = 0.3 * torch.randn(tuple(shape), generator=draw, dtype=torch.float64)
        made[name] = 1 + x.abs() if name.endswith("running_var") else x
    return made


class _Anything(ModuleType):
    """A module that has every name, in place of one that is not installed and not called."""

    __path__: ClassVar[list[str]] = []

    __version__ = "2.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Absent:
    """A finder of modules that nothing else finds."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in MISSING:
            return importlib.util.spec_from_loader(name, self)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: Any) -> ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


def record(folder: str) -> dict[str, Any]:
    sys.path.insert(0, folder)
    sys.meta_path.append(_Absent())  # type: ignore[arg-type]
    for name in (
        "speechbrain",
        "speechbrain.lobes",
        "speechbrain.lobes.models",
        "speechbrain.dataio",
        "speechbrain.nnet",
    ):
        package = ModuleType(name)  # without running its `__init__`
        package.__path__ = [str(Path(folder, *name.split(".")))]
        sys.modules[name] = package
    from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN  # type: ignore[import-not-found]
    from speechbrain.nnet.losses import AdditiveAngularMargin, LogSoftmaxWrapper  # type: ignore[import-not-found]

    net = ECAPA_TDNN(6, **OPTIONS).double().eval()
    shapes = {name: list(x.shape) for name, x in net.state_dict().items()}
    net.load_state_dict(parameters(shapes))
    x = frames().requires_grad_()
    out = net(x)[:, 0]
    out.square().sum().backward()
    pooled = net.asp(pooled_frames(), torch.tensor(LENGTHS, dtype=torch.float64))[..., 0]
    with torch.device("meta"):
        whole = ECAPA_TDNN(80, channels=[1024] * 4 + [3072])  # as in train_ecapa_tdnn.yaml
    loss = LogSoftmaxWrapper(AdditiveAngularMargin(margin=0.2, scale=30))
    margin = loss(cosines().float()[:, None], (torch.arange(6) % 4)[:, None])
    return {
        "versions": {"speechbrain": next(Path(folder).glob("speechbrain-*.dist-info")).stem.split("-")[1]}
        | {"torch": importlib.metadata.version("torch")},
        "released": {name: list(x.shape) for name, x in whole.state_dict().items()},
        "parameters": shapes, "out": out.tolist(), "gradient": x.grad.tolist(), "pooled": pooled.tolist(),
        "margin": float(margin),
    }  # fmt: skip


if __name__ == "__main__":
    RECORD.write_text(json.dumps(record(sys.argv[1])) + "\n", "utf-8")
