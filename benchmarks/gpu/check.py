"""Does everything that attaches to a model work on a GPU? `python benchmarks/gpu/check.py`, where a GPU is at hand.

Every cache policy runs on a small random decoder, on the GPU, in float32 and bfloat16, next to the same run on the CPU:
prompts of unequal length, a prompt in two pieces, twenty tokens of decoding. Then training of DuoAttention's gates, the
lens, and every engine on one call. Prints one line a check with the largest difference, and exits with 1 where one is
too large or fails. It takes about a minute.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import foveate
from foveate.core.catalog import cache_policies
from foveate.core.engines import ENGINES
from foveate.host import Host, Method
from foveate.kv.base.policy import Policy
from foveate.kv.duo_attention import duo_train
from foveate.lens import Lens
from foveate.ops import SlidingWindow

#: Engines that need a selection.
SPARSE = ("flex", "gather", "slices")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU is visible to torch here")
    failures = 0
    for name, check, tolerance in _checks(device):
        begun = time.perf_counter()
        try:
            worst = check()
            verdict = "ok" if worst <= tolerance else "TOO FAR"
            said = f"largest difference {worst:.2e}, tolerance {tolerance:.0e}"
        except Exception as error:  # noqa: BLE001  a check that fails is a line of the report
            verdict, said = "FAILS", f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        failures += verdict != "ok"
        print(f"{verdict:8}{name:48}{said} ({time.perf_counter() - begun:.1f} s)", flush=True)
    sys.exit(1 if failures else 0)


def _checks(device: torch.device) -> list[tuple[str, Callable[[], float], float]]:
    found: list[tuple[str, Callable[[], float], float]] = []
    labels = ("no method", "packed", *(row.key for row in cache_policies()))
    for dtype, tolerance in ((torch.float32, 2e-4), (torch.bfloat16, 6e-2)):
        found += [(f"{label}, {dtype}", _decoding(label, device, dtype), tolerance) for label in labels]
    found.append(("lens, torch.float32", _looking(device), 2e-4))
    found.append(("duo_train, torch.float32", _training(device), 5e-3))
    found += [(f"engine {engine}, torch.float32", _engine(engine, device), 2e-4) for engine in ENGINES]
    return found


def _model() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=8,
            num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, initializer_range=0.2,
        )
    ).eval()  # fmt: skip


def _method(label: str, model: PreTrainedModel, length: int) -> tuple[Method, ...]:
    if label in ("no method", "packed"):
        return (foveate.Packed(),) if label == "packed" else ()
    cls, host = foveate.system(label).load(), Host(model)
    assert issubclass(cls, Policy)
    draw = torch.Generator().manual_seed(0)
    learnt = {
        "duo_attention": {"gates": torch.rand(6, 2, generator=draw)},
        "razor_attention": {kind: torch.rand(6, 8, generator=draw) for kind in ("echo", "induction")},
    }
    return (cls.at_budget(0.5, host, length, **learnt.get(label, {})),)


def _decoding(label: str, device: torch.device, dtype: torch.dtype) -> Callable[[], float]:
    @torch.no_grad()
    def logits(where: torch.device) -> Tensor:
        model = _model().to(where, dtype)
        draw = torch.Generator().manual_seed(1)
        ids = torch.randint(2, 256, (2, 220), generator=draw)
        mask = torch.ones_like(ids)
        ids[0, :9], mask[0, :9] = 0, 0
        ids, mask, cache, out = ids.to(where), mask.to(where), DynamicCache(config=model.config), []
        with foveate.apply(model, *_method(label, model, 220)):
            end = 0
            for size in (120, 80, *[1] * 20):
                begin, end = end, end + size
                out.append(model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
        return torch.cat(out, 1)[:, 9:].float().log_softmax(-1).cpu()

    return lambda: _apart(logits(device), logits(torch.device("cpu")))


def _looking(device: torch.device) -> Callable[[], float]:
    @torch.no_grad()
    def entropy(where: torch.device) -> Tensor:
        model, lens = _model().to(where), Lens()
        ids = torch.randint(2, 256, (2, 96), generator=torch.Generator().manual_seed(1)).to(where)
        with foveate.apply(model, lens):
            model(ids)
        return lens.values("entropy")[0].cpu()

    return lambda: _apart(entropy(device), entropy(torch.device("cpu")))


def _training(device: torch.device) -> Callable[[], float]:
    def gates(where: torch.device) -> Tensor:
        draw = torch.Generator().manual_seed(1)
        data = [(torch.randint(2, 256, (1, 96), generator=draw), torch.arange(96)[None] > 80) for _ in range(5)]
        return duo_train(_model().to(where), data, steps=5, sink=4, recent=16).cpu()

    return lambda: _apart(gates(device), gates(torch.device("cpu")))


def _engine(name: str, device: torch.device) -> Callable[[], float]:
    def run(where: torch.device, engine: str) -> Tensor:
        q, k, v = torch.randn(3, 1, 4, 512, 64, generator=torch.Generator().manual_seed(0)).to(where)
        if engine in SPARSE:
            return SlidingWindow(64, sinks=0)(q, k, v, causal=True, engine=engine).cpu()
        return foveate.attend(q, k, v, "softmax", causal=True, engine=engine).cpu()

    plain = "gather" if name in SPARSE else "reference"
    return lambda: _apart(run(device, name), run(torch.device("cpu"), plain))


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


if __name__ == "__main__":
    main()
