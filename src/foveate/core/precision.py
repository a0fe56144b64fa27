"""The dtypes that a device multiplies fast."""

from __future__ import annotations

from functools import cache

import torch

#: Instruction sets, as PyTorch names them, whose processors have no fast product of bfloat16 or float16 matrices.
_PLAIN = ("DEFAULT", "NO AVX", "AVX2")


@cache
def _has_halves(dtype: torch.dtype) -> bool:
    """Return True if this processor has instructions for matrix products in this half precision."""
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX512"):
        return capability not in _PLAIN
    # the first processors with AVX-512 have none, and only some of the later ones have them for float16
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.cpu._is_amx_fp16_supported()


def multiplying(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype for matrix products: float32 for half precision on a CPU without instructions for it.

    float32 is many times as fast there, and at least as exact.
    """
    halves = dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if halves and device.type == "cpu" and not _has_halves(dtype) else dtype
