"""The time that `foveate.attend(..., "softmax")` adds to PyTorch's own kernel.

Goals: at most 5 % at N = 1,024 and 1 % at N = 8,192.
"""

from __future__ import annotations

import argparse
import functools

import torch
from torch.nn import functional as F

import foveate
from _report import finish, interleaved

REPEATS = {1024: 150, 8192: 11}
GOALS = {1024: 1.05, 8192: 1.01}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=list(REPEATS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows, ratios = [], {}
    for n in options.lengths:
        q, k, v = torch.randn(3, 1, 8, n, 64, generator=torch.Generator().manual_seed(0))
        for causal in (False, True):
            kernel = functools.partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal)
            ours = functools.partial(foveate.attend, q, k, v, "softmax", causal=causal)
            assert torch.equal(ours(), kernel())
            with torch.inference_mode():
                seconds = interleaved({"torch": kernel, "foveate": ours}, REPEATS.get(n, 11))
            name = f"N={n}{' causal' if causal else ''}"
            ratios[f"attend / torch, {name}"] = ratio = seconds["foveate"] / seconds["torch"]
            rows.append(
                {"call": name, "torch (ms)": seconds["torch"] * 1e3, "foveate (ms)": seconds["foveate"] * 1e3}
                | {"ratio": ratio, "goal": GOALS.get(n, "")}
            )
    finish(rows, ratios)


if __name__ == "__main__":
    main()
