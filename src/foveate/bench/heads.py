"""Head identification: what a method learns about each head of a model, once, kept in a file that names the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.bench.loading import load
from foveate.bench.parts.folder import lock_folder
from foveate.bench.policies.calibrate import GATES, PROBE
from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.host import Host
from foveate.host.hf.layout import layout
from foveate.host.hf.model import host
from foveate.host.probing import Progress
from foveate.kv.duo_attention import duo_train
from foveate.kv.moa import MoA
from foveate.kv.parts import calibration_store
from foveate.kv.parts.duo_pattern import load_duo_pattern
from foveate.kv.parts.head_split import check_heads
from foveate.kv.parts.influence import span_influence
from foveate.kv.parts.span_search import spans
from foveate.kv.razor_attention import head_scores
from foveate.lens.heads.retrieval_heads import copying_scores
from foveate.tasks.text.needle import Needle
from foveate.tasks.text.passkeys import Passkeys

#: The methods, and the key under which a policy looks for what they find.
METHODS = {"duo": "duo_attention", "razor": "razor_attention", "moa": "moa", "retrieval": "retrieval_heads"}
_MOA_BUDGET = 0.5


@dataclass(frozen=True)
class Heads:
    """Findings of a method about the heads of a model.

    Attributes:
        method: its name.
        model: the model as the user named it.
        tables: numbers by layer and head, by name.
        meanings: what the numbers of each table say.
        layers: the numbers of the tables' layers.
        kind: "key/value heads" or "query heads".
        file: the file that keeps it.
        seconds: the time that it took; 0 if the file had it.
    """

    method: str
    model: str
    tables: dict[str, Tensor]
    meanings: dict[str, str]
    layers: list[int]
    kind: str
    file: Path
    seconds: float


@dataclass(frozen=True)
class Sizes:
    """Amounts of text that a method reads: tokens of a text, and texts (steps of the gates' training)."""

    length: int = 800
    items: int = 20


def usual(method: str) -> Sizes:
    """Return the sizes that a method takes by itself."""
    return Sizes(items={"duo": GATES["steps"], "moa": 6}.get(method, 20))


def identify(
    model: str | None, method: str, out: Path, *, sizes: Sizes | None = None, pattern: Path | None = None,
    device: str = "cpu", dtype: str = "float32", trust_remote_code: bool = False, fresh: bool = False,
    progress: Progress | None = None, say: Callable[[str], None] = lambda text: None,
) -> Heads:  # fmt: skip
    """Identify the heads of a model by a method, or read what an earlier run found; an interrupted run resumes.

    Args:
        model: folder, GGUF file or hub id of a decoder; None is the lab model.
        method: a name in `METHODS`.
        out: folder of the result; `foveate compare` finds it there, or beside a checkpoint.
        sizes: how much text is read; None is the method's own.
        pattern: for "duo": a folder of DuoAttention's published format, which is read instead of training gates.
        device, dtype, trust_remote_code: see `foveate.bench.loading.load`.
        fresh: whether an earlier result is replaced.
        progress: called as `progress(step, steps, note)`.
        say: called with messages between steps.
    """
    if method not in METHODS:
        raise OptionError(f"method={method!r} must be one of {', '.join(METHODS)}")
    if pattern is not None and method != "duo":
        raise OptionError(f"pattern={str(pattern)!r} holds gates of DuoAttention; use it with method=duo")
    sizes = sizes or usual(method)
    validate.count("length", sizes.length, 256)
    validate.count("items", sizes.items, 1)
    with lock_folder(out):
        loaded, tokenizer, _ = load(model, device, dtype, trust_remote_code=trust_remote_code, note=say)
        here = host(loaded)
        digest = calibration_store.model_digest(loaded)
        file, start = out / f"{METHODS[method]}.safetensors", time.perf_counter()
        learnt = None if fresh or pattern is not None else calibration_store.load(file, digest)
        seconds = 0.0
        if learnt is None:
            find = partial(_FINDERS[method], here, tokenizer, sizes, out, digest, fresh)
            learnt = _from_pattern(pattern, here) if pattern is not None else find(progress)
            calibration_store.save(learnt, file, digest)
            seconds = time.perf_counter() - start
    tables, meanings, kind = _TABLES[method](here, learnt)
    numbers = [layer.layer for layer in layout(here).layers]
    return Heads(method, model or "lab lm", tables, meanings, numbers, kind, file, seconds)


# -- what each method computes -----------------------------------------------------------------------------------------


def _duo(
    here: Host, tokenizer: Any, sizes: Sizes, out: Path, digest: str, fresh: bool, progress: Progress | None
) -> Any:
    partial_file = out / "duo_attention.partial.safetensors"
    if fresh:
        partial_file.unlink(missing_ok=True)
    options = {**GATES, "steps": sizes.items}
    data = _passkeys(tokenizer, sizes.length)
    return {"gates": duo_train(here.model, data, **options, partial=partial_file, progress=progress)}


def _from_pattern(folder: Path, here: Host) -> dict[str, Tensor]:
    gates = load_duo_pattern(folder).gates
    check_heads("pattern", gates, here)
    return {"gates": gates}


def _razor(
    here: Host, tokenizer: Any, sizes: Sizes, out: Path, digest: str, fresh: bool, progress: Progress | None
) -> Any:
    if progress is not None:
        progress(0, 1, "heads that attend to earlier copies of random tokens")
    return head_scores(here, length=PROBE)


def _moa(
    here: Host, tokenizer: Any, sizes: Sizes, out: Path, digest: str, fresh: bool, progress: Progress | None
) -> Any:
    """Profile item by item; finished ones are kept in a file until all are done."""
    file, wanted = out / "moa.partial.safetensors", MoA.profiled(_passkeys(tokenizer, sizes.length), sizes.items)
    done = {} if fresh else calibration_store.load(file, f"{digest} {sizes}") or {}
    for step, (ids, answers) in enumerate(wanted):
        name = f"{step}_{ids.shape[1]}"
        if name not in done:
            done[name] = span_influence(here, [(ids, answers)], items=1, sink=4, own=False)[ids.shape[1]]
            calibration_store.save(done, file, f"{digest} {sizes}")
        if progress is not None:
            progress(step + 1, len(wanted), f"influence of attention at {ids.shape[1]} tokens")
    lengths = sorted({ids.shape[1] for ids, _ in wanted})
    means = {n: torch.stack([each for name, each in done.items() if name.endswith(f"_{n}")]).mean(0) for n in lengths}
    file.unlink(missing_ok=True)
    return {f"influence_{n}": mean for n, mean in means.items()}


def _retrieval(
    here: Host, tokenizer: Any, sizes: Sizes, out: Path, digest: str, fresh: bool, progress: Progress | None
) -> Any:
    data = _needles(tokenizer, sizes.length, sizes.items)
    return {"scores": copying_scores(here.model, data, items=sizes.items, progress=progress)}


_FINDERS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "duo": _duo, "razor": _razor, "moa": _moa, "retrieval": _retrieval
}  # fmt: skip


