"""The keys that `foveate compare` accepts; read without torch, so that `--help` can list them."""

from __future__ import annotations

from pathlib import Path

from foveate.core import catalog
from foveate.core.catalog import cache_policies, systems
from foveate.core.errors import OptionError, unknown

FULL = "full"
#: The full cache with grouped heads packed; it drops nothing, and decodes faster.
PACKED = "packed"
DEFAULT = (
    FULL, "sink_recent", "duo_attention", "razor_attention", "token_select", "tidal_decode", "recycled_attention",
    "hip",
)  # fmt: skip
#: Methods that read a prompt in one piece densely, and whose choices need no query of it but the last. They can share
#: one reading of the prompt, up to its last token; all others have to read more of it themselves.
SHARING = (
    FULL, PACKED, "sink_recent", "duo_attention", "razor_attention", "token_select", "tidal_decode",
    "recycled_attention",
)  # fmt: skip
#: How many of the prompt's last tokens the methods below read themselves.
LAST = 128
#: Methods whose choices need keys, values, and the queries of a few last tokens: they can share one dense reading of
#: the rest of the prompt.
SHARING_ALL_BUT_LAST = (
    "snapkv", "knorm", "keydiff", "tova", "random_keep", "lagkv", "pyramidkv", "adakv", "criticalkv", "chunkkv", "r_kv",
    "triattention", "quest", "rocketkv", "task_kv", "simlayerkv", "kivi", "turboquant", "eight_bit", "think", "cur_dkv",
    "q_filters", "finch", "streaming_llm", "qada",
)  # fmt: skip
#: Causal operators that cannot replace a model's attention: Aaren has one query for all tokens.
_OWN_QUERIES = ("aaren",)


def policies() -> list[str]:
    """Return the keys of the methods that act on a decoder's cache or attention."""
    return [row.key for row in (*cache_policies(), *systems(room="steer"))]


def readers() -> list[str]:
    """Return the keys of the causal operators, which can read a prompt instead of a decoder's attention."""
    facts = {row.key: catalog.capabilities(row.key) for row in systems(room="ops")}  # {} before `make systems` has run
    causal = [key for key, known in facts.items() if "causal self" in known.get("patterns", ())]
    return [key for key in causal if key not in _OWN_QUERIES]


def methods() -> list[str]:
    """Return all keys that `compare` accepts."""
    return [FULL, PACKED, *policies(), *readers()]


def own_tokens(key: str) -> int | None:
    """Return how many of a prompt's last tokens the method has to read itself; None for the whole prompt."""
    return 1 if key in SHARING else LAST if key in SHARING_ALL_BUT_LAST else None


def is_recipe(key: str) -> bool:
    """Return whether this names the file of a recipe, which `compare` accepts beside the keys."""
    return key.endswith(".json")


def check(keys: list[str]) -> None:
    """Refuse unknown or repeated keys, before anything is loaded."""
    for key in keys:
        if is_recipe(key):
            if not Path(key).is_file():
                raise OptionError(f"cannot read recipe {key}: No such file")
        elif key not in methods():
            raise unknown("method", key, methods())
    if len(set(keys)) < len(keys):
        raise OptionError(f"methods={','.join(keys)} must name each method once, not twice")
