"""Which network a training run gets: the operator asked for, in a setting that suits its family."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from foveate.core import validate
from foveate.core.catalog import system
from foveate.core.errors import OptionError, unknown
from foveate.models.base.spec import Mixer, Spec
from foveate.ops.base.linear import Linear
from foveate.ops.base.test_time import Memory
from foveate.ops.operator import Operator
from foveate.tasks.base.training_task import Drill
from foveate.tasks.training.copying import Copying
from foveate.tasks.training.digits import Digits
from foveate.tasks.training.language import Language
from foveate.tasks.training.mqar import MQAR

CONV = 4
DRILLS: dict[str, type[Drill]] = {"mqar": MQAR, "copy": Copying, "lm": Language, "digits": Digits}

#: Sizes at which a small network learns the task within minutes; the published ones are the classes' own defaults.
SMALL: dict[str, dict[str, Any]] = {
    "mqar": dict(vocabulary=64, length=48, pairs=8),
    "copy": dict(vocabulary=32, length=64),
    "lm": dict(length=128),
    "digits": {},
}


def drill(name: str, **sizes: Any) -> Drill:
    """The task of this name, small, with some sizes replaced."""
    if name not in DRILLS:
        raise unknown("task", name, DRILLS)
    given = {key: value for key, value in sizes.items() if value is not None}
    taken = {field.name for field in fields(DRILLS[name])}
    if wrong := sorted(given.keys() - taken):
        raise OptionError(f"task {name} takes no {', '.join(wrong)}; it takes {', '.join(sorted(taken)) or 'none'}")
    return DRILLS[name](**{**SMALL[name], **given})


def around(key: str, *, tokens: bool = True, conv: int | None = None) -> dict[str, Any]:
    """How the layer around an operator is set: nothing for a whole layer.

    Tokens get a short convolution, without which no two-layer network but attention sees which token came before.
    Operators over all keys get rotary positions; those with a state know the order by it, and have their outputs
    normalised where nothing bounds them. Softmax attention with `conv=0` is a transformer as others know it: cache
    policies apply to what is saved of it.
    """
    cls = system(key).load()
    if not (isinstance(cls, type) and issubclass(cls, Operator)):
        return {}
    stateful = issubclass(cls, Linear | Memory)
    chosen: dict[str, Any] = {"conv": CONV if conv is None else conv} if tokens else {}
    if not stateful and tokens:
        chosen["position"] = "rotary"
    if issubclass(cls, Memory) or (issubclass(cls, Linear) and not cls.normalised):
        chosen["out_norm"] = True
    return chosen


def fitted(key: str, *, heads: int, length: int, tokens: bool) -> dict[str, Any]:
    """Options without which a small network of this layer cannot be built: sizes that it has no default for, or whose
    defaults belong to published, larger networks.
    """
    half = max(1, heads // 2)
    sizes: dict[str, dict[str, Any]] = {
        "aaren": {"query": "first"},
        "super_attention": {"context_len": length, "causal": tokens},
        "dual_attention_transformer": {"sensory_heads": heads - half, "relational_heads": half},
        "moh": {"shared_heads": heads - half, "routed_active": max(1, half // 2)},
        "key_driven_gqa": {"kv_heads": half if heads % half == 0 else 1},
    }
    return sizes.get(key, {})


def spec(
    key: str, task: Drill, *, dim: int = 64, heads: int = 2, depth: int = 2, conv: int | None = None,
    options: dict[str, Any] | None = None,
) -> Spec:  # fmt: skip
    """A network of `depth` such layers for this task; `conv` as in `around`."""
    validate.count("depth", depth, 1)
    cls = system(key).load()
    image = isinstance(task, Digits)
    patch = 2
    length = (Digits.side // patch) ** 2 if image else task.length
    chosen = {**fitted(key, heads=heads, length=length, tokens=not image), **(options or {})}
    mixers = (Mixer(key, chosen, around(key, tokens=not image, conv=conv)),) * depth
    if not image:
        # symbols without a meaning are learnt several times faster with embeddings and a head of their own
        return Spec(dim, heads, mixers, vocabulary=task.vocabulary, tied=isinstance(task, Language))
    causal = "self" not in getattr(cls, "patterns", {"self"})
    shape = {"channels": 1, "side": Digits.side, "classes": Digits.vocabulary, "patch": patch, "causal": causal}
    return Spec(dim, heads, mixers, image=shape)
