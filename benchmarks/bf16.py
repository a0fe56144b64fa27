"""Time bfloat16: operators and layers take turns with themselves in float32 and with a peer in both, on one thread.

Goals: nothing slower in bfloat16 than in float32, nor than the peer in the same numbers. Where a processor has no fast
product of halves (AVX2, the first with AVX-512), tiles and the linear maps of layers are computed in float32, which is
the reason that the goal is met there too.

Peers: the Set Transformer's block as it was released, written down here; `memory-efficient-attention-pytorch` and
`titans-pytorch` (0.5) where they are installed, or lie in a folder on PYTHONPATH. What is missing shows as "-".
Titans is read once for a chunk, as the peer does: that one also takes one rate of forgetting for a chunk, where
Foveate's has one for a token, so that their outputs differ, and only the work is compared.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from _report import finish
from foveate.nn.sequence.neural_memory import NeuralMemory
from foveate.nn.sequence.set_transformer import ISAB, MAB
from foveate.ops import create

HEADS, WIDTH = 4, 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

#: Calls ready to be timed, by the numbers that they compute in.
Calls = Mapping[str, Callable[[], Tensor]]


class Case(NamedTuple):
    """One thing that is timed.

    Args:
        name: of the operator or layer. n: tokens.
        ours: its calls.
        theirs: the peer's, or None where there is none.
        same: whether both compute the same numbers.
    """

    name: str
    n: int
    ours: Calls
    theirs: Calls | None = None
    same: bool = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", help="names of cases, by commas; all where left out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, ratios = [], {}
    for name, make in CASES.items():
        if options.only and name not in options.only.split(","):
            continue
        case = make(name)
        check(case)
        row, found = measured(case, options.repeats)
        rows.append(row)
        ratios.update(found)
    finish(rows, ratios)


def check(case: Case) -> None:
    """The gate: bfloat16 gives what float32 does up to rounding, and so does the peer where it computes the same."""
    with torch.no_grad():
        exact = case.ours["float32"]()
        outs = {"bfloat16": case.ours["bfloat16"]()}
        if case.theirs is not None and case.same:
            outs["peer"] = case.theirs["float32"]()
    for name, out in outs.items():
        error = ((out - exact).norm() / exact.norm()).item()
        assert error < (0.05 if name == "bfloat16" else 1e-3), (case.name, name, error)


def measured(case: Case, repeats: int) -> tuple[dict[str, object], dict[str, float]]:
    """A row of the table, and ratios by name."""
    calls = dict(case.ours) | {f"peer {name}": call for name, call in (case.theirs or {}).items()}
    seconds = in_turns(calls, repeats)
    row: dict[str, object] = {"case": case.name, "N": case.n}
    for name in (*DTYPES, *(f"peer {name}" for name in DTYPES)):
        row[f"{name} (ms)"] = 1e3 * statistics.median(seconds[name]) if name in seconds else "-"
    pairs = {"bfloat16 / float32": ("bfloat16", "float32")}
    pairs |= {f"{name} / peer": (name, f"peer {name}") for name in DTYPES}
    ratios = {}
    for label, (one, other) in pairs.items():
        low, middle, high = (0.0, 0.0, 0.0) if other not in seconds else spread(seconds[one], seconds[other])
        row[label] = f"{middle:.2f} ({low:.2f}-{high:.2f})" if other in seconds else "-"
        if other in seconds:
            ratios[f"{label}, {case.name} (goal 1.05)"] = middle
    return row, ratios


def spread(ours: list[float], others: list[float]) -> tuple[float, float, float]:
    """The ratios of times measured one after the other: a low, the middle and a high tenth."""
    tenths = statistics.quantiles([one / other for one, other in zip(ours, others, strict=True)], n=10)
    return tenths[0], tenths[4], tenths[8]


def in_turns(fns: Calls, repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, round by round, there and back; the first round does not count."""
    taken: dict[str, list[float]] = {name: [] for name in fns}
    with torch.no_grad():  # the peer of Titans differentiates inside, which inference mode does not allow
        for repeat in range(repeats + 1):
            for name in list(fns)[:: 1 if repeat % 2 else -1]:
                begun = time.perf_counter()
                fns[name]()
                taken[name].append(time.perf_counter() - begun)
    return {name: times[1:] for name, times in taken.items()}


# -- cases -------------------------------------------------------------------------------------------------------------


def calls(make: Callable[[], nn.Module], given: Tensor, **options: Any) -> Calls:
    """A module's call in each dtype, with the same weights; `given (parts, ...)` are the tensors that it takes."""
    found = {}
    for name, dtype in DTYPES.items():
        torch.manual_seed(0)
        found[name] = functools.partial(make().to(dtype), *given.to(dtype), **options)
    return found


