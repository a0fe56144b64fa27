"""The description of a mask works as a tensor, and stays a description when it can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask

from foveate.host import Method, Site, apply
from foveate.host.hf.alias import NAME, Alias
from foveate.host.hf.mask import MaskPlan, describe, is_given
from tests.support.host_models import NATIVE, NO_OPS, model, padded, tokens

BATCH, QUERIES, KEYS = 2, 3, 7


class Config:
    """The part of a configuration that a mask function reads."""

    def __init__(self, implementation: str) -> None:
        self._attn_implementation = Alias(implementation)


def arguments(implementation: str = "sdpa", *, holes: bool = True, queries: int = QUERIES) -> dict[str, Any]:
    real = torch.ones(BATCH, KEYS, dtype=torch.bool)
    real[0, :2] = not holes
    return {
        "batch_size": BATCH, "q_length": queries, "kv_length": KEYS, "q_offset": KEYS - queries, "kv_offset": 0,
        "mask_function": causal_mask_function, "attention_mask": real, "allow_is_causal_skip": True,
        "dtype": torch.float32, "config": Config(implementation), "use_vmap": False, "device": torch.device("cpu"),
    }  # fmt: skip


BIAS = torch.randn(BATCH, 4, QUERIES, KEYS, generator=torch.Generator().manual_seed(0))
#: Operations that models apply to their masks.
IDIOMS: dict[str, Callable[[Tensor], Tensor]] = {
    "index": lambda mask: mask[:, 0, :, :],
    "later keys": lambda mask: mask[..., 2:],
    "some queries": lambda mask: mask[:, :, -1:],
    "added to scores": lambda mask: BIAS + torch.where(mask, 0.0, -1.0) if mask.dtype == torch.bool else BIAS + mask,
    "and": lambda mask: mask.bool() & (BIAS > 0),
    "expanded": lambda mask: mask.expand(-1, 4, -1, -1),
    "padded": lambda mask: torch.nn.functional.pad(mask, (0, 2)),
    "joined": lambda mask: torch.cat([mask, mask], -1),
    "filled": lambda mask: mask.masked_fill(BIAS > 0, 0),
    "cast": lambda mask: mask.to(torch.float64),
    "nonzero": torch.nonzero,
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("idiom", IDIOMS)
def test_a_model_may_compute_with_it(idiom: str, implementation: str) -> None:
    native = {"sdpa": sdpa_mask, "eager": eager_mask}[implementation](**arguments(implementation))
    got = IDIOMS[idiom](describe(**arguments(implementation)))
    assert type(got) is Tensor
    torch.testing.assert_close(got, IDIOMS[idiom](native), rtol=0, atol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_it_has_the_shape_and_type_of_the_tensor(implementation: str) -> None:
    native = {"sdpa": sdpa_mask, "eager": eager_mask}[implementation](**arguments(implementation))
    plan = describe(**arguments(implementation))
    assert isinstance(plan, Tensor)
    assert (plan.shape, plan.dtype, plan.device, plan.ndim) == (native.shape, native.dtype, native.device, native.ndim)
    assert plan._native == {}
    assert plan._dense is None


@pytest.mark.parametrize(
    "same",
    [
        lambda mask: mask[:, :, :, :KEYS], lambda mask: mask[..., :KEYS], lambda mask: mask.contiguous(),
        lambda mask: mask.detach(), lambda mask: mask.clone(), lambda mask: mask.to(mask.dtype), lambda mask: mask[:],
    ],
)  # fmt: skip
def test_a_kernel_that_needs_no_mask_gets_none(same: Callable[[Tensor], Tensor]) -> None:
    plan = same(describe(**arguments(holes=False, queries=1)))
    assert isinstance(plan, MaskPlan)
    assert plan.native("sdpa") is None
    assert plan.sees_all()


@pytest.mark.parametrize("queries", [1, QUERIES])
@pytest.mark.parametrize("given", [KEYS - 2, KEYS, KEYS + 2])
@pytest.mark.parametrize("offset", [0, KEYS - 1])
@pytest.mark.parametrize("holes", [False, True])
def test_real_tokens_are_those_of_the_attention_mask(queries: int, given: int, offset: int, holes: bool) -> None:
    """This holds for masks of any length, and for the first token of a static cache, whose later keys are empty."""
    real = torch.ones(BATCH, given, dtype=torch.bool)
    real[0, :2] = not holes
    if offset == 0 and queries == 1:
        real[:, 1:] = False
    plan = describe(**{**arguments(queries=queries), "attention_mask": real, "q_offset": offset})
    expected = torch.nn.functional.pad(real, (0, max(0, KEYS - given)))[:, :KEYS]
    for _ in range(2):
        tokens_given, keys = plan.real_tokens(), plan.keys()
        if bool(expected.all()):
            assert tokens_given is None and keys is None
        else:
            assert tokens_given is not None and torch.equal(tokens_given, expected)
            assert keys is not None and torch.equal(keys, expected[:, None, None])


def test_the_first_keys_are_a_description_too() -> None:
    cut = describe(**arguments())[..., :5]
    assert isinstance(cut, MaskPlan)
    assert torch.equal(cut.dense(), sdpa_mask(**arguments())[..., :5])
    slots = torch.tensor([1, 6, 3]).expand(BATCH, 2, 3)  # slots may lie beyond what was cut
    assert torch.equal(cut.at(slots), describe(**arguments()).at(slots))


def test_a_tensor_of_the_callers_is_no_description() -> None:
    assert is_given(torch.ones(1, 1, 2, 2))
    assert not is_given(describe(**arguments()))
    assert not is_given(None)


def test_the_alias_equals_the_native_name_and_finds_foveate() -> None:
    alias = Alias("sdpa")
    assert alias == "sdpa" and alias in ("eager", "sdpa") and alias != "eager"
    assert {NAME: "ours", "sdpa": "theirs"}[alias] == "ours"
    assert type(alias.native) is str and alias.native == "sdpa"
    assert {"eager": "theirs", NAME: "ours"}[Alias("eager")] == "ours"


@pytest.mark.parametrize("path", [path for path in NATIVE if path in ("no method", "output")])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mistral"])
def test_a_static_cache(name: str, path: str) -> None:
    """Its keys have the length of the cache; most of them are not filled yet."""
    ids, mask = padded(tokens(), "left")

    def call() -> Tensor:
        options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
        out = model(name).generate(
            ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **options
        )
        return torch.stack(out.logits)

    with torch.no_grad():
        expected = call()
        with apply(model(name), *[kind() for kind in NO_OPS[path]]):
            assert torch.equal(call(), expected)


def test_a_model_that_slices_and_adds() -> None:
    """GIT adds its mask to its scores itself; its vision tower uses the interface."""
    config = hf.GitConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        vision_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
                       "image_size": 16, "patch_size": 8},
    )  # fmt: skip
    torch.manual_seed(0)
    git = hf.GitModel(config).eval()
    ids, mask = padded(tokens(), "right")
    with torch.no_grad():
        expected = git(input_ids=ids, attention_mask=mask).last_hidden_state
        with apply(git):
            assert torch.equal(git(input_ids=ids, attention_mask=mask).last_hidden_state, expected)


class ReadsMask(Method):
    """A method that records the class of each site's mask."""

    def __init__(self) -> None:
        self.kinds: list[type] = []

    def read(self, site: Site, out: Tensor) -> None:
        self.kinds.append(type(site.attention_mask))


def test_a_site_gets_the_description() -> None:
    reader = ReadsMask()
    with torch.no_grad(), apply(model("llama"), reader):
        model("llama")(tokens())
    assert set(reader.kinds) == {MaskPlan}