# -- tables ------------------------------------------------------------------------------------------------------------

Tables = tuple[dict[str, Tensor], dict[str, str], str]


def _gate_table(here: Host, learnt: dict[str, Tensor]) -> Tables:
    return {"gate": learnt["gates"]}, {"gate": "1 keeps the whole cache, 0 streams"}, "key/value heads"


def _razor_table(here: Host, learnt: dict[str, Tensor]) -> Tables:
    meanings = {
        "echo": "weight on earlier copies of the same token",
        "induction": "weight on the tokens after earlier copies",
    }
    return {name: learnt[name] for name in meanings}, meanings, "query heads"


def _span_table(here: Host, learnt: dict[str, Tensor]) -> Tables:
    longest = max(int(name.rpartition("_")[2]) for name in learnt)
    made = MoA.at_budget(_MOA_BUDGET, here, longest, **learnt)
    share = spans(made.rules, longest, made.block) / longest
    meaning = f"share of {longest} tokens that a head keeps where all keep {_MOA_BUDGET:g} on average"
    return {"span": share}, {"span": meaning}, "key/value heads"


def _score_table(here: Host, learnt: dict[str, Tensor]) -> Tables:
    meaning = "share of copied tokens at which the head looks at the copy"
    return {"retrieval": learnt["scores"]}, {"retrieval": meaning}, "query heads"


_TABLES: dict[str, Callable[[Host, dict[str, Tensor]], Tables]] = {
    "duo": _gate_table, "razor": _razor_table, "moa": _span_table, "retrieval": _score_table
}  # fmt: skip


# -- texts -------------------------------------------------------------------------------------------------------------


def _encoder(tokenizer: Any) -> tuple[Callable[[str], list[int]], tuple[int, ...]]:
    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    return encode, tuple(tokenizer("", verbose=False).input_ids)


def _passkeys(tokenizer: Any, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    encode, begin = _encoder(tokenizer)
    return iter(Passkeys(encode, length=length, count=3, words=6, begin=begin))


def _needles(tokenizer: Any, length: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield texts with facts about numbers, and the number that is asked for."""
    encode, begin = _encoder(tokenizer)
    for example in Needle(length=length, count=count).examples():
        prompt, answer = [*begin, *encode(example.prompt)], encode(str(example.answer))
        yield torch.tensor([prompt + answer]), torch.tensor([[False] * len(prompt) + [True] * len(answer)])
