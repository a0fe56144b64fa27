"""The dtypes that a processor multiplies fast."""

from __future__ import annotations

import pytest
import torch

from foveate.core import precision
from foveate.core.precision import multiplying


@pytest.mark.parametrize(
    ("capability", "flags", "fast"),
    [
        ("AVX2", (True, True, True), {}),
        ("AVX512", (False, False, False), {}),
        ("AVX512", (True, False, False), {torch.bfloat16}),
        ("AVX512", (False, True, False), {torch.bfloat16}),
        ("AVX512", (True, True, True), {torch.bfloat16, torch.float16}),
        ("SVE256", (False, False, False), {torch.bfloat16, torch.float16}),
    ],
)
def test_processors_with_half_precision_products(
    capability: str, flags: tuple[bool, bool, bool], fast: set[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    """AVX-512 alone is not enough: its first processors have no instruction for half precision."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for name, flag in zip(("avx512_bf16", "amx_tile", "amx_fp16"), flags, strict=True):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda flag=flag: flag)
    for dtype in (torch.bfloat16, torch.float16):
        assert precision._has_halves.__wrapped__(dtype) == (dtype in fast)


@pytest.mark.parametrize("fast", [False, True])
def test_only_slow_half_precision_is_widened(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_has_halves", lambda dtype: fast)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for dtype in (torch.bfloat16, torch.float16):
        assert multiplying(dtype, cpu) == (dtype if fast else torch.float32)
        assert multiplying(dtype, gpu) == dtype
    for dtype in (torch.float32, torch.float64):
        assert multiplying(dtype, cpu) == dtype
