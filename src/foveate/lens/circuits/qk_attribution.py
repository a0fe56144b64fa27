"""QK attribution: a head's score of a key as a sum over pairs of a part of the query's stream and one of the key's.

    found = qk_attribution(model, ids, head=(2, 5), query=-1, key=17)
    found.total(), found.score                     # equal to rounding
    found.top(5)                                   # the pairs that matter: ("0.3", "embedding", 4.1) ...

A score is scale * q . k, and queries and keys are linear in the residual stream once the norms in front of attention,
and those of queries and keys (Qwen 3, Gemma 3), are frozen at their scale in the run. The stream is a sum of the
embedding and of what earlier heads, MLPs and biases add to it (`residual_parts`). So a score has one term for each pair
of parts. The model's own modules compute the queries and keys of the parts, rotary embedding included, so that its
positions are those of the run. As in A Mathematical Framework for Transformer Circuits (Elhage et al., 2021), where the
terms are those of the QK circuit. A soft cap, a mask and a bias by position come after the score.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host.entry import apply
from foveate.host.hf.model import host
from foveate.host.site import Site
from foveate.lens.circuits.direct_effects import FrozenNorm, residual_parts
from foveate.lens.circuits.interventions import Head, checked_heads
from foveate.lens.circuits.residual_stream import Inputs, Step, Trace, agree, as_mapping, chosen_tokens, trace, wide
from foveate.lens.circuits.stream_reads import Reading, StreamReads


@final
@dataclass(frozen=True, eq=False)
class QKAttribution:
    """The terms of one score in each text.

    Args:
        terms: the term of each part of the query's stream and each part of the key's.
        parts: names of the parts: "embedding"; "3.1" is a head; "mlp 3" and "bias 3" are of a layer, the bias being
            that of attention's output; "constant" has the biases of norms and projections.
        score: the model's own score, before a cap and a mask.
    """

    terms: Float[Tensor, "b p p"]
    parts: tuple[str, ...]
    score: Float[Tensor, " b"]

    def total(self) -> Float[Tensor, " b"]:
        """Return the sum of all terms: the score, to rounding."""
        return self.terms.sum((1, 2))

    def top(self, count: int = 10) -> list[tuple[str, str, float]]:
        """Return the largest terms in size, on average over texts: the query's part, the key's part, and the term."""
        validate.count("count", count, 1)
        mean = self.terms.mean(0)
        order = mean.abs().flatten().argsort(descending=True, stable=True)[:count].tolist()
        pairs = (divmod(number, len(self.parts)) for number in order)
        return [(self.parts[one], self.parts[other], float(mean[one, other])) for one, other in pairs]


def qk_attribution(
    model: object, inputs: Inputs, head: Head, query: Int[Tensor, " b"] | int, key: Int[Tensor, " b"] | int
) -> QKAttribution:
    """Return the score of a head at one query and one key of each text, as terms of the parts of the stream.

    Args:
        model: a decoder with a language-model head.
        inputs: token ids, or a tokenizer's mapping.
        head: layer and head.
        query, key: positions, one for all texts or for each; negative ones count from the end.

    Raises:
        OptionError: a key comes after its query.
        UnsupportedModel: the terms do not sum to the model's own score.
    """
    run = host(model)
    run.check_heads(checked_heads([head]))
    given = as_mapping(run, inputs)
    places = [chosen_tokens(given, run, position) for position in (query, key)]
    if bool((places[1] > places[0]).any()):
        raise OptionError(f"key={key} must not come after query={query}")
    (layer, number), traces = head, [trace(model, inputs, place) for place in places]
    reads = _ScoreRead(layer)
    with torch.no_grad(), apply(model, reads, on="decoder"):
        run.model(**{**given, "use_cache": False})
        site, reading = reads.site, reads.here.readings[layer]
        assert site is not None
        group = number // site.groups
        queries = _read_parts(traces[0], layer, reading, places[0], "q", number)
        keys = _read_parts(traces[1], layer, reading, places[1], "k", group)
    texts = torch.arange(len(places[0]))
    own = wide(site.q[texts, number, places[0]]) * wide(site.k[texts, group, places[1]])
    terms = site.scale * torch.einsum("bpd,brd->bpr", queries, keys)
    result = QKAttribution(terms, _names(traces[0], layer), site.scale * own.sum(-1))
    _check_sum(result, site)
    return result


class _ScoreRead(StreamReads):
    """Record a layer's call, and what it reads of the stream."""

    def __init__(self, layer: int) -> None:
        super().__init__([layer])
        self.site: Site | None = None

    def read(self, site: Site, out: Tensor) -> None:
        if site.layer in self.readers:
            self.site = site


