"""Records which tokens NVIDIA's kvpress keeps of a small model's prompt: `kvpress.json`, which `test_kvpress.py` reads.

kvpress needs an older transformers than Foveate does, so that it has an environment of its own. By hand, from here:

    python3 -m venv /tmp/kvpress && /tmp/kvpress/bin/pip install torch==2.13.0 'transformers<5.3' kvpress
    /tmp/kvpress/bin/python tests/parity/kvpress_record.py

Both sides make the same model, from one generator. A record is refused where a slightly different model keeps other
tokens: then a score is near the border, and rounding would decide.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers as hf
from torch import Tensor

RECORD = Path(__file__).with_name("kvpress.json")
LENGTH, LAYERS, KV_HEADS = 64, 3, 2
#: What kvpress calls the ratio: the share that it removes. At these it keeps a whole number of 64 tokens.
RATIOS = (0.5, 0.75)
#: Window and pooling width of the presses that score by the last queries, shorter than the defaults as the text is.
WINDOW = {"window_size": 8, "kernel_size": 5}

Kept = list[list[list[int]]]

#: Each press, from kvpress's names and the ratio.
PRESSES: dict[str, Callable[[Any, float], Any]] = {
    "knorm": lambda kp, r: kp.KnormPress(r),
    "keydiff": lambda kp, r: kp.KeyDiffPress(r),
    "tova": lambda kp, r: kp.TOVAPress(r),
    "snapkv": lambda kp, r: kp.SnapKVPress(r, **WINDOW),
    "snapkv, no pooling": lambda kp, r: kp.SnapKVPress(r, window_size=8, kernel_size=1),
    "pyramidkv": lambda kp, r: kp.PyramidKVPress(r, **WINDOW),
    "pyramidkv, beta 2": lambda kp, r: kp.PyramidKVPress(r, **WINDOW, beta=2),
    "expected_attention": lambda kp, r: kp.ExpectedAttentionPress(r),
    "expected_attention, epsilon 0.01": lambda kp, r: kp.ExpectedAttentionPress(r, epsilon=0.01),
    "expected_attention, no covariance": lambda kp, r: kp.ExpectedAttentionPress(r, use_covariance=False),
    # 4 sinks, 12 tokens of tail and 4 partitions, which have 16 tokens in common at 0.5: 4 each, and so no ties
    "lagkv": lambda kp, r: kp.LagKVPress(r, lag_size=12),
    "lagkv, ties": lambda kp, r: kp.LagKVPress(r, lag_size=8),
    "lagkv, across partitions": lambda kp, r: kp.LagKVPress(r, lag_size=12, cross_scoring=True),
    "lagkv, short text": lambda kp, r: kp.LagKVPress(r),
    "adakv": lambda kp, r: kp.AdaKVPress(kp.SnapKVPress(r, **WINDOW)),
    "adakv, knorm": lambda kp, r: kp.AdaKVPress(kp.KnormPress(r)),
    "criticalkv": lambda kp, r: kp.CriticalKVPress(kp.SnapKVPress(r, **WINDOW)),
    "criticalkv, knorm": lambda kp, r: kp.CriticalKVPress(kp.KnormPress(r)),
    "criticalkv, adaptive": lambda kp, r: kp.CriticalAdaKVPress(kp.SnapKVPress(r, **WINDOW)),
    "chunkkv": lambda kp, r: kp.ChunkKVPress(kp.SnapKVPress(r, **WINDOW)),
    # the window of 8 is two chunks of 4; others reach across its border
    "chunkkv, chunks of 4": lambda kp, r: kp.ChunkKVPress(kp.SnapKVPress(r, **WINDOW), chunk_length=4),
    "chunkkv, knorm": lambda kp, r: kp.ChunkKVPress(kp.KnormPress(r), chunk_length=5),
    "cur_dkv": lambda kp, r: kp.CURPress(r),
    "cur_dkv, mean, windows of 10": lambda kp, r: kp.CURPress(r, leverage_type="kv_avg", local_window_size=10),
    "cur_dkv, values of the whole": lambda kp, r: kp.CURPress(r, leverage_type="value", use_local_approximation=False),
    "cap_kv": lambda kp, r: kp.CapPress(r),
    "kvzip": lambda kp, r: kp.KVzipPress(r),
    "kvzip, parts of 24": lambda kp, r: kp.KVzipPress(r, chunk_size=24),
    "kvzip, layers": lambda kp, r: kp.KVzipPress(r, layerwise=True),
    "kvzip, plus": lambda kp, r: kp.KVzipPress(r, kvzip_plus_normalization=True),
    "chunkkv, chunks of 5": lambda kp, r: kp.ChunkKVPress(kp.SnapKVPress(r, **WINDOW), chunk_length=5),
}


class Letters:
    """A tokenizer of one id for each letter, for the instruction of KVzip."""

    chat_template = None

    def encode(self, text: str, **options: Any) -> Tensor:
        return torch.tensor([self(text).input_ids], dtype=torch.long)

    def __call__(self, text: str, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[ord(letter) % 64 for letter in text])


def model(moved: float = 0.0) -> hf.PreTrainedModel:
    """A random Llama of 3 layers, 4 query heads and 2 key/value heads of width 8, its weights `moved` by a little."""
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=KV_HEADS, head_dim=8, max_position_embeddings=2048, attn_implementation="sdpa",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    llama = hf.LlamaForCausalLM(config).float().eval()
    draw, other = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in sorted(llama.named_parameters()):
            noise = torch.randn(weight.shape, generator=draw)
            weight.copy_(1 + 0.1 * noise if "norm" in name else 0.3 * noise)
            weight.mul_(1 + moved * torch.randn(weight.shape, generator=other))
    return llama


def ids() -> Tensor:
    """Different ids: the keys of one token at two places would have the same norm, and tie."""
    return torch.randperm(LENGTH, generator=torch.Generator().manual_seed(2))[None]


@torch.no_grad()
def keys(llama: hf.PreTrainedModel) -> Tensor:
    """The keys of all layers `(layers, heads, length, width)`, without any press."""
    cache = hf.DynamicCache()
    llama(ids(), past_key_values=cache)
    return torch.stack([layer.keys[0] for layer in cache.layers])


def sample(whole: Tensor) -> list[list[float]]:
    """A few numbers of each layer's keys, by which the other side knows that its model is the same."""
    return [[round(float(x), 5) for x in layer.flatten()[::97]] for layer in whole]


