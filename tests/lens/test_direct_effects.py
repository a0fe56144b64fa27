"""Direct effects: they sum to the model's own logits, each part is that by hand, and other models are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from foveate.core.errors import ShapeError, UnsupportedModel
from foveate.lens import DirectEffects, direct_effects, head_outputs
from foveate.lens.circuits.mlp_outputs import mlp_outputs, patched_mlps
from foveate.lens.circuits.residual_stream import trace
from tests.support.host_models import VOCAB, model, padded, tokens

_SMALL: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, initializer_range=0.3,
)  # fmt: skip
OTHERS = {
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2,
                      initializer_range=0.3)
    ),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_SMALL)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**_SMALL)),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**_SMALL)),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**_SMALL, num_local_experts=4, num_key_value_heads=2)
    ),
    "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**_SMALL, residual_multiplier=0.3)),
}  # fmt: skip
TARGETS = torch.tensor([3, 9, 20])


def random(name: str) -> hf.PreTrainedModel:
    """A model whose biases and whose norms' weights are random too."""
    torch.manual_seed(0)
    made = OTHERS[name]().eval() if name in OTHERS else copy.deepcopy(model(name))
    for parameter in made.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    return made


def inputs(side: str = "none") -> dict[str, Tensor]:
    return dict(zip(("input_ids", "attention_mask"), padded(tokens(), side), strict=True))


def parts(effects: DirectEffects) -> Tensor:
    single = effects.embedding[:, None], effects.constant[:, None]
    return torch.cat([effects.heads.flatten(1, 2), effects.mlps, effects.biases, *single], 1)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gemma3", "gpt2", "gpt_neox", "phi", "olmo2", "mixtral"])
def test_the_parts_sum_to_the_logits(name: str, side: str) -> None:
    lm, given = random(name), inputs(side)
    effects = direct_effects(lm, given, TARGETS)
    caught = []
    handle = lm.get_output_embeddings().register_forward_hook(lambda *call: caught.append(call[2]))
    with torch.no_grad():
        lm(**given)
    handle.remove()
    last = [9 if side == "right" else 13, 13]
    own = torch.stack([caught[0][row, at, TARGETS] for row, at in enumerate(last)])
    assert torch.allclose(effects.logits, own, rtol=0, atol=1e-6)
    assert torch.allclose(parts(effects).sum(1), own, rtol=0, atol=1e-5)
    assert parts(effects).abs().amax() > 10 * (effects.total() - own).abs().amax() + 1e-3


@pytest.mark.parametrize(("name", "one"), [("llama", 0.0), ("gemma2", 1.0)])
def test_each_part_is_that_by_hand(name: str, one: float) -> None:
    """`one` is added to the weights of Gemma's norms."""
    lm, ids = random(name), tokens()
    effects, layer = direct_effects(lm, ids, TARGETS), lm.model.layers[1]
    with torch.no_grad():
        seen = dict[str, Tensor]()
        branch = layer.post_feedforward_layernorm if name == "gemma2" else layer.mlp
        for key, module in (("attention", layer.self_attn), ("mlp", branch), ("final", lm.model.norm)):
            module.register_forward_hook(
                lambda _, given, made, key=key: seen.update({key: made if key == "mlp" else made[0]})
                if key != "final" else seen.update(final=given[0])
            )  # fmt: skip
        heads = head_outputs(lm, ids)[1][:, :, -1]
        weights = layer.self_attn.o_proj.weight.unflatten(1, (4, 8))
        written = torch.einsum("bhd,chd->bhc", heads, weights)

        def rms(x: Tensor) -> Tensor:
            return torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

        if name == "gemma2":
            written = written * (one + layer.post_attention_layernorm.weight) * rms(seen["attention"][:, -1])[:, None]
        rows = lm.lm_head.weight[TARGETS] * (one + lm.model.norm.weight)
        scale = rms(seen["final"][:, -1])
        assert torch.allclose(effects.heads[:, 1], (written @ rows.T) * scale[:, None], atol=1e-5)
        assert torch.allclose(effects.mlps[:, 1], (seen["mlp"][:, -1] @ rows.T) * scale, atol=1e-5)


def test_a_bias_of_the_output_projection_is_no_heads() -> None:
    lm = random("gpt2")
    before = direct_effects(lm, tokens(), TARGETS)
    lm.transformer.h[1].attn.c_proj.bias.data.zero_()
    after = direct_effects(lm, tokens(), TARGETS)
    assert before.biases[:, 1].abs().min() > 1e-3
    assert not after.biases[:, 1].any()
    assert before.biases.shape == (2, 2, 3)


def test_targets_positions_and_the_mean_over_the_vocabulary() -> None:
    lm, ids = random("llama"), tokens()
    every = torch.arange(VOCAB)
    plain, centred = direct_effects(lm, ids, every), direct_effects(lm, ids, every, centred=True)
    assert torch.allclose(parts(centred), parts(plain) - parts(plain).mean(-1, keepdim=True), atol=1e-5)
    assert torch.allclose(centred.logits, plain.logits - plain.logits.mean(-1, keepdim=True), atol=1e-5)
    own = direct_effects(lm, ids, torch.tensor([[3, 9], [4, 8]]), positions=torch.tensor([5, -2]))
    with torch.no_grad():
        logits = lm(ids).logits
    assert torch.allclose(own.total()[0], logits[0, 5, [3, 9]], atol=1e-5)
    assert torch.allclose(own.total()[1], logits[1, 12, [4, 8]], atol=1e-5)
    for targets, positions in ((torch.tensor([VOCAB]), None), (torch.tensor([1.0]), None), (TARGETS, 14)):
        with pytest.raises(ShapeError):
            direct_effects(lm, ids, targets, positions=positions)


def test_half_precision_and_a_patch_of_mlps() -> None:
    lm, ids = random("gemma2").bfloat16(), tokens()
    effects = direct_effects(lm, ids, TARGETS)
    assert torch.allclose(effects.total(), effects.logits, atol=0.05)
    lm = random("gemma2")
    modules = trace(lm, ids).mlps
    found = mlp_outputs(lm, modules, ids)
    with patched_mlps(modules, {1: found[1] * 0}, [-1]):
        assert not direct_effects(lm, ids, TARGETS).mlps[:, 1].any()
        assert direct_effects(lm, ids, TARGETS, positions=3).mlps[:, 1].any()
    with torch.no_grad(), patched_mlps(modules, found):
        same = lm(ids).logits
    assert torch.allclose(same, lm(ids).logits, atol=1e-5)


class Squash(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.tanh()


def test_models_of_another_kind_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="do not sum to the residual stream"):
        direct_effects(random("granite"), tokens(), TARGETS)
    with pytest.raises(UnsupportedModel, match="decoder with a language-model head"):
        direct_effects(model("bert"), tokens(), TARGETS)
    lm = random("llama")
    lm.model.norm = Squash()
    with pytest.raises(UnsupportedModel, match="neither RMSNorm nor LayerNorm"):
        direct_effects(lm, tokens(), TARGETS)
    lm = random("llama")
    lm.model.layers[1].self_attn.o_proj.register_forward_hook(lambda _, given, made: made * 1.1)
    with pytest.raises(UnsupportedModel, match="the heads of LlamaAttention do not sum"):
        direct_effects(lm, tokens(), TARGETS)
    lm = random("llama")
    lm.model.layers[1].register_forward_pre_hook(lambda _, given: (given[0] * 1.1, *given[1:]))
    with pytest.raises(UnsupportedModel, match="nothing may change it between"):
        direct_effects(lm, tokens(), TARGETS)
