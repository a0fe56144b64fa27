"""kvpress as a contender of `decode_real.py`: it runs under another Python, and decodes when it is its turn.

The file is both sides: `Worker` starts it as a script, in the environment that has kvpress, and talks to it by lines.
It needs nothing but PyTorch, so that both sides take the time in the same way (`Clock`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


class Worker:
    """A process that holds the model and one compressed cache: StreamingLLM at the same budget, dropped after the
    prompt.
    """

    def __init__(self, python: str, folder: str, dtype: str, ids: Any, budget: float, options: Any) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
            told = {"folder": folder, "dtype": dtype, "ids": ids.tolist(), "budget": budget}
            json.dump(told | {"steps": options.steps, "threads": options.threads}, file)
        self._process = subprocess.Popen(
            [python, __file__, file.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._ask() == "ready"

    def block(self, kind: str) -> list[tuple[float, float]]:
        """Seconds of each token of a block, and of attention in it: on the "pressed" cache or on the "plain" one."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{kind}\n")
        self._process.stdin.flush()
        return json.loads(self._ask())

    def _ask(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise RuntimeError("the kvpress process ended; run its Python on this file to see why")
        return line

    def __del__(self) -> None:
        self._process.kill()


class Clock:
    """Seconds in attention modules, from before the hooks that a method puts on them until after.

    Use: `with Clock(modules) as clock, method: clock.close_after(); ...`.
    """

    def __init__(self, modules: list[Any]) -> None:
        self.modules, self.seconds, self._begun, self._hooks = modules, 0.0, 0.0, []

    def __enter__(self) -> Clock:
        self._hooks = [module.register_forward_pre_hook(self._begin) for module in self.modules]
        return self

    def close_after(self) -> None:
        """Make later calls end after the hooks that are there already."""
        self._hooks += [module.register_forward_hook(self._end) for module in self.modules]

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, *_: object) -> None:
        self._begun = time.perf_counter()

    def _end(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._begun


def attention_modules(model: Any) -> list[Any]:
    return [module for name, module in model.named_modules() if name.endswith("self_attn")]


def serve(told: dict[str, Any]) -> None:
    import copy

    import torch
    from kvpress import StreamingLLMPress
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(told["threads"])
    model = AutoModelForCausalLM.from_pretrained(told["folder"], dtype=torch.float32).eval()
    ids, dtype = torch.tensor(told["ids"]), getattr(torch, told["dtype"])
    caches = {kind: DynamicCache(config=model.config) for kind in ("plain", "pressed")}
    with torch.inference_mode():
        model.model(ids, past_key_values=caches["plain"])
        with StreamingLLMPress(compression_ratio=1 - told["budget"], n_sink=4)(model):
            model.model(ids, past_key_values=caches["pressed"])
        model = model.to(dtype)
        for layer in (layer for cache in caches.values() for layer in cache.layers):
            layer.keys, layer.values, layer.dtype = layer.keys.to(dtype), layer.values.to(dtype), dtype
        print("ready", flush=True)
        for line in sys.stdin:
            past, token, seconds = copy.deepcopy(caches[line.strip()]), ids[:, -1:], []
            with Clock(attention_modules(model)) as clock:
                clock.close_after()
                for step in range(told["steps"] + 3):
                    position = torch.tensor([ids.shape[1] + step])
                    begun, before = time.perf_counter(), clock.seconds
                    out = model(
                        token, past_key_values=past, use_cache=True, logits_to_keep=1, position_ids=position[None],
                        cache_position=position,
                    )  # fmt: skip
                    token = out.logits[:, -1].argmax(-1, keepdim=True)
                    seconds.append((time.perf_counter() - begun, clock.seconds - before))
            print(json.dumps(seconds[3:]), flush=True)


if __name__ == "__main__":
    serve(json.loads(Path(sys.argv[1]).read_text("utf-8")))
