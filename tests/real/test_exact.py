"""On real models: at full budget, and once a method is gone, every logit is bit for bit the model's own."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from transformers import DynamicCache

from foveate.bench.policies.plan import policies
from foveate.host import Method, apply
from tests.real.conftest import Real

pytestmark = pytest.mark.real
_PROMPT, _NEW = 200, 6


@torch.inference_mode()
def logits(real: Real, *methods: Method, bare: bool = False) -> torch.Tensor:
    """Of a prompt and of the greedy tokens behind it."""
    cache, feed, found = DynamicCache(config=real.model.config), real.ids(_PROMPT), []
    with nullcontext() if bare else apply(real.model, *methods):
        for _ in range(_NEW):
            found.append(real.model(feed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits)
            feed = found[-1][:, -1].argmax(-1)[:, None]
    return torch.cat(found, 1)


@pytest.fixture(scope="session")
def plain(real: Real) -> torch.Tensor:
    return logits(real, bare=True)


def test_no_method_changes_no_bit(real: Real, plain: torch.Tensor) -> None:
    assert torch.equal(logits(real), plain)


@pytest.mark.parametrize("key", policies())
def test_full_budget_changes_no_bit(real: Real, plain: torch.Tensor, key: str) -> None:
    assert torch.equal(logits(real, *real.policy(key, 1.0, 2 * _PROMPT)), plain)


@pytest.mark.parametrize("key", policies())
def test_nothing_is_left_behind(real: Real, plain: torch.Tensor, key: str) -> None:
    hooks = [len(module._forward_pre_hooks) for module in real.model.modules()]
    chosen = real.model.config._attn_implementation
    logits(real, *real.policy(key, 0.25, _PROMPT))
    assert [len(module._forward_pre_hooks) for module in real.model.modules()] == hooks
    assert real.model.config._attn_implementation == chosen
    assert torch.equal(logits(real, bare=True), plain)
