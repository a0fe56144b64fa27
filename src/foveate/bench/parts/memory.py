"""Memory of tensors in bytes: live at a moment, and the peak."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Return the peak bytes of live tensors that `work` created."""
    with Memory(device) as memory:
        work()
    return memory.peak


class Memory:
    """Counts the tensors created inside its block, in bytes: `now` is the live memory, `peak` the most at once.

    On CUDA it reads the allocator. Elsewhere it follows every operation's results until they are freed. This excludes
    scratch space inside kernels, and it is slow, so it is never timed. Every tensor that is still referenced counts,
    whether by a cache, a method or a model's buffers.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._live = None if device.type == "cuda" else _LiveStorages()
        self._before = 0

    def __enter__(self) -> Self:
        gc.freeze()  # existing objects need not be searched at each collection
        if self._live is not None:
            self._live.__enter__()
        else:
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        gc.unfreeze()
        if self._live is not None:
            self._live.__exit__(kind, error, trace)

    @property
    def now(self) -> int:
        gc.collect()  # free what only reference cycles hold
        if self._live is not None:
            return self._live.now
        torch.cuda.synchronize(self._device)
        return torch.cuda.memory_allocated(self._device) - self._before

    @property
    def peak(self) -> int:
        if self._live is not None:
            return self._live.peak
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - self._before


class _LiveStorages(TorchDispatchMode):
    """Counts the storages that operations return, as long as a tensor refers to them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._references: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor, known)
        return out

    def _add(self, tensor: torch.Tensor, inputs: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key == 0 or (key in inputs and key not in self._references):
            return  # a view of a tensor from before the block
        if key not in self._references:
            self._references[key] = 0
            self.now += size
            self.peak = max(self.peak, self.now)
        self._references[key] += 1
        weakref.finalize(tensor, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._references[key] -= 1
        if not self._references[key]:
            del self._references[key]
            self.now -= size
