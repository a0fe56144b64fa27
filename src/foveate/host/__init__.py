"""Hosts: methods on pretrained models, through transformers' own interfaces."""

from foveate.host.method import Method
from foveate.host.model import Host
from foveate.host.run import Run, Stats, apply
from foveate.host.site import Site
from foveate.host.slots import EMPTY, SUMMARY, Slots

__all__ = ["EMPTY", "SUMMARY", "Host", "Method", "Run", "Site", "Slots", "Stats", "apply"]
