"""The residual stream of an image encoder: a run that finds the ways from an MLP's neurons to the model's output.

`neuron_paths` runs a pre-norm vision transformer once and freezes all that is not linear on these ways; see
`NeuronPaths`. As in `residual_stream`, modules are known by what they do in the run: the norm whose output attention
reads, the linear map that makes the values, and the one that reads the neurons. A model in which these are not found,
or whose branches do not sum to its own stream, is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, UnsupportedModel, shown
from foveate.host.entry import apply
from foveate.host.hf.model import Host, host
from foveate.host.method import Method
from foveate.host.output_projection import projection_parts
from foveate.host.site import Site
from foveate.host.weight_tiles import weight_tile
from foveate.lens.circuits.neuron_paths import HeadPaths, NeuronPaths, StreamNorm
from foveate.lens.circuits.residual_stream import (
    Inputs,
    agree,
    as_mapping,
    blocks_of,
    chained,
    first_tensor,
    same_numbers,
    wide,
)

#: A call of a module: its input and its output, for all tokens.
Call = tuple[nn.Module, Tensor, Tensor]


def neuron_paths(model: object, images: Inputs, layer: int) -> NeuronPaths:
    """Run an image encoder once and return the ways from the neurons of one MLP to its output.

    Args:
        model: a pre-norm vision transformer that is read at its first token, the class token; or a model that holds one
            and has `get_image_features`, such as `CLIPModel`.
        images: pixel values `(B, C, H, W)`, or an image processor's mapping.
        layer: the number of the block with the MLP, from 0; at least one block must follow.

    Raises:
        UnsupportedModel: the model has no such stack of blocks, has other norms, or no class token.
    """
    tower, run = _tower(model)
    attending = tower.attention_modules()
    blocks = blocks_of(tower.model, attending, len(attending))
    validate.count("mlp_layer", layer)
    if layer > len(blocks) - 2:
        raise OptionError(f"mlp_layer={layer} must be in 0..{len(blocks) - 2}: heads of a later block must follow")
    given = as_mapping(tower, images)
    pixels = given.get("pixel_values")
    if not isinstance(pixels, Tensor) or pixels.dim() != 4 or not len(pixels):
        raise ShapeError(f"images must be pixel values (B, C, H, W), at least one image; got {shown(pixels)}")
    return _Tracer(model, blocks, layer).run(tower.model, lambda: run(**given))


def _tower(model: object) -> tuple[Host, Callable[..., Any]]:
    """Return the image encoder of a model, and the function that runs it up to the image's embedding."""
    whole = host(model).model
    if whole.main_input_name == "pixel_values":
        return host(whole), whole
    towers = [each for each in whole.modules() if isinstance(each, PreTrainedModel) and each is not whole]
    own = next((each for each in towers if each.main_input_name == "pixel_values"), None)
    run = getattr(whole, "get_image_features", None)
    if own is None or run is None:
        raise UnsupportedModel(f"{type(whole).__name__} must be an image encoder, or have get_image_features")
    return host(own), run


