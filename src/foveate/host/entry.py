"""Apply methods to a model for the length of a block."""

from __future__ import annotations

from torch import nn

from foveate.core import validate
from foveate.host.diffusers.model import is_diffusion_model, refuse_pipeline
from foveate.host.diffusers.run import DiffusionRun
from foveate.host.hf import dispatch  # noqa: F401  the import registers Foveate's attention function
from foveate.host.hf.layout import layout
from foveate.host.hf.model import Host
from foveate.host.method import Method
from foveate.host.operator_swap import PrefillSwap
from foveate.host.run import Evict, Part, Run
from foveate.ops.operator import Operator


def apply(model: object, *methods: Method | Operator, on: Part = "auto", evict: Evict = "always") -> Run | DiffusionRun:
    """Apply methods to a pretrained model: `with foveate.apply(model, method, ...) as run:`.

    Args:
        model: any model that uses transformers' attention interface (decoders, encoders, ViTs, VLMs), or a network of
            diffusers (`pipe.unet`, `pipe.transformer`); see `foveate.host.DiffusionRun`.
        methods: applied in order; hooks of several compose, and a later method gets the result of an earlier one. An
            `Operator` replaces the model's attention while the prompt is read; see `foveate.host.PrefillSwap`.
        on: the part that they act on: "decoder", "all", or "auto". "auto" is the decoder of a model that has one, and
            all of any other model. A vision tower or an encoder before a decoder attends natively unless `on="all"`.
        evict: when methods drop tokens. "always" is after every call; "after prompt" only while the prompt is read, in
            one call or several. The prompt ends with the first call that decodes (see `Site.phase`). All later tokens
            stay, so that the cache can be cropped back to the prompt.

    Within the block the model is used as before (`model(...)`, `model.generate(...)`), also from several threads. Runs
    nest. After the block, also after an exception, weights, configuration and hooks are what they were. A cache whose
    heads hold equally many tokens works without Foveate; a cache with different numbers works inside another block.

    Raises:
        UnsupportedModel: the model does not use the attention interface.
    """
    swapped = tuple(PrefillSwap(each) if isinstance(each, Operator) else each for each in methods)
    refuse_pipeline(model)
    if isinstance(model, nn.Module) and is_diffusion_model(model):
        validate.one_of("evict", evict, ("always", "after prompt"))
        return DiffusionRun(model, swapped, on)
    return Run(model, swapped, on, evict, find_excluded=_excluded)


def _excluded(host: Host) -> set[nn.Module]:
    return {host.model.get_submodule(name) for name in layout(host).excluded}
