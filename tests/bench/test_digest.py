"""Digests change with what a result depends on, and with nothing else."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from foveate.bench.parts import digest


def small(**more: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **more}))


def test_a_digest_depends_on_values_and_their_order() -> None:
    assert digest.of(1, {"a": 1, "b": [2]}) == digest.of(1, {"b": [2], "a": 1})
    found = {digest.of(*parts) for parts in ((1, 2), (2, 1), ("1", 2), (1, 2, None), ([1, 2],), ())}
    assert len(found) == 6 and {len(one) for one in found} == {32}


def test_a_models_digest_depends_on_weights_and_configuration_alone() -> None:
    model = small()
    known = digest.of_model(model)
    model.config._name_or_path, model.config.transformers_version = "elsewhere", "9.9"
    assert digest.of_model(model) == digest.of_model(small()) == known
    assert digest.of_model(small(rope_theta=5e5)) != known
    with torch.no_grad():
        model.lm_head.weight[3, 3] += 1e-6
    assert digest.of_model(model) != known


def test_the_codes_digest_is_the_same_while_the_code_is() -> None:
    assert digest.of_code() == digest.of_code.__wrapped__() and len(digest.of_code()) == 32
