"""Sparse operators against fused dense attention, by `foveate bench sparse`: achieved over ideal speed-up by name.

    python benchmarks/sparse.py --lengths 1024 4096 16384

The goal is 0.8 at 16,384 tokens. Rows where dense attention is faster are part of the table.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from rich.console import Console

from foveate.bench.sparsity.run import BUDGET, DIM, HEADS, ROUNDS, sparse
from foveate.report import sparse as report


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--operators", nargs="+")
    parser.add_argument("--budget", type=float, default=BUDGET)
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--dim", type=int, default=DIM)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--model", help="the decoder of the error's inputs; default: the lab model")
    parser.add_argument("--out", type=Path, default=Path("foveate-sparse"))
    found = sparse(**vars(parser.parse_args()), fresh=True)
    Console(width=120).print(report.table(found), markup=False, highlight=False)
    ratios = {f"{row.operator}, N={row.length}: achieved / ideal (goal 0.8)": row.ratio for row in found.rows}
    print(json.dumps({name: round(ratio, 4) for name, ratio in ratios.items() if math.isfinite(ratio)}))


if __name__ == "__main__":
    main()
