"""Records what pysaliency, multimatch-gaze and GazeParser say of a few maps and scanpaths: `gaze.json`.

They are no part of the development environment. By hand, from here:

    python -m venv /tmp/gaze
    /tmp/gaze/bin/pip install "numpy<2.3" "setuptools<81" scipy numba pandas cython wheel multimatch-gaze==0.1.3
    /tmp/gaze/bin/pip install --no-build-isolation pysaliency==0.2.22 scikit-learn h5py pillow torch
    pip download --no-deps --dest /tmp/gaze GazeParser==0.12.3
    unzip -q -o /tmp/gaze/*azeparser*.whl "GazeParser/ScanMatch.py" -d /tmp/gaze
    PYTHONPATH=. /tmp/gaze/bin/python tests/parity/gaze_record.py /tmp/gaze

`test_gaze.py` makes the same inputs, from one generator of numpy.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

RECORD = Path(__file__).with_name("gaze.json")
#: (H, W) of the images; two sizes, so that shuffled fixations have to be scaled.
SIZES = ((30, 40), (30, 40), (24, 32))
SCREEN = (300, 400)
#: Thresholds of MultiMatch's simplification: pixels, degrees, seconds.
SIMPLIFY = ((100.0, 45.0, 0.3), (200.0, 90.0, 0.5), (50.0, 10.0, 1.0))


def images() -> list[np.ndarray]:
    """Return images `(H, W, 3)`, whole numbers, which some pixels share."""
    draw = np.random.default_rng(0)
    return [draw.integers(0, 12, (*size, 3)).astype(np.uint8) for size in SIZES]


def scores(image: np.ndarray) -> np.ndarray:
    """Return a saliency map of an image; it has ties."""
    return image.astype(np.float64).sum(-1)


def baseline(image: np.ndarray) -> np.ndarray:
    """Return a density of an image's size, more to the left."""
    flat = np.ones(image.shape[:2]) * np.linspace(2, 1, image.shape[1])
    return flat / flat.sum()


def fixations() -> tuple[np.ndarray, np.ndarray]:
    """Return positions `(N, 2)` of x and y, and the index of each one's image."""
    draw = np.random.default_rng(1)
    index = draw.integers(0, len(SIZES), 60)
    sides = np.array(SIZES)[index][:, ::-1]
    return draw.random((60, 2)) * sides, index


def pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    """Return pairs of scanpaths `(T, 3)`: x and y in whole pixels, and seconds of whole milliseconds."""
    draw = np.random.default_rng(2)
    made = []
    for lengths in ((5, 7), (12, 9), (20, 20), (3, 15), (30, 8), (40, 44)):
        pair = []
        for count in lengths:
            xy = np.cumsum(draw.normal(0, 60, (count, 2)), 0) + draw.random(2) * SCREEN[::-1]
            xy = np.mod(xy, SCREEN[::-1]).round()
            # 10 k + 3 ms is never halfway between two bins of 50 ms, which the two sides round differently
            seconds = (10 * draw.integers(2, 70, count) + 3) / 1000
            pair.append(np.column_stack([np.minimum(xy, np.array(SCREEN[::-1]) - 1), seconds]))
        made.append((pair[0], pair[1]))
    return made


def record(folder: str) -> dict[str, Any]:
    packages = ("pysaliency", "multimatch-gaze", "numpy", "scipy")
    return {
        "versions": {name: importlib.metadata.version(name) for name in packages} | {"GazeParser": "0.12.3"},
        "saliency": _saliency(), "maps": _maps(), "multimatch": _multimatch(), "scanmatch": _scanmatch(folder),
    }  # fmt: skip


def _saliency() -> dict[str, Any]:
    """Scores of each image's fixations, in the order of the images."""
    import pysaliency  # type: ignore[import-not-found]

    class Summed(pysaliency.SaliencyMapModel):
        def _saliency_map(self, stimulus: np.ndarray) -> np.ndarray:
            return scores(stimulus)

    class Density(pysaliency.Model):
        def _log_density(self, stimulus: np.ndarray) -> np.ndarray:
            return np.log((scores(stimulus) + 1) / (scores(stimulus) + 1).sum())

    class Left(pysaliency.Model):
        def _log_density(self, stimulus: np.ndarray) -> np.ndarray:
            return np.log(baseline(stimulus))

    stimuli = pysaliency.Stimuli(images())
    xy, index = fixations()
    seen = pysaliency.Fixations.create_without_history(xy[:, 0], xy[:, 1], index)

    def by_image(values: np.ndarray) -> list[float]:
        return [float(values[index == number].mean()) for number in range(len(SIZES))]

    model = Summed()
    return {
        "auc_judd": by_image(model.AUCs(stimuli, seen)),
        "auc_unfixated": by_image(model.AUCs(stimuli, seen, nonfixations="unfixated")),
        "auc_shuffled": by_image(model.AUCs(stimuli, seen, nonfixations="shuffled")),
        "nss": by_image(model.NSSs(stimuli, seen)),
        "information_gain": by_image(Density().information_gains(stimuli, seen)),
        "information_gain_left": by_image(Density().information_gains(stimuli, seen, baseline_model=Left())),
    }


def _maps() -> dict[str, Any]:
    """Measures between the maps of the first two images, and of one raised below 0."""
    from pysaliency import metrics  # type: ignore[import-not-found]

    one, two = (scores(image) for image in images()[:2])
    below = two - 5
    return {
        "cc": metrics.CC(one, two), "sim": metrics.SIM(one, two), "sim_below": metrics.SIM(one, below),
        "kl_mit": metrics.MIT_KLDiv(one, two),
        "kl": metrics.image_based_kl_divergence(one + 1, two + 1, minimum_value=0),
    }  # fmt: skip


def _multimatch() -> list[dict[str, Any]]:
    from multimatch_gaze import docomparison  # type: ignore[import-not-found]

    names = [("start_x", "f8"), ("start_y", "f8"), ("duration", "f8")]
    found = []
    for pair in pairs():
        one, other = (np.array([tuple(row) for row in each], dtype=names) for each in pair)
        plain = docomparison(one, other, SCREEN[::-1])
        simple = []
        for amplitude, angle, duration in SIMPLIFY:
            try:
                made = docomparison(one, other, SCREEN[::-1], grouping=True, TAmp=amplitude, TDir=angle, TDur=duration)
            except IndexError:  # it fails where a single small saccade is left
                simple.append(None)
            else:
                simple.append(list(map(float, made)))
        found.append({"plain": list(map(float, plain)), "simple": simple})
    return found


def _scanmatch(folder: str) -> list[dict[str, float]]:
    spec = importlib.util.spec_from_file_location("scanmatch", Path(folder, "GazeParser", "ScanMatch.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def score(one: np.ndarray, other: np.ndarray, **options: Any) -> float:
        """Their durations are whole numbers, so that they are given in milliseconds."""
        match = module.ScanMatch(Xres=SCREEN[1], Yres=SCREEN[0], **options)
        strings = [match.fixationToSequence((each * [1, 1, 1000]).round()).astype(int) for each in (one, other)]
        return float(match.match(*strings)[0])

    return [
        {
            "grid": score(one, other, Xbin=8, Ybin=6, Threshold=3.5),
            "near": score(one, other, Xbin=5, Ybin=4, Threshold=1.2),
            "timed": score(one, other, Xbin=8, Ybin=6, Threshold=3.5, TempBin=50),
        }
        for one, other in pairs()
    ]


if __name__ == "__main__":
    RECORD.write_text(json.dumps(record(sys.argv[1])) + "\n", "utf-8")