@final
class _ClassRows(Method):
    """A method that keeps the class token's attention weights and all tokens' values, by attention module."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules, self.found = set(modules), dict[nn.Module, tuple[Tensor, Tensor]]()

    def at(self, site: Site) -> bool:
        return site.module in self.modules

    def read(self, site: Site, out: Tensor) -> None:
        tile = weight_tile(site, slice(0, 1))
        rows = tile.weights.new_zeros(*tile.weights.shape[:2], site.k.shape[2])
        rows[..., tile.keys] = tile.weights[:, :, 0]
        self.found[site.module] = rows, site.v.detach().clone()


class _Tracer:
    """The hooks of one run; the tensors of a block are released when it ends."""

    def __init__(self, model: Any, blocks: dict[nn.Module, nn.Module], layer: int) -> None:
        self.model, self.blocks, self.layer = model, blocks, layer
        self.rows = _ClassRows(list(blocks.values())[layer + 1 :])
        self.calls: dict[nn.Module, list[Call]] = {}
        self.later: list[HeadPaths] = []
        self.neurons: tuple[Tensor, Tensor, Tensor] | None = None
        self.last: Tensor | None = None

    def run(self, tower: PreTrainedModel, run: Callable[[], Any]) -> NeuronPaths:
        inside = {module for block in self.blocks for module in block.modules()}
        outer = [m for m in self.model.modules() if m not in inside and not list(m.children())]
        with ExitStack() as stack, torch.no_grad(), apply(tower, self.rows):
            first = next(iter(self.blocks))
            stack.callback(first.register_forward_pre_hook(_check_class_token, with_kwargs=True).remove)
            for number, (block, attention) in enumerate(self.blocks.items()):
                if number >= self.layer:
                    maps = [module for module in block.modules() if isinstance(module, nn.Linear)]
                    self._watch(stack, block, [*block.children(), attention, *maps])
                    hook = self._ended(number, attention)
                    stack.callback(block.register_forward_hook(hook, with_kwargs=True).remove)
            self._watch(stack, self.model, outer)
            run()
        if self.last is None or self.neurons is None or len(self.later) != len(self.blocks) - 1 - self.layer:
            raise UnsupportedModel(f"{type(self.model).__name__} does not run each of its blocks once")
        final, projection, bias, output = _read_out(self.calls[self.model], self.last[:, 0])
        later, depth = tuple(self.later), len(self.blocks)
        return NeuronPaths(*self.neurons, later, final, projection, bias, output, depth)

    def _watch(self, stack: ExitStack, owner: nn.Module, modules: Iterable[nn.Module]) -> None:
        calls = self.calls[owner] = []

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> None:
            given, result = first_tensor((*args, *kwargs.values())), first_tensor(made)
            if given is not None and result is not None and not same_numbers(given, result):
                calls.append((module, given.detach(), result.detach()))

        for module in dict.fromkeys(modules):
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)

    def _ended(self, number: int, attention: nn.Module) -> Any:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> None:
            entered, self.last = first_tensor((*args, *kwargs.values())), first_tensor(made)
            calls = self.calls[block].copy()  # the probes of norms below are calls too, which must not count
            assert entered is not None and self.last is not None
            own, after, down, tail = _branches(block, attention, calls, entered, self.last)
            if number == self.layer:
                self.neurons = _neurons(down, tail)
            else:
                norm = next((c for c in calls if same_numbers(c[2], own[1]) and same_numbers(c[1], entered)), None)
                if norm is None:
                    raise UnsupportedModel(f"{type(block).__name__} has no norm between the stream and its attention")
                inner = [call for call in calls if call[0] in set(attention.modules())]
                self.later.append(_head_paths(number, norm, own, after, inner, *self.rows.found.pop(attention)))
            self.calls[block].clear()

        return hook


def _branches(
    block: nn.Module, attention: nn.Module, calls: list[Call], entered: Tensor, left: Tensor
) -> tuple[Call, list[Call], Call, list[Call]]:
    """Return the calls of attention and of the MLP's last linear map, each with the calls between it and the stream."""
    name, inner = type(block).__name__, set(attention.modules())
    own = next((call for call in calls if call[0] is attention), None)
    maps = [c for c in calls if isinstance(c[0], nn.Linear) and c[0] not in inner and c[2].shape == entered.shape]
    if own is None or not maps:
        raise UnsupportedModel(f"{name} must have an attention module and an MLP that ends in a linear map")
    after, tail = chained(calls, own[2]), chained(calls, maps[-1][2])
    ends = (own, *after)[-1][2], (maps[-1], *tail)[-1][2]
    if not agree(wide(entered) + wide(ends[0]) + wide(ends[1]), left):
        raise UnsupportedModel(f"{name}: attention and an MLP do not sum to the residual stream")
    return own, after, maps[-1], tail


