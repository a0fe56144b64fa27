"""kvpress as a contender of `decode_real.py`: it runs under another Python, and decodes when it is its turn.

The file is both sides: `Worker` starts it as a script, in the environment that has kvpress, and talks to it by lines.
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

    def block(self) -> list[float]:
        """Seconds of each token of a block."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
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


def serve(told: dict[str, Any]) -> None:
    import copy

    import torch
    from kvpress import StreamingLLMPress
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(told["threads"])
    model = AutoModelForCausalLM.from_pretrained(told["folder"], dtype=torch.float32).eval()
    ids, cache, dtype = torch.tensor(told["ids"]), DynamicCache(config=model.config), getattr(torch, told["dtype"])
    with torch.inference_mode():
        with StreamingLLMPress(compression_ratio=1 - told["budget"], n_sink=4)(model):
            model.model(ids, past_key_values=cache)
        model = model.to(dtype)
        for layer in cache.layers:
            layer.keys, layer.values, layer.dtype = layer.keys.to(dtype), layer.values.to(dtype), dtype
        print("ready", flush=True)
        for _ in sys.stdin:
            past, token, seconds = copy.deepcopy(cache), ids[:, -1:], []
            for step in range(told["steps"] + 3):
                position = torch.tensor([ids.shape[1] + step])
                begun = time.perf_counter()
                out = model(
                    token, past_key_values=past, use_cache=True, logits_to_keep=1, position_ids=position[None],
                    cache_position=position,
                )  # fmt: skip
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                seconds.append(time.perf_counter() - begun)
            print(json.dumps(seconds[3:]), flush=True)


if __name__ == "__main__":
    serve(json.loads(Path(sys.argv[1]).read_text("utf-8")))
