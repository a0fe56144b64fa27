"""KV-head SVD: a model with fewer key/value heads, by a low-rank basis of what groups of heads put in the cache.

Effectively Compress KV Heads for LLM (2024), arXiv 2406.07056. There is no official code. Not in our sources, and so
arguments or choices made here: how much text calibrates (`data`), which heads form a group (`order`), how biases are
absorbed (they are part of the caches), and how weights give a basis for rotated keys (`rotated_weights`). The paper
trains the converted model further; this is left to the caller. `rope="pairs"` is ours.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, UnsupportedModel
from foveate.host import Host
from foveate.host.hf.layout import layout
from foveate.host.hf.model import host
from foveate.kv.conversion.attention_modules import Sizes, has_norms, modules, out_name, second_moments
from foveate.kv.conversion.compressed_keys import FIELD, CompressedKeyAttention, swap
from foveate.kv.conversion.group_basis import Basis, group_basis, pooled_basis, weight_moments
from foveate.kv.renumbered import rotations

Kind = Literal["svd_a", "svd_w", "mean_pool"]
_TRIAL, _TOLERANCE = 8, 2e-2


@torch.no_grad()
def compress_kv_heads(
    model: PreTrainedModel,
    groups: int,
    data: Iterable[Tensor] = (),
    *,
    method: Kind = "svd_a",
    rope: Literal["post", "pairs"] = "post",
    order: Int[Tensor, "l hkv"] | None = None,
    rotated_weights: bool = False,
) -> PreTrainedModel:
    """Return a copy of a decoder with `groups` key/value heads: its cache is `Hkv / groups` times as small.

    The heads of a group become one head of the same width d: keys and values of the t heads, side by side, are
    projected onto their d main directions. With one head a group nothing is lost; caches of rank d are exact. Values,
    and keys without rotary embedding, cost nothing more at run time: the maps go into the projections. The wrong choice
    without further training where few heads remain, and for a model that is already grouped and has no slack left.

    Keys with rotary embedding turn with their position, which a projection before it cannot follow. "post" compresses
    them after it, as the paper does: two maps of `d²` products for each head and token stay in the model, whose
    attention modules are then Foveate's (`save_pretrained` works as ever; `load_compressed` loads). "pairs" takes only
    maps that commute with the rotation: each pair of channels is a complex number, and t of them become one. It loses
    more, and gives a plain model of the same class, which any library loads.

    Args:
        model: a decoder of transformers with linear q_proj, k_proj, v_proj and o_proj.
        groups: key/value heads of the result; it divides those of the model.
        data: token ids `(B, N)` without padding, for "svd_a" only; 128 sequences of 2,048 tokens are usual.
        method: "svd_a" (from the caches of `data`), "svd_w" (from the weights), or "mean_pool" (the baseline: means).
        rope: see above; without effect on keys that do not rotate, and for "mean_pool", whose means commute.
        order: order of the key/value heads, of which neighbours form a group, for each layer; None keeps the model's.
        rotated_weights: for "svd_w" with "post": whether keys' weights are averaged over positions of their rotation.

    Raises:
        UnsupportedModel: the model's attention is built in another way; the model is left as it is.
    """
    here = host(model)
    validate.one_of("method", method, ("svd_a", "svd_w", "mean_pool"))
    validate.one_of("rope", rope, ("post", "pairs"))
    validate.flag("rotated_weights", rotated_weights)
    found, sizes, sorting = _checked(here, groups, order)
    turning = rotations(here)
    plain = {
        layer for layer, module in found.items()
        if (turning[layer] is None or rope == "pairs" or method == "mean_pool") and not has_norms(module)
    }  # fmt: skip
    if len(plain) < len(found) and (rope == "pairs" or method == "mean_pool"):
        raise UnsupportedModel(
            f"{type(model).__name__} normalises keys after their projection, so that no projection can merge them; "
            f'use rope="post" with "svd_a" or "svd_w"'
        )
    moments = _moments(here, found, sizes, data, groups, sorting, method, rotated_weights and rope == "post")
    bases = {}
    for layer in found:
        if moments is None:
            bases[layer] = (pooled_basis(sizes, groups),) * 2
        else:
            commuting = turning[layer] if rope == "pairs" else None
            keys, values = moments[0][layer], moments[1][layer]
            bases[layer] = group_basis(keys, sizes.width, commuting), group_basis(values, sizes.width, None)
    return _converted(here, found, sizes, groups, sorting, bases, plain)


@torch.no_grad()
def kv_spectrum(model: PreTrainedModel, data: Iterable[Tensor], groups: int) -> dict[str, Float[Tensor, "l g td"]]:
    """Return the share of the caches' energy in their first 1, 2, ... t·d directions, by layer and group.

    `found["keys"][..., d - 1]` is what a conversion to `groups` heads keeps of the rotated keys' squared size;
    "values" likewise. Cheap: one pass over the data, and nothing is converted.
    """
    here = host(model)
    found, sizes, sorting = _checked(here, groups, None)
    out = {}
    for name, moments in zip(("keys", "values"), second_moments(here, data, groups, sorting), strict=True):
        if len(moments) < len(found):
            raise OptionError("data must hold at least one tensor of token ids (B, N); got none")
        energy = torch.stack([torch.linalg.eigvalsh(moments[layer]).flip(-1).clamp_min(0) for layer in sorted(found)])
        out[name] = (energy.cumsum(-1) / energy.sum(-1, keepdim=True).clamp_min(1e-300)).float()
    return out


def _checked(here: Host, groups: int, order: Tensor | None) -> tuple[dict[int, nn.Module], Sizes, dict[int, Tensor]]:
    """Return the modules, their sizes and the order of each layer's heads, if the call fits the model."""
    validate.count("groups", groups, 1)
    layout(here)
    if getattr(here.config, "num_key_value_heads", None) is None or getattr(here.config, FIELD, None):
        raise UnsupportedModel(
            f"{type(here.model).__name__} has no setting for its key/value heads, or its keys are compressed already"
        )
    found, sizes = modules(here)
    if sizes.kv_heads % groups:
        raise OptionError(f"groups={groups} must divide the model's {sizes.kv_heads} key/value heads")
    natural = torch.arange(sizes.kv_heads).expand(len(found), -1)
    order = natural if order is None else order
    if tuple(order.shape) != tuple(natural.shape) or not torch.equal(order.cpu().long().sort(-1).values, natural):
        raise ShapeError(
            f"order must hold each of the {sizes.kv_heads} heads once for each of {len(found)} layers; got "
            f"{tuple(order.shape)}"
        )
    return found, sizes, {layer: row.cpu().long() for layer, row in zip(sorted(found), order, strict=True)}