@torch.no_grad()
def kept(llama: hf.PreTrainedModel, press: Any) -> Kept:
    """The tokens that each layer and head keeps. kvpress drops keys, or lists those that it will hide (AdaKV)."""
    whole, cache = keys(llama), hf.DynamicCache()
    for layer in llama.model.layers:
        layer.self_attn.masked_key_indices = None
    with press(llama):
        llama.model(input_ids=ids(), past_key_values=cache)
    out: Kept = []
    for number, layer in enumerate(cache.layers):
        same = (whole[number][:, :, None] == layer.keys[0][:, None]).all(-1).any(-1)
        hidden = llama.model.layers[number].self_attn.masked_key_indices
        if hidden is not None:
            same[hidden[1], hidden[2]] = False
        out.append([row.nonzero()[:, 0].tolist() for row in same])
    return out


def record(press: Callable[[float], Any], ratio: float) -> Kept:
    found = kept(model(), press(ratio))
    if kept(model(moved=1e-5), press(ratio)) != found:
        raise SystemExit(f"{press(ratio)}: rounding decides what is kept; take another model")
    return found


def main() -> None:
    import kvpress  # here, since importing it changes transformers' attention functions
    from kvpress.presses import kvzip_press

    kvzip_press.AutoTokenizer = SimpleNamespace(from_pretrained=lambda name: Letters())

    made = {
        name: {str(ratio): record(lambda r, make=make: make(kvpress, r), ratio) for ratio in RATIOS}
        for name, make in PRESSES.items()
    }
    made["knorm"]["0.3"] = record(kvpress.KnormPress, 0.3)
    made["pyramidkv"]["0.25"] = record(lambda r: PRESSES["pyramidkv"](kvpress, r), 0.25)
    made["adakv, knorm"]["0.96875"] = record(lambda r: PRESSES["adakv, knorm"](kvpress, r), 0.96875)
    made["snapkv, wide window"] = {"0.75": record(lambda r: kvpress.SnapKVPress(r, window_size=24), 0.75)}
    versions = {name: version(name) for name in ("kvpress", "transformers", "torch")}
    lines = [f' "versions": {json.dumps(versions)}', f' "keys": {json.dumps(sample(keys(model())))}']
    for name, ratios in made.items():
        rows = ",\n  ".join(f"{json.dumps(ratio)}: {json.dumps(layers)}" for ratio, layers in ratios.items())
        lines.append(f" {json.dumps(name)}: {{\n  {rows}\n }}")
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
