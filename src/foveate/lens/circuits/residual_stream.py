"""The residual stream of a decoder at one token of each text, as its blocks write to it.

A block adds the outputs of its branches to the stream: attention's and the MLP's, each perhaps behind a norm of its own
(Gemma 2, OLMo 2). `trace` finds the branches from the data flow of one run: the modules of a block whose results no
other module of the block reads. It needs no names of model classes, and refuses a model whose branches do not sum to
its own stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.core.errors import OptionError, ShapeError, UnsupportedModel
from foveate.host.entry import apply
from foveate.host.hf.model import Host, host
from foveate.host.method import Method
from foveate.host.site import Site
from foveate.lens.parts.inputs import by_name

#: The inputs of a run: token ids `(B, N)`, or a tokenizer's mapping.
Inputs = Tensor | Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Step:
    """One call of a module: its input and its output at the traced tokens, `(B, C)` each."""

    module: nn.Module
    given: Tensor
    made: Tensor


@dataclass(frozen=True, eq=False)
class Block:
    """The reads and writes of one block at the traced tokens.

    Args:
        module: the block.
        entered, left: the stream before and after the block.
        heads: outputs of the heads, before the output projection.
        attention: the call of the attention module.
        before: the norms between the stream and attention, in order; None if something else stands there.
        after: the norms between attention and the stream, in order; mostly none.
        others: the last calls of the other branches: the MLP, or its own norm.
    """

    module: nn.Module
    entered: Float[Tensor, "b c"]
    left: Float[Tensor, "b c"]
    heads: Float[Tensor, "b h dv"]
    attention: Step
    before: tuple[Step, ...] | None
    after: tuple[Step, ...]
    others: tuple[Step, ...]


@dataclass(frozen=True, eq=False)
class Trace:
    """A run of a decoder: its blocks, the norms behind the last of them, and the call that computes the logits."""

    blocks: tuple[Block, ...]
    final: tuple[Step, ...]
    unembedding: Step

    @property
    def mlps(self) -> list[nn.Module]:
        """The module of each block whose output is the MLP's contribution to the stream."""
        for number, block in enumerate(self.blocks):
            if len(block.others) != 1:
                raise UnsupportedModel(
                    f"layer {number} has {len(block.others)} branches beside attention; one MLP is needed"
                )
        return [block.others[0].module for block in self.blocks]


def trace(model: object, inputs: Inputs, positions: Int[Tensor, " b"] | int | None = None) -> Trace:
    """Run a decoder once and return how its parts add up at one token of each text.

    Args:
        model: a decoder with a language-model head.
        inputs: token ids, or a tokenizer's mapping.
        positions: that token, one for all texts or one for each; negative numbers count from the end. None is the last
            that is no padding.

    Raises:
        UnsupportedModel: the model has no stack of blocks with one attention each, or its branches do not sum to its
            own stream within rounding.
    """
    run = host(model)
    given = as_mapping(run, inputs)
    return _Tracer(run, chosen_tokens(given, run, positions)).run(given)


def as_mapping(run: Host, inputs: Inputs) -> dict[str, Any]:
    """Return the inputs of a run by name."""
    return by_name(run.model, inputs)


def chosen_tokens(given: Mapping[str, Any], run: Host, positions: Tensor | int | None) -> Int[Tensor, " b"]:
    """Return the token to read of each text, counted from the first."""
    batch, n = given[run.model.main_input_name].shape[:2]
    if positions is None:
        mask = given.get("attention_mask")
        if mask is None:
            return torch.full((batch,), n - 1)
        return (mask.cpu().bool() * torch.arange(n)).argmax(-1)
    found = torch.as_tensor(positions)
    found = (found if found.ndim else found.expand(batch)).cpu()
    if found.shape != (batch,) or bool((found < -n).any()) or bool((found >= n).any()):
        raise ShapeError(f"positions must be one token of each of {batch} texts, in {-n}..{n - 1}; got {positions}")
    return found % n


def wide(x: Tensor) -> Tensor:
    """Return a tensor in float32, or in float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


def agree(ours: Tensor, own: Tensor) -> bool:
    """Return whether two results are the same within the rounding of the model's dtype."""
    tolerance = max(4 * torch.finfo(own.dtype).eps, 1e-5)
    gap = torch.linalg.vector_norm(wide(ours) - wide(own), dim=-1)
    return bool((gap <= tolerance * torch.linalg.vector_norm(wide(own), dim=-1)).all())