def _moments(
    here: Host, found: dict[int, nn.Module], sizes: Sizes, data: Iterable[Tensor], groups: int,
    sorting: dict[int, Tensor], method: Kind, rotated: bool,
) -> tuple[dict[int, Tensor], dict[int, Tensor]] | None:  # fmt: skip
    """Return second moments of keys and values by layer, from data or from weights; None for the mean."""
    if method == "mean_pool":
        return None
    if method == "svd_w":
        turning = rotations(here) if rotated else dict.fromkeys(found)
        length = int(getattr(here.config, "max_position_embeddings", None) or 2048)
        keys, values = {}, {}
        for layer, module in found.items():
            k, v = (_rows(getattr(module, name).weight, sorting[layer]) for name in ("k_proj", "v_proj"))
            keys[layer] = weight_moments(k, groups, turning[layer], length)
            values[layer] = weight_moments(v, groups, None, length)
        return keys, values
    keys, values = second_moments(here, data, groups, sorting)
    if len(keys) < len(found):
        raise OptionError('data must hold at least one tensor of token ids (B, N) for method="svd_a"; got none')
    return keys, values


def _rows(weight: Tensor, order: Tensor) -> Float[Tensor, "h d c"]:
    """Return a projection's weight by head, in order and in float64; a bias is a weight with one column."""
    return (
        weight.detach()
        .double()
        .cpu()
        .unflatten(0, (order.shape[0], -1))[order]
        .reshape(order.shape[0], -1, weight[0].numel())
    )


