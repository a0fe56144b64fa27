"""All modules of cases: importing this one registers them."""

from tests.corpus import adapters, checkpoints, conversations, gguf_files, kinds, prompts, tables

__all__ = ["adapters", "checkpoints", "conversations", "gguf_files", "kinds", "prompts", "tables"]
