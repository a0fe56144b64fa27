"""Attention as conditioning: keys are conditional stimuli, values unconditional stimuli, and queries test the memory.

Understanding Transformers through the Lens of Pavlovian Conditioning (2025), arXiv 2508.08289. Only the paper's
abstract was read: a head stores O(sqrt(d_k)) associations without error, O(d_k) on average, and redundant heads must
compensate for depth. The measures of interference, capacity and reliability here and in `hebbian_capacity.py` are a
reconstruction, checked at its limits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
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
from foveate.ops.operator import CAUSAL_PATTERNS, Operator
from foveate.studies.hebbian_capacity import retrieval_snr

Rule = Literal["hebb", "delta", "oja", "decay"]

# -- learning and retrieval --------------------------------------------------------------------------------------------


def hebbian_retrieval(
    q: Float[Tensor, "b h m d"], k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n dv"], rule: Rule = "hebb", *,
    eta: float = 1.0, decay: float = 0.1, causal: bool = False,
) -> Float[Tensor, "b h m dv"]:  # fmt: skip
    """Return what the queries retrieve after a memory S has learned the pairs (k, v) in order, by a plasticity rule.

    Args:
        rule: "hebb": `S += eta v kᵀ`, un-normalized linear attention. "delta": `S += eta (v - S k) kᵀ`, the rule of
            Rescorla and Wagner, which learns from prediction errors. "oja": `S += eta (v kᵀ - S diag(k²))`, which
            bounds S. "decay": `S <- (1 - decay) S + eta v kᵀ`, which forgets with time.
        eta: the learning rate. For "oja", `eta k²` may be at most 1.
        decay: the forgetting rate of "decay".
        causal: True lets each query retrieve after its own token has been learned and before later ones, aligned at the
            last token; False lets all retrieve at the end.
    """
    op = _operator(rule, eta, decay)
    if rule == "oja" and bool((eta * k.square() > 1).any()):
        raise OptionError(
            f"eta={eta} must give eta k² of at most 1 in every channel with rule='oja'; these keys give more"
        )
    if causal:
        return op(q, k, v, causal=True)
    n, m = k.shape[2], q.shape[2]
    k, v = F.pad(k, (0, 0, 0, m)), F.pad(v, (0, 0, 0, m))  # positions of the queries, where nothing is learned
    return op(q, k, v, causal=True, mask=(torch.arange(n + m, device=k.device) < n)[None, None, None])


def _operator(rule: Rule, eta: float, decay: float) -> Operator:
    validate.one_of("rule", rule, ("hebb", "delta", "oja", "decay"))
    validate.at_least("eta", eta, 0)
    validate.between("decay", decay, 0, 1)
    if rule == "oja":
        return _Oja(eta)
    if rule == "delta":
        return Miras("l2", "none", theta=eta, chunk=1, unit=False)
    if rule == "decay":
        return Miras("dot", "l2", theta=eta, alpha=decay, chunk=64, unit=False)
    return Miras("dot", "none", theta=eta, chunk=64, unit=False)


@final
class _Oja(Linear):
    """A linear operator with a decay per feature: each key channel forgets in proportion to its use."""

    capabilities = replace(Linear.capabilities, patterns=CAUSAL_PATTERNS, default_scale=1.0)
    normalized: ClassVar[bool] = False

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
    """A memory's responses to the single stimuli A and B; the unconditional stimulus (US) is 1.

    Args:
        acquired: the response to A after pairings of A with the US.
        extinguished: the response to A after as many further presentations of A without the US.
        blocked: the response to B after pairings of A, then of A and B together, with the US. A rule that learns from
            prediction errors does not learn B.
        interference: the response to B after pairings of only `A + B / 2` with the US: overlapping keys respond alike.
    """

    acquired: float
    extinguished: float
    blocked: float
    interference: float


def conditioning(rule: Rule, *, eta: float = 1.0, decay: float = 0.1, trials: int = 1) -> Conditioning:
    """Run the experiments that distinguish the rules, with `trials` presentations in each phase."""
    validate.count("trials", trials, 1)
    a, b = torch.eye(2, dtype=torch.float64)

    def response(test: Tensor, *phases: tuple[Tensor, float]) -> float:
        k = torch.stack([cue for cue, _ in phases]).repeat_interleave(trials, 0)
        v = torch.tensor([us for _, us in phases], dtype=k.dtype).repeat_interleave(trials)[:, None]
        q, k, v = (x.reshape(1, 1, -1, x.shape[-1]) for x in (test[None], k, v))
        return hebbian_retrieval(q, k, v, rule, eta=eta, decay=decay).item()

    return Conditioning(
        acquired=response(a, (a, 1.0)),
        extinguished=response(a, (a, 1.0), (a, 0.0)),
        blocked=response(b, (a, 1.0), (a + b, 1.0)),
        interference=response(b, (a + b / 2, 1.0)),
    )


# -- a real model ------------------------------------------------------------------------------------------------------


def conditioning_report(
    model: object, inputs: Tensor | Mapping[str, Any] | None = None, *, layers: Iterable[int] | None = None, **more: Any
) -> list[dict[str, Any]]:
    """Measure a real model's keys and values as if each head were a Hebbian memory.

    Args:
        model, inputs, more: see `foveate.look`.
        layers: the layers to measure; None is all.

    Returns:
        A row for each layer and key/value head, means over the batch: `tokens` stored; `coherence`, the root mean
        square of the keys' cosines (`d_k ** -0.5` at random); `snr`, see `Retrieval.overall`; and `effective`, the
        number of random unit keys with the same interference, `1 + d_k / snr`.
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
    """A method that measures keys and values at each attention call."""

    layers: Iterable[int] | None = None
    rows: list[dict[str, Any]] = field(default_factory=list, init=False)

    def bind(self, host: Host) -> None:
        self.layers = tuple(range(host.layers) if self.layers is None else self.layers)
        for layer in self.layers:
            if layer not in range(host.layers):
                raise OptionError(f"layers: {layer} must be in 0..{host.layers - 1} for this model")

    def at(self, site: Site) -> bool:
        return site.layer in (self.layers or ())

    def read(self, site: Site, out: Tensor) -> None:
        k, v = site.k.double(), site.v.double()
        real = k.new_ones(k.shape[0], k.shape[2]) if site.real is None else site.real.to(k.dtype)
        for head in range(k.shape[1]):
            found = [_measure_head(k[b, head][real[b] > 0], v[b, head][real[b] > 0]) for b in range(k.shape[0])]
            means = {name: sum(row[name] for row in found) / len(found) for name in found[0]}
            self.rows.append({"layer": site.layer, "head": head, **means})


def _measure_head(k: Float[Tensor, "n d"], v: Float[Tensor, "n dv"]) -> dict[str, float]:
    n, d = k.shape
    unit = F.normalize(k, dim=-1)
    pairs = (unit.mT @ unit).square().sum() - n  # the sum of squared cosines of different keys
    snr = retrieval_snr(k, v).overall
    return {
        "tokens": n, "coherence": (pairs.clamp_min(0) / max(n * (n - 1), 1)).sqrt().item(), "snr": snr.item(),
        "effective": (1 + d / snr).item(),
    }  # fmt: skip