def _converted(
    here: Host, found: dict[int, nn.Module], sizes: Sizes, groups: int, sorting: dict[int, Tensor],
    bases: dict[int, tuple[Basis, Basis]], plain: set[int],
) -> PreTrainedModel:  # fmt: skip
    """Return the copy of the model with rewritten projections."""
    names = {module: name for name, module in here.model.named_modules()}
    names_of = {layer: names[module] for layer, module in found.items()}
    model = copy.deepcopy(here.model)
    config = model.config.get_text_config()
    compressed = {names_of[layer]: sizes.kv_heads for layer in sorted(found) if layer not in plain}
    made = swap(model, compressed, sizes.kv_heads) if compressed else {}
    if made:
        _try(here.model, model)
    config.num_key_value_heads = groups
    for layer, name in names_of.items():
        module = model.get_submodule(name)
        module.num_key_value_groups = sizes.heads // groups
        for field in ("num_key_value_heads", "num_kv_heads"):
            if hasattr(module, field):
                setattr(module, field, groups)
        keys, values = bases[layer]
        _rewrite(module, sizes, sorting[layer], keys, values, made.get(name))
        if name in made:
            made[name].groups = groups
    if compressed:
        setattr(config, FIELD, compressed)
    return model


def _rewrite(
    module: nn.Module, sizes: Sizes, order: Tensor, keys: Basis, values: Basis, made: CompressedKeyAttention | None
) -> None:
    """Put the maps of keys and values into a module's projections, or those of keys beside them."""
    every = (order[:, None] * sizes.groups + torch.arange(sizes.groups)).flatten()  # the query heads in their new order
    if made is None:
        _project(module, "k_proj", lambda x: keys.merged(_rows(x, order)))
        up = keys.up.repeat_interleave(sizes.groups, 0)
        _project(module, "q_proj", lambda x: up.transpose(1, 2) @ _rows(x, every))
    else:
        for name, some in (("k_proj", order), ("q_proj", every)):
            _project(module, name, lambda x, some=some: _rows(x, some))
        for parameter, value in ((made.key_map, keys.down), (made.query_map, keys.up)):
            parameter.data.copy_(value)
    _project(module, "v_proj", lambda x: values.merged(_rows(x, order)))
    out = getattr(module, out_name(module))
    up = values.up.repeat_interleave(sizes.groups, 0)
    columns = _rows(out.weight.T, every).transpose(1, 2) @ up  # (heads, C, d)
    out.weight.data.copy_(columns.permute(1, 0, 2).flatten(1))


def _project(module: nn.Module, name: str, change: object) -> None:
    """Replace a projection by one with changed rows of its weight and of its bias."""
    assert callable(change)
    old = getattr(module, name)
    weight = change(old.weight).flatten(0, 1)
    new = nn.Linear(weight.shape[1], weight.shape[0], old.bias is not None, old.weight.device, old.weight.dtype)
    new.weight.data.copy_(weight)
    if old.bias is not None:
        new.bias.data.copy_(change(old.bias).flatten())
    for parameter, before in zip(new.parameters(), old.parameters(), strict=True):
        parameter.requires_grad_(before.requires_grad)
    setattr(module, name, new)


def _try(before: PreTrainedModel, after: PreTrainedModel) -> None:
    """Refuse a model whose attention is not what ours computes with maps that change nothing."""
    ids = torch.arange(_TRIAL, device=before.device)[None] % before.config.get_text_config().vocab_size
    why = "its result differs"
    try:
        expected, got = (model.eval()(ids, use_cache=False).logits.float() for model in (before, after))
        if (expected - got).abs().max() <= _TOLERANCE * expected.abs().max():
            return
    except Exception as error:  # noqa: BLE001  the model's own code may raise anything
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    raise UnsupportedModel(
        f"{type(before).__name__}: its attention does more than rotate and attend, so that it cannot be rebuilt "
        f'({why}); rope="pairs" changes weights only'
    )
