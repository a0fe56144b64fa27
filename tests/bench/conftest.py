"""A tiny random decoder as a checkpoint, prompts in a file, and a receiver of progress."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from foveate.models.base import byte_tokenizer as bytes_


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a checkpoint with the byte tokenizer; tests must not change it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=bytes_.VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=768,
        bos_token_id=bytes_.BOS, eos_token_id=bytes_.EOS, pad_token_id=bytes_.PAD,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("decoder")
    LlamaForCausalLM(config).save_pretrained(path)
    bytes_.build(768).save_pretrained(path)
    return path


@pytest.fixture
def own_decoder(decoder: Path, tmp_path: Path) -> Path:
    """Copy the checkpoint, so that a test may change it."""
    return Path(shutil.copytree(decoder, tmp_path / "decoder"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "mine.jsonl", [f"{'word ' * 30}and the key is {n}" for n in range(3)])


def write_prompts(file: Path, texts: list[str], answer: str = " ab") -> Path:
    file.write_text("\n".join(json.dumps({"prompt": text, "answer": answer}) for text in texts))
    return file


class Watch:
    """Counts progress, and interrupts the run after `stop_at` steps."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.total, self.labels, self.stop_at = 0, [], stop_at  # type: ignore[var-annotated]

    def start(self, total: int) -> None:
        self.total = total

    def say(self, label: str) -> None: ...

    def advance(self, label: str) -> None:
        self.labels.append(label)
        if len(self.labels) == self.stop_at:
            raise KeyboardInterrupt


@pytest.fixture
def watching() -> type[Watch]:
    return Watch
