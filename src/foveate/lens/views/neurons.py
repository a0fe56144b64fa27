"""Neuron view: one query's weights of one head, taken apart into the products of single neurons.

A neuron is a channel of the head. For a query i and a key j the logit is `scale * sum(q_i * k_j)`, so that each
neuron's product is its share of the logit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.errors import OptionError
from foveate.lens.views.stack import Products, Stack

#: The largest difference between a map and the softmax of its products that counts as rounding.
ROUNDING = 1e-3


@final
@dataclass(frozen=True, eq=False)
class NeuronTable:
    """One query's weights over the `n` keys that it may see, taken apart by neuron.

    Args:
        layer, head, query: the row of the map that it takes apart.
        text: the query's token.
        tokens: the keys' tokens.
        keys: the keys' places.
        q: the query.
        k: the keys.
        qk: the products of the query's and each key's neurons.
        logit: their scaled sum, with the model's soft cap and bias.
        prob: the softmax of the logits: the row of the map.
    """

    layer: int
    head: int
    query: int
    text: str
    tokens: Sequence[str]
    keys: Int[Tensor, " n"]
    q: Float[Tensor, " d"]
    k: Float[Tensor, "n d"]
    qk: Float[Tensor, "n d"]
    logit: Float[Tensor, " n"]
    prob: Float[Tensor, " n"]

    def strongest(self, key: int, count: int = 5) -> list[tuple[int, float]]:
        """Return the neurons with the largest products for a key, by size, each with its product.

        Args:
            key: the key's place.
            count: the number of neurons.
        """
        at = (self.keys == key).nonzero().flatten()
        if not len(at):
            raise OptionError(f"key={key} must be a key that query {self.query} sees: {self.keys.tolist()}")
        row = self.qk[int(at[0])]
        best = row.abs().topk(min(count, len(row))).indices
        return [(int(neuron), float(row[neuron])) for neuron in best]


def neuron_table(stack: Stack, layer: int, head: int, query: int) -> NeuronTable:
    """Take a query's row of a map apart.

    Raises:
        OptionError: there are no queries and keys of this layer, or the row is not the softmax of their products.
    """
    weights, products = stack.map(layer, head), products_of(stack, layer)
    if not 0 <= query < len(weights):
        raise OptionError(f"query={query} must be in 0..{len(weights) - 1}")
    row = weights[query]
    # a key that the model hides has the weight 0; so has one whose weight is too small for a float, which adds nothing
    keys = (row > 0).nonzero().flatten()
    q, k = products.q[head, query].float(), products.keys_of(head)[keys].float()
    qk = q * k
    logit = qk.sum(-1) * products.scale
    if products.softcap is not None:
        logit = torch.tanh(logit / products.softcap) * products.softcap
    if products.bias is not None:
        logit = logit + products.bias[head if len(products.bias) > 1 else 0, query, keys].float()
    prob = _softmax(logit, None if products.sinks is None else products.sinks[head])
    off = float((prob - row[keys]).abs().max()) if len(keys) else 0.0
    if off > ROUNDING:
        raise OptionError(
            f"layer={layer}, head={head}: its map is not the softmax of its products (off by {off:.2g}); give the "
            f"model's scale, bias or softcap"
        )
    tokens = [stack.keys[key] for key in keys.tolist()]
    return NeuronTable(layer, head, query, stack.queries[query], tokens, keys, q, k, qk, logit, prob)


def products_of(stack: Stack, layer: int) -> Products:
    """Return the queries and keys of a layer.

    Raises:
        OptionError: they are not known.
    """
    found = stack.products.get(layer)
    if found is None:
        known = f"of layers {sorted(stack.products)} only" if stack.products else "nowhere"
        raise OptionError(f"layer={layer}: neurons need q and k, which are known {known}; give q= and k=")
    return found


def neuron_distance(stack: Stack, layer: int, head: int) -> Float[Tensor, " d"]:
    """Return the correlation of each neuron's product with the distance of its query and key, over all visible pairs.

    A neuron far below 0 makes the head prefer near tokens. A product that never changes has the correlation 0.
    """
    if stack.places is None:
        raise OptionError("distances need queries and keys of the same text")
    products, seen = products_of(stack, layer), (stack.map(layer, head) > 0).double()
    q, k = products.q[head].double(), products.keys_of(head).double()
    places = torch.tensor(list(stack.places), dtype=torch.float64, device=q.device)
    far = (places[:, None] - torch.arange(len(k), device=q.device)).abs()
    pairs = seen.sum()
    first, second = (q * (seen @ k)).sum(0) / pairs, (q.square() * (seen @ k.square())).sum(0) / pairs
    distance, square = (seen * far).sum() / pairs, (seen * far.square()).sum() / pairs
    both = (q * ((seen * far) @ k)).sum(0) / pairs
    spread = (second - first.square()).clamp_min(0.0), (square - distance.square()).clamp_min(0.0)
    steady = spread[0] <= 1e-12 * second
    return ((both - first * distance) / (spread[0] * spread[1]).sqrt()).masked_fill(steady, 0.0).nan_to_num(0.0).float()


def neuron_strength(stack: Stack, layer: int, head: int) -> Float[Tensor, " d"]:
    """Return the mean size of each neuron's product over all visible pairs."""
    products, seen = products_of(stack, layer), (stack.map(layer, head) > 0).double()
    q, k = products.q[head].double().abs(), products.keys_of(head).double().abs()
    return ((q * (seen @ k)).sum(0) / seen.sum().clamp_min(1.0)).float()


def _softmax(logit: Float[Tensor, " n"], sink: Tensor | None) -> Float[Tensor, " n"]:
    if sink is None:
        return logit.softmax(-1)
    return torch.cat([logit, sink.float().reshape(1)]).softmax(-1)[:-1]
