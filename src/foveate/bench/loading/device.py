"""Devices and number formats by name."""

from __future__ import annotations

import torch

from foveate.core.errors import OptionError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def torch_device(device: str) -> torch.device:
    """Return the device of this name, after checking that it works."""
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError(f"device={device!r} is not usable here: {str(error).splitlines()[0]}") from None
    if found.type == "meta":
        raise OptionError(f"device={device!r} must hold data, such as cpu or cuda")
    return found