def _names(found: Trace, layer: int) -> tuple[str, ...]:
    heads = max(block.heads.shape[1] for block in found.blocks)
    of_heads = [f"{number}.{head}" for number in range(layer) for head in range(heads)]
    others = [f"{kind} {number}" for kind in ("mlp", "bias") for number in range(layer)]
    return ("embedding", *of_heads, *others, "constant")


def _stream_parts(found: Trace, layer: int) -> Float[Tensor, "b p c"]:
    """Return the parts of the stream in front of a block; refuse parts that do not sum to it."""
    whole = residual_parts(found)
    of_heads = whole.heads[:, :layer].flatten(1, 2)
    parts = torch.cat([whole.embedding[:, None], of_heads, whole.mlps[:, :layer], whole.biases[:, :layer]], 1)
    if not agree(parts.sum(1), found.blocks[layer].entered):
        raise UnsupportedModel(f"the parts of the model do not sum to the residual stream in front of layer {layer}")
    return parts


def _read_parts(
    found: Trace, layer: int, reading: Reading, places: Int[Tensor, " b"], name: Any, head: int
) -> Float[Tensor, "b p d"]:
    """Return the query or the key that a head makes of each part of the stream; the last one is that of constants."""
    parts, before = _stream_parts(found, layer), found.blocks[layer].before
    assert before is not None  # the wiring refuses it
    constant = torch.zeros_like(parts[:, :1])
    for norm in map(FrozenNorm.of, before):
        parts, constant = norm.linear(parts), norm.linear(constant) + norm.bias
    made = []
    for text, place in enumerate(places.tolist()):
        here = reading.at(text, place)
        given = torch.cat([parts[text], constant[text], torch.zeros_like(constant[text])])
        with _frozen_norms(here, found.blocks[layer].attention.given[text]):
            read = wide(here.of_hidden(given[:, None, None])[name][:, 0, head, 0])
        made.append(torch.cat([read[:-2] - read[-1], read[-2:-1]]))  # affine: less its value at zero
    return torch.stack(made)


@contextmanager
def _frozen_norms(reading: Reading, hidden: Float[Tensor, " c"]) -> Iterator[None]:
    """Freeze the norms inside an attention module, those of queries and keys, at their scale for some hidden states."""
    steps = _norms_inside(reading, hidden)
    frozen = {step.module: FrozenNorm.of(step) for step in steps}

    def replace(module: nn.Module, args: tuple[Tensor, ...], made: Tensor) -> Tensor:
        norm, x = frozen[module], wide(args[0])
        rows = x.reshape(len(x), -1, x.shape[-1]).transpose(
            0, 1
        )  # one scale for each head, the parts beside each other
        return (norm.linear(rows) + norm.bias).transpose(0, 1).reshape(x.shape).to(made.dtype)

    with ExitStack() as stack:
        for module in frozen:
            stack.callback(module.register_forward_hook(replace).remove)
        yield


def _norms_inside(reading: Reading, hidden: Float[Tensor, " c"]) -> list[Step]:
    """Return the calls of the modules between projections and attention, which change vectors of some width."""
    steps = list[Step]()

    def keep(module: nn.Module, args: tuple[Any, ...], made: Any) -> None:
        x = args[0] if args else None
        if isinstance(x, Tensor) and isinstance(made, Tensor) and x.shape == made.shape and x is not made:
            steps.append(Step(module, x.reshape(-1, x.shape[-1]), made.reshape(-1, x.shape[-1])))

    with ExitStack() as stack:
        for module in reading.layer.attention.modules():
            has_weight = isinstance(getattr(module, "weight", None), Tensor)
            if has_weight and module.weight.ndim == 1 and not list(module.children()):
                stack.callback(module.register_forward_hook(keep).remove)
        reading.of_hidden(hidden[None, None, None])
    return steps


def _check_sum(result: QKAttribution, site: Site) -> None:
    """Refuse a score that is not the sum of its terms; the size of the terms sets the rounding."""
    gap = (result.total() - result.score).abs().amax()
    tolerance = max(8 * torch.finfo(site.q.dtype).eps, 1e-4)
    if not bool(gap <= tolerance * max(1.0, float(result.terms.abs().amax()))):
        raise UnsupportedModel(
            f"the terms sum to another score than the model's own, by up to {float(gap):.3g}: queries or keys of "
            f"{type(site.module).__name__} are more than norms, projections and rotations of the stream"
        )
