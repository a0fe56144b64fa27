"""`foveate bench recall`: how much a network recalls against how much state it keeps, operator by operator."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from foveate.bench.comparison.results import write_atomic
from foveate.core.errors import DivergedError, OptionError
from foveate.models.base.spec import Mixer, Spec
from foveate.ops.base import state_size as states
from foveate.tasks.base.training_task import TrainingTask
from foveate.tasks.training.mqar import MQAR
from foveate.train.loop import checkpoint, network
from foveate.train.loop.loop import Schedule, evaluate, fit

RESULTS = "recall.json"

Family = Literal["attention", "window", "based", "linear", "memory"]


#: More pairs than a head has channels, so that a state of this width is overloaded, and few enough to learn in minutes.
TASK: dict[str, int] = dict(vocabulary=128, length=128, pairs=32)
SCHEDULE: dict[str, Any] = dict(steps=800, batch=32)
#: Each network is trained at each of these learning rates, as in Zoology: none suits all of them.
RATES = (3e-3, 1e-2, 3e-2)
DIM, HEADS = 32, 2
#: The seed of the examples that the figure is made of; others choose the rate.
TEST_SEED = 2**31 - 2


@dataclass(frozen=True)
class Contender:
    """One network of the comparison: its label, and of each layer the system, its options, and what goes around it."""

    label: str
    family: Family
    layers: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...]


def twice(label: str, family: Family, key: str, **options: Any) -> Contender:
    return Contender(label, family, ((key, options, {}),) * 2)


def based(feature_dim: int, window: int) -> Contender:
    """Based's two mixers in the release's order: Taylor features over all tokens, then exact attention over a few.

    The other way round, where the second layer alone sees everything, none that we tried learned within such a
    schedule, the one with softmax attention there neither.
    """
    far = ("based", {}, {"head_dim": feature_dim, "value_dim": DIM // HEADS})
    layers = (far, ("sliding_window", {"window": window, "sinks": 0}, {}))
    return Contender(f"based {feature_dim}, window {window}", "based", layers)


CONTENDERS = (
    twice("softmax", "attention", "softmax"),
    twice("sigmoid", "attention", "sigmoid_attention", bias="row"),
    twice("window 8", "window", "sliding_window", window=8, sinks=0),
    twice("window 32", "window", "sliding_window", window=32, sinks=0),
    based(4, 8),
    based(8, 16),
    based(16, 32),
    twice("hedgehog", "linear", "hedgehog"),
    twice("normalised linear", "linear", "dsf"),
    twice("lightning", "linear", "lightning_attention"),
    twice("lightnet", "linear", "lightnet"),
    twice("titans", "memory", "titans", depth=1),
    twice("miras", "memory", "miras"),
)


@dataclass(frozen=True)
class Point:
    """What one network came to at one learning rate.

    Args:
        accuracy: the share recalled in examples that nothing has seen before.
        validation: in those by which the rate is chosen.
        scores: validation along the way, by step; none where the run diverged.
    """

    label: str
    family: Family
    rate: float
    parameters: int
    state_bytes: int
    accuracy: float
    validation: float
    seconds: float
    scores: dict[int, float] = field(default_factory=dict)


@dataclass
class Recall:
    """The figure: its task, its schedule, and all its runs."""

    task: dict[str, Any]
    schedule: dict[str, Any]
    points: list[Point]

    def best(self) -> list[Point]:
        """Each network at the rate that suits it best, in the order of the runs."""
        labels = dict.fromkeys(point.label for point in self.points)
        return [max(self._of(label), key=lambda point: point.validation) for label in labels]

    def _of(self, label: str) -> list[Point]:
        return [point for point in self.points if point.label == label]

    @classmethod
    def load(cls, path: Path) -> Recall:
        kept = json.loads(path.read_text("utf-8"))
        points = [Point(**{**p, "scores": {int(step): s for step, s in p["scores"].items()}}) for p in kept["points"]]
        return cls(kept["task"], kept["schedule"], points)

    def save(self, path: Path) -> None:
        write_atomic(path, json.dumps(asdict(self), indent=1) + "\n")


def recall(
    *, drill: TrainingTask | None = None, schedule: Schedule | None = None, rates: Sequence[float] = RATES,
    only: list[str] | None = None, dim: int = DIM, heads: int = HEADS, out: Path = Path("foveate-recall"),
    fresh: bool = False, progress: Callable[[int, int, str], None] | None = None,
) -> Recall:  # fmt: skip
    """Train every contender on the same recall task with as many parameters, and measure what it keeps per sequence.

    Args:
        drill: the task; `MQAR` of the sizes `TASK` where None.
        schedule: of the training, the same for all but for its rate.
        rates: learning rates, each of which every contender is trained at.
        only: labels of contenders; all where None.
        dim, heads: of every network.
        out: folder of `recall.json`; what an earlier run with the same settings left there is kept.
        fresh: put the results in the place of whatever an earlier run left there.
        progress: called as `progress(step, steps, note)`, over all trainings.

    Raises:
        OptionError: `out` cannot be written, or holds results with other settings.
        KeyboardInterrupt: with `(trainings done, trainings in all)`.
    """
    drill = drill or MQAR(**TASK)
    schedule = schedule or Schedule(**SCHEDULE)
    tried = [replace(schedule, rate=rate) for rate in dict.fromkeys(rates)]
    if not tried:
        raise OptionError("rates must name at least one learning rate")
    chosen = [contender for contender in CONTENDERS if only is None or contender.label in only]
    if missing := set(only or ()) - {contender.label for contender in chosen}:
        labels = ", ".join(contender.label for contender in CONTENDERS)
        raise OptionError(f"only={', '.join(sorted(missing))} names no contender; they are {labels}")
    settings = Recall({"name": drill.name, **vars(drill)}, {**asdict(schedule), "rate": None}, [])
    checkpoint.check_writable(out)
    found = settings if fresh else _resumed(settings, out / RESULTS)
    budget = parameters(spec(CONTENDERS[0], drill, dim, heads))
    runs = [(contender, at) for contender in chosen for at in tried]
    done = {(point.label, point.rate) for point in found.points}
    todo = [(contender, at) for contender, at in runs if (contender.label, at.rate) not in done]
    for number, (contender, at) in enumerate(todo):

        def watch(step: int, steps: int, note: str, first: int = number, run: str = _named(contender, at)) -> None:
            if progress is not None:
                progress(first * steps + step, len(todo) * steps, f"{run}: {note}")

        try:
            found.points.append(_point(contender, drill, at, dim, heads, budget, watch))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(len(runs) - len(todo) + number, len(runs)) from None
        found.save(out / RESULTS)
    order = [(contender.label, at.rate) for contender, at in runs]
    asked = [point for point in found.points if (point.label, point.rate) in order]
    return replace(found, points=sorted(asked, key=lambda point: order.index((point.label, point.rate))))


def _named(contender: Contender, schedule: Schedule) -> str:
    return f"{contender.label} at {schedule.rate:g}"


def spec(contender: Contender, drill: TrainingTask, dim: int, heads: int) -> Spec:
    """The contender's network, before its parameters are evened out."""
    mixers = tuple(
        Mixer(key, options, {**network.layer_options(key), **layer}) for key, options, layer in contender.layers
    )
    return Spec(dim, heads, mixers, vocabulary=drill.vocabulary, tied=False)


