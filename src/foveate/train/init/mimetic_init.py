"""Mimetic initialisation: start self-attention with the structure that trained attention has.

Mimetic Initialization of Self-Attention Layers (2023), arXiv 2305.09828.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self, cast, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.nn import MultiHeadAttention
from foveate.train.base.initialiser import Initialiser


@dataclass(frozen=True)
class Projections:
    """The projections of one layer, oriented so that tokens are rows: a query is `x @ q`.

    Args:
        q, k, v: `(C, H * D)`, views of the layer's own weights.
        out: `(H * D, C)`, also a view.
        biases: the biases of all four.
        heads: H.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    biases: tuple[Tensor, ...]
    heads: int


@torch.no_grad()
def mimetic_init(
    module: nn.Module, *, alpha_qk: float = 0.7, beta_qk: float = 0.7, alpha_vo: float = 0.4, beta_vo: float = 0.4,
    generator: torch.Generator | None = None,
) -> int:  # fmt: skip
    """Set the projections of every self-attention layer inside `module`; return the number of layers.

    Trained transformers have `W_q W_kᵀ` near a multiple of the identity and `W_v W_o` near a negative one. So each
    head's `W_q W_kᵀ` becomes the best approximation of rank D to `alpha_qk Z + beta_qk I`, and each layer's `W_v W_o`
    becomes `alpha_vo Z - beta_vo I`, with fresh `Z` of variance `1 / C`. Biases of these
    projections become 0; nothing else changes, and no weights are tied. Cost: one SVD of a C x C matrix per head, and
    one per layer.

    With sinusoidal or learned positions at the input, each token then attends to itself and to similar tokens at first.
    It is meant for networks trained from scratch on little data, and is the wrong choice for a pretrained one.

    Args:
        module: a module with `foveate.nn.MultiHeadAttention` layers (without grouped heads, and with `Dv = D = C / H`),
            `torch.nn.MultiheadAttention`, or timm's attention (`qkv`, `proj`, `num_heads`).
        alpha_qk, beta_qk: weights of noise and identity for queries and keys; defaults are the paper's for vision
            transformers.
        alpha_vo, beta_vo: the same for values and output.
        generator: draws Z.

    Raises:
        OptionError: if there is no such layer, or a layer's matrices have other shapes.
    """
    _check_weights(alpha_qk=alpha_qk, beta_qk=beta_qk, alpha_vo=alpha_vo, beta_vo=beta_vo)
    layers = list(projections(module))
    if not layers:
        raise OptionError(f"module={type(module).__name__} must hold a known self-attention layer; it has none")
    for layer in layers:
        _queries_and_keys(layer, alpha_qk, beta_qk, generator)
        left, right = _factors(_target(layer.q, alpha_vo, -beta_vo, generator))
        layer.v.copy_(left)
        layer.out.copy_(right)
        for bias in layer.biases:
            bias.zero_()
    return len(layers)


@final
@dataclass(eq=False)
class MimeticInit(Initialiser):
    """`mimetic_init` as an initialiser, for every self-attention layer inside a model.

    Args:
        alpha_qk, beta_qk, alpha_vo, beta_vo: see `mimetic_init`.
    """

    alpha_qk: float = 0.7
    beta_qk: float = 0.7
    alpha_vo: float = 0.4
    beta_vo: float = 0.4

    def __post_init__(self) -> None:
        _check_weights(**vars(self))

    def _set(self, model: nn.Module, generator: torch.Generator | None) -> None:
        mimetic_init(model, **vars(self), generator=generator)

    @classmethod
    def example(cls) -> tuple[Self, nn.Module, Mapping[str, Any]]:
        net = nn.Sequential(nn.Linear(8, 8), MultiHeadAttention(8, 2, bias=True), nn.Linear(8, 8))
        return cls(), net, {"input": torch.linspace(-1, 1, 48).view(1, 6, 8)}


