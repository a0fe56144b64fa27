"""Five hundred tokens under each policy are still text: the full model, reading them, is hardly more surprised."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache

from foveate.bench.policies.plan import policies
from foveate.host import Method, apply
from tests.real.conftest import Real

pytestmark = pytest.mark.real
_PROMPT, _NEW, _TEMPERATURE = 400, 500, 0.7


@torch.inference_mode()
def written(real: Real, *methods: Method) -> torch.Tensor:
    """A sample of `_NEW` tokens behind real text; the same draws for every method."""
    cache, feed, found = DynamicCache(config=real.model.config), real.ids(_PROMPT), []
    draw = torch.Generator().manual_seed(0)
    with apply(real.model, *methods):
        for _ in range(_NEW):
            logits = real.model(feed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            feed = torch.multinomial((logits.float() / _TEMPERATURE).softmax(-1), 1, generator=draw)
            found.append(feed)
    return torch.cat(found, 1)


@torch.inference_mode()
def surprise(real: Real, text: torch.Tensor) -> float:
    """The full model's mean loss on what was written."""
    ids = torch.cat([real.ids(_PROMPT), text], 1)
    logits = real.model(ids, use_cache=False, logits_to_keep=text.shape[1] + 1).logits[0, :-1]
    return float(F.cross_entropy(logits.float(), text[0]))


@pytest.fixture(scope="session")
def own(real: Real) -> tuple[float, int]:
    """The model's surprise at what it wrote itself, and how many different tokens that has."""
    text = written(real)
    return surprise(real, text), text.unique().numel()


def test_the_measure_tells_text_from_noise(real: Real, own: tuple[float, int]) -> None:
    draw = torch.Generator().manual_seed(0)
    noise = torch.randint(0, real.host.vocabulary, (1, _NEW), generator=draw)
    shuffled = real.ids(_NEW + 1, start=9000)[:, 1:][:, torch.randperm(_NEW, generator=draw)]
    assert own[0] < 3.0 < surprise(real, shuffled) < surprise(real, noise)


@pytest.mark.parametrize("key", policies())
def test_a_policy_writes_text(real: Real, own: tuple[float, int], key: str) -> None:
    """On the larger model those that evict, for the time that it takes: what was dropped may be missed, and a short
    window does not see that it repeats itself.
    """
    method = real.policy(key, 0.25, _PROMPT)
    if real.host.layers > 20 and not any(part.evicts for part in method):
        pytest.skip("on the smaller model")
    text = written(real, *method)
    loss = surprise(real, text)
    assert loss < own[0] + 1.0, real.tokenizer.decode(text[0])
    assert text.unique().numel() > own[1] / 5, "it is no loop of a few words"
