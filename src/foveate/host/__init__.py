"""Hosts: methods on pretrained models, through transformers' own interfaces."""

from foveate.host.ends import Ends
from foveate.host.layout import AttendingLayer, Layout, decoder_inputs, layout
from foveate.host.method import Method
from foveate.host.model import Host
from foveate.host.packed import Packed
from foveate.host.run import Run, Stats, apply
from foveate.host.site import Site
from foveate.host.slots import EMPTY, SUMMARY, Slots

__all__ = [
    "EMPTY", "SUMMARY", "AttendingLayer", "Ends", "Host", "Layout", "Method", "Packed", "Run", "Site", "Slots",
    "Stats", "apply", "decoder_inputs", "layout",
]  # fmt: skip
