"""Tables `(layers, heads)`: the models that have one."""

from __future__ import annotations

from foveate.core.errors import UnsupportedModel
from foveate.host.hf.model import Host, host


def one_stack(model: object) -> Host:
    """Return the model as a host; refuse one whose heads are no single table `(layers, heads)`."""
    found = host(model)
    modules = len(found.scope())
    if found.config.is_encoder_decoder or modules > found.layers:
        raise UnsupportedModel(
            f"{type(found.model).__name__} has {modules} attention modules for {found.layers} layers; a table of heads "
            f"needs a single stack, such as its encoder or decoder alone"
        )
    return found
