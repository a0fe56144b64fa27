"""A layer's output projection, cut by heads, and the values behind it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from foveate.core.errors import UnsupportedModel
from foveate.host.hf.model import Host
from foveate.host.site import Site

#: The largest number of projected numbers that are held at a time.
TILE = 1 << 22


def check_projections(host: Host) -> None:
    """Refuse a model with an attention layer whose output projection is not linear, or has another name."""
    for module in host.scope("decoder"):
        _projection(module)


def _projection(module: nn.Module) -> nn.Linear:
    found = getattr(module, "o_proj", None) or getattr(module, "out_proj", None)
    if not isinstance(found, nn.Linear):
        raise UnsupportedModel(
            f"{type(module).__name__} has no linear o_proj or out_proj, so that the output of a token is unknown"
        )
    return found


def _parts(site: Site) -> Float[Tensor, "c hq dv"]:
    """Return each query head's part of the output projection."""
    weight, heads, width = _projection(site.module).weight.detach(), site.q.shape[1], site.v.shape[-1]
    if weight.shape[1] != heads * width:
        raise UnsupportedModel(
            f"the output projection of {type(site.module).__name__} takes {weight.shape[1]} numbers, and {heads} heads "
            f"give {heads * width}"
        )
    return weight.unflatten(1, (heads, -1))


def projection_holders(host: Host) -> dict[nn.Module, nn.Module]:
    """Return, by attention module, the module that has its output projection: itself, or BERT's `output` beside it."""
    parents = {child: parent for parent in host.model.modules() for child in parent.children()}
    found: dict[nn.Module, nn.Module] = {}
    for module in host.attention_modules():
        beside = getattr(parents.get(module), "output", None)
        found[module] = beside if _linear(module) is None and isinstance(beside, nn.Module) else module
    return found


def output_projection(module: nn.Module) -> nn.Linear | Conv1D:
    """Return the output projection of an attention module, which may have any of the names that models give it."""
    linear = _linear(module)
    if linear is None:
        raise UnsupportedModel(f"{type(module).__name__} has no linear o_proj, out_proj, c_proj, dense or o")
    return linear


def _linear(module: nn.Module) -> nn.Linear | Conv1D | None:
    found = [getattr(module, name, None) for name in ("o_proj", "out_proj", "c_proj", "dense", "o")]
    if isinstance(last := getattr(module, "to_out", None), nn.ModuleList):  # diffusers' projection, before its dropout
        found.append(last[0])
    return next((each for each in found if isinstance(each, nn.Linear | Conv1D)), None)


def projection_parts(module: nn.Module, heads: int) -> tuple[Float[Tensor, "hq dv c"], Float[Tensor, " c"] | None]:
    """Return each head's part of an attention module's output projection, and the bias that all heads share, if any.

    The projection may have any of the names that models give it, and may be GPT-2's `Conv1D`.
    """
    linear = output_projection(module)
    weight = linear.weight.detach() if isinstance(linear, Conv1D) else linear.weight.detach().mT
    if weight.shape[0] % heads:
        raise UnsupportedModel(f"the output projection of {type(module).__name__} cannot be cut into {heads} heads")
    return weight.unflatten(0, (heads, -1)), None if linear.bias is None else linear.bias.detach()


def projected_heads(site: Site, x: Float[Tensor, "b hq dv"]) -> Float[Tensor, "b hq c"]:
    """Return one output of each query head behind its part of the output projection."""
    return torch.einsum("bhd,chd->bhc", x.float(), _parts(site).float())


def projected_norms(site: Site, order: int = 1) -> Float[Tensor, "b hq s"]:
    """Return the norm of each value behind each query head's part of the output projection.

    `order` is 1 for the sum of absolute numbers, 2 for the Euclidean norm.
    """
    v, heads = site.v, site.q.shape[1]
    parts = _parts(site).to(v.dtype)
    step, groups = max(1, TILE // (v.shape[0] * parts.shape[0])), heads // v.shape[1]
    norms = v.new_empty(v.shape[0], heads, v.shape[2], dtype=torch.float32)
    for head in range(heads):
        for start in range(0, v.shape[2], step):
            some = v[:, head // groups, start : start + step].detach() @ parts[:, head].mT
            norms[:, head, start : start + step] = torch.linalg.vector_norm(some.float(), order, dim=-1)
    return norms