class _Heads(Method):
    """A method that reads the outputs of the heads at one token of each text, by attention module."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens, self.found = tokens, dict[nn.Module, Tensor]()

    def read(self, site: Site, out: Tensor) -> None:
        rows = torch.arange(len(self.tokens), device=out.device)
        self.found[site.module] = out.detach()[rows, :, self.tokens.to(out.device)]


class _Tracer:
    """The hooks of one traced run; the tensors of a block are released when it ends."""

    def __init__(self, run: Host, tokens: Tensor) -> None:
        self.host, self.tokens, self.heads = run, tokens, _Heads(tokens)
        self.calls: dict[nn.Module, list[tuple[nn.Module, Tensor, Tensor]]] = {}
        self.blocks: list[Block] = []
        self.last: Tensor | None = None
        self.unembedded: Step | None = None

    def run(self, given: dict[str, Any]) -> Trace:
        decoder, head = self.host.decoder, self.host.model.get_output_embeddings()
        if decoder is None or head is None:
            raise UnsupportedModel(f"{self._name} must be a decoder with a language-model head")
        blocks = blocks_of(decoder, self.host.scope("decoder"), self.host.layers)
        inside = {module for block in blocks for module in block.modules()}
        outer = [m for m in decoder.modules() if m not in inside and not list(m.children())]
        with ExitStack() as stack, torch.no_grad(), apply(self.host.model, self.heads, on="decoder"):
            for block, attention in blocks.items():
                self._watch(stack, block, [*block.children(), attention])
                stack.callback(block.register_forward_hook(self._ended(attention), with_kwargs=True).remove)
            self._watch(stack, decoder, outer)
            stack.callback(head.register_forward_hook(self._unembedded, with_kwargs=True).remove)
            self.host.model(**given)
        if self.last is None or self.unembedded is None or len(self.blocks) != len(blocks):
            raise UnsupportedModel(f"{self._name} does not run each of its blocks and its head once")
        chain = chained(self.calls[decoder], self.last)
        return Trace(tuple(self.blocks), tuple(self._step(call) for call in chain), self.unembedded)

    @property
    def _name(self) -> str:
        return type(self.host.model).__name__

    def _watch(self, stack: ExitStack, owner: nn.Module, modules: Iterable[nn.Module]) -> None:
        calls = self.calls[owner] = []

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> None:
            given, result = first_tensor((*args, *kwargs.values())), first_tensor(made)
            if given is not None and result is not None and not same_numbers(given, result):
                calls.append((module, given, result))

        for module in dict.fromkeys(modules):
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)

    def _ended(self, attention: nn.Module) -> Any:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> None:
            entered, left = first_tensor((*args, *kwargs.values())), first_tensor(made)
            calls = self.calls[block]
            own = next((call for call in calls if call[0] is attention), None)
            if entered is None or left is None or own is None or attention not in self.heads.found:
                raise UnsupportedModel(f"{type(block).__name__} does not hand hidden states to its attention")
            after = chained(calls, own[2])
            mine = [own, *after]
            ends = [call for call in calls if not any(same_numbers(call[2], other[1]) for other in calls)]
            others = [call for call in ends if not any(call is each for each in mine)]
            branches = [(mine[-1])[2], *(call[2] for call in others)]
            if not agree(sum(map(self._row, branches), self._row(entered)), self._row(left)):
                raise UnsupportedModel(
                    f"{type(block).__name__}: attention and the other branches do not sum to the residual stream"
                )
            before = _back(calls, own[1], entered)
            rows = self._row(entered), self._row(left), self.heads.found.pop(attention)
            front = None if before is None else self._steps(before)
            self.blocks.append(Block(block, *rows, self._step(own), front, self._steps(after), self._steps(others)))
            self.last = left
            calls.clear()

        return hook

    def _unembedded(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], made: Tensor) -> None:
        given = first_tensor((*args, *kwargs.values()))
        assert given is not None
        self.unembedded = Step(module, self._row(given), self._row(made))

    def _step(self, call: tuple[nn.Module, Tensor, Tensor]) -> Step:
        return Step(call[0], self._row(call[1]), self._row(call[2]))

    def _steps(self, calls: list[tuple[nn.Module, Tensor, Tensor]]) -> tuple[Step, ...]:
        return tuple(self._step(call) for call in calls)

    def _row(self, x: Tensor) -> Float[Tensor, "b c"]:
        whole = x.detach().reshape(len(self.tokens), -1, x.shape[-1])
        if whole.shape[1] <= int(self.tokens.max()):
            raise OptionError(f"{self._name} was asked for the logits of some tokens only; logits_to_keep must be 0")
        return whole[torch.arange(len(whole), device=x.device), self.tokens.to(x.device)].clone()


def blocks_of(model: nn.Module, attending: Iterable[nn.Module], count: int) -> dict[nn.Module, nn.Module]:
    """Return the blocks of a stack in order, each with its attention module.

    Args:
        model: holds the stack.
        attending: the attention modules to look for; a block has exactly one.
        count: the number of blocks.
    """
    wanted = set(attending)
    for group in model.modules():
        if isinstance(group, nn.ModuleList) and len(group) == count:
            own = [[module for module in block.modules() if module in wanted] for block in group]
            if all(len(found) == 1 for found in own):
                return {block: found[0] for block, found in zip(group, own, strict=True)}
    raise UnsupportedModel(f"{type(model).__name__} has no list of {count} blocks with one attention module each")


def chained(calls: list[tuple[nn.Module, Tensor, Tensor]], start: Tensor) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Return the calls that pass a tensor on, one after another."""
    found = []
    for call in calls:
        if same_numbers(call[1], start):
            found.append(call)
            start = call[2]
    return found


def _back(
    calls: list[tuple[nn.Module, Tensor, Tensor]], end: Tensor, start: Tensor
) -> list[tuple[nn.Module, Tensor, Tensor]] | None:
    """Return the calls that make a tensor of another, in order; None if they do not lead there."""
    found = list[tuple[nn.Module, Tensor, Tensor]]()
    while not same_numbers(end, start):
        call = next((call for call in calls if same_numbers(call[2], end)), None)
        if call is None or len(found) == len(calls):
            return None
        found.insert(0, call)
        end = call[1]
    return found


def same_numbers(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are views of the same numbers."""
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()


def first_tensor(values: Any) -> Tensor | None:
    """Return the first tensor of floating point among a module's arguments or results."""
    if isinstance(values, Tensor):
        return values if values.is_floating_point() else None
    if isinstance(values, Mapping):
        values = values.values()
    if not isinstance(values, Iterable):
        return None
    return next((value for value in values if isinstance(value, Tensor) and value.is_floating_point()), None)