def an_operator(name: str, n: int, key: str | None = None, **built: float | str) -> Case:
    make = functools.partial(create, key or name, **built)
    drawn = torch.randn(3, 1, HEADS, n, WIDTH, generator=torch.Generator().manual_seed(0))
    return Case(name, n, calls(make, drawn, causal="causal self" in make().patterns))


def in_chunks(name: str, n: int, sizes: tuple[int, int] = (512, 1024)) -> Case:
    case = an_operator(name, n, q_chunk=sizes[0], k_chunk=sizes[1])
    try:
        from memory_efficient_attention_pytorch.memory_efficient_attention import memory_efficient_attention
    except ImportError:
        return case
    drawn = torch.randn(3, 1, HEADS, n, WIDTH, generator=torch.Generator().manual_seed(0))
    attend = functools.partial(memory_efficient_attention, q_bucket_size=sizes[0], k_bucket_size=sizes[1], causal=True)
    theirs = {name: functools.partial(attend, *drawn.to(dtype)) for name, dtype in DTYPES.items()}
    return case._replace(theirs=theirs)


def a_memory(name: str, n: int, chunk: int = 64) -> Case:
    dim, x = HEADS * WIDTH, torch.randn(1, 1, n, HEADS * WIDTH, generator=torch.Generator().manual_seed(0))
    case = Case(name, n, calls(lambda: NeuralMemory(dim, HEADS, chunk=chunk, reads="chunk", conv=0), x, causal=True))
    try:
        import titans_pytorch
    except ImportError:
        return case

    class Peer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            model = titans_pytorch.MemoryMLP(WIDTH, depth=2, expansion_factor=2.0)
            self.memory = titans_pytorch.NeuralMemory(
                dim, dim_head=WIDTH, heads=HEADS, chunk_size=chunk, batch_size=chunk, model=model, qk_rmsnorm=True
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.memory(x)[0]

    return case._replace(theirs=calls(Peer, x), same=False)


def induced(name: str, n: int, batch: int = 4, points: int = 32) -> Case:
    dim, x = HEADS * WIDTH, torch.randn(1, batch, n, HEADS * WIDTH, generator=torch.Generator().manual_seed(0))
    return Case(
        name, n, calls(lambda: ISAB(dim, HEADS, points, ln=True), x),
        calls(lambda: Released(ISAB(dim, HEADS, points, ln=True)), x),
    )  # fmt: skip


class Released(nn.Module):
    """The Set Transformer's block as its authors wrote it, with the weights of ours."""

    def __init__(self, block: ISAB) -> None:
        super().__init__()
        self.points, self.parts = block.points, nn.ModuleList([block.gather, block.spread])
        for part in self.parts:
            for name in ("q", "k", "v", "feed"):
                theirs = nn.Linear(*getattr(part, name).weight.shape[::-1])
                theirs.load_state_dict(getattr(part, name).state_dict())
                setattr(part, name, theirs)

    def forward(self, x: Tensor) -> Tensor:
        gather, spread = self.parts
        return self._block(spread, x, self._block(gather, self.points.repeat(x.shape[0], 1, 1), x))

    @staticmethod
    def _block(part: MAB, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = part.q(x), part.k(y), part.v(y)
        parts = [torch.cat(t.split(t.shape[2] // part.heads, 2), 0) for t in (q, k, v)]
        weights = torch.softmax(parts[0].bmm(parts[1].transpose(1, 2)) * part.scale, 2)
        out = part.norm(torch.cat((parts[0] + weights.bmm(parts[2])).split(len(q), 0), 2))
        return part.feed_norm(out + F.relu(part.feed(out)))


#: By name, what makes each; 4 heads of 64 channels.
CASES: dict[str, Callable[[str], Case]] = {
    "memory_efficient_attention": functools.partial(in_chunks, n=2048),
    "neural_attention": functools.partial(an_operator, n=512, head_dim=WIDTH),
    "hedgehog": functools.partial(an_operator, n=2048, heads=HEADS, head_dim=WIDTH),
    "efficient_attention": functools.partial(an_operator, n=2048),
    "titans": functools.partial(an_operator, n=512, heads=HEADS, head_dim=WIDTH, chunk=64, theta=0.01),
    "titans, read by chunks": functools.partial(
        an_operator, n=512, key="titans", heads=HEADS, head_dim=WIDTH, chunk=64, theta=0.01, reads="chunk"
    ),
    "titans-memory": functools.partial(a_memory, n=512),
    "set_transformer": functools.partial(induced, n=512),
    "sliding_window": functools.partial(an_operator, n=2048, window=256),
}


if __name__ == "__main__":
    main()
