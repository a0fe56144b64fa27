"""Load a model and its tokenizer by name, and refuse unsuitable ones early, in one line."""

from foveate.bench.loading.device import DTYPES, torch_device
from foveate.bench.loading.load import load, trained_on
from foveate.bench.loading.source import Source, find

__all__ = ["DTYPES", "Source", "find", "load", "torch_device", "trained_on"]
