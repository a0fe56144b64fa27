"""FreeSwim: sample from a video or image transformer at more than its trained size, window by window.

FreeSwim: Revisiting Sliding-Window Attention Mechanisms for Training-Free Ultra-High-Resolution Video Generation
(2025), arXiv 2511.14712. A branch with windows of the trained size keeps details; a branch with full attention keeps
the whole: its text cross-attention replaces that of the window branch in every block. The release is written for one
model (Wan 2.1); here any module serves whose self-attention calls PyTorch's `scaled_dot_product_attention`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, final

from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, UnsupportedModel, shown
from foveate.host.sdpa import SDPA, CatchSDPA
from foveate.steer.diffusion.inward_window import inward_window_attention

#: The two branches of a step.
Branch = Literal["window", "full"]


@final
class FreeSwim:
    """Runs a transformer on a grid larger than its trained one: `swim(grid, *inputs)` in place of `model(*inputs)`.

        swim = FreeSwim(transformer, base=(30, 52), cache_every=4)
        for t in times:
            said = swim(grid, latent, t, text)                          # of the prompt
            unsaid = swim(grid, latent, t, empty, conditional=False)    # of classifier-free guidance
        swim.reset()                                                    # before the next sample

    Nothing is trained, and the model is unchanged between calls. Every self-attention sees a window of the trained size
    in all frames (see `inward_window_attention`). In calls with a prompt, every cross-attention gives what the full
    branch gave: that branch runs in every `cache_every`-th of them, and its outputs are stored in between, one tensor
    of `(batch, tokens, channels)` a block. Cost: one windowed pass a call, plus `1 / cache_every` full ones.

    A pipeline around it begins with a sample of the trained size, enlarges it, adds noise part of the way, and denoises
    with these calls; from pure noise, windows repeat the content. The wrong choice for a model whose blocks mix text
    and image tokens in one attention, and where text says nothing about what stands where: the override then changes
    little.

    Args:
        model: a transformer with self-attention and cross-attention modules.
        base: height and width of the trained grid, in tokens.
        self_attention, cross_attention: the last part of these modules' names.
        cache_every: calls with a prompt for each full pass; 1 runs it always.
        window_tokens: tokens whose logarithm to the base of the trained number sharpens the softmax of self-attention:
            its scale is `sqrt(log(window_tokens) / log(height * width) / d)`. None is twice the trained number, as in
            the release.
        override: False leaves the cross-attention of the window branch, for comparison.
    """

    def __init__(
        self, model: nn.Module, base: tuple[int, int], *, self_attention: str = "attn1", cross_attention: str = "attn2",
        cache_every: int = 4, window_tokens: int | None = None, override: bool = True,
    ) -> None:  # fmt: skip
        if not isinstance(base, tuple) or len(base) != 2:
            raise OptionError(f"base={shown(base)} must be (height, width)")
        for size in base:
            validate.count("base", size, 1)
        if base[0] * base[1] < 2:
            raise OptionError(f"base={shown(base)} must hold at least two tokens")
        validate.count("cache_every", cache_every, 1)
        validate.flag("override", override)
        if window_tokens is not None:
            validate.count("window_tokens", window_tokens, 2)
        self.model, self.base, self.cache_every, self.override = model, base, cache_every, override
        self.sharpness = math.log(window_tokens or 2 * base[0] * base[1], base[0] * base[1])
        self._own = _named(model, "self_attention", self_attention)
        self._cross = _named(model, "cross_attention", cross_attention)
        self._calls, self._stored = 0, dict[str, Tensor]()

    def reset(self) -> None:
        """Forget the stored outputs; the next call with a prompt runs the full branch."""
        self._calls = 0
        self._stored.clear()

    def __call__(self, grid: tuple[int, int, int], *inputs: Any, conditional: bool = True, **options: Any) -> Any:
        """Return the model's output for one denoising step.

        Args:
            grid: frames, height and width of the tokens that self-attention gets.
            inputs, options: of the model.
            conditional: False for the pass without a prompt, which never uses the full branch.
        """
        if not (conditional and self.override):
            return self._pass("window", grid, inputs, options)
        if self._calls % self.cache_every == 0:
            self._stored.clear()
            with _hooked(self._cross, self._store):
                self._pass("full", grid, inputs, options)
        self._calls += 1
        with _hooked(self._cross, self._replace):
            return self._pass("window", grid, inputs, options)

    def _pass(self, branch: Branch, grid: tuple[int, int, int], inputs: Sequence[Any], options: dict[str, Any]) -> Any:
        attention = _Attention(self, branch, grid)
        with _hooked(self._own, attention.leave, attention.enter), CatchSDPA(attention.answer):
            return self.model(*inputs, **options)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, branch: Branch, grid: tuple[int, int, int]) -> Tensor:
        """Return self-attention as a branch computes it: in windows or in full, with the sharper softmax."""
        scale = math.sqrt(self.sharpness / q.shape[-1])
        if branch == "full":
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
        return inward_window_attention(q, k, v, grid, (self.base[0] // 2, self.base[1] // 2), scale)

    def _store(self, name: str, out: Any) -> None:
        if not isinstance(out, Tensor):
            raise UnsupportedModel(f"cross-attention {name} must return a tensor; it returns {type(out).__name__}")
        self._stored[name] = out.detach()

    def _replace(self, name: str, out: Tensor) -> Tensor:
        stored = self._stored[name]
        if stored.shape != out.shape:
            raise OptionError(
                f"the stored output of {name} is {tuple(stored.shape)}, and this call's {tuple(out.shape)}; call "
                f"reset() before another sample"
            )
        return stored


class _Attention:
    """Gives the attention of self-attention modules as a branch computes it, and leaves that of others.

    Args:
        swim: computes it.
        branch, grid: the branch and its grid.
    """

    def __init__(self, swim: FreeSwim, branch: Branch, grid: tuple[int, int, int]) -> None:
        self.swim, self.branch, self.grid = swim, branch, grid
        self.calls: int | None = None  # None outside of self-attention

    def enter(self, name: str) -> None:
        self.calls = 0

    def leave(self, name: str, out: Any) -> None:
        if not self.calls:
            raise UnsupportedModel(f"self-attention {name} does not call scaled_dot_product_attention")
        self.calls = None

    def answer(self, sdpa: SDPA, native: Callable[[], Tensor]) -> Tensor:
        if self.calls is None:
            return native()
        self.calls += 1
        if sdpa.mask is not None or sdpa.is_causal or sdpa.dropout:
            raise UnsupportedModel("self-attention must see all tokens: a mask, causality or dropout is not supported")
        return self.swim.attend(sdpa.q, sdpa.k, sdpa.v, self.branch, self.grid)


def _named(model: nn.Module, option: str, last: str) -> dict[str, nn.Module]:
    """Return the modules whose name ends in a part."""
    found = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] == last}
    if not found:
        raise OptionError(f"{option}={shown(last)} must end the name of a module of {type(model).__name__}; none does")
    return found


@contextmanager
def _hooked(
    modules: dict[str, nn.Module], after: Callable[[str, Any], Any], before: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Call `before(name)` and `after(name, output)` around the modules' forward within the block."""
    with ExitStack() as stack:
        for name, module in modules.items():
            if before is not None:
                enter = module.register_forward_pre_hook(lambda module, given, name=name: before(name))
                stack.callback(enter.remove)
            leave = module.register_forward_hook(lambda module, given, out, name=name: after(name, out))
            stack.callback(leave.remove)
        yield
