"""All modules of cases: importing this one registers them."""

from tests.corpus import adapters, benchmarks, checkpoints, conversations, gguf_files, kinds, prompts, tables

__all__ = ["adapters", "benchmarks", "checkpoints", "conversations", "gguf_files", "kinds", "prompts", "tables"]
