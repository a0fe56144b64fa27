"""KVzip: a text's cache is compressed to what the model needs to repeat the text.

KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction (2025), arXiv 2505.23416.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self, final

from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.host import Host
from foveate.host.hf.layout import layout
from foveate.host.hf.words import tokenizer_of
from foveate.host.output_projection import check_projections
from foveate.host.pass_end import PassEnd
from foveate.host.site import Site
from foveate.host.slots.ends import AT_END, AtEnd
from foveate.kv.base.scored import Heads, ScorePolicy
from foveate.kv.parts import slot_notes
from foveate.kv.parts.reconstruction import Instruction, Reconstruction


@final
@dataclass(eq=False)
class KVzip(ScorePolicy):
    """A token's score is the largest attention weight that it gets while the model repeats the text.

    After a text is read, the model is asked to repeat it, and reads it a second time behind that instruction, in parts.
    The repetition is then removed from the cache. A token that no head looks at to repeat the text is not needed for
    any question about it. So one compressed text serves all questions: the choice for a text that is read once and
    asked about many times. Cost: the text is read two to three times, and in the second reading the weights of each
    part are computed a few rows at a time. The wrong choice for a prompt that is answered once.

    The best scores over all heads of all layers stay, without a safeguard for single heads, as in the paper.
    `heads="adaptive"` gives all layers the same share instead (`layerwise` in kvpress). Layers with a window keep their
    window. A prompt in several pieces is repeated piece by piece; earlier tokens keep their scores.

    Args:
        plus: KVzip+ (arXiv 2601.07891, section 3): a weight is multiplied by the norm of the token's value behind the
            output projection, and divided by that of the hidden state that the query's layer gets.
        chunk: tokens that are repeated at once.
        overlap: tokens before a later part that the instruction names.
        instruct: whether to put the instruction before the repetition.
        tokenizer: turns the instruction into tokens; None takes the model's own: its attribute `tokenizer`, or that of
            the folder or hub name that it was loaded from.
        share, sink, recent, heads, safeguard, limit, layers: see `ScorePolicy`.

    Models that are given embeddings or pictures in place of tokens are refused.
    """

    heads: Heads = "global"
    safeguard: float = 0.0
    plus: bool = False
    chunk: int = 2048
    overlap: int = 8
    instruct: bool = True
    tokenizer: Any = field(default=None, repr=False)
    _how: Reconstruction = field(default_factory=lambda: Reconstruction(Instruction()), init=False, repr=False)
    _far: frozenset[int] = field(default=frozenset(), init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.count("chunk", self.chunk, 1)
        validate.count("overlap", self.overlap)
        validate.flag("plus", self.plus)
        validate.flag("instruct", self.instruct)
        if self.tokenizer is not None and not callable(self.tokenizer):
            raise OptionError(f"tokenizer={self.tokenizer!r:.80} must turn text into tokens, as transformers' do")
        if self.every is not None:
            raise OptionError(f"every={self.every} must be None: KVzip repeats a text when it has been read, not later")

    def bind(self, host: Host) -> None:
        super().bind(host)
        words = self.tokenizer if self.tokenizer is not None else tokenizer_of(host.model)
        if self.instruct and words is None:
            raise OptionError(
                f"KVzip asks {type(host.model).__name__} in words to repeat a text, and finds no tokenizer: give "
                f"tokenizer=..., or instruct=False to repeat the text without asking"
            )
        if self.plus:
            check_projections(host)
        instruction = Instruction.of(words) if self.instruct else Instruction()
        self._how = Reconstruction(instruction, self.sink, self.chunk, self.overlap, self.plus)
        self._far = frozenset(one.layer for one in layout(host).layers if one.window is None)

    def at(self, site: Site) -> bool:
        return super().at(site) and site.layer in self._far

    def keep(self, site: Site) -> AtEnd | None:
        return None if self.is_off(site) or not self.is_due(site) else AT_END

    def keep_all(self, end: PassEnd) -> list[Tensor | None]:
        self._how.measure(end, self)
        return self.best_of_all(end.sites, [self.ranked(site, self.score(site)) for site in end.sites])

    def score(self, site: Site) -> Float[Tensor, "b hkv s"]:
        return slot_notes.find(site.notes(self), site)

    def note_kept(self, site: Site, kept: Bool[Tensor, "b hkv s"]) -> None:
        slot_notes.trim(site.notes(self), site, kept, int(kept.sum(-1).max()))

    @classmethod
    def at_budget(cls, budget: float, host: Host, length: int, **learnt: Tensor) -> Self:
        """See `Policy.at_budget`. Models without a tokenizer get no instruction."""
        made = super().at_budget(budget, host, length, **learnt)
        return replace(made, instruct=tokenizer_of(host.model) is not None)
