"""Attention whose keys are compressed after their rotary embedding, as a part of a transformers model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

# the name under which transformers, and Foveate's host, look for a module's own attention
from transformers.models.llama.modeling_llama import eager_attention_forward

from foveate.core.errors import UnsupportedModel
from foveate.kv.conversion.attention_modules import out_name

#: The field of a configuration that lists the layers with compressed keys.
FIELD = "compressed_keys"
_LATER = ("attn_logit_softcapping", "attention_sinks", "attention_chunk_size")  # settings that change attention


class CompressedKeyAttention(nn.Module):
    """A layer's attention, whose cache holds `groups` heads of keys: each is a combination of `t` rotated heads.

    `k = Σᵢ rotate(kᵢ) downᵢ` enters the cache, and a query that read head i becomes `rotate(q) upᵢ`. This costs
    `d²` products for each head and token beside attention. Both maps are parameters, so that they can be trained.

    Args:
        source: the model's own module; its projections are taken over, its values are grouped already.
        kv_heads: heads that its `k_proj` makes.
        groups: heads that the cache holds.
    """

    def __init__(self, source: Any, kv_heads: int, groups: int) -> None:
        super().__init__()
        self.config: Any = source.config
        self.layer_idx = source.layer_idx
        self.head_dim, self.scaling, self.is_causal = source.head_dim, source.scaling, source.is_causal
        self.attention_dropout = getattr(source, "attention_dropout", 0.0)
        self.sliding_window = getattr(source, "sliding_window", getattr(source.config, "sliding_window", None))
        self.kv_heads, self.num_key_value_groups = kv_heads, source.config.num_attention_heads // groups
        self.q_proj, self.k_proj, self.v_proj = source.q_proj, source.k_proj, source.v_proj
        self.q_norm: nn.Module | None = getattr(source, "q_norm", None)
        self.k_norm: nn.Module | None = getattr(source, "k_norm", None)
        self.out_name = out_name(source)
        setattr(self, self.out_name, getattr(source, self.out_name))
        self.rotate: Callable[..., tuple[Tensor, Tensor]] = rotary_of(source)
        weight, d = source.k_proj.weight, int(source.head_dim)
        eye = torch.eye(d, dtype=weight.dtype, device=weight.device).repeat(kv_heads, 1, 1)
        self.key_map, self.query_map = nn.Parameter(eye), nn.Parameter(eye.clone())
        self.groups = groups

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Any = None,
        past_key_values: Any = None, **call: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (x(hidden_states).view(shape) for x in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rotate(q.transpose(1, 2), k.transpose(1, 2), *position_embeddings)
        q, k, v = self._mapped(q), self._compressed(k), v.transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, weights = attend(
            self, q, k, v, attention_mask, dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling, sliding_window=self.sliding_window, **call,
        )  # fmt: skip
        return getattr(self, self.out_name)(out.reshape(*shape[:-2], -1).contiguous()), weights

    def _mapped(self, q: Float[Tensor, "b hq n d"]) -> Float[Tensor, "b hq n d"]:
        return (q.unflatten(1, (self.kv_heads, -1)) @ self.query_map[:, None]).flatten(1, 2)

    def _compressed(self, k: Float[Tensor, "b h n d"]) -> Float[Tensor, "b g n d"]:
        return (k @ self.key_map).unflatten(1, (self.groups, -1)).sum(2)


def rotary_of(module: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the function with which a model's attention rotates queries and keys."""
    found = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    later = [name for name in _LATER if getattr(module.config, name, None)]
    if found is None or later or getattr(module, "sinks", None) is not None:
        why = f"{later[0]} is set" if later else "it has no rotary embedding of the usual form, or learnt sinks"
        raise UnsupportedModel(
            f"{type(module).__name__}: keys cannot be compressed after their rotary embedding, since {why}; "
            f'rope="pairs" changes weights only'
        )
    return found


def swap(model: PreTrainedModel, layers: dict[str, int], groups: int) -> dict[str, CompressedKeyAttention]:
    """Replace attention modules by compressed ones, with identity maps; return them by their names.

    Args:
        model: a decoder, which is changed.
        layers: names of the modules, with the number of heads that their `k_proj` makes.
        groups: heads that the cache holds.
    """
    made = {}
    for name, kv_heads in layers.items():
        parent, _, last = name.rpartition(".")
        made[name] = CompressedKeyAttention(model.get_submodule(name), kv_heads, groups)
        setattr(model.get_submodule(parent), last, made[name])
    return made


def load_compressed(folder: str | Path, config: PreTrainedConfig | None = None, **options: Any) -> Any:
    """Load a converted model that `save_pretrained` wrote. Models without compressed keys load as any other.

    Args:
        folder: the folder.
        config: its configuration; None reads it.
        options: those of transformers' `from_pretrained`.
    """
    config = config or AutoConfig.from_pretrained(folder)
    plain: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    layers: dict[str, int] = getattr(config, FIELD, None) or {}
    if not layers:
        return plain.from_pretrained(folder, config=config, **options)
    groups = int(config.num_key_value_heads)

    class Converted(plain):
        """The model's own class with its modules replaced before its weights are read."""

        def __init__(self, config: PreTrainedConfig, *args: Any, **more: Any) -> None:
            super().__init__(config, *args, **more)
            for name, kv_heads in layers.items():
                k = self.get_submodule(name).k_proj
                rows = kv_heads * k.out_features // groups
                self.get_submodule(name).k_proj = nn.Linear(k.in_features, rows, bias=k.bias is not None)
            swap(self, layers, groups)

    Converted.__name__ = plain.__name__
    loaded = Converted.from_pretrained(folder, config=config, **options)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.__class__ = plain
    return loaded
