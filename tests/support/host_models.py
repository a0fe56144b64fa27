"""Tiny random models of every kind that a host must carry, and methods that change nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from foveate.core.selection import Blocks, Indices, Selection
from foveate.host import Method, ModelCall, Site, Spans
from foveate.host.method import overrides
from foveate.host.stream import Stream

VOCAB, WINDOW = 64, 8

_DECODER = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, head_dim=8,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    initializer_range=0.3,
)  # fmt: skip
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_BERT = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0,
    max_position_embeddings=64, initializer_range=0.3,
)  # fmt: skip
_BART = dict(
    vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, eos_token_id=None,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, init_std=0.3,
    decoder_start_token_id=1, forced_eos_token_id=None, pad_token_id=0,
)  # fmt: skip

_MAKE = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_DECODER)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_DECODER)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_DECODER)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_DECODER, sliding_window=WINDOW)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_DECODER, sliding_window=WINDOW)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**_DECODER, sliding_window=WINDOW, layer_types=_MIXED)
    ),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**_BERT)),
    "vit": lambda: hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16,
            patch_size=4, initializer_range=0.3,
        )
    ),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**_BART)),
    # draws its attention scores by itself, without the interface
    "falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    ),
}  # fmt: skip

DECODERS = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3")
#: Decoders with layers that only see a window: such layers drop tokens by themselves.
SLIDING = ("mistral", "gemma2", "gemma3")


@cache
def model(name: str) -> hf.PreTrainedModel:
    """One model a name, in evaluation mode. Tests share it, so that a test which leaves a trace breaks the others."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _MAKE[name]().eval()


def tokens(batch: int = 2, length: int = 14, seed: int = 0) -> Tensor:
    """Random ids without the padding token."""
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(ids: Tensor, side: str, amount: int = 4) -> tuple[Tensor, Tensor]:
    """The same ids with the first sequence padded, and their attention mask."""
    ids, mask = ids.clone(), torch.ones_like(ids)
    if side != "none":
        where = slice(0, amount) if side == "left" else slice(-amount, None)
        ids[0, where], mask[0, where] = 0, 0
    return ids, mask


def feed(
    subject: hf.PreTrainedModel, ids: Tensor, mask: Tensor, pieces: Sequence[int], cache: hf.DynamicCache | None = None
) -> Tensor:
    """Logits of the real tokens, the ids being fed in pieces of these sizes."""
    out, end, cache = [], 0, hf.DynamicCache() if cache is None else cache
    for size in pieces:
        begin, end = end, end + size
        step = subject(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache)
        out.append(step.logits)
    assert end == ids.shape[1]
    return torch.cat(out, 1)[mask.bool()]


def use(subject: hf.PreTrainedModel) -> None:
    """One forward pass of whatever model it is."""
    with torch.no_grad():
        if subject.main_input_name == "pixel_values":
            subject(torch.zeros(1, 3, 16, 16))
        else:
            subject(tokens(), attention_mask=torch.ones(2, 14, dtype=torch.long))


#: Models without a decoder, and so without a cache that a method could evict from.
ENCODERS = ("bert", "vit")


def evicts(*methods: Method) -> bool:
    """Whether some of these methods evict, so that encoders refuse them."""
    return any(method.evicts or overrides(method, "keep") for method in methods)


class Evicts(Method):
    """Stores tokens slot by slot, and drops none."""

    evicts = True


class KeepsAll(Method):
    def keep(self, site: Site) -> Tensor:
        return torch.ones_like(site.positions, dtype=torch.bool)


class SameLogits(Method):
    def edit_logits(self, site: Site, logits: Tensor) -> Tensor:
        return logits.clone()


class SameWeights(Method):
    def edit_weights(self, site: Site, weights: Tensor) -> Tensor:
        return weights.clone()


class SameOutput(Method):
    def edit_output(self, site: Site, out: Tensor) -> Tensor:
        return out.clone()


class Adds(Method):
    def __init__(self, number: float) -> None:
        self.number = number

    def edit_output(self, site: Site, out: Tensor) -> Tensor:
        return out + self.number


class SameHidden(Method):
    def edit_hidden(self, layer: int, hidden: Tensor, spans: Spans) -> Tensor:
        return hidden.clone()


class DropsNone(Method):
    renumbers = True

    def drop(self, layer: int, hidden: Tensor, stream: Stream) -> Tensor:
        return torch.ones(hidden.shape[:2], dtype=torch.bool)


class SameNextToken(Method):
    def edit_next_token(self, logits: Tensor, call: ModelCall) -> Tensor:
        return logits.clone()


class SelectsIndices(Method):
    """Every key by its index, in groups of three queries."""

    def select(self, site: Site) -> Selection:
        nq, nk = site.q.shape[2], site.k.shape[2]
        return Indices(torch.arange(nk).expand(1, 1, -(-nq // 3), nk), nq, nk, group=3)


class SelectsBlocks(Method):
    def select(self, site: Site) -> Selection:
        nq, nk = site.q.shape[2], site.k.shape[2]
        blocks = torch.ones(site.q.shape[0], site.q.shape[1], -(-nq // 4), -(-nk // 4), dtype=torch.bool)
        return Blocks(blocks, (4, 4), nq, nk)


class Recent(Method):
    """Keeps the last few tokens."""

    def __init__(self, count: int = 4) -> None:
        self.count = count

    def keep(self, site: Site) -> Tensor:
        return site.positions >= site.seen - self.count


class Reads(Method):
    """Notes what it sees."""

    def __init__(self, what: Callable[[Site], Any]) -> None:
        self.what, self.seen = what, []

    def read(self, site: Site, out: Tensor) -> None:
        self.seen.append(self.what(site))


#: Each way through the host, with methods that change nothing on it.
NO_OPS: dict[str, tuple[type[Method], ...]] = {
    "no method": (),
    "slots": (Evicts,),
    "keep": (KeepsAll,),
    "logits": (SameLogits,),
    "weights": (SameWeights,),
    "output": (SameOutput,),
    "hidden": (SameHidden,),
    "dropping": (DropsNone,),
    "indices": (SelectsIndices,),
    "blocks": (SelectsBlocks,),
    "two selections": (SelectsIndices, SelectsBlocks),
    "slots, selection, weights, output": (KeepsAll, SelectsBlocks, SameWeights, SameOutput),
}
#: Those that leave the model's own kernel in charge, so that results are the same bit for bit.
NATIVE = ("no method", "slots", "keep", "output", "hidden", "dropping")
