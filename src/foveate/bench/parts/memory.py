"""Memory of a piece of work, in bytes of tensors: what is alive at a moment, and the most that was at once."""

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
    """Most bytes of tensors alive at once that `work` made."""
    with Memory(device) as memory:
        work()
    return memory.peak


class Memory:
    """Counts the tensors made since it was entered: `now` those alive, `peak` the most of them at once, in bytes.

    On CUDA by the allocator's own count. Elsewhere every operation's results are followed until they are freed, which
    sees what Python sees and not the scratch space inside a kernel; that is slow, so it is never timed. Whatever
    somebody still holds is counted, whoever it is: a cache, a method's memory, or what a model's buffers became.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._alive = None if device.type == "cuda" else _Alive()
        self._before = 0

    def __enter__(self) -> Self:
        gc.freeze()  # what is there already need not be searched each time
        if self._alive is not None:
            self._alive.__enter__()
        else:
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        gc.unfreeze()
        if self._alive is not None:
            self._alive.__exit__(kind, error, trace)

    @property
    def now(self) -> int:
        gc.collect()  # what only a cycle holds is no use of memory
        if self._alive is not None:
            return self._alive.now
        torch.cuda.synchronize(self._device)
        return torch.cuda.memory_allocated(self._device) - self._before

    @property
    def peak(self) -> int:
        if self._alive is not None:
            return self._alive.peak
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - self._before


class _Alive(TorchDispatchMode):
    """Counts the storages that operations return for as long as some tensor holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._holders: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor, known)
        return out

    def _hold(self, tensor: torch.Tensor, inputs: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key == 0 or (key in inputs and key not in self._holders):
            return  # a view of something that was there before
        if key not in self._holders:
            self._holders[key] = 0
            self.now += size
            self.peak = max(self.peak, self.now)
        self._holders[key] += 1
        weakref.finalize(tensor, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self.now -= size
