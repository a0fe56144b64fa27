"""Nested runs each act on their own part and on the same caches; the last run to end restores the model."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import Tensor

from foveate.host import Method, Packed, Site, apply
from foveate.kv.sink_recent import SinkRecent
from tests.support.host_models import model as model_of, tokens


class Reader(Method):
    def read(self, site: Site, out: Tensor) -> None:
        pass


class Halves(Method):
    def edit_output(self, site: Site, out: Tensor) -> Tensor:
        return out / 2


def latent() -> hf.PreTrainedModel:
    """Return a model that caches one latent for all heads, and expands it at each call."""
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=2, initializer_range=0.3,
    )  # fmt: skip
    return hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**sizes)).eval()


def fed(model: hf.PreTrainedModel) -> dict[str, Tensor]:
    return {"input_ids": tokens(1, 6), "decoder_input_ids": tokens(1, 5, 1)}


@torch.no_grad()
@pytest.mark.parametrize("other", [(), (Reader(),)])
@pytest.mark.parametrize(("outer", "inner"), [("auto", "all"), ("all", "auto")])
def test_each_run_acts_on_its_own_part(other: tuple[Method, ...], outer: str, inner: str) -> None:
    model = model_of("bart")
    with apply(model, Halves(), on=inner) as separate:  # type: ignore[arg-type]
        expected = model(**fed(model)).logits
    with apply(model, *other, on=outer), apply(model, Halves(), on=inner) as run:  # type: ignore[arg-type]
        assert torch.equal(model(**fed(model)).logits, expected)
    assert run.stats.calls == separate.stats.calls
    with apply(model, Halves(), on=inner) as run, apply(model, *other, on=outer):  # type: ignore[arg-type]
        assert torch.equal(model(**fed(model)).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("outer", [Packed(), Reader()])
def test_a_policy_inside_another_run_drops_the_same_tokens(outer: Method) -> None:
    model, kept = latent(), []
    for methods in ((), (outer,)):
        with apply(model, *methods), apply(model, SinkRecent(0, 3)) as run:
            model(tokens(1, 10), past_key_values=hf.DynamicCache(config=model.config))
        kept.append(run.stats.kept)
    assert kept[0] == kept[1] < 0.5


@torch.no_grad()
def test_the_outer_run_may_end_first() -> None:
    model, ids = model_of("llama"), tokens(1, 8)
    plain = model(ids).logits
    outer, inner = apply(model, Reader()), apply(model, Halves())
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    halved = model(ids).logits
    inner.__exit__(None, None, None)
    assert not torch.allclose(halved, plain)
    assert torch.equal(model(ids).logits, plain)
    assert type(model.config._attn_implementation_internal) is str
