"""Time sparse operators and fused dense attention, which take turns, and measure the operators' error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import nan
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate._version import __version__
from foveate.bench.loading.device import DTYPES, torch_device
from foveate.bench.parts.intervals import of_median
from foveate.bench.parts.timing import fixed_threads
from foveate.bench.parts.turns import take_turns
from foveate.bench.sparsity.captured import Inputs, captured, read
from foveate.bench.sparsity.operators import chosen_share, is_causal, made, sparse_operators
from foveate.bench.sparsity.results import RESULTS, Sparse, SparseRow
from foveate.core import engines, validate
from foveate.core.errors import FoveateError, Interrupted, OptionError
from foveate.ops.operator import Operator
from foveate.train.loop.checkpoint import check_writable

#: Lengths, share of the keys, heads, width and rounds of a run that names none.
LENGTHS, BUDGET, HEADS, DIM, ROUNDS = (1024, 2048, 4096, 8192, 16384, 32768), 0.125, 4, 64, 5
#: Tokens that the model reads; errors at greater lengths are left out.
TOKENS = 4096
RANDOM = "random"


@dataclass(frozen=True)
class _Contender:
    operator: Operator
    causal: bool
    chosen: float
    call: Callable[[], Tensor]


def sparse(
    *, lengths: Sequence[int] = LENGTHS, operators: Sequence[str] | None = None, budget: float = BUDGET,
    heads: int = HEADS, dim: int = DIM, dtype: str = "float32", device: str = "cpu", threads: int | None = None,
    rounds: int = ROUNDS, inputs: str | Path = RANDOM, model: str | None = None, tokens: int = TOKENS,
    out: Path = Path("foveate-sparse"), fresh: bool = False,
    progress: Callable[[int, int, str], None] = lambda step, steps, note: None,
    say: Callable[[str], None] = lambda text: None,
) -> Sparse:  # fmt: skip
    """Compare every sparse operator with fused dense attention: time over lengths, the ideal, and the error.

    Args:
        lengths: numbers of tokens.
        operators: keys; None is every sparse operator of the catalogue.
        budget: the share of the keys that operators are asked to read; some have no option for it.
        heads, dim: the sizes of random inputs.
        dtype, device, threads: where the calls run; None leaves PyTorch's number of threads.
        rounds: rounds in which all take turns.
        inputs: "random", or a safetensors file with q, k and v, which then serve the error too.
        model: the decoder whose queries, keys and values serve the error; None is the lab model.
        tokens: the length of the text that it reads.
        out: the folder of `sparse.json`; rows of an earlier run with the same settings are kept.
        fresh: True replaces the results of an earlier run.
        progress: called as `progress(step, steps, note)`.
        say: called with messages between steps.

    Raises:
        OptionError: for a wrong option, or if `out` holds results with other settings.
        Interrupted: with the number of finished rows, and of all.
    """
    _check(lengths, budget, dtype, threads, heads=heads, dim=dim, rounds=rounds, tokens=tokens)
    chosen, given = sparse_operators(operators), None if inputs == RANDOM else read(Path(inputs))
    target, kind = torch_device(device), DTYPES[dtype]
    if given is not None and max(lengths) > given.q.shape[2]:
        raise OptionError(f"lengths={max(lengths)} is longer than the inputs of {given.q.shape[2]} tokens")
    check_writable(out)
    with fixed_threads(threads) as count:
        settings = {
            "budget": budget, "heads": heads, "dim": dim, "dtype": dtype, "device": device, "threads": count,
            "rounds": rounds, "inputs": str(inputs), "model": model or "lab lm", "tokens": tokens,
            "foveate": __version__, "torch": torch.__version__,
        }  # fmt: skip
        found = Sparse(settings) if fresh else _resumed(settings, out / RESULTS)
        real = given if given is not None else captured(model, tokens, say)
        wanted = [(key, n) for n in dict.fromkeys(lengths) for key in chosen]
        for step, n in enumerate(dict.fromkeys(lengths)):
            done = {(row.operator, row.length) for row in found.rows}
            todo = {key: cls for key, cls in chosen.items() if (key, n) not in done}
            if not todo:
                continue
            timed = _random(n, heads, dim) if given is None else given.first(n)
            timed = Inputs(*(x.to(target, kind) for x in timed))
            watch = partial(_watch, progress, step * (rounds + 1), len(set(lengths)) * (rounds + 1), n)
            try:
                found.rows.extend(_length(todo, budget, timed, real, rounds, watch))
            except KeyboardInterrupt:
                raise Interrupted(len(done & set(wanted)), len(wanted)) from None
            found.save(out)
    rows = {(row.operator, row.length): row for row in found.rows}
    return replace(found, rows=[rows[each] for each in wanted])


def _check(lengths: Sequence[int], budget: float, dtype: str, threads: int | None, **counts: int) -> None:
    if not lengths:
        raise OptionError("lengths must hold at least one number of tokens; got none")
    for length in lengths:
        validate.count("lengths", length, 1)
    for name, value in {**counts, "threads": 1 if threads is None else threads}.items():
        validate.count(name, value, 1)
    if not 0 < budget <= 1:
        raise OptionError(f"budget={budget} must be above 0 and at most 1, a share of the keys")
    validate.one_of("dtype", dtype, tuple(DTYPES))


def _resumed(settings: dict[str, Any], path: Path) -> Sparse:
    """Load the rows of an earlier run with the same settings; rows with other settings are refused."""
    if not path.is_file():
        return Sparse(settings)
    kept = Sparse.load(path)
    if other := [name for name in settings if kept.settings.get(name) != settings[name]]:
        changed = ", ".join(f"{name} was {kept.settings.get(name)!r}, is {settings[name]!r}" for name in other)
        raise OptionError(f"{path} holds results with other settings ({changed}); --fresh replaces them")
    return kept


def _watch(progress: Callable[[int, int, str], None], first: int, steps: int, n: int, number: int) -> None:
    progress(first + number, steps, f"{n:,} tokens, round {number}")


def _random(n: int, heads: int, dim: int) -> Inputs:
    return Inputs(*torch.randn(3, 1, heads, n, dim, generator=torch.Generator().manual_seed(0)).unbind())


@torch.inference_mode()
def _length(
    todo: dict[str, type[Operator]], budget: float, timed: Inputs, real: Inputs, rounds: int,
    watch: Callable[[int], None],
) -> list[SparseRow]:  # fmt: skip
    """Return the rows of one length."""
    watch(0)
    n, device = timed.q.shape[2], timed.q.device
    contenders, failed = dict[str, _Contender](), list[SparseRow]()
    for key, cls in todo.items():
        try:
            contenders[key] = _contender(cls, budget, timed)
        except FoveateError as error:
            failed.append(SparseRow(key, n, note=" ".join(str(error).split())))
    dense = {causal: partial(_dense, timed, causal) for causal in {each.causal for each in contenders.values()}}
    for call in dense.values():
        call()
    named: dict[str, Callable[[], object]] = {_name(causal): call for causal, call in dense.items()}
    taken = take_turns(named | {key: each.call for key, each in contenders.items()}, rounds, device, watch)
    rows = {
        key: _row(key, each, taken[key], taken[_name(each.causal)], timed, _error(todo[key], budget, real, n))
        for key, each in contenders.items()
    }
    return [*rows.values(), *failed]


def _contender(cls: type[Operator], budget: float, inputs: Inputs) -> _Contender:
    """Make an operator and warm it up: as often as `auto` needs to settle on an engine."""
    (_, heads, n, width), kv_heads = inputs.q.shape, inputs.k.shape[1]
    op = made(cls, budget, n, heads, kv_heads, width).to(inputs.q)
    causal = is_causal(op)
    call = partial(op, *inputs, causal=causal)
    for _ in range(engines.OFTEN + 2 if n >= engines.LONG else 1):
        call()
    return _Contender(op, causal, chosen_share(op, *inputs), call)


def _dense(inputs: Inputs, causal: bool) -> Tensor:
    grouped = inputs.q.shape[1] != inputs.k.shape[1]
    return F.scaled_dot_product_attention(*inputs, is_causal=causal, enable_gqa=grouped)


def _name(causal: bool) -> str:
    return "causal self" if causal else "self"


def _row(
    key: str, contender: _Contender, own: list[float], dense: list[float], inputs: Inputs, error: float
) -> SparseRow:
    ratios = [theirs / mine for theirs, mine in zip(dense, own, strict=True)]
    return SparseRow(
        key, inputs.q.shape[2], _name(contender.causal),
        contender.operator.plan(*inputs, causal=contender.causal).engine, contender.chosen,
        1e3 * median(own), 1e3 * median(dense), *of_median(ratios), 1 / max(contender.chosen, 1e-9), error,
    )  # fmt: skip


def _error(cls: type[Operator], budget: float, real: Inputs, n: int) -> float:
    """Return the relative error of an operator's output on the first tokens of real inputs."""
    if n > real.q.shape[2]:
        return nan
    inputs = Inputs(*(x.float() for x in real.first(n)))
    op = made(cls, budget, n, inputs.q.shape[1], inputs.k.shape[1], inputs.q.shape[3])
    try:
        out, expected = op(*inputs, causal=is_causal(op)), _dense(inputs, is_causal(op))
    except FoveateError:  # such as heads that do not divide: it has no error on this model
        return nan
    return float((out - expected).norm() / expected.norm())