def parameters(made: Spec) -> int:
    return sum(parameter.numel() for parameter in made.build().parameters())


def evened(made: Spec, budget: int) -> Spec:
    """The same network with its MLPs as wide as the budget of parameters leaves room for."""
    one = parameters(replace(made, hidden=1))
    wider = parameters(replace(made, hidden=2)) - one
    return replace(made, hidden=max(1, 1 + round((budget - one) / wider)))


def state_bytes(made: Spec, drill: TrainingTask) -> int:
    """Bytes that one sequence's state takes after the whole of it: what decoding holds in memory."""
    net = made.build()
    state = [block.mixer.prefill(torch.zeros(1, drill.length, made.dim))[1] for block in net.blocks]
    return states.state_bytes(state)


def _point(
    contender: Contender, drill: TrainingTask, schedule: Schedule, dim: int, heads: int, budget: int, watch: Any
) -> Point:
    made = evened(spec(contender, drill, dim, heads), budget)
    torch.manual_seed(schedule.seed)
    net, begun = made.build(), time.perf_counter()
    try:
        scores = fit(net, drill, schedule, heldout=512, progress=watch).scores
        found = evaluate(net, drill, 1024, seed=TEST_SEED)
    except DivergedError:
        scores, found = {}, 0.0
    seconds = time.perf_counter() - begun
    with torch.no_grad():
        held = state_bytes(made, drill)
    return Point(
        contender.label, contender.family, schedule.rate, sum(p.numel() for p in net.parameters()), held, found,
        scores[max(scores)] if scores else 0.0, round(seconds, 1), scores,
    )  # fmt: skip


def _resumed(settings: Recall, path: Path) -> Recall:
    """What an earlier run with the same settings measured; results with other settings are not written over."""
    if not path.is_file():
        return settings
    try:
        kept = Recall.load(path)
    except (OSError, TypeError, KeyError, ValueError) as error:
        raise OptionError(f"{path} cannot be read ({type(error).__name__}); --fresh replaces it") from None
    for there, here in ((kept.task, settings.task), (kept.schedule, settings.schedule)):
        if other := [name for name in here if there.get(name) != here[name]]:
            changed = ", ".join(f"{name} was {there.get(name)!r}, is {here[name]!r}" for name in other)
            raise OptionError(f"{path} holds results with other settings ({changed}); --fresh replaces them")
    return kept
