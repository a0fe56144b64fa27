"""Neighbourhood attention against dense attention: how much of the ideal speed-up tiles of queries reach.

The ideal is the number of all keys over those that a query sees. Contenders take turns, in float32 unless `--dtype`
says otherwise. In one dimension the windows of 16,384 tokens are read as slices; in two, 96 x 96 cells are read in
boxes.
"""

from __future__ import annotations

import argparse
import functools
import sys
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from _report import finish, interleaved
from foveate.ops import FNA, GNA, neighborhood_mask
from foveate.ops.base.neighborhood import Neighborhood

HEADS, WIDTH = 8, 64


def cases() -> dict[str, Neighborhood]:
    return {
        "1-D, 16384, window 512": FNA((16384,), 512),
        "1-D, 16384, window 512, stride 64": GNA((16384,), 512, 64),
        "2-D, 96 x 96, window 13": FNA((96, 96), 13),
        "2-D, 96 x 96, window 32": FNA((96, 96), 32),
        "2-D, 96 x 96, window 32, stride 8": GNA((96, 96), 32, 8),
        "2-D, 96 x 96, window 24, stride 8": GNA((96, 96), 24, 8),
        "2-D, 96 x 96, window 24, dilation 2": FNA((96, 96), 24, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--backward", action="store_true", help="forward and backward pass")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    agree()
    rows, ratios = [], {}
    for name, op in cases().items():
        cells = prod(op.grid)
        q, k, v = (torch.randn(1, HEADS, cells, WIDTH).to(getattr(torch, options.dtype)) for _ in range(3))
        calls = {"dense": F.scaled_dot_product_attention, name: op}
        seconds = interleaved(
            {each: functools.partial(timed, call, q, k, v, options.backward) for each, call in calls.items()},
            options.repeats,
        )
        ideal, achieved = cells / prod(rule.keys_read for rule in op.rules(cells)), seconds["dense"] / seconds[name]
        rows.append({"neighbourhood": name, "ms": 1e3 * seconds[name], "dense ms": 1e3 * seconds["dense"],
                     "faster": achieved, "ideal": ideal, "achieved / ideal": achieved / ideal})  # fmt: skip
        ratios[f"{name}: achieved / ideal"] = achieved / ideal
    finish(rows, ratios)


def timed(attend: object, q: Tensor, k: Tensor, v: Tensor, backward: bool) -> None:
    if not backward:
        with torch.inference_mode():
            attend(q, k, v)  # type: ignore[operator]
        return
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    attend(q, k, v).sum().backward()  # type: ignore[operator]


def agree() -> None:
    """The gate: what is timed is attention under the mask."""
    op = FNA((12, 10), (5, 4), (2, 1))
    q, k, v = (torch.randn(1, 2, 120, 16) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v, neighborhood_mask((12, 10), (5, 4), (2, 1)))
    torch.testing.assert_close(op(q, k, v), expected, atol=1e-5, rtol=1e-5)


if __name__ == "__main__":
    main()
