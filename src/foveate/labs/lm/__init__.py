"""The lab language model: a byte-level Llama that retrieves."""

from foveate.labs.lm.recipe import Recipe, Stage, train

__all__ = ["Recipe", "Stage", "train"]
