"""The time that HiLo saves over other attention on images: one layer on 14 x 14 tokens of width 768, float32, on CPU.

Goals: at least 1.6 times as fast as attention in windows of 7 x 7, and 1.4 times as spatial reduction attention, the
paper's numbers. Shapes are those of the paper's largest network at 224 x 224 pixels: 12 heads, windows of 2 x 2 for
HiLo with alpha 0.9, reduction by 2 x 2 with a convolution. The ratios of multiply-adds, which a layer without overhead
would reach where all products are equally fast, are shown beside those of time.
"""

from __future__ import annotations

import argparse
import functools

import torch
from torch import Tensor, nn

from _report import finish, interleaved
from foveate.nn import GlobalSubsampledAttention, HiLoAttention, Layer, MultiHeadAttention, WindowAttention, cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=14)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--alpha", type=float, default=0.9)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dim, heads, size = options.dim, options.heads, (options.side, options.side)
    layers = {
        "HiLo": HiLoAttention(dim, heads, 2, options.alpha),
        "windows of 7 x 7": WindowAttention(dim, heads, 7),
        "spatial reduction": GlobalSubsampledAttention(dim, heads, 2),
        "averages only": HiLoAttention(dim, heads, 2, 1.0),
        "windows of 2 x 2 only": HiLoAttention(dim, heads, 2, 0.0),
        "all tokens": MultiHeadAttention(dim, heads, bias=True),
    }
    calls = {name: Call(layer, size) for name, layer in layers.items()}
    x = torch.randn(options.batch, options.side**2, dim)
    macs = {name: cost(call, x[:1]).macs for name, call in calls.items()}
    with torch.inference_mode():
        seconds = interleaved({name: functools.partial(call, x) for name, call in calls.items()}, options.repeats)
    report(seconds, macs)


class Call(nn.Module):
    """A layer with the size of its grid, if it needs one."""

    def __init__(self, layer: Layer, size: tuple[int, int]) -> None:
        super().__init__()
        self.layer, self.grid = layer, {"size": size} if layer.capabilities.grid else {}

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, **self.grid)


def report(seconds: dict[str, float], macs: dict[str, int]) -> None:
    rows = [
        {"layer": name, "ms": taken * 1e3, "multiply-adds (M)": macs[name] / 1e6}
        | {"time / HiLo's": taken / seconds["HiLo"], "multiply-adds / HiLo's": macs[name] / macs["HiLo"]}
        for name, taken in seconds.items()
    ]
    ratios = {}
    for name, goal in (("windows of 7 x 7", 1.6), ("spatial reduction", 1.4)):
        ratios[f"speed-up over {name} (goal {goal})"] = seconds[name] / seconds["HiLo"]
        ratios[f"ideal speed-up over {name}"] = macs[name] / macs["HiLo"]
    ratios["speed-up over all tokens"] = seconds["all tokens"] / seconds["HiLo"]
    finish(rows, ratios)


if __name__ == "__main__":
    main()
