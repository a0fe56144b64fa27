"""The base class of policies that wrap another policy: its scores, another choice."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Self

from jaxtyping import Bool
from torch import Tensor

from foveate.core.errors import OptionError
from foveate.host import Host
from foveate.host.site import Site
from foveate.kv.base.policy import check_budget
from foveate.kv.base.scored import UNEVEN, Heads, ScorePolicy

#: Hooks of a base that a wrapper does not call.
_OWN = ("select", "attend", "edit_logits", "edit_weights", "edit_output", "keep", "keep_all", "fold", "refit", "encode")


def _defines(base: ScorePolicy, hook: str) -> bool:
    return getattr(type(base), hook) is not getattr(ScorePolicy, hook)


@dataclass(eq=False)
class Wrapper(ScorePolicy):
    """A policy that changes the choice of another one, `base`.

    The share of tokens, the tokens that always stay, the layers and the times of compression are those of `base`. A
    system gives `base` a default, and writes `score`, `keep` or both.
    """

    base: ScorePolicy
    share: float = field(init=False, repr=False)
    sink: int = field(init=False, repr=False)
    recent: int = field(init=False, repr=False)
    heads: Heads = field(init=False, repr=False)
    safeguard: float = field(init=False, repr=False)
    threshold: float | None = field(init=False, repr=False)
    limit: int | None = field(init=False, repr=False)
    every: int | None = field(init=False, repr=False)
    layers: tuple[int, ...] | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.base, ScorePolicy):
            raise OptionError(f"base must be a policy that scores, such as SnapKV(); got {type(self.base).__name__}")
        if more := [hook for hook in _OWN if not isinstance(self.base, Wrapper) and _defines(self.base, hook)]:
            raise OptionError(
                f"base must be a policy that only scores; {type(self.base).__name__} also has a {more[0]} of its own, "
                f'which {type(self).__name__} would leave out (for budgets over heads, it has heads="adaptive")'
            )
        for option in fields(self):
            if not option.init:
                setattr(self, option.name, getattr(self.base, option.name))
        super().__post_init__()

    def bind(self, host: Host) -> None:
        self.base.bind(host)

    def at(self, site: Site) -> bool:
        return self.base.at(site)

    def layer_share(self, site: Site) -> float:
        return self.base.layer_share(site)

    def read(self, site: Site, out: Tensor) -> None:
        self.base.read(site, out)

    def note_kept(self, site: Site, kept: Bool[Tensor, "b h s"]) -> None:
        site.step[UNEVEN, site.layer] = True
        self.base.note_kept(site, kept)

    @classmethod
    def at_budget(cls, budget: float, host: Host, length: int, **learnt: Tensor) -> Self:
        """See `Policy.at_budget`. At most half of the budget goes to tokens that always stay."""
        check_budget(budget, length)
        made = cls()  # type: ignore[call-arg]  # systems have a default
        base = type(made.base).at_budget(budget, host, length, **learnt)
        half = max(1, cls.tokens(budget, length) // 2)
        return replace(made, base=replace(base, sink=min(base.sink, half - 1), recent=min(base.recent, half)))
