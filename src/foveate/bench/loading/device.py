"""Devices and number formats by name."""

from __future__ import annotations

import torch

from foveate.core.errors import OptionError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def torch_device(device: str) -> torch.device:
    """The device by name, checked to be there."""
    try:
        where = torch.device(device)
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError(f"device={device!r} is not usable here: {str(error).splitlines()[0]}") from None
    if where.type == "meta":
        raise OptionError(f"device={device!r} holds no numbers; use cpu or cuda")
    return where
