"""The defaults of a method, and its options in reports."""

from __future__ import annotations

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from foveate.host import Method, apply
from foveate.host.method import HOOKS, describe, overrides
from tests.support.host_models import Reads, Recent, model, tokens


class Named(Method):
    def __init__(self, count: int) -> None:
        self.count, self._hidden = count, 2


def test_a_report_shows_the_public_options() -> None:
    assert describe(Named(3)) == {"count": 3}


def test_a_method_overrides_only_what_it_defines() -> None:
    assert [hook for hook in HOOKS if overrides(Recent(), hook)] == ["keep"]
    assert not any(overrides(Named(1), hook) for hook in HOOKS)


@torch.no_grad()
def test_a_method_that_only_reads_leaves_the_models_cache_as_it_is() -> None:
    llama, cache = model("llama"), DynamicCache(config=model("llama").config)
    reads = Reads(lambda site: site.slots)
    with apply(llama, reads):
        llama(tokens(1, 6), past_key_values=cache)
    assert {type(layer) for layer in cache.layers} == {DynamicLayer} and set(reads.seen) == {None}
