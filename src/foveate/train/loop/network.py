"""The network of a training run: the given operator or layer, with options that suit its family."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from foveate.core import validate
from foveate.core.catalog import system
from foveate.core.errors import OptionError, unknown
from foveate.models.base.spec import Mixer, Spec
from foveate.ops.base.linear import Linear
from foveate.ops.base.test_time import Memory
from foveate.ops.operator import Operator
from foveate.tasks.base.training_task import TrainingTask
from foveate.tasks.training.copying import Copying
from foveate.tasks.training.digits import Digits
from foveate.tasks.training.language import Language
from foveate.tasks.training.mqar import MQAR

CONV = 4
TRAINING_TASKS: dict[str, type[TrainingTask]] = {"mqar": MQAR, "copy": Copying, "lm": Language, "digits": Digits}

#: Sizes at which a small network learns the task within minutes; the classes' defaults are the published sizes.
SMALL: dict[str, dict[str, Any]] = {
    "mqar": dict(vocabulary=64, length=48, pairs=8),
    "copy": dict(vocabulary=32, length=64),
    "lm": dict(length=128),
    "digits": {},
}


def training_task(name: str, **sizes: Any) -> TrainingTask:
    """Create the task of this name with the sizes `SMALL`, some of them replaced."""
    if name not in TRAINING_TASKS:
        raise unknown("task", name, TRAINING_TASKS)
    given = {key: value for key, value in sizes.items() if value is not None}
    kind = TRAINING_TASKS[name]
    assert is_dataclass(kind)  # every one of them is
    taken = {field.name for field in fields(kind)}
    if wrong := sorted(given.keys() - taken):
        raise OptionError(
            f"task={name!r} takes no {', '.join(wrong)}; valid are {', '.join(sorted(taken)) or 'no sizes'}"
        )
    return TRAINING_TASKS[name](**{**SMALL[name], **given})


def layer_options(key: str, *, tokens: bool = True, conv: int | None = None) -> dict[str, Any]:
    """Return the options of the layer around an operator; a catalogue row that is a layer gets none.

    Token networks get a short convolution: without it, only two layers of softmax attention learn which token came
    before. Operators over all keys get rotary positions; operators with a state know the order from it, and their
    outputs are normalized unless they are bounded. Softmax attention with `conv=0` is a standard transformer, to whose
    checkpoint cache policies apply.
    """
    cls = system(key).load()
    if not (isinstance(cls, type) and issubclass(cls, Operator)):
        return {}
    stateful = issubclass(cls, Linear | Memory)
    chosen: dict[str, Any] = {"conv": CONV if conv is None else conv} if tokens else {}
    if not stateful and tokens:
        chosen["position"] = "rotary"
    if issubclass(cls, Memory) or (issubclass(cls, Linear) and not cls.normalized):
        chosen["out_norm"] = True
    return chosen


def required_options(key: str, *, heads: int, length: int, tokens: bool) -> dict[str, Any]:
    """Return the options that a small network of this layer needs: those without a default, and those whose defaults
    suit only the larger, published networks.
    """
    half = max(1, heads // 2)
    sizes: dict[str, dict[str, Any]] = {
        "aaren": {"query": "first"},
        "super_attention": {"context_len": length, "causal": tokens},
        "dual_attention_transformer": {"sensory_heads": heads - half, "relational_heads": half},
        "moh": {"shared_heads": heads - half, "routed_active": max(1, half // 2)},
        "key_driven_gqa": {"kv_heads": half if heads % half == 0 else 1},
        "sparsifiner": {"num_tokens": length, "prefix": 0, "reduce_n": min(6, length)},
    }
    return sizes.get(key, {})


def spec(
    key: str, task: TrainingTask, *, dim: int = 64, heads: int = 2, depth: int = 2, conv: int | None = None,
    options: dict[str, Any] | None = None,
) -> Spec:  # fmt: skip
    """Describe a network of `depth` such layers for this task; for `conv` see `layer_options`."""
    validate.count("depth", depth, 1)
    cls = system(key).load()
    image = isinstance(task, Digits)
    patch = 2
    length = (Digits.side // patch) ** 2 if image else task.length
    chosen = {**required_options(key, heads=heads, length=length, tokens=not image), **(options or {})}
    mixers = (Mixer(key, chosen, layer_options(key, tokens=not image, conv=conv)),) * depth
    if not image:
        # tasks of symbols train several times faster if embeddings and head are not tied
        return Spec(dim, heads, mixers, vocabulary=task.vocabulary, tied=isinstance(task, Language))
    able = getattr(cls, "capabilities", None)
    causal = able is not None and "self" not in able.patterns
    shape = {"channels": 1, "side": Digits.side, "classes": Digits.vocabulary, "patch": patch, "causal": causal}
    return Spec(dim, heads, mixers, image=shape)
