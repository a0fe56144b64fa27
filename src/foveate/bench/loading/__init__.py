"""From names on a command line to a model and its tokenizer, refusing what would not work later."""

from foveate.bench.loading.device import DTYPES, torch_device
from foveate.bench.loading.load import load, trained_on
from foveate.bench.loading.source import Source, find

__all__ = ["DTYPES", "Source", "find", "load", "torch_device", "trained_on"]
