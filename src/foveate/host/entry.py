"""`apply`: put methods on a model for a while, and leave it as it was."""

from __future__ import annotations

from torch import nn

from foveate.host.hf import dispatch  # noqa: F401  it registers Foveate's attention function
from foveate.host.hf.layout import layout
from foveate.host.hf.model import Host
from foveate.host.method import Method
from foveate.host.run import Evict, Part, Run


def apply(model: object, *methods: Method, on: Part = "auto", evict: Evict = "always") -> Run:
    """Apply methods to a pretrained model: `with foveate.apply(model, method, ...) as run:`.

    Args:
        model: any transformers model that goes through its attention interface (decoders, encoders, ViTs, VLMs).
        methods: applied in order; hooks of several compose, the later seeing what the earlier left.
        on: the part that they act on: "decoder", "all", or "auto", the decoder of a model that has one and all of any
            other. A vision tower or an encoder in front of a decoder attends natively unless "all" is asked for.
        evict: "always" drops tokens after every call, as a method says; "after prompt" only while the prompt is read,
            in one call or in several. It ends with the first call that decodes (see `Site.phase`). Later tokens all
            stay, so that the cache can be cropped back to the prompt.

    Within the block the model is used as always (`model(...)`, `model.generate(...)`), also from several threads; runs
    nest. After it, also after an exception, weights, configuration and hooks are what they were. A cache whose heads
    hold equally many tokens goes on without Foveate; one with different numbers goes on inside another block.

    Raises:
        UnsupportedModel: for a model that does not dispatch its attention.
    """
    return Run(model, methods, on, evict, aside=_aside)


def _aside(host: Host) -> set[nn.Module]:
    return {host.model.get_submodule(name) for name in layout(host).aside}
