"""Each malformed argument raises an error with its name and value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from foveate.core import validate
from foveate.core.errors import FoveateError, OptionError, ShapeError

Q, K = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 5, 8)
GOOD: dict[str, Any] = {"q": Q, "k": K, "v": K}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": [[1.0]]}, "q must be a tensor .*; got list"),
        ({"q": Q[0]}, r"q must be .*; got 3 dimensions \(4, 3, 8\)"),
        ({"v": Q.long()}, "v must be floating point; got torch.int64"),
        ({"k": K[..., :0]}, "k must be .* D > 0"),
        ({"k": K[:1]}, "batch size; got 2, 1, 2"),
        ({"k": K[..., :4]}, r"k must be as wide as q \(D=8\)"),
        ({"v": K[:, :, :4]}, "k and v must share heads and length"),
        ({"q": Q[:, :3]}, r"\(Hq=3\) must be a multiple of k's \(Hkv=2\)"),
        ({"k": K[:, :0], "v": K[:, :0]}, "Hkv=0"),
        ({"k": K.double()}, "share a dtype"),
        ({"v": K.to("meta")}, "one device; got cpu, cpu, meta"),
        ({"causal": "yes"}, "causal='yes'"),
        ({"q": torch.zeros(2, 4, 6, 8), "causal": True}, "Nq=6, Nk=5"),
        ({"mask": [True]}, "mask must be .*; got list"),
        ({"mask": torch.ones(3, 5, dtype=torch.int64)}, "mask must be .*; got torch.int64"),
        ({"mask": torch.ones(3, 5, dtype=torch.bool, device="meta")}, "mask must be on cpu"),
        ({"mask": torch.ones(3, 4)}, r"mask must broadcast to .*\(2, 4, 3, 5\); got \(3, 4\)"),
        ({"mask": torch.ones(1, 2, 4, 3, 5)}, "mask must broadcast"),
        ({"mask": torch.ones(2, 3, 5)}, "mask must broadcast"),
    ],
)
def test_a_malformed_call(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message) as caught:
        validate.tensors(**{**GOOD, **changed})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(), (5,), (3, 5), (1, 3, 1), (2, 1, 1, 5), (2, 4, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_every_broadcastable_mask_is_fine(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    validate.tensors(**GOOD, mask=torch.ones(shape).to(dtype))


def test_lengths_may_be_zero() -> None:
    validate.tensors(Q[:, :, :0], K, K)
    validate.tensors(Q, K[:, :, :0], K[:, :, :0])


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: validate.at_least("gain", -0.5, 0.0), "gain=-0.5 must be at least 0.0"),
        (lambda: validate.at_least("gain", float("nan"), 0.0), "gain=nan"),
        (lambda: validate.at_least("gain", True, 0), "gain=True"),
        (lambda: validate.count("keep", 0, 1), "keep=0 must be a whole number, at least 1"),
        (lambda: validate.count("keep", 2.0), r"keep=2\.0"),
        (lambda: validate.count("keep", True), "keep=True"),
        (lambda: validate.between("share", 1.5, 0, 1), r"share=1\.5 must be in 0\.\.1"),
        (lambda: validate.between("share", "half", 0, 1), "share='half'"),
        (lambda: validate.one_of("rep", "last", ("first", "middle")), "rep='last' must be one of 'first', 'middle'"),
        (lambda: validate.scale("big", 4), "scale='big' must be a finite number"),
        (lambda: validate.scale(float("inf"), 4), "scale=inf"),
        (lambda: validate.scale(torch.ones(()), 4), "scale=Tensor"),
    ],
)
def test_a_malformed_option(check: Callable[[], object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        check()


def test_good_options() -> None:
    validate.at_least("gain", 0, 0)
    validate.count("keep", 3, 3)
    validate.between("share", 1, 0, 1)
    validate.one_of("rep", "first", ("first", "middle"))
    assert validate.scale(None, 16) == 0.25
    assert validate.scale(2, 16) == 2.0
    assert issubclass(ShapeError, ValueError)


class Choosy:
    def __init__(self, count: int | None = 1, either: int | str | None = None, many: int | str = 1) -> None: ...


def test_options_are_checked_by_annotations_of_one_type() -> None:
    for options in ({}, {"count": None}, {"count": 3, "either": "a"}, {"either": 2, "many": "b"}):
        validate.options(Choosy, (), options)
    with pytest.raises(OptionError, match="count='a' must be .* or None"):
        validate.options(Choosy, (), {"count": "a"})


def test_a_mask_of_keys_is_told_its_shape() -> None:
    def refusal(*shape: int) -> str:
        with pytest.raises(ShapeError) as caught:
            validate.bool_mask("m", torch.ones(shape, dtype=torch.bool), "B, 1, 1, Nk", (2, 1, 1, 5), K.device)
        return str(caught.value)

    hint = "a mask of keys is (B, 1, 1, Nk)"
    assert refusal(2, 5).endswith(hint) and refusal(2, 1, 5).endswith(hint)
    for shape in ((1, 4), (2, 4), (3, 5), (2, 3, 5), (4,)):
        assert hint not in refusal(*shape)
    for shape in ((5,), (2, 1, 1, 5), (1, 1, 1, 5), (2, 1, 1, 1)):
        validate.bool_mask("m", torch.ones(shape, dtype=torch.bool), "B, 1, 1, Nk", (2, 1, 1, 5), K.device)
