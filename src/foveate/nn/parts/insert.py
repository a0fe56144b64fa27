"""Feature gates in any network: put behind modules by name, and taken out again without a trace."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from foveate.core.catalog import system, systems
from foveate.core.errors import OptionError, nearest, shown
from foveate.nn.base.feature_gate import FeatureGate

#: The name of a gate in the module behind which it stands.
CHILD = "foveate_gate"

Factory = Callable[..., nn.Module]


class Inserted:
    """The gates that a call of `insert` has put into a model. As a context manager it takes them out at the end.

    Attributes:
        gates: the gate behind each module, by the module's name.
    """

    def __init__(
        self, gates: Mapping[str, nn.Module], hosts: Sequence[tuple[nn.Module, RemovableHandle | None]]
    ) -> None:
        self.gates = dict(gates)
        self._hosts = list(hosts)

    def remove(self) -> None:
        """Take the gates out: the model is what it was, but for what was trained. A second call does nothing."""
        for host, handle in self._hosts:
            if handle is not None:
                handle.remove()
            delattr(host, CHILD)
        self._hosts = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def insert(model: nn.Module, key: str | Factory, where: str | Sequence[str], inputs: Any, **options: Any) -> Inserted:
    """Put a gate behind the output of every module with a matching name.

    A gate is a child of the module whose output it gates, with the name "foveate_gate"; of an `nn.Sequential`'s last
    module in the place of the `nn.Sequential`. It is trained, copied, moved, saved and compiled with the model. Gates
    take the device, the dtype and the mode (train or eval) of their places.

    Args:
        model: any network of modules that return a tensor.
        key: a gate's key in the catalogue, its class, or a function `(channels, dims)` that makes a module.
        where: names of modules as in `model.named_modules()`, or several. `*` stands for anything between two dots,
            `**` for anything.
        inputs: example inputs of the model: a tensor, several in a tuple or list, or a dictionary by name. The model
            runs on them once, in eval mode, to find the size of each gate; its buffers stay as they are.
        options: further options of the gate.

    Raises:
        OptionError: no module has such a name, or it did not run or returned no feature map; `key` is no gate; there is
            a gate already. The model stays as it is.
    """
    make = _factory(key)
    places = _matches(model, where)
    hosts = {name: _host(model, module) for name, module in places.items()}
    for name, host in hosts.items():
        if hasattr(host, CHILD) or sum(other is host for other in hosts.values()) > 1:
            raise OptionError(f"where={shown(where)} must name each output once; {name!r} has a gate already")
    maps = _maps(model, places, inputs)
    gates = {name: _made(make, name, maps[name], options).train(module.training) for name, module in places.items()}
    return Inserted(gates, [_attach(hosts[name], gate) for name, gate in gates.items()])


# -- the gate ----------------------------------------------------------------------------------------------------------


def gate_class(key: str) -> type[FeatureGate]:
    """Return the feature gate of a row of the catalogue: its object, or one of its parts.

    Raises:
        UnknownKey: no such row. OptionError: a row without a gate.
    """
    found = _gate_of(key)
    if found is None:
        usable = ", ".join(row.key for row in systems(room="nn") if _gate_of(row.key) is not None)
        raise OptionError(f'system "{key}" must be a feature gate; valid keys: {usable}')
    return found


def _gate_of(key: str) -> type[FeatureGate] | None:
    row = system(key)
    for target in (row.object, *row.parts):
        module, _, name = target.partition(":")
        if module.startswith("foveate.nn."):
            found = getattr(import_module(module), name)
            if isinstance(found, type) and issubclass(found, FeatureGate):
                return found
    return None


def _factory(key: str | Factory) -> Factory:
    if isinstance(key, str):
        return gate_class(key).for_map
    if isinstance(key, type) and issubclass(key, FeatureGate):
        return key.for_map
    if isinstance(key, type) or not callable(key) or isinstance(key, nn.Module):
        raise OptionError(f"key={shown(key)} must be a gate's key, its class, or a function (channels, dims)")
    return key


def _made(make: Factory, name: str, out: Tensor, options: Mapping[str, Any]) -> nn.Module:
    try:
        gate = make(out.shape[1], out.dim() - 2, **options)
    except OptionError as error:
        raise OptionError(f"{name}: {error}") from None
    return gate.to(out.device, out.dtype)


# -- the places --------------------------------------------------------------------------------------------------------


def _matches(model: nn.Module, where: str | Sequence[str]) -> dict[str, nn.Module]:
    """Return the modules with matching names; one that has several names, once."""
    named = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    named = {name: module for name, module in named.items() if CHILD not in name.split(".")}
    found: dict[str, nn.Module] = {}
    patterns = [where] if isinstance(where, str) else list(where)
    if not patterns:
        raise OptionError("where=[] must name at least one module")
    for pattern in patterns:
        fits = {name: module for name, module in named.items() if re.fullmatch(_expression(pattern), name)}
        if not fits:
            near = nearest(pattern, named)
            hint = f'; did you mean "{near}"?' if near else f"; names: {', '.join(list(named)[:8])} ..."
            raise OptionError(f"where={shown(pattern)} must match the name of a module{hint}")
        for name, module in fits.items():
            if not any(module is other for other in found.values()):
                found[name] = module
    return found


def _expression(pattern: str) -> str:
    parts = re.split(r"(\*\*|\*)", pattern)
    return "".join({"**": ".*", "*": r"[^.]*"}.get(part, re.escape(part)) for part in parts)


def _host(model: nn.Module, module: nn.Module) -> nn.Module:
    """Return the module to hold the gate: in the place of a sequence, the last one, if it stands nowhere else."""
    while isinstance(module, nn.Sequential) and len(module) and not hasattr(module, CHILD):
        if type(module).forward is not nn.Sequential.forward:
            name = type(module).__name__
            raise OptionError(f"where: {name} is a Sequential with a forward of its own; name one of its modules")
        last = module[-1]
        if sum(other is last for _, other in model.named_modules(remove_duplicate=False)) > 1:
            return module
        module = last
    return module


def _attach(host: nn.Module, gate: nn.Module) -> tuple[nn.Module, RemovableHandle | None]:
    host.add_module(CHILD, gate)
    runs_children = isinstance(host, nn.Sequential)
    return host, None if runs_children else host.register_forward_hook(_apply_gate)


def _apply_gate(module: nn.Module, _: object, output: Tensor) -> Tensor:
    return getattr(module, CHILD)(output)


# -- the sizes ---------------------------------------------------------------------------------------------------------


def _maps(model: nn.Module, places: Mapping[str, nn.Module], inputs: Any) -> dict[str, Tensor]:
    """Run the model once and return the output of each place, without its values."""
    outputs: dict[str, Any] = {}

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            before = outputs.setdefault(name, output)
            if _kind(before) != _kind(output):
                got = f"{shown(before)} and {shown(output)}"
                raise OptionError(f"where: the module {name!r} must return maps of one kind; got {got}")

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in places.items()]
    try:
        with _undisturbed(model), torch.no_grad():
            _call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    for name in places:
        _check_map(name, outputs)
    return outputs


def _call(model: nn.Module, inputs: Any) -> None:
    if isinstance(inputs, Mapping):
        model(**inputs)
    else:
        model(*(inputs if isinstance(inputs, tuple | list) else (inputs,)))


def _kind(output: Any) -> tuple[int, int] | None:
    """Return a map's channels and spatial axes, or None for what is no feature map."""
    if not isinstance(output, Tensor) or not 3 <= output.dim() <= 5 or not output.is_floating_point():
        return None
    return output.shape[1], output.dim() - 2


def _check_map(name: str, outputs: Mapping[str, Any]) -> None:
    if name not in outputs:
        raise OptionError(f"where: the module {name!r} must run on the example inputs; it did not")
    if _kind(outputs[name]) is None:
        got = shown(outputs[name])
        raise OptionError(f"where: the module {name!r} must return a feature map (B, C, *space); got {got}")


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the model in eval mode; afterwards restore modes, buffers and the random state."""
    training = {module: module.training for module in model.modules()}
    buffers = {module: dict(module._buffers) for module in model.modules()}
    values = {id(x): x.clone() for x in model.buffers()}
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
            module._buffers.update(buffers[module])
            for x in buffers[module].values():
                if x is not None:
                    x.copy_(values[id(x)])