def _neurons(down: Call, tail: Sequence[Call]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the activations of neurons, their rows, and the bias beside them."""
    rows, bias = _linear(down[0])
    scale = _layer_scale(tail)
    return wide(down[1]), rows.mT * scale, bias * scale


def _head_paths(
    number: int, norm: Call, own: Call, after: Sequence[Call], inner: Sequence[Call], weights: Tensor, v: Tensor
) -> HeadPaths:
    groups = weights.shape[1] // v.shape[1]
    values, value_bias = (each.repeat_interleave(groups, 0) for each in _values(own, inner, v))
    parts, bias = projection_parts(own[0], weights.shape[1])
    outputs = wide(parts)
    bias = outputs.new_zeros(outputs.shape[-1]) if bias is None else wide(bias)
    heads = torch.einsum("bhn,bhnd->bhd", weights, wide(v).repeat_interleave(groups, 1))
    if not agree(torch.einsum("bhd,hdc->bc", heads, outputs) + bias, own[2][:, 0]):
        raise UnsupportedModel(f"the heads of {type(own[0]).__name__} do not sum to its output")
    scale = _layer_scale(after)
    return HeadPaths(number, StreamNorm.of(*norm), weights, values, value_bias, outputs * scale, bias * scale)


def _values(own: Call, inner: Sequence[Call], v: Float[Tensor, "b h n d"]) -> tuple[Tensor, Tensor]:
    """Return the map to values, `(H, Dv, C)`, and its bias: the one that gave the values of the run."""
    heads, width = v.shape[1], v.shape[3]
    for module, given, made in inner:
        if not isinstance(module, nn.Linear) or not same_numbers(given, own[1]):
            continue
        for start in range(0, made.shape[-1] - heads * width + 1, heads * width):  # queries and keys may come first
            rows = slice(start, start + heads * width)
            if torch.equal(made[..., rows].unflatten(-1, (heads, width)).transpose(1, 2), v):
                weight, bias = _linear(module)
                return weight[rows].unflatten(0, (heads, width)), bias[rows].unflatten(0, (heads, width))
    raise UnsupportedModel(f"{type(own[0]).__name__} has no linear map from the norm to its values")


def _linear(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the weight and the bias of a linear map; zero for none."""
    assert isinstance(module, nn.Linear)
    weight, bias = wide(module.weight.detach()), module.bias
    return weight, weight.new_zeros(len(weight)) if bias is None else wide(bias.detach())


def _layer_scale(calls: Sequence[Call]) -> Tensor | float:
    """Return the factor of each channel by which modules multiply a branch; 1 for no module."""
    scale: Tensor | float = 1.0
    for call in calls:
        norm = StreamNorm.of(*call)
        if norm.centres or not torch.allclose(norm.scale, torch.ones_like(norm.scale), atol=1e-3):
            raise UnsupportedModel(f"{type(call[0]).__name__} between a branch and the stream must scale channels")
        scale = scale * norm.weight
    return scale


def _read_out(
    calls: Sequence[Call], token: Float[Tensor, "b c"]
) -> tuple[tuple[StreamNorm, ...], Tensor, Tensor, Tensor]:
    """Return the norms behind the stream of the class token, the linear map behind them, its bias, and the output.

    A map whose result goes on into something else (the activation of a pooler) is left out.
    """
    chain, output = list[Call](), token
    for module, given, made in calls:
        read = _class_token(given)
        if read.shape == output.shape and read.dtype == output.dtype and torch.equal(read, output):
            chain.append((module, read, _class_token(made)))
            output = chain[-1][2]
    first = next((place for place, call in enumerate(chain) if isinstance(call[0], nn.Linear)), len(chain))
    norms = tuple(StreamNorm.of(*call) for call in chain[:first])
    if first == len(chain) - 1:
        return norms, *_linear(chain[-1][0]), wide(output)
    output = wide(chain[first - 1][2] if first else token)
    return norms, torch.eye(output.shape[-1]).to(output), torch.zeros_like(output[0]), output


def _class_token(x: Tensor) -> Tensor:
    return x[:, 0] if x.dim() == 3 else x


def _check_class_token(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a model whose first token differs between images before the first block."""
    entered = first_tensor((*args, *kwargs.values()))
    if entered is None or entered.dim() != 3 or not agree(entered[:1, 0].expand_as(entered[:, 0]), entered[:, 0]):
        raise UnsupportedModel(
            f"the first token of {type(block).__name__} must be a class token, which is the same in all images"
        )
