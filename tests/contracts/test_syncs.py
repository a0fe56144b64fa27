"""The contract of device syncs: decoding under a method makes the host wait for the device seldom or never.

Every wait stops the host from queueing further kernels, so that a GPU idles. Positional policies know in numbers which
tokens they keep, and need no wait. The other methods may wait once per layer.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import foveate
from foveate.core import trusted
from foveate.host import Method, apply
from foveate.kv.recycled_attention import Dynamic, RecycledAttention
from foveate.kv.token_select import TokenSelect
from foveate.ops import LightningAttention2, Operator, SigmoidAttention, Softmax
from tests.contracts.methods import METHODS, OPERATORS
from tests.contracts.policies import CASES, VOCAB, policy, subject
from tests.support.tensors import qkv

_aten = torch.ops.aten
_PACKAGE = f"{Path(foveate.__file__).parent}/"
#: Operations whose result, or whose result's shape, the host has to read from the device.
_READ = {
    _aten._local_scalar_dense, _aten.nonzero, _aten.equal, _aten.masked_select, _aten._unique2, _aten.unique_dim,
    _aten.unique_consecutive, _aten.bincount, _aten.is_nonzero,
}  # fmt: skip
#: Methods of a tensor that read it without an operation that a mode sees, at least on a CPU.
_PATCHED = ("tolist", "cpu", "numpy", "__array__")


class Syncs(TorchDispatchMode):
    """Counts, by line of code, the operations for which the host would wait for a GPU.

    It sees what goes through PyTorch's dispatcher; `tolist`, `cpu` and `numpy` of a CPU tensor do not, and are patched.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._saved: dict[str, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in _READ or self._reads_a_shape(func, args):
            self._count(str(func))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _reads_a_shape(func: Any, args: Any) -> bool:
        """Return whether an index is a mask, which becomes a list of places of unknown length."""
        if func.overloadpacket not in (_aten.index, _aten.index_put, _aten.index_put_, _aten._unsafe_index):
            return False
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])

    def _count(self, what: str) -> None:
        frame: Any = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
            frame = frame.f_back
        path = "the model" if frame is None else frame.f_code.co_filename.removeprefix(_PACKAGE)
        self.counts[path if frame is None else f"{path}:{frame.f_lineno}, {what}"] += 1

    def __enter__(self) -> Syncs:
        for name in _PATCHED:
            self._saved[name] = getattr(Tensor, name)
            setattr(Tensor, name, self._counted(name, self._saved[name]))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for name, original in self._saved.items():
            setattr(Tensor, name, original)

    def _counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Tensor, *args: Any, **options: Any) -> Any:
            self._count(name)
            return original(x, *args, **options)

        return call

    @property
    def total(self) -> int:
        return self.counts.total()


PROMPT, WARM_UP, STEPS = 160, 4, 12
LAYERS = 3


