"""The cost of looking: a model's forward pass with a lens on every layer, without one, and with eager maps.

Entropy, sink mass and received mass of every head are one more pass over the logits, a tile at a time. The usual way,
`output_attentions=True`, gives up the kernel and keeps N×N maps; it is left out where these take gigabytes. Goal: at
most 2 for the whole model, 1.5 hoped for.
"""

from __future__ import annotations

import argparse
import functools

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from _report import finish, interleaved
from foveate.host import apply
from foveate.host.fused_statistics import Statistics
from foveate.lens import MEASURES, Lens
from foveate.lens.lens import look

#: The longest text with eager maps.
EAGER = 2048
NAMES = ("entropy", "sink_mass", "received_mass")


def llama(layers: int) -> LlamaForCausalLM:
    """A random Llama with the proportions of a small one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1376, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=16384,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def forward(model: LlamaForCausalLM, ids: torch.Tensor, lens: Lens | None = None, maps: bool = False) -> object:
    if lens is None:
        return model.model(ids, use_cache=False, output_attentions=maps)
    with apply(model, lens):
        return model.model(ids, use_cache=False)


def statistics(q: torch.Tensor, k: torch.Tensor) -> None:
    call = Statistics(q, k, 64**-0.5, causal=True)
    _ = call.mean_logit, call.lse, call.received


def agree(model: LlamaForCausalLM, eager: LlamaForCausalLM, ids: torch.Tensor) -> None:
    """The gate: what is timed is what eager maps say."""
    seen = look(model, ids, measures=NAMES)
    for layer, w in enumerate(eager(ids, use_cache=False, output_attentions=True).attentions):
        torch.testing.assert_close(seen.values("entropy")[layer], torch.special.entr(w).sum(-1), atol=1e-4, rtol=0)
        torch.testing.assert_close(seen.values("sink_mass")[layer], w[..., 0], atol=1e-4, rtol=0)
        torch.testing.assert_close(seen.values("received_mass")[layer], w.sum(-2), atol=1e-4, rtol=1e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, eager = llama(options.layers), llama(options.layers)
    eager.set_attn_implementation("eager")
    assert set(NAMES) <= set(MEASURES)
    rows, ratios = [], {}
    with torch.inference_mode():
        for n in options.lengths:
            ids = torch.randint(512, (1, n), generator=torch.Generator().manual_seed(0))
            small = n <= EAGER
            if small:
                agree(model, eager, ids)
            q, k, v = (torch.randn(1, heads, n, 64) for heads in (8, 4, 4))
            plain = functools.partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
            calls = {
                "model": functools.partial(forward, model, ids),
                "model, lens": functools.partial(forward, model, ids, Lens(NAMES)),
                "attention": plain,
                "statistics": functools.partial(statistics, q, k),
            }
            if small:
                calls["model, eager maps"] = functools.partial(forward, eager, ids, maps=True)
            seconds = interleaved(calls, options.repeats)
            rows += [{"call": f"{name}, N={n}", "ms": taken * 1e3} for name, taken in seconds.items()]
            ratios |= {
                f"model with lens / without, N={n} (goal 2)": seconds["model, lens"] / seconds["model"],
                f"attention and its statistics / attention, N={n}": 1 + seconds["statistics"] / seconds["attention"],
            }
            if small:
                ratios[f"model with eager maps / without, N={n}"] = seconds["model, eager maps"] / seconds["model"]
    finish(rows, ratios)


if __name__ == "__main__":
    main()
