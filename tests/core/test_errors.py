"""Values in messages are one short line."""

from __future__ import annotations

import pytest
import torch

from foveate.core.errors import shown


@pytest.mark.parametrize("count", [0, 150, 198])
def test_a_value_is_shown_whole_up_to_200_characters(count: int) -> None:
    assert shown("x" * count) == repr("x" * count)


def test_a_long_value_is_cut_and_a_tensor_is_its_shape() -> None:
    assert shown("x" * 199) == f"'{'x' * 196}..." and len(shown("x" * 10_000)) == 200
    assert shown(["a\n", {"b": 1}]) == "['a\\n', {'b': 1}]"
    assert shown(torch.zeros(2, 3, dtype=torch.bfloat16)) == "Tensor (2, 3) bfloat16"
