# The public names of foveate.host; written by `make systems` from the catalogue.

from foveate.host.branch import Branch as Branch
from foveate.host.cache_contents import Held as Held
from foveate.host.cache_contents import held as held
from foveate.host.context import Context as Context
from foveate.host.diffusers.model import DiffusionHost as DiffusionHost
from foveate.host.diffusers.run import DiffusionRun as DiffusionRun
from foveate.host.diffusers.words import phrase_spans as phrase_spans
from foveate.host.diffusers.words import word_spans as word_spans
from foveate.host.entry import apply as apply
from foveate.host.head_cuts import cut_heads as cut_heads
from foveate.host.hf.layout import AttendingLayer as AttendingLayer
from foveate.host.hf.layout import Layout as Layout
from foveate.host.hf.layout import decoder_inputs as decoder_inputs
from foveate.host.hf.layout import layout as layout
from foveate.host.hf.model import Host as Host
from foveate.host.hf.model import host as host
from foveate.host.hf.vision_spans import spans_of as spans_of
from foveate.host.method import Method as Method
from foveate.host.model_call import ModelCall as ModelCall
from foveate.host.operator_swap import PrefillSwap as PrefillSwap
from foveate.host.packed import Packed as Packed
from foveate.host.pass_end import PassEnd as PassEnd
from foveate.host.run import Run as Run
from foveate.host.site import Site as Site
from foveate.host.slots.codec import Codec as Codec
from foveate.host.slots.codec import Coding as Coding
from foveate.host.slots.codec import Uncoded as Uncoded
from foveate.host.slots.ends import AT_END as AT_END
from foveate.host.slots.ends import Ends as Ends
from foveate.host.slots.slots import EMPTY as EMPTY
from foveate.host.slots.slots import SUMMARY as SUMMARY
from foveate.host.slots.slots import Slots as Slots
from foveate.host.spans import Spans as Spans
from foveate.host.spans import span_mask as span_mask
from foveate.host.stats import CacheStats as CacheStats
from foveate.host.stats import LayerStats as LayerStats
from foveate.host.stats import Stats as Stats
from foveate.host.stream import Stream as Stream

__all__ = [
    "AT_END",
    "AttendingLayer",
    "Branch",
    "CacheStats",
    "Codec",
    "Coding",
    "Context",
    "DiffusionHost",
    "DiffusionRun",
    "EMPTY",
    "Ends",
    "Held",
    "Host",
    "LayerStats",
    "Layout",
    "Method",
    "ModelCall",
    "Packed",
    "PassEnd",
    "PrefillSwap",
    "Run",
    "SUMMARY",
    "Site",
    "Slots",
    "Spans",
    "Stats",
    "Stream",
    "Uncoded",
    "apply",
    "cut_heads",
    "decoder_inputs",
    "held",
    "host",
    "layout",
    "phrase_spans",
    "span_mask",
    "spans_of",
    "word_spans",
]
