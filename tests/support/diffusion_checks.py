"""Methods, fingerprints and refusals for tests of the diffusion host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from foveate.core.errors import FoveateError
from foveate.host import Method, Site
from tests.support.diffusion_models import MODELS
from tests.support.host_models import NO_OPS, evicts

EVERY = pytest.mark.parametrize("name", MODELS)

#: Ways through the host that a model without a cache and without a decoder has.
PATHS = {path: kinds for path, kinds in NO_OPS.items() if not evicts(*(kind() for kind in kinds)) and path != "hidden"}
#: Those on which PyTorch's kernel computes what the processor asked of it.
NATIVE = ("no method", "output")


class Fingerprint:
    """Everything about a network that a run could leave changed; processors as objects."""

    def __init__(self, subject: nn.Module) -> None:
        self.processors = [id(module.processor) for module in subject.modules() if hasattr(module, "processor")]
        self.weights = {name: (value.data_ptr(), value._version) for name, value in subject.state_dict().items()}
        hooks = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called", "_backward_hooks")
        self.hooks = [len(getattr(module, hook)) for module in subject.modules() for hook in hooks]
        self.attributes = [{key: id(value) for key, value in vars(module).items()} for module in subject.modules()]

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


class Breaks(Method):
    def __init__(self, where: str, error: type[BaseException] = RuntimeError) -> None:
        self.where, self.error = where, error

    def bind(self, host: Any) -> None:
        if self.where == "bind":
            raise self.error("broken")

    def edit_output(self, site: Site, out: Tensor) -> Tensor:
        if self.where == "forward" and site.layer == 1:
            raise self.error("broken")
        return out


class Doubles(Method):
    def edit_output(self, site: Site, out: Tensor) -> Tensor:
        return 2 * out


def refusal(kind: type[FoveateError], act: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)
