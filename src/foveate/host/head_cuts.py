"""Heads cut out of a model: a copy with smaller projections, which computes what the model computes without them."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host.hf.model import Host, host

#: The names of the projections of queries, keys and values in transformers' attention modules.
_INPUTS = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))


def cut_heads(model: object, heads: Iterable[tuple[int, int]]) -> PreTrainedModel:
    """Return a copy of a model without some heads: their rows of Q, K and V and their columns of O are gone.

    The copy equals the model with these heads' outputs set to zero, up to rounding, and is smaller and faster. Heads
    that share keys go together. A layer that loses all its heads keeps the first group with zero output weights. The
    copy's configuration still has the old number of heads, so that it cannot be saved and loaded again; `foveate.apply`
    works on it.

    Args:
        model: a transformers model with one stack of layers.
        heads: pairs of layer and query head.

    Raises:
        OptionError: a head is not in the model, or goes without the others that share its keys.
        UnsupportedModel: a projection has an unknown name, is not linear, or something else in the module has a size
            that depends on the number of heads.
    """
    found = host(model)
    gone: dict[int, set[int]] = {}
    listed = list(heads)
    found.check_heads(listed)
    for layer, head in listed:
        gone.setdefault(layer, set()).add(head)
    small = copy.deepcopy(found.model)
    for order, module in enumerate(Host(small).scope()):
        number = getattr(module, "layer_idx", None)
        lost = gone.pop(number if isinstance(number, int) else order, None)
        if lost:
            _cut(small, module, found, lost)
    if gone:
        raise OptionError(f"heads: layers {sorted(gone)} of {type(model).__name__} do not attend")
    return small


def _cut(model: nn.Module, module: nn.Module, found: Host, lost: set[int]) -> None:
    """Cut heads out of one attention module."""
    group = found.heads // found.kv_heads
    groups = {head // group for head in lost}
    if len(lost) < group * len(groups):
        raise OptionError(f"heads {sorted(lost)} share keys with others: only whole groups of {group} can be cut")
    kept = [number for number in range(found.kv_heads) if number not in groups]
    inputs, output = _projections(model, module)
    width = inputs[1].out_features // found.kv_heads
    for name, parameter in module.named_parameters():
        if name.split(".")[0] not in _names() and parameter.shape[:1] != (width,):
            raise UnsupportedModel(f"{type(module).__name__}.{name} is {tuple(parameter.shape)}, which may depend "
                                   f"on the number of heads; cut_heads knows no way to cut it")  # fmt: skip
    stay = torch.tensor(kept or [0])
    for linear in inputs:
        _keep_rows(linear, _rows(stay, linear.out_features // found.kv_heads))
    columns = _rows(stay, output.in_features // found.kv_heads)
    output.weight = nn.Parameter(output.weight.detach()[:, columns].mul(float(bool(kept))).clone())
    output.in_features = len(columns)
    sizes = {"num_heads": len(stay) * group, "num_attention_heads": len(stay) * group, "num_key_value_heads": len(stay),
             "all_head_size": inputs[0].out_features}  # fmt: skip
    for name in sizes.keys() & vars(module).keys():
        setattr(module, name, sizes[name])


def _rows(groups: Tensor, size: int) -> Tensor:
    """Return the numbers of the rows of some groups of heads, which have `size` rows each."""
    return (groups[:, None] * size + torch.arange(size)).flatten()


def _keep_rows(linear: nn.Linear, rows: Tensor) -> None:
    linear.weight = nn.Parameter(linear.weight.detach()[rows].clone())
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[rows].clone())
    linear.out_features = len(rows)


def _names() -> set[str]:
    return {name for names in _INPUTS for name in names} | {"o_proj", "out_proj"}


def _projections(model: nn.Module, module: nn.Module) -> tuple[list[nn.Linear], nn.Linear]:
    """Return the projections of queries, keys and values, and that of the output, which may stand beside the module."""
    path = next(name for name, each in model.named_modules() if each is module)
    beside = getattr(model.get_submodule(path.rpartition(".")[0]), "output", None)
    options = [[getattr(module, name, None) for name in names] for names in _INPUTS]
    options.append([getattr(module, "o_proj", None), getattr(module, "out_proj", None), getattr(beside, "dense", None)])
    found = [next((each for each in some if isinstance(each, nn.Linear)), None) for some in options]
    linear = [each for each in found if each is not None]
    if len(linear) < len(found):
        raise UnsupportedModel(f"{type(module).__name__} has no separate linear projections of queries, keys, values "
                               f"and output, which cut_heads needs")  # fmt: skip
    return linear[:3], linear[3]
