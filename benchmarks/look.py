"""The cost of looking: a model's forward pass with a lens on every layer, without one, and with eager maps.

Entropy, sink mass and received mass of every head are one more pass over the logits, a tile at a time. The usual way,
`output_attentions=True`, gives up the kernel and keeps N×N maps; it is left out where these take gigabytes. Goal: at
most 2 for the whole model, 1.5 hoped for. By default the model is a random Llama; `--model` takes a pretrained one,
which then reads real text.
"""

from __future__ import annotations

import argparse
import functools
import sys

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from _report import finish, interleaved
from foveate.bench.loading import load
from foveate.host import apply
from foveate.host.fused_statistics import Statistics
from foveate.lens import MEASURES, Lens
from foveate.lens.lens import look
from foveate.tasks.parts.corpus import text

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


def models(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedModel, Tensor]:
    """The model with its fused kernel, the same with eager attention, and the ids of a text as long as the longest."""
    longest = max(options.lengths)
    if options.model is None:
        ids = torch.randint(512, (1, longest), generator=torch.Generator().manual_seed(0))
        model, eager = llama(options.layers), llama(options.layers)
    else:
        model, tokenizer, _ = load(options.model, dtype=options.dtype)
        eager, _, _ = load(options.model, dtype=options.dtype)
        ids = tokenizer(text("heldout"), return_tensors="pt", verbose=False).input_ids[:, :longest]
    eager.set_attn_implementation("eager")
    return model, eager, ids


def forward(model: PreTrainedModel, ids: Tensor, lens: Lens | None = None, maps: bool = False) -> object:
    if lens is None:
        return model.model(ids, use_cache=False, output_attentions=maps)
    with apply(model, lens):
        return model.model(ids, use_cache=False)


def statistics(q: Tensor, k: Tensor) -> None:
    call = Statistics(q, k, q.shape[-1] ** -0.5, causal=True)
    _ = call.mean_logit, call.lse, call.received


def alone(model: PreTrainedModel, n: int) -> dict[str, functools.partial[object]]:
    """One layer's attention, and its statistics, on random queries and keys of the model's shape and number format."""
    config, dtype = model.config, model.dtype
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    q, k, v = (torch.randn(1, count, n, dim, dtype=dtype) for count in (heads, groups, groups))
    return {
        "attention": functools.partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True),
        "statistics": functools.partial(statistics, q, k),
    }


def agree(model: PreTrainedModel, eager: PreTrainedModel, ids: Tensor, close: float) -> None:
    """The gate: what is timed is what eager maps say."""
    seen = look(model, ids, measures=NAMES)
    for layer, w in enumerate(eager(ids, use_cache=False, output_attentions=True).attentions):
        torch.testing.assert_close(seen.values("entropy")[layer], torch.special.entr(w).sum(-1), atol=close, rtol=0)
        torch.testing.assert_close(seen.values("sink_mass")[layer], w[..., 0], atol=close, rtol=0)
        torch.testing.assert_close(seen.values("received_mass")[layer], w.sum(-2), atol=close, rtol=close)


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    model, eager, text_ids = models(options)
    assert set(NAMES) <= set(MEASURES)
    rows, ratios = [], {}
    with torch.inference_mode():
        for n in options.lengths:
            ids = text_ids[:, :n]
            small = n <= EAGER
            if small and model.dtype == torch.float32:
                # two kernels round the hidden states of 24 layers differently
                agree(model, eager, ids, 1e-4 if options.model is None else 2e-3)
            calls = {
                "model": functools.partial(forward, model, ids),
                "model, lens": functools.partial(forward, model, ids, Lens(NAMES)),
                **alone(model, n),
            }
            if small:
                calls["model, eager maps"] = functools.partial(forward, eager, ids, maps=True)
            seconds = interleaved(calls, options.repeats)
            print(f"done: {n} tokens", file=sys.stderr, flush=True)
            rows += [{"call": f"{name}, N={n}", "ms": taken * 1e3} for name, taken in seconds.items()]
            ratios |= {
                f"model with lens / without, N={n} (goal 2)": seconds["model, lens"] / seconds["model"],
                f"attention and its statistics / attention, N={n}": 1 + seconds["statistics"] / seconds["attention"],
            }
            if small:
                ratios[f"model with eager maps / without, N={n}"] = seconds["model, eager maps"] / seconds["model"]
    finish(rows, ratios)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder, GGUF file or hub id of a decoder; default: a random Llama")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--layers", type=int, default=2, help="layers of the random Llama")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


if __name__ == "__main__":
    main()
