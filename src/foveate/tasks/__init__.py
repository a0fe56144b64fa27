"""Tasks: prompts with scores for the answers, and batches to train on."""

from foveate.core.public import lazy

__getattr__, __dir__ = lazy(__name__)
