"""A model on a hub is refused at once where the hub cannot be reached; its own client tries again for half a minute."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, try_to_load_from_cache

from foveate.bench.loading.refusal import refused
from foveate.bench.loading.source import Source

_PATIENCE = 5.0  # seconds
_PORTS = {"http": 80, "https": 443}


def check(source: Source) -> None:
    """Refuse a model that is neither local nor in the hub's cache if no connection to the hub can be made."""
    if source.folder is not None or constants.HF_HUB_OFFLINE:
        return
    if isinstance(try_to_load_from_cache(source.location, source.gguf or "config.json"), str):
        return
    try:
        socket.create_connection(_address(constants.ENDPOINT), timeout=_PATIENCE).close()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise refused(
            source.name, f"is no folder and no file here, and the hub {constants.ENDPOINT} cannot be reached: {why}"
        ) from None


def _address(endpoint: str) -> tuple[str, int]:
    """Return the host and port to connect to: the hub's, or those of the proxy that leads to it."""
    scheme = urlsplit(endpoint).scheme or "https"
    parts = urlsplit(getproxies().get(scheme) or endpoint)
    return parts.hostname or "", parts.port or _PORTS.get(parts.scheme, 443)
