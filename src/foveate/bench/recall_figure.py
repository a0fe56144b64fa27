"""`foveate bench recall`: recall against the size of the state, for networks of different operators."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from foveate.bench.comparison.results import write_atomic
from foveate.core.errors import DivergedError, Interrupted, OptionError
from foveate.models.base.spec import Mixer, Spec
from foveate.nn.base.layer import streaming
from foveate.nn.parts.blocks import stacked
from foveate.ops.base import state_size
from foveate.tasks.base.training_task import TrainingTask
from foveate.tasks.training.mqar import MQAR
from foveate.train.loop import checkpoint, network
from foveate.train.loop.loop import Schedule, evaluate, fit

RESULTS = "recall.json"

Family = Literal["attention", "window", "based", "linear", "memory"]
#: A layer's system, its options, and those of the layer around it.
LayerSpec = tuple[str, dict[str, Any], dict[str, Any]]


#: More pairs than a head has channels, which overloads such a state, and few enough to learn within minutes.
TASK: dict[str, Any] = dict(vocabulary=128, length=128, pairs=32)
SCHEDULE: dict[str, Any] = dict(steps=800, batch=32)
#: Each network is trained at each of these learning rates, as in Zoology: none suits all of them.
RATES = (3e-3, 1e-2, 3e-2)
DIM, HEADS = 32, 2
#: The seed of the test examples in the figure; the learning rate is chosen on others.
TEST_SEED = 2**31 - 2


@dataclass(frozen=True)
class RecallNetwork:
    """A network of the figure."""

    label: str
    family: Family
    layers: tuple[LayerSpec, ...]


def two_layers(label: str, family: Family, key: str, **options: Any) -> RecallNetwork:
    """Describe a network of two equal layers."""
    return RecallNetwork(label, family, ((key, options, {}),) * 2)


def based(feature_dim: int, window: int) -> RecallNetwork:
    """Describe Based's two mixers in the release's order: Taylor features over all tokens, then exact local attention.

    In the reverse order, in which only the second layer sees all tokens, no network that we tried learned within such
    a schedule, not even with softmax attention as the second layer.
    """
    whole: LayerSpec = ("based", {}, {"head_dim": feature_dim, "value_dim": DIM // HEADS})
    recent: LayerSpec = ("sliding_window", {"window": window, "sinks": 0}, {})
    return RecallNetwork(f"based {feature_dim}, window {window}", "based", (whole, recent))


NETWORKS = (
    two_layers("softmax", "attention", "softmax"),
    two_layers("sigmoid", "attention", "sigmoid_attention", bias="row"),
    two_layers("window 8", "window", "sliding_window", window=8, sinks=0),
    two_layers("window 32", "window", "sliding_window", window=32, sinks=0),
    based(4, 8),
    based(8, 16),
    based(16, 32),
    two_layers("hedgehog", "linear", "hedgehog"),
    two_layers("normalised linear", "linear", "dsf"),
    two_layers("lightning", "linear", "lightning_attention"),
    two_layers("lightnet", "linear", "lightnet"),
    two_layers("titans", "memory", "titans", depth=1),
    two_layers("miras", "memory", "miras"),
)


@dataclass(frozen=True)
class Point:
    """The result of one network at one learning rate.

    Args:
        accuracy: the accuracy on test examples.
        validation: the accuracy on the examples that choose the learning rate.
        scores: the validation accuracy by step; empty if the run diverged.
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
    """The data of the figure: its task, its schedule, and all runs."""

    task: dict[str, Any]
    schedule: dict[str, Any]
    points: list[Point]

    def best(self) -> list[Point]:
        """Return each network's run at its best learning rate, in the order of the runs."""
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
    *, task: TrainingTask | None = None, schedule: Schedule | None = None, rates: Sequence[float] = RATES,
    only: list[str] | None = None, dim: int = DIM, heads: int = HEADS, out: Path = Path("foveate-recall"),
    fresh: bool = False, progress: Callable[[int, int, str], None] | None = None,
) -> Recall:  # fmt: skip
    """Train every network on the same recall task with equal parameter counts, and measure the size of its state.

    Args:
        task: the task; None is `MQAR` with the sizes `TASK`.
        schedule: the training schedule; each run replaces its learning rate.
        rates: every network is trained at each of these learning rates.
        only: labels of the networks to train; None is all.
        dim, heads: the sizes of every network.
        out: the folder of `recall.json`; results of an earlier run with the same settings are kept.
        fresh: True replaces the results of an earlier run.
        progress: called as `progress(step, steps, note)`, over all trainings.

    Raises:
        OptionError: if `out` cannot be written, or holds results with other settings.
        Interrupted: with the number of finished trainings, and of all.
    """
    task = task or MQAR(**TASK)
    schedule = schedule or Schedule(**SCHEDULE)
    schedules = [replace(schedule, rate=rate) for rate in dict.fromkeys(rates)]
    if not schedules:
        raise OptionError("rates must hold at least one learning rate; got none")
    chosen = _chosen(only)
    settings = Recall({"name": task.name, **vars(task)}, {**asdict(schedule), "rate": None}, [])
    checkpoint.check_writable(out)
    found = settings if fresh else _resumed(settings, out / RESULTS)
    budget = parameters(spec(NETWORKS[0], task, dim, heads))
    runs = [(member, at) for member in chosen for at in schedules]
    done = {(point.label, point.rate) for point in found.points}
    todo = [(member, at) for member, at in runs if (member.label, at.rate) not in done]
    for number, (member, at) in enumerate(todo):

        def watch(step: int, steps: int, note: str, first: int = number, run: str = _run_name(member, at)) -> None:
            if progress is not None:
                progress(first * steps + step, len(todo) * steps, f"{run}: {note}")

        try:
            found.points.append(_point(member, task, at, dim, heads, budget, watch))
        except KeyboardInterrupt:
            raise Interrupted(len(runs) - len(todo) + number, len(runs)) from None
        found.save(out / RESULTS)
    order = [(member.label, at.rate) for member, at in runs]
    wanted = [point for point in found.points if (point.label, point.rate) in order]
    return replace(found, points=sorted(wanted, key=lambda point: order.index((point.label, point.rate))))


