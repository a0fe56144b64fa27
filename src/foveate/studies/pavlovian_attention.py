"""Attention as conditioning: keys are conditional stimuli, values unconditional ones, a query tests what was learned.

Understanding Transformers through the Lens of Pavlovian Conditioning (2025), arXiv 2508.08289. Of the paper its
abstract was read: a head stores O(sqrt(d_k)) associations without error, O(d_k) on average, and redundant heads must
balance depth. How interference, capacity and reliability are measured here (and in `hebbian_capacity.py`) is a
reconstruction, checked at its limits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.host.entry import apply
from foveate.host.hf.model import Host, host
from foveate.host.method import Method
from foveate.host.site import Site
from foveate.ops.base.linear import Linear
from foveate.ops.memory.miras import Miras
from foveate.ops.operator import Operator, Pattern
from foveate.studies.hebbian_capacity import retrieval_snr

Rule = Literal["hebb", "delta", "oja", "decay"]

# -- learning and asking -----------------------------------------------------------------------------------------------


def hebbian_retrieval(
    q: Float[Tensor, "b h m d"], k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n dv"], rule: Rule = "hebb", *,
    eta: float = 1.0, fade: float = 0.1, causal: bool = False,
) -> Float[Tensor, "b h m dv"]:  # fmt: skip
    """What the queries recall after the pairs (k, v) were met in order, by a rule of plasticity for the memory S.

    Args:
        rule: "hebb": `S += eta v kᵀ`, un-normalised linear attention. "delta": `S += eta (v - S k) kᵀ`, Rescorla and
            Wagner's, which learns from surprise. "oja": `S += eta (v kᵀ - S diag(k²))`, which bounds S. "decay":
            `S <- (1 - fade) S + eta v kᵀ`, which extinguishes with time.
        eta: the rate. For "oja", `eta k²` may be at most 1.
        causal: each query asks when its own token has been met, and those after it have not (the last query at the last
            token); otherwise all ask at the end.
    """
    op = _operator(rule, eta, fade)
    if rule == "oja" and bool((eta * k.square() > 1).any()):
        raise OptionError(f"eta={eta} is too large for these keys: oja needs eta k² of at most 1 in every channel")
    if causal:
        return op(q, k, v, causal=True)
    n, m = k.shape[2], q.shape[2]
    k, v = F.pad(k, (0, 0, 0, m)), F.pad(v, (0, 0, 0, m))  # places for the tests, where nothing is learned
    return op(q, k, v, causal=True, mask=(torch.arange(n + m, device=k.device) < n)[None, None, None])


def _operator(rule: Rule, eta: float, fade: float) -> Operator:
    validate.one_of("rule", rule, ("hebb", "delta", "oja", "decay"))
    validate.at_least("eta", eta, 0)
    validate.between("fade", fade, 0, 1)
    if rule == "oja":
        return _Oja(eta)
    if rule == "delta":
        return Miras("l2", "none", theta=eta, chunk=1, unit=False)
    if rule == "decay":
        return Miras("dot", "l2", theta=eta, alpha=fade, chunk=64, unit=False)
    return Miras("dot", "none", theta=eta, chunk=64, unit=False)


@final
class _Oja(Linear):
    """Each key channel forgets as much as it is used: a linear operator with a decay per feature."""

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"causal self", "causal cross"})
    default_scale: ClassVar[float | None] = 1.0
    normalised: ClassVar[bool] = False

    def __init__(self, eta: float) -> None:
        super().__init__()
        self.eta = eta

    def query_features(self, q: Tensor, scale: float) -> Tensor:
        return q * scale

    def key_features(self, k: Tensor, scale: float) -> Tensor:
        return self.eta * k

    def log_decay(self, k: Tensor, **inputs: Tensor) -> Tensor:
        return torch.log1p(-self.eta * k.square())


@dataclass(frozen=True)
class Conditioning:
    """Responses of a memory to stimuli A and B, alone, where the unconditional stimulus is 1.

    Args:
        acquired: to A after A was followed by it.
        extinguished: to A after A was then met as often without it.
        blocked: to B after A was followed by it, and then A and B together: a learner from surprise leaves B out.
        interference: to B after only `A + B / 2` was followed by it: what overlaps is answered alike.
    """

    acquired: float
    extinguished: float
    blocked: float
    interference: float


def conditioning(rule: Rule, *, eta: float = 1.0, fade: float = 0.1, trials: int = 1) -> Conditioning:
    """The experiments that tell rules apart, each phase of `trials` pairings."""
    validate.count("trials", trials, 1)
    a, b = torch.eye(2, dtype=torch.float64)

    def response(test: Tensor, *phases: tuple[Tensor, float]) -> float:
        k = torch.stack([cue for cue, _ in phases]).repeat_interleave(trials, 0)
        v = torch.tensor([us for _, us in phases], dtype=k.dtype).repeat_interleave(trials)[:, None]
        shaped = (x.reshape(1, 1, -1, x.shape[-1]) for x in (test[None], k, v))
        return hebbian_retrieval(*shaped, rule, eta=eta, fade=fade).item()

    return Conditioning(
        acquired=response(a, (a, 1.0)),
        extinguished=response(a, (a, 1.0), (a, 0.0)),
        blocked=response(b, (a, 1.0), (a + b, 1.0)),
        interference=response(b, (a + b / 2, 1.0)),
    )


# -- a real head -------------------------------------------------------------------------------------------------------


def conditioning_report(
    model: object, inputs: Tensor | Mapping[str, Any] | None = None, *, layers: Iterable[int] | None = None, **more: Any
) -> list[dict[str, Any]]:
    """How full the heads' memories are, if they are read as Hebbian ones: from the keys and values of a real model.

    Args:
        model, inputs, more: as for `foveate.look`.
        layers: which; all where None.

    Returns:
        A row for each layer and key/value head, means over the batch: `tokens` stored; `coherence`, the root mean
        square of the keys' cosines (`d_k ** -0.5` at random); `snr`, see `Retrieval.overall`; and `effective`, the
        number of random unit keys that would interfere as much, `1 + d_k / snr`.
    """
    reader = _Reader(layers)
    if isinstance(inputs, Tensor):
        inputs = {host(model).model.main_input_name: inputs}
    with torch.no_grad(), apply(model, reader) as run:
        run.host.model(**{**(inputs or {}), **more})
    return reader.rows


@final
@dataclass(eq=False)
class _Reader(Method):
    """Reads keys and values where they are attended to."""

    layers: Iterable[int] | None = None
    rows: list[dict[str, Any]] = field(default_factory=list, init=False)

    def bind(self, host: Host) -> None:
        self.layers = tuple(range(host.layers) if self.layers is None else self.layers)
        for layer in self.layers:
            if layer not in range(host.layers):
                raise OptionError(f"layer {layer} must be in 0..{host.layers - 1}, the layers of this model")

    def at(self, site: Site) -> bool:
        return site.layer in (self.layers or ())

    def read(self, site: Site, out: Tensor) -> None:
        k, v = site.k.double(), site.v.double()
        real = k.new_ones(k.shape[0], k.shape[2]) if site.real is None else site.real.to(k.dtype)
        for head in range(k.shape[1]):
            found = [_head(k[b, head][real[b] > 0], v[b, head][real[b] > 0]) for b in range(k.shape[0])]
            means = {name: sum(row[name] for row in found) / len(found) for name in found[0]}
            self.rows.append({"layer": site.layer, "head": head, **means})


def _head(k: Float[Tensor, "n d"], v: Float[Tensor, "n dv"]) -> dict[str, float]:
    n, d = k.shape
    unit = F.normalize(k, dim=-1)
    pairs = (unit.mT @ unit).square().sum() - n  # of cosines, squared
    snr = retrieval_snr(k, v).overall
    return {
        "tokens": n, "coherence": (pairs.clamp_min(0) / max(n * (n - 1), 1)).sqrt().item(), "snr": snr.item(),
        "effective": (1 + d / snr).item(),
    }  # fmt: skip
