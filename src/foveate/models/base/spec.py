"""A small network as plain data, so that it can be saved, compared and built again."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.models.base.decoder import Decoder
from foveate.models.base.image_encoder import ImageEncoder
from foveate.nn.parts.build import create


@dataclass(frozen=True)
class Mixer:
    """One layer: a catalogue key, the system's own options, and those of the layer around an operator."""

    key: str
    options: dict[str, Any] = field(default_factory=dict)
    around: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Spec:
    """What a `Decoder` or an `ImageEncoder` is made of.

    Args:
        dim, heads: C and H of every layer.
        mixers: the layers, first to last.
        vocabulary: tokens of a decoder; None for images.
        places, mlp, tied: of `Decoder`.
        hidden: width inside the MLPs; their own choice where None.
        image: `channels`, `side`, `classes`, `patch`, `causal` of `ImageEncoder`; None for tokens.
    """

    dim: int
    heads: int
    mixers: tuple[Mixer, ...]
    vocabulary: int | None = None
    places: int = 0
    mlp: bool = True
    tied: bool = True
    hidden: int | None = None
    image: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        validate.count("dim", self.dim, 1)
        validate.count("heads", self.heads, 1)
        if (self.vocabulary is None) == (self.image is None):
            raise OptionError("a network reads tokens (vocabulary=...) or images (image=...), one of the two")

    def build(self) -> Decoder | ImageEncoder:
        """The network, with fresh parameters from torch's global generator."""
        mixers = [create(m.key, self.dim, self.heads, options=m.options, **m.around) for m in self.mixers]
        if self.image is not None:
            return ImageEncoder(mixers=mixers, hidden=self.hidden, **self.image)
        assert self.vocabulary is not None
        return Decoder(self.vocabulary, mixers, places=self.places, mlp=self.mlp, tied=self.tied, hidden=self.hidden)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Spec:
        try:
            return cls(**{**given, "mixers": tuple(Mixer(**mixer) for mixer in given["mixers"])})
        except (TypeError, KeyError) as error:
            raise OptionError(f"no description of a network: {error}") from None