def _chosen(only: list[str] | None) -> list[RecallNetwork]:
    chosen = [member for member in NETWORKS if only is None or member.label in only]
    if missing := set(only or ()) - {member.label for member in chosen}:
        labels = ", ".join(member.label for member in NETWORKS)
        raise OptionError(f"only={', '.join(sorted(missing))} must be among {labels}")
    return chosen


def _run_name(member: RecallNetwork, schedule: Schedule) -> str:
    return f"{member.label} at {schedule.rate:g}"


def spec(member: RecallNetwork, task: TrainingTask, dim: int, heads: int) -> Spec:
    """Return the network's description, before its parameter count is adjusted."""
    mixers = tuple(
        Mixer(key, options, {**network.layer_options(key), **layer}) for key, options, layer in member.layers
    )
    return Spec(dim, heads, mixers, vocabulary=task.vocabulary, tied=False)


def parameters(network_spec: Spec) -> int:
    """Count the parameters of a network_spec network."""
    return sum(parameter.numel() for parameter in network_spec.build().parameters())


def with_parameters(network_spec: Spec, budget: int) -> Spec:
    """Choose the width of the MLPs so that the network has about `budget` parameters."""
    one = parameters(replace(network_spec, hidden=1))
    wider = parameters(replace(network_spec, hidden=2)) - one
    return replace(network_spec, hidden=max(1, 1 + round((budget - one) / wider)))


def network_state_bytes(network_spec: Spec, task: TrainingTask) -> int:
    """Return the bytes of the state after one whole sequence, which decoding holds in memory."""
    net = network_spec.build()
    x = torch.zeros(1, task.length, network_spec.dim)
    state = [streaming(block.mixer).prefill(x)[1] for block in stacked(net.blocks)]
    return state_size.state_bytes(state)


def _point(
    member: RecallNetwork, task: TrainingTask, schedule: Schedule, dim: int, heads: int, budget: int, watch: Any
) -> Point:
    network_spec = with_parameters(spec(member, task, dim, heads), budget)
    torch.manual_seed(schedule.seed)
    net, start = network_spec.build(), time.perf_counter()
    try:
        scores = fit(net, task, schedule, heldout=512, progress=watch).scores
        found = evaluate(net, task, 1024, seed=TEST_SEED)
    except DivergedError:
        scores, found = {}, 0.0
    seconds = time.perf_counter() - start
    with torch.no_grad():
        size = network_state_bytes(network_spec, task)
    return Point(
        member.label, member.family, schedule.rate, sum(p.numel() for p in net.parameters()), size, found,
        scores[max(scores)] if scores else 0.0, round(seconds, 1), scores,
    )  # fmt: skip


def _resumed(settings: Recall, path: Path) -> Recall:
    """Load the results of an earlier run with the same settings; results with other settings are refused."""
    if not path.is_file():
        return settings
    try:
        kept = Recall.load(path)
    except (OSError, TypeError, KeyError, ValueError) as error:
        raise OptionError(f"{path} cannot be read ({type(error).__name__}); --fresh replaces it") from None
    for old, new in ((kept.task, settings.task), (kept.schedule, settings.schedule)):
        if other := [name for name in new if old.get(name) != new[name]]:
            changed = ", ".join(f"{name} was {old.get(name)!r}, is {new[name]!r}" for name in other)
            raise OptionError(f"{path} holds results with other settings ({changed}); --fresh replaces them")
    return kept
