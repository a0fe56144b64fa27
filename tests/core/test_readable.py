"""Values of tensors are read where they can be, and not within a trusted block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from foveate.core.readable import has_shapes_alone, is_clean, known, trusted

NAN = torch.tensor([1.0, float("nan")])


class Refuses(TorchDispatchMode):
    """A mode in which no operation of PyTorch may run."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} is computed")


def test_a_condition_is_read_unless_it_cannot_or_must_not_be() -> None:
    yes, no = torch.tensor(True), torch.tensor(False)
    assert (known(yes), known(no), known(yes.to("meta"))) == (True, False, None)
    with trusted():
        assert known(yes) is None and known(no) is None
    assert known(no) is False
    assert torch.vmap(lambda x: x + (known(x > 0) is None))(torch.ones(2)).tolist() == [2.0, 2.0]


def test_a_trusted_block_computes_nothing() -> None:
    with trusted(), Refuses():
        assert is_clean(NAN)
    with pytest.raises(AssertionError, match="is computed"), Refuses():
        is_clean(NAN)
    assert is_clean(torch.ones(3), torch.zeros(2)) and not is_clean(torch.ones(3), NAN)
    assert not is_clean(torch.tensor([float("-inf")])) and is_clean(NAN.to("meta"))


def test_a_tensor_without_numbers() -> None:
    assert has_shapes_alone(NAN.to("meta")) and not has_shapes_alone(NAN)
