"""The size of what heads add to the residual stream, on models with different projections."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from foveate.core.errors import FoveateError
from foveate.host import apply
from foveate.lens import Lens, OutputNorm, head_outputs
from foveate.lens.lens import look
from tests.lens.models import image, text, tiny
from tests.support.tensors import assert_near


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()


def weights(model: PreTrainedModel, kind: str) -> list[Tensor]:
    """The output projections of all layers, `(H * Dv, C)`."""
    if kind == "gpt2":
        return [block.attn.c_proj.weight for block in model.transformer.h]
    if kind == "bert":
        return [layer.attention.output.dense.weight.T for layer in model.encoder.layer]
    if kind == "vit":
        return [module.o_proj.weight.T for module in model.modules() if hasattr(module, "o_proj")]
    return [layer.self_attn.o_proj.weight.T for layer in model.model.layers]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "bert", "vit"])
@pytest.mark.parametrize("tile", [1 << 22, 100])
def test_it_is_the_norm_of_what_is_added(kind: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.lens.output_measures.TILE", tile)
    model = gpt2() if kind == "gpt2" else tiny(kind)
    inputs = image() if kind == "vit" else text("right" if kind == "bert" else "left")
    seen = look(model, inputs, measures=["output_norm"])
    z = head_outputs(model, inputs)
    for layer, weight in enumerate(weights(model, kind)):
        parts = weight.detach().unflatten(0, (4, -1))
        expected = torch.stack([(z[layer][:, head] @ parts[head]).norm(dim=-1) for head in range(4)], 1)
        real = inputs.get("attention_mask", torch.ones(2, expected.shape[-1])).bool()
        expected = torch.where(real[:, None], expected, 0.0)
        assert_near(seen.values("output_norm")[layer], expected, 1e-5, f"layer {layer}")
        mean = expected.sum(-1) / real.sum(-1, keepdim=True)
        assert_near(seen.lens.reduced("output_norm")[layer], mean, 1e-5)


def test_generated_tokens_have_theirs() -> None:
    model, lens = tiny("llama"), Lens(["output_norm", "entropy"], phase="all")
    with torch.no_grad(), apply(model, lens):
        ids = model.generate(**text(), max_new_tokens=5, do_sample=False, eos_token_id=None)
    seen = look(model, ids[:, :-1], measures=["output_norm"])
    assert_near(lens.values("output_norm")[1], seen.values("output_norm")[1], 1e-4)


def test_a_head_that_gives_nothing_has_none() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, 8:16] = 0.0
    rows = look(model, text(), measures=[OutputNorm()]).measures()
    table = {(row["layer"], row["head"]): row["value"] for row in rows}
    assert table[1, 1] == 0.0 and min(value for head, value in table.items() if head != (1, 1)) > 0.01


def test_a_model_without_a_linear_projection_is_refused() -> None:
    model = tiny("llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj = torch.nn.Sequential(layer.self_attn.o_proj)
    with pytest.raises(FoveateError, match="has no linear o_proj"):
        look(model, text(), measures=["output_norm"])
