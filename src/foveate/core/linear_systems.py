"""Solve symmetric systems without PyTorch's batched LU, which can wait forever on a CPU.

`torch.linalg.solve`, `inv` and `det` of several matrices of a few hundred rows do not return in PyTorch 2.13's CPU
build with two threads or more (oneMKL reports "incorrect parameter 6 of DLASWP"). Cholesky factors are sound there, and
are the better choice for normal equations anyway.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def solve_positive(a: Float[Tensor, "*b n n"], b: Float[Tensor, "*b n c"]) -> Float[Tensor, "*b n c"]:
    """Return `x` with `a x = b`, for a symmetric positive definite `a`.

    Matrices that rounding has made indefinite are solved by their eigenvectors, without those of eigenvalues below
    rounding.
    """
    factor, failed = torch.linalg.cholesky_ex(a)
    if not failed.any():
        return torch.cholesky_solve(b, factor)
    values, vectors = torch.linalg.eigh(a)
    least = values[..., -1:] * a.shape[-1] * torch.finfo(a.dtype).eps
    inverse = torch.where(values > least, values.clamp_min(least).reciprocal(), 0.0)
    return vectors @ (inverse[..., None] * (vectors.mT @ b))
