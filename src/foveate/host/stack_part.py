"""The parts of a model whose blocks stand in a stack."""

from __future__ import annotations

from typing import Literal

#: Decoders and text encoders, or image encoders.
StackPart = Literal["text", "image"]
