"""A small network as plain data, which can be saved, compared and built again."""

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
    """The options of a `Decoder` or an `ImageEncoder`.

    Args:
        dim, heads: C and H of every layer.
        mixers: the layers, first to last.
        vocabulary: number of tokens of a decoder; None for images.
        places, mlp, tied: see `Decoder`.
        hidden: width inside the MLPs; None is their default.
        image: `channels`, `side`, `classes`, `patch` and `causal` of an `ImageEncoder`; None for tokens.
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
            raise OptionError("a network needs either vocabulary=... (for tokens) or image=... (for images), not both")

    def build(self) -> Decoder | ImageEncoder:
        """Build the network, with new parameters from torch's global generator."""
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
            raise OptionError(f"this is no description of a network: {error}") from None