def _check_weights(**weights: float) -> None:
    for name, value in weights.items():
        validate.at_least(name, value, 0)


def mimetic_products(module: nn.Module) -> tuple[Float[Tensor, "h c c"], Float[Tensor, "c c"]]:
    """Return each head's `W_q W_kᵀ` and the layer's `W_v W_o`, of the first self-attention layer inside `module`."""
    layer = next(projections(module), None)
    if layer is None:
        raise OptionError(f"module={type(module).__name__} must hold a known self-attention layer; it has none")
    q, k = (x.unflatten(1, (layer.heads, -1)).transpose(0, 1) for x in (layer.q, layer.k))
    return q @ k.mT, layer.v @ layer.out


def projections(module: nn.Module) -> Iterator[Projections]:
    """Yield the self-attention layers inside `module`: Foveate's, PyTorch's and timm's."""
    for part in module.modules():
        if isinstance(part, MultiHeadAttention):
            yield _checked(_ours(part))
        elif isinstance(part, nn.MultiheadAttention):
            yield _checked(_torchs(part))
        elif all(hasattr(part, name) for name in ("qkv", "proj", "num_heads")):
            yield _checked(_timms(cast(_Timm, part)))


def _ours(layer: MultiHeadAttention) -> Projections:
    linear = (layer.q, layer.k, layer.v, layer.out)
    biases = tuple(part.bias for part in linear if part.bias is not None)
    q, k, v, out = (part.weight.mT for part in linear)
    return Projections(q, k, v, out, biases, layer.heads)


def _torchs(layer: nn.MultiheadAttention) -> Projections:
    if layer.in_proj_weight is None:
        raise OptionError(
            f"kdim={layer.kdim} and vdim={layer.vdim} must equal embed_dim={layer.embed_dim}: "
            "mimetic_init sets self-attention only"
        )
    q, k, v = layer.in_proj_weight.chunk(3)
    biases = () if layer.in_proj_bias is None else (layer.in_proj_bias, layer.out_proj.bias)
    return Projections(q.mT, k.mT, v.mT, layer.out_proj.weight.mT, biases, layer.num_heads)


class _Timm(Protocol):
    """The modules of timm's attention."""

    qkv: nn.Linear
    proj: nn.Linear
    num_heads: int


def _timms(layer: _Timm) -> Projections:
    q, k, v = layer.qkv.weight.chunk(3)
    biases = tuple(part.bias for part in (layer.qkv, layer.proj) if part.bias is not None)
    return Projections(q.mT, k.mT, v.mT, layer.proj.weight.mT, biases, layer.num_heads)


def _checked(layer: Projections) -> Projections:
    width = layer.q.shape[0]
    shapes = {tuple(x.shape) for x in (layer.q, layer.k, layer.v, layer.out)}
    if shapes != {(width, width)}:
        raise OptionError(f"module's projections must be C x C with C={width}; got {sorted(shapes)}")
    return layer


def _queries_and_keys(layer: Projections, alpha: float, beta: float, generator: torch.Generator | None) -> None:
    width = layer.q.shape[1] // layer.heads
    for head in range(layer.heads):
        left, right = _factors(_target(layer.q, alpha, beta, generator))
        at = slice(head * width, (head + 1) * width)
        layer.q[:, at] = left[:, :width]
        layer.k[:, at] = right[:width].mT


def _target(like: Tensor, alpha: float, beta: float, generator: torch.Generator | None) -> Float[Tensor, "c c"]:
    width = like.shape[0]
    noise = torch.randn(width, width, generator=generator, dtype=torch.float64) * width**-0.5
    return (alpha * noise + beta * torch.eye(width, dtype=torch.float64)).to(like.device)


def _factors(target: Tensor) -> tuple[Tensor, Tensor]:
    """Return two matrices whose product is `target`, with the largest singular values first."""
    u, s, vh = torch.linalg.svd(target)
    return u * s.sqrt(), s.sqrt()[:, None] * vh
