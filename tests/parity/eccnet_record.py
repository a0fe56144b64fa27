"""Records what the release of eccNET makes of small displays, with random weights: `eccnet.json`.

The release needs TensorFlow, and names of it and of scikit-image that are gone by now. By hand, from here:

    git clone https://github.com/kreimanlab/VisualSearchAsymmetry /tmp/asymmetry
    python -m venv /tmp/eccnet
    /tmp/eccnet/bin/pip install tensorflow-cpu tf_keras opencv-python-headless pillow tqdm
    PYTHONPATH=. TF_USE_LEGACY_KERAS=1 /tmp/eccnet/bin/python tests/parity/eccnet_record.py /tmp/asymmetry

`test_eccnet.py` makes the same weights and displays, from generators of numpy.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

RECORD = Path(__file__).with_name("eccnet.json")
WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
BLOCKS = (2, 2, 3, 3, 3)
#: What Keras takes off the channels blue, green and red.
MEANS = (103.939, 116.779, 123.68)
SIDE, MARGIN, IOR, STEPS = 96, 64, 10, 4
#: Pools apart: sides of the map, pixels per degree, slope, kind.
POOLS = ((36, 2, 0.32, "avg"), (41, 3, 0.5, "avg"), (36, 2, 0.32, "max"))


class Case(NamedTuple):
    """A search.

    Attributes:
        target: `(t, t, 3)`, whole numbers 0..255, red first.
        image: `(SIDE, SIDE, 3)`.
        goal: `(SIDE, SIDE)`, True for the target.
        objects: `(N, SIDE, SIDE)`, or None.
        background: the value outside the image.
    """

    target: np.ndarray
    image: np.ndarray
    goal: np.ndarray
    objects: np.ndarray | None
    background: int


def weights() -> list[tuple[np.ndarray, np.ndarray]]:
    """Return kernels `(h, w, in, out)` and biases of the 13 convolutions."""
    draw = np.random.default_rng(0)
    found, before = [], 3
    for width in WIDTHS:
        kernel = draw.standard_normal((3, 3, before, width)) * (2 / (9 * before)) ** 0.5
        found.append((kernel.astype(np.float32), (0.05 * draw.standard_normal(width)).astype(np.float32)))
        before = width
    return found


def pool_input(side: int) -> np.ndarray:
    """Return a map `(side, side, 2)`."""
    return np.random.default_rng(side).standard_normal((side, side, 2)).astype(np.float32)


def cases() -> list[Case]:
    draw = np.random.default_rng(1)
    made = []
    for objects, size, background in ((False, 28, 0), (False, 64, 255), (True, 28, 0), (True, 28, 128)):
        image = draw.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
        image[::2] //= 3
        masks = np.zeros((9, SIDE, SIDE), bool)
        for number in range(9):
            top, left = number // 3 * 32 + 4, number % 3 * 32 + 4
            masks[number, top : top + 24, left : left + 24] = True
        masks = np.delete(masks, 4, 0)  # none at the centre, where the search begins
        goal = masks[6] if objects else np.zeros((SIDE, SIDE), bool)
        target = draw.integers(0, 256, (size, size, 3)).astype(np.uint8)
        made.append(Case(target, image, goal, masks if objects else None, background))
    return made


def record(folder: str) -> dict[str, Any]:
    _stand_in()
    sys.path.insert(0, folder)
    from vs_model import VisualSearchModel, ecc_net  # type: ignore[import-not-found]

    ecc_net.tf.keras.models.Model.load_weights = _set_weights
    commit = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    return {
        "commit": commit.stdout.strip(), "versions": {"tensorflow": importlib.metadata.version("tensorflow-cpu")},
        "pools": [_pooled(ecc_net, *each) for each in POOLS],
        "searches": [_searched(VisualSearchModel, ecc_net, each) for each in cases()],
    }  # fmt: skip


def _stand_in() -> None:
    """Give the release the names that it imports: a circle as scikit-image drew it, and ones that it never calls."""
    vars(np)["int"] = int

    def circle(row: int, column: int, radius: float) -> tuple[np.ndarray, np.ndarray]:
        near = np.arange(-int(radius), int(radius) + 1)
        inside = near[:, None] ** 2 + near**2 < radius**2
        rows, columns = np.nonzero(inside)
        return near[rows] + row, near[columns] + column

    names = {"draw": {"circle": circle}, "filters": {}, "filters.rank": {"entropy": None}}
    names |= {"morphology": {"disk": None, "square": None}}
    sys.modules["skimage"] = ModuleType("skimage")
    for name, content in names.items():
        module = sys.modules[f"skimage.{name}"] = ModuleType(f"skimage.{name}")
        vars(module).update(content)


def _set_weights(model: Any, path: str) -> None:
    names = [f"block{block + 1}_conv{number + 1}" for block, count in enumerate(BLOCKS) for number in range(count)]
    for name, given in zip(names, weights(), strict=True):
        model.get_layer(name).set_weights(given)


def _pooled(ecc_net: Any, side: int, deg2px: float, slope: float, kind: str) -> list[float]:
    layer = ecc_net.CentreDependentPooling2D(rf_min=2, ecc_slope=slope, deg2px=deg2px, pool_type=kind)
    return layer(ecc_net.tf.constant(pool_input(side)[None])).numpy().ravel().tolist()


def _searched(model: Any, ecc_net: Any, case: Case) -> dict[str, Any]:
    """Search from files, as the release does; its x is a row."""
    from PIL import Image  # type: ignore[import-not-found]

    description = {
        "eccParam": dict(ecc_net.eccParamDefault), "ecc_depth": 5, "out_layer": [1, 1, 1], "comp_layer": "diff",
        "vgg_model_path": "", "model_subname": "",
    }  # fmt: skip
    found = model(description)
    found.load_exp_info(
        {
            "eye_res": SIDE, "stim_shape": case.image.shape, "tar_shape": case.target.shape, "ior_size": IOR,
            "NumStimuli": 1, "NumFix": STEPS, "fix": None, "bg_value": case.background, "rev_img_flag": 0,
            "gt_mask": None if case.objects is None else case.objects.astype(np.uint8) * 255, "deg2px": 30,
            "weight_pattern": "nl", "dog_size": [[3, 1], [5, 3]],
        }, corner_bias=MARGIN,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder, f"{name}.png")) for name in ("image", "target", "goal")]
        for path, pixels in zip(paths, (case.image, case.target, case.goal.astype(np.uint8) * 255), strict=True):
            Image.fromarray(pixels).save(path)
        saccades, maps, _ = found.start_search(*paths, debug_flag=True)
    first = maps[0][SIDE // 2 + MARGIN : SIDE // 2 + MARGIN + SIDE, SIDE // 2 + MARGIN : SIDE // 2 + MARGIN + SIDE]
    return {"fixations": saccades[:, ::-1].tolist(), "map": first[4::8, 4::8].tolist()}


if __name__ == "__main__":
    RECORD.write_text(json.dumps(record(sys.argv[1])) + "\n", "utf-8")