def tokens(n: int, seed: int, batch: int = 1) -> Tensor:
    return torch.randint(2, VOCAB, (batch, n), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def syncs_of(methods: list[Method], masked: bool, batch: int = 1, padding: int = 0) -> Counter[str]:
    """Count the syncs of `STEPS` decoding steps, after a prompt and the first few steps.

    Args:
        methods: the methods, in order.
        masked: whether every call gets an attention mask, as in `generate`.
        batch: number of sequences.
        padding: number of padding tokens before the first sequence; needs a mask.
    """
    model, cache, length = subject("llama"), DynamicCache(), PROMPT

    def step(ids: Tensor) -> None:
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[0, :padding] = 0
        model(ids, attention_mask=mask if masked else None, past_key_values=cache)

    with apply(model, *methods):
        step(tokens(PROMPT, 0, batch))
        for number in range(WARM_UP):
            length += 1
            step(tokens(1, number, batch))
        with Syncs() as syncs:
            for number in range(STEPS):
                length += 1
                step(tokens(1, 100 + number, batch))
    return syncs.counts


#: Policies that keep tokens by their positions.
POSITIONAL = ("sink_recent", "duo_attention", "razor_attention")
OTHERS = {
    **{f"{key}-{name}": lambda key=key, name=name: policy(key, 0.25, PROMPT, name)  # type: ignore[misc]
       for key, name in CASES if key not in POSITIONAL},
    **{key: METHODS[key] for key in METHODS if key not in OPERATORS and key not in {key for key, _ in CASES}},
    "token_select-votes": lambda: TokenSelect(4, 8, 16, sim_threshold=1.5),
    "recycled_attention-dynamic": lambda: RecycledAttention(16, dynamic=Dynamic(0.8, every=1)),
    "prefill_swap": METHODS["hip"],
}  # fmt: skip
MASKED = pytest.mark.parametrize("masked", [False, True], ids=["no mask", "a mask of ones"])
BATCH = pytest.mark.parametrize("batch", [1, 3])


def own(masked: bool, batch: int) -> int:
    """Return the number of syncs of the model itself, without Foveate."""
    return syncs_of([], masked, batch).total()


def test_the_count_sees_every_kind_of_sync() -> None:
    """Each of these waits for the device; operations on shapes and numbers do not."""
    x = torch.arange(6.0)
    reads: list[Callable[[Tensor], Any]] = [
        lambda x: x[0].item(), lambda x: x.tolist(), lambda x: x.cpu(), lambda x: x.numpy(), lambda x: bool(x[0] > 0),
        lambda x: int(x.argmax()), lambda x: x.nonzero(), lambda x: x[x > 2], lambda x: torch.where(x > 2),
        lambda x: x.unique(), lambda x: x.masked_select(x > 2), lambda x: torch.equal(x, x + 1),
        lambda x: range(6)[x.argmax()],
    ]  # fmt: skip
    for number, read in enumerate(reads):
        with Syncs() as syncs:
            read(x)
        assert syncs.total > 0, number
    with Syncs() as syncs:
        y = torch.where(x > 2, x, 0.0)[: x.shape[0] - 1]
        y[2:] = 1.0
        y.masked_fill_(y > 0, 2.0).topk(2).indices.sort()
        x.index_select(0, torch.arange(3)).gather(0, torch.arange(2))
    assert syncs.total == 0, syncs.counts


@pytest.mark.parametrize("key, variant", [case for case in CASES if case[0] in POSITIONAL])
@MASKED
@BATCH
def test_positional_policies_wait_for_nothing(key: str, variant: str, masked: bool, batch: int) -> None:
    counts = syncs_of([policy(key, 0.25, PROMPT, variant)], masked, batch)
    assert counts.total() <= own(masked, batch), counts


@pytest.mark.parametrize("key", OTHERS)
@MASKED
@BATCH
def test_other_methods_wait_at_most_once_per_layer(key: str, masked: bool, batch: int) -> None:
    counts = syncs_of([OTHERS[key]()], masked, batch)
    assert counts.total() <= own(masked, batch) + LAYERS * STEPS, counts


WITHOUT = ["tidal_decode-", "recycled_attention-", "token_select-votes", "packed", "act_calibration", "prefill_swap"]


@pytest.mark.parametrize("key", WITHOUT)
@MASKED
def test_choices_that_need_no_decision_wait_for_nothing(key: str, masked: bool) -> None:
    """Only decisions by the values of tensors make the host wait: to vote again, and whether the next step is full."""
    counts = syncs_of([OTHERS[key]()], masked)
    assert counts.total() <= own(masked, 1), counts


@pytest.mark.parametrize("key, variant", CASES)
def test_padded_batches_wait_once_per_group_outside_the_engines(key: str, variant: str) -> None:
    """Positional policies then need masks, and ask once for each group of heads that drops tokens.

    The engines wait too: they check masked calls for NaN and for queries without keys, and a selection counts its keys.
    """
    counts = syncs_of([policy(key, 0.25, PROMPT, variant)], True, 2, padding=70)
    outside = {place: count for place, count in counts.items() if not place.startswith("core/")}
    groups = 2 if key in ("duo_attention", "razor_attention", "moa", "task_kv") else 1
    assert sum(outside.values()) <= STEPS * (2 + LAYERS * groups), counts


@pytest.mark.parametrize("op", [Softmax(), SigmoidAttention(), LightningAttention2()], ids=lambda op: op.name)
def test_calls_with_trusted_inputs_wait_for_nothing(op: Operator) -> None:
    """The checks for NaN are the only waits of a masked call, and `trusted` leaves them out."""
    q, k, v = (x.float() for x in qkv(24, heads=4, kv_heads=2, width=8))
    mask = torch.ones(2, 1, 1, 24, dtype=torch.bool)
    expected = op(q, k, v, mask=mask, causal=True)
    with Syncs() as checked:
        op(q, k, v, mask=mask, causal=True)
    with Syncs() as free, trusted():
        out = op(q, k, v, mask=mask, causal=True)
    assert torch.equal(out, expected)
    assert sum(checked.counts.values()) >= 1
    assert not free.counts
