"""Layers against those of models in `transformers`: rotary positions, ALiBi, grouped heads, and Lightning attention.

Their rotary angles, slopes' powers and Bloom's softmax are in float32 whatever the model is: hence the tolerances.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import BloomConfig, LlamaConfig, MiniMaxConfig, MistralConfig, PreTrainedConfig, Qwen3Config
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from foveate.nn import Alibi, MultiHeadAttention, Rotary
from foveate.ops.base.fixed_decay import transnormer_decay
from foveate.ops.linear.lightning_attention import LightningAttention
from foveate.ops.linear.lightning_attention_2 import LightningAttention2
from foveate.ops.sparse.sliding_window import SlidingWindow
from tests.parity import peers
from tests.support.tensors import assert_near

DIM, N, WINDOW = 24, 11, 4
SIZES = dict(hidden_size=DIM, num_attention_heads=6, num_key_value_heads=2, head_dim=8)
THETA = 500.0  # of the rotary angles; not the default of either side
ROPE = {"rope_type": "default", "rope_theta": THETA}


def rotary_case(name: str) -> tuple[MultiHeadAttention, torch.nn.Module, Tensor]:
    """Ours, theirs, and which pairs they are told to look at."""
    eager = dict(attn_implementation="eager", rope_parameters=ROPE)
    op = SlidingWindow(WINDOW, 0) if name == "mistral" else "softmax"
    ours = MultiHeadAttention(
        DIM, 6, kv_heads=2, head_dim=8, op=op, position=Rotary(THETA), qk_norm=name == "qwen3"
    ).double()  # fmt: skip
    seen = torch.ones(N, N, dtype=torch.bool).tril()
    if name == "llama":
        return ours, LlamaAttention(LlamaConfig(**SIZES, **eager), 0).double(), seen
    if name == "qwen3":
        # torch's RMSNorm has the machine's eps for a default
        config = Qwen3Config(**SIZES, **eager, rms_norm_eps=torch.finfo(torch.float64).eps)
        return ours, Qwen3Attention(config, 0).double(), seen
    seen = seen & ~torch.ones(N, N, dtype=torch.bool).tril(-WINDOW)
    return ours, MistralAttention(MistralConfig(**SIZES, **eager, sliding_window=WINDOW), 0).double(), seen


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_rotary_positions_grouped_heads_norms_and_windows(name: str) -> None:
    ours, theirs, seen = rotary_case(name)
    w, x = peers.weights(ours), peers.leaf(2, N, DIM, seed=1)
    config: PreTrainedConfig = theirs.config
    angles = LlamaRotaryEmbedding(config)(x, torch.arange(N)[None])
    hidden = torch.zeros(1, 1, N, N, dtype=torch.float64).masked_fill(~seen, float("-inf"))
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"}
    given = {f"{names.get(part, part)}.weight": w[f"{part}.weight"] for part in (name.rpartition(".")[0] for name in w)}

    def other() -> Tensor:
        return peers.call(theirs, given, x, position_embeddings=angles, attention_mask=hidden)[0]

    peers.agree(lambda: peers.call(ours, w, x, causal=True), other, {"x": x, **w}, 1e-5)


def test_a_stream_is_llama_on_the_whole_sequence() -> None:
    ours, theirs, seen = rotary_case("llama")
    x = peers.leaf(2, N, DIM, seed=1).detach()
    for mine, other in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "o_proj")):
        getattr(ours, mine).load_state_dict(getattr(theirs, other).state_dict())
    angles = LlamaRotaryEmbedding(theirs.config)(x, torch.arange(N)[None])
    hidden = torch.zeros(1, 1, N, N, dtype=torch.float64).masked_fill(~seen, float("-inf"))
    expected = theirs(x, position_embeddings=angles, attention_mask=hidden)[0]
    out, state = ours.prefill(x[:, :5])
    parts = [out]
    for t in range(5, N):
        y, state = ours.step(x[:, t : t + 1], state)
        parts.append(y)
    assert_near(torch.cat(parts, 1), expected, 1e-5)


@pytest.mark.parametrize("heads", [4, 6])  # 6: the slopes of 4 heads, and every other one of 8
def test_alibi_is_bloom(heads: int) -> None:
    """Bloom adds `slope * position of the key`, which is the distance up to a constant per row."""
    ours = MultiHeadAttention(DIM, heads, position=Alibi(heads), bias=True).double()
    config = BloomConfig(hidden_size=DIM, n_head=heads, hidden_dropout=0.0, attention_dropout=0.0)
    theirs = BloomAttention(config, 0).double().eval()
    w, x = peers.weights(ours), peers.leaf(2, N, DIM, seed=1)
    alibi = build_alibi_tensor(torch.ones(2, N), heads, torch.float64)
    hidden = torch.zeros(1, 1, N, N, dtype=torch.float64).masked_fill(torch.ones(N, N).triu(1).bool(), -1e30)

    def fused(part: str) -> Tensor:  # queries, keys and values lie together within a head
        return torch.stack([w[f"{name}.{part}"].unflatten(0, (heads, -1)) for name in "qkv"], 1).flatten(0, 2)

    def other() -> Tensor:
        given = {
            "query_key_value.weight": fused("weight"), "query_key_value.bias": fused("bias"),
            "dense.weight": w["out.weight"], "dense.bias": w["out.bias"],
        }  # fmt: skip
        return peers.call(theirs, given, x, torch.zeros_like(x), alibi, hidden)[0]

    peers.agree(lambda: peers.call(ours, w, x, causal=True), other, {"x": x, **w}, 1e-5)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("op", [LightningAttention, LightningAttention2])
def test_lightning_attention_is_minimax(op: type[LightningAttention], layer: int) -> None:
    """MiniMax's layer up to the norm that follows attention: its slopes are those that we call the release's."""
    heads, depth, block = 4, 3, 4
    config = MiniMaxConfig(
        hidden_size=DIM, num_attention_heads=heads, head_dim=6, num_hidden_layers=depth, block_size=block,
        num_key_value_heads=heads, layer_types=["linear_attention"] * depth,
    )  # fmt: skip
    theirs = MiniMaxLightningAttention(config, layer)
    slopes = theirs.slope_rate[:, 0, 0].double()
    # 1e-5 stands in two places of their factor, in one of ours
    assert_near(transnormer_decay(heads, layer, depth, "release"), torch.exp(-slopes), 1e-5)
    theirs = theirs.double()
    x, seen = peers.leaf(2, N, DIM, seed=1), []
    theirs.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

    def other() -> Tensor:
        theirs(x, (x, x), None)
        return seen[-1]

    def mine() -> Tensor:
        q, k, v = theirs.act_fn(theirs.qkv_proj(x)).unflatten(-1, (heads, 18)).transpose(1, 2).split(6, -1)
        return op(torch.exp(-slopes), block=3)(q, k, v, causal=True).transpose(1, 2).flatten(2)

    leaves = {"x": x, "w": theirs.qkv_proj.weight}
    peers.agree(mine, other, leaves, 1e-6)
    assert_near(mine(), other(), 1e-6)
