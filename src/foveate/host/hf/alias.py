"""An implementation's name that looks up Foveate's functions and compares as the model's own."""

from __future__ import annotations

NAME = "foveate"


class Alias(str):
    """An attention implementation's name, such as "sdpa", that looks up Foveate's functions.

    Models branch on the name of their implementation: sparse attention builds its mask for "eager" and "sdpa" only. So
    the name equals the one that the model was loaded with. transformers' tables of functions look a name up by its hash
    first, and the hash is that of Foveate's name.
    """

    __slots__ = ()

    @property
    def native(self) -> str:
        """The plain name of the model's own implementation."""
        return str.__str__(self)

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or (isinstance(other, str) and str.__eq__(NAME, other) is True)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __deepcopy__(self, memo: dict[int, object]) -> str:
        return self.native  # a copy of the model is a plain model

    def __hash__(self) -> int:
        return hash(NAME)
