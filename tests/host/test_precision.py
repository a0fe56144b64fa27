"""A host computes in the model's precision, also where methods need the whole matrix of weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from foveate.host import Method, Site, apply
from tests.support.host_models import DECODERS, model, tokens


class Matrix(Method):
    """A method that edits the logits by nothing, so that the host makes the matrix of weights."""

    def edit_logits(self, site: Site, logits: Tensor) -> Tensor:
        assert logits.dtype == site.q.dtype
        return logits


# the caps of Gemma 2 need transformers' own matrix path, whose softmax is in float32
@pytest.mark.parametrize("name", sorted(set(DECODERS) - {"gemma2"}))
@torch.no_grad()
def test_the_matrix_path_keeps_float64(name: str) -> None:
    wide, ids = copy.deepcopy(model(name)).double(), tokens(2, 30)
    expected = wide(ids).logits
    with apply(wide, Matrix()):
        out = wide(ids).logits
    assert out.dtype == torch.float64
    assert (out - expected).abs().max() < 1e-10 * expected.abs().max()
