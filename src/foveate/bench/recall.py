"""`foveate bench recall`: how much a network recalls against how much state it keeps, operator by operator."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from foveate.bench.results import write_atomic
from foveate.core.errors import OptionError
from foveate.models.spec import Mixer, Spec
from foveate.ops import states
from foveate.tasks.drill import Drill
from foveate.tasks.mqar import MQAR
from foveate.train import network
from foveate.train.loop import Schedule, fit

RESULTS = "recall.json"

Family = Literal["attention", "window", "based", "linear", "memory"]


#: Small enough to overload what a state of this width holds, and to learn within half a minute each.
TASK: dict[str, int] = dict(vocabulary=64, length=96, pairs=16)
SCHEDULE: dict[str, Any] = dict(steps=600, batch=32, rate=1e-2)
DIM, HEADS = 32, 2


@dataclass(frozen=True)
class Contender:
    """One network of the comparison: its label, and of each layer the system, its options, and what goes around it."""

    label: str
    family: Family
    layers: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...]


def twice(label: str, family: Family, key: str, **options: Any) -> Contender:
    return Contender(label, family, ((key, options, {}),) * 2)


def based(feature_dim: int, window: int) -> Contender:
    """Based's two mixers: exact attention over a few tokens, then Taylor features over all."""
    near = ("sliding_window", {"window": window, "sinks": 0}, {})
    layers = (near, ("based", {}, {"head_dim": feature_dim, "value_dim": DIM // HEADS}))
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
    """What one network came to."""

    label: str
    family: Family
    parameters: int
    state_bytes: int
    accuracy: float
    seconds: float
    scores: dict[int, float] = field(default_factory=dict)


@dataclass
class Recall:
    """The figure: its task, its schedule, and its points."""

    task: dict[str, Any]
    schedule: dict[str, Any]
    points: list[Point]

    def save(self, path: Path) -> None:
        write_atomic(path, json.dumps(asdict(self), indent=1) + "\n")


def recall(
    *, drill: Drill | None = None, schedule: Schedule | None = None, only: list[str] | None = None, dim: int = DIM,
    heads: int = HEADS, out: Path = Path("foveate-recall"), progress: Callable[[int, int, str], None] | None = None,
) -> Recall:  # fmt: skip
    """Train every contender on the same recall task with as many parameters, and measure what it keeps per sequence.

    Args:
        drill: the task; `MQAR` of the sizes `TASK` where None.
        schedule: of the training, the same for all.
        only: labels of contenders; all where None.
        dim, heads: of every network.
        out: folder of `recall.json`; what an earlier run with the same settings left there is kept.
    """
    drill = drill or MQAR(**TASK)
    schedule = schedule or Schedule(**SCHEDULE)
    chosen = [contender for contender in CONTENDERS if only is None or contender.label in only]
    if missing := set(only or ()) - {contender.label for contender in chosen}:
        labels = ", ".join(contender.label for contender in CONTENDERS)
        raise OptionError(f"only={', '.join(sorted(missing))} names no contender; they are {labels}")
    found = _resumed(Recall({"name": drill.name, **vars(drill)}, asdict(schedule), []), out / RESULTS)
    done = {point.label for point in found.points}
    budget = parameters(spec(CONTENDERS[0], drill, dim, heads))
    todo = [contender for contender in chosen if contender.label not in done]
    for number, contender in enumerate(todo):

        def watch(step: int, steps: int, note: str, first: int = number, label: str = contender.label) -> None:
            if progress is not None:
                progress(first * steps + step, len(todo) * steps, f"{label}: {note}")

        found.points.append(_point(contender, drill, schedule, dim, heads, budget, watch))
        found.save(out / RESULTS)
    order = [contender.label for contender in CONTENDERS]
    found.points.sort(key=lambda point: order.index(point.label))
    found.points = [point for point in found.points if only is None or point.label in only]
    return found


def spec(contender: Contender, drill: Drill, dim: int, heads: int) -> Spec:
    """The contender's network, before its parameters are evened out."""
    mixers = tuple(Mixer(key, options, {**network.around(key), **around}) for key, options, around in contender.layers)
    return Spec(dim, heads, mixers, vocabulary=drill.vocabulary, tied=False)


def parameters(made: Spec) -> int:
    return sum(parameter.numel() for parameter in made.build().parameters())


def evened(made: Spec, budget: int) -> Spec:
    """The same network with its MLPs as wide as the budget of parameters leaves room for."""
    one = parameters(replace(made, hidden=1))
    wider = parameters(replace(made, hidden=2)) - one
    return replace(made, hidden=max(1, 1 + round((budget - one) / wider)))


def state_bytes(made: Spec, drill: Drill) -> int:
    """Bytes that one sequence's state takes after the whole of it: what decoding holds in memory."""
    net = made.build()
    state = [block.mixer.prefill(torch.zeros(1, drill.length, made.dim))[1] for block in net.blocks]
    return states.state_bytes(state)


def _point(
    contender: Contender, drill: Drill, schedule: Schedule, dim: int, heads: int, budget: int, watch: Any
) -> Point:
    made = evened(spec(contender, drill, dim, heads), budget)
    torch.manual_seed(schedule.seed)
    net, begun = made.build(), time.perf_counter()
    history = fit(net, drill, schedule, heldout=512, progress=watch)
    seconds = time.perf_counter() - begun
    with torch.no_grad():
        held = state_bytes(made, drill)
    return Point(
        contender.label, contender.family, sum(p.numel() for p in net.parameters()), held, history.score,
        round(seconds, 1), history.scores,
    )  # fmt: skip


def _resumed(settings: Recall, path: Path) -> Recall:
    """What an earlier run with the same settings measured."""
    if not path.is_file():
        return settings
    kept = json.loads(path.read_text("utf-8"))
    if (kept.get("task"), kept.get("schedule")) != (settings.task, settings.schedule):
        return settings
    points = [Point(**{**p, "scores": {int(step): s for step, s in p["scores"].items()}}) for p in kept["points"]]
    return replace(settings, points=points)
