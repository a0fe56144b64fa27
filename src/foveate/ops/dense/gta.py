"""Geometric transform attention (GTA): tokens of several cameras attend in one common frame.

GTA: A Geometry-Aware Attention Mechanism for Multi-View Transformers (2023), arXiv 2310.10375.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Self, final

import torch
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.ops.base.framed import Framed, FramedTokens
from foveate.ops.functional import geometry, rotary

KINDS = ("triv", "se3", "so3", "so2", "t2")


@final
class GTA(Framed):
    """`o_i = Σ_j softmax_j(q_iᵀ ρ(g_i⁻¹ g_j) k_j · scale) ρ(g_i⁻¹ g_j) v_j`: keys and values in the query's own frame.

    Tokens have a geometry g: a camera's pose, coordinates in its image. ρ acts on groups of channels and factorises, so
    the operator runs on the fused kernels of softmax attention at an extra cost of O(N D). It is invariant to the
    world's origin. The wrong choice if geometry is unknown or inaccurate. Attributes come with a call; missing ones are
    the identity, and without any it is softmax attention.

    Inputs of a call (each for keys; queries are the last of them, unless a call brings `poses_q`, `coords_q`, which it
    must if queries are other tokens):
        poses: `(B, Nk, 4, 4)` rigid camera-to-world matrices; a common factor from the left changes nothing.
        coords: `(B, Nk, axes)` positions in the image, in [0, 1) for octaves.

    Args:
        head_dim: D, and Dv if values are transformed.
        dims: channels for each kind, in this order, D in all: "triv" (unchanged), "se3" (groups of 4 times the pose),
            "so3" (groups of 3 + 5 by the rotation alone), "so2" (pairs rotated by coordinates: `2 axes` times a number
            of frequencies, for each frequency a pair for each axis), "t2" (groups of 3 shifted by coordinates). None
            for the paper's halves, "se3" and "so2".
        axes: coordinates of a token.
        base: rotary frequencies of this base for "so2", as in the release for diffusion Transformers (10000); octaves
            up to 2π per unit for None.
        grid: sizes `(H, W)` of an image whose patches are the tokens, row by row, one view after another. They give
            calls without coordinates their coordinates, divided by the sizes for octaves.
        v_transform: False does not transform values and outputs, like rotary embedding.
        euclid: True uses `-½ ‖q̃ - k̃‖² · scale` in place of the dot product; "se3" then has groups of 3, points in
            space.
        trans_coeff: start of the factor on translations, one learned number.

    Channels have the release's order, so that its projections load unchanged, except for "so3", which has another basis
    here. The release takes world-to-camera matrices and inverts them; here `poses` are the inverses. It also has a
    highest frequency for each axis (`max_freq_h`, `max_freq_w`; here 1: multiply the coordinates by it). Its Euclidean
    form lacked the squares of the norms until April 2025; models trained before differ. Attention weights exist as a
    matrix only with `v_transform=False`.

    Raises:
        OptionError: dims that do not add up, or inputs that no channel uses.
        ShapeError: another width than `head_dim`, or inputs of another shape.
    """

    capabilities = replace(Framed.capabilities, inputs=frozenset({"poses", "coords", "poses_q", "coords_q"}))

    def __init__(
        self, head_dim: int, dims: Mapping[str, int] | None = None, *, axes: int = 2, base: float | None = None,
        grid: Sequence[int] | None = None, v_transform: bool = True, euclid: bool = False, trans_coeff: float = 0.01,
    ) -> None:  # fmt: skip
        super().__init__()
        validate.count("head_dim", head_dim, 1)
        validate.count("axes", axes, 1)
        validate.one_of("v_transform", v_transform, (True, False))
        validate.one_of("euclid", euclid, (True, False))
        dims = {"se3": head_dim // 2, "so2": head_dim - head_dim // 2} if dims is None else dims
        group = {"triv": 1, "se3": 3 if euclid else 4, "so3": 8, "so2": 2 * axes, "t2": 3}
        for name, width in dims.items():
            validate.one_of("dims' kind", name, KINDS)
            validate.count(f"dims[{name!r}]", width)
            if width % group[name]:
                raise OptionError(f"dims[{name!r}]={width} must be a multiple of {group[name]}")
        if sum(dims.values()) != head_dim:
            raise OptionError(f"dims={dict(dims)} must add up to head_dim={head_dim}")
        if dims.get("t2") and (axes != 2 or euclid):
            raise OptionError(f"t2={dims['t2']} shifts by two coordinates, in dot products; got {axes=}, {euclid=}")
        if grid is not None and (len(grid) != axes or any(type(size) is not int or size < 1 for size in grid)):
            raise OptionError(f"grid={shown(grid)} must be {axes} whole numbers, at least 1")
        self.dims = {name: dims[name] for name in KINDS if dims.get(name)}
        self.head_dim, self.axes, self.grid, self.euclid = head_dim, axes, grid, euclid
        self.v_transform = v_transform
        self._declare(has_weights=not v_transform)
        count = dims.get("so2", 0) // (2 * axes)
        self.base = base
        self.rates = (
            geometry.octaves(count) if base is None or not count else rotary.rotary_frequencies(2 * count, base)
        )
        self.trans_coeff = nn.Parameter(torch.tensor(float(trans_coeff))) if dims.get("se3") else None

    def frames(self, tokens: FramedTokens, inputs: Mapping[str, Tensor]) -> tuple[_Frame, _Frame]:
        self._check_widths(tokens)
        poses = self._attribute("poses", ("se3", "so3"), (4, 4), tokens, inputs)
        coords = self._attribute("coords", ("so2", "t2"), (self.axes,), tokens, inputs)
        mine, theirs = ({kind: self._action(kind, poses[i], coords[i]) for kind in self.dims} for i in range(2))
        return _Frame(self, mine), _Frame(self, theirs)

    def _action(self, kind: str, poses: Tensor | None, coords: Tensor | None) -> geometry.Action | None:
        """Return the action on a kind of channels, or None for the identity."""
        if kind == "se3" and poses is not None and self.trans_coeff is not None:
            return (geometry.Points if self.euclid else geometry.Matrices)(*geometry.rigid(poses, self.trans_coeff))
        if kind == "so3" and poses is not None:
            rotations = geometry.wigner(poses[..., :3, :3])
            return geometry.Matrices(rotations, rotations.mT)
        if kind == "so2" and coords is not None:
            # the release's order of pairs: by frequency, then by axis
            return geometry.Rotation((coords[..., None, :] * self.rates.to(coords.device)[:, None]).flatten(-2))
        if kind == "t2" and coords is not None:
            return geometry.Matrices(geometry.shift(coords), geometry.shift(-coords))
        return None

    def _attribute(
        self,
        name: str,
        kinds: Sequence[str],
        shape: tuple[int, ...],
        tokens: FramedTokens,
        inputs: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Return an attribute of the queries and of the keys, `(B, N, *shape)`; None if all are the identity."""
        n_queries, n_keys, theirs, mine = (
            tokens.q.shape[2],
            tokens.k.shape[2],
            inputs.get(name),
            inputs.get(f"{name}_q"),
        )
        for label, given, count in ((name, theirs, n_keys), (f"{name}_q", mine, n_queries)):
            if given is None:
                continue
            if not any(kind in self.dims for kind in kinds):
                raise OptionError(f"{label} must come with channels of {', '.join(kinds)}; got dims={self.dims}")
            fits = isinstance(given, Tensor) and given.shape[:1] in ((1,), tokens.q.shape[:1])
            if not fits or given.shape[1:] != (count, *shape):
                got = tuple(given.shape) if isinstance(given, Tensor) else given
                raise ShapeError(f"{label} must be (B, N, ...)={(tokens.q.shape[0], count, *shape)}; got {got}")
        if theirs is not None and mine is None:
            if not tokens.causal and n_queries != n_keys:
                raise OptionError(f"{name} must come with {name}_q, since queries are other tokens than keys")
            mine = theirs[:, n_keys - n_queries :]
        if theirs is None and mine is None and not (self.grid if name == "coords" else self.euclid):
            return None, None
        wide = torch.promote_types(tokens.q.dtype, torch.float32)
        theirs = self._default(name, tokens.key_positions) if theirs is None else theirs
        mine = self._default(name, tokens.query_positions) if mine is None else mine
        return mine.to(wide), theirs.to(wide)

    def _default(self, name: str, positions: Tensor) -> Tensor:
        """Return the default attribute `(1, N, ...)` of tokens, or None."""
        if name == "poses":
            return torch.eye(4, device=positions.device).expand(1, len(positions), 4, 4)
        if self.grid is None:
            return torch.zeros(1, len(positions), self.axes, device=positions.device)
        sizes = torch.tensor(self.grid, device=positions.device)
        strides = sizes.flip(0).cumprod(0).flip(0) // sizes
        places = positions[:, None] // strides % sizes
        return (places / sizes if self.base is None else places)[None]

    def _check_widths(self, tokens: FramedTokens) -> None:
        for name, x in (("q", tokens.q), ("v", tokens.v)):
            if x.shape[-1] != self.head_dim and (name == "q" or self.v_transform):
                raise ShapeError(f"GTA was built for width {self.head_dim}; got {name} of width {x.shape[-1]}")

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        dims = {"se3": 4, "so2": head_dim - 4} if head_dim >= 8 else {"so2" if head_dim % 4 == 0 else "triv": head_dim}
        return cls(head_dim, dims, grid=(2, 3), trans_coeff=1.0)

    @classmethod
    def exact(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(head_dim)

    @classmethod
    def example_input(cls, name: str, batch: int, heads: int, length: int) -> Tensor:
        random = torch.Generator().manual_seed(0)
        if name.startswith("coords"):
            return torch.rand(batch, length, 2, generator=random)
        poses = torch.eye(4, dtype=torch.float64).repeat(batch, length, 1, 1)
        rotation, _ = torch.linalg.qr(torch.randn(batch, length, 3, 3, generator=random, dtype=torch.float64))
        poses[..., :3, :3] = rotation * torch.linalg.det(rotation)[..., None, None]
        poses[..., :3, 3] = torch.randn(batch, length, 3, generator=random, dtype=torch.float64)
        return poses


@final
class _Frame:
    """The frames of tokens: an action for each kind of channels."""

    marks = None

    def __init__(self, op: GTA, actions: Mapping[str, geometry.Action | None]) -> None:
        self.op, self.actions = op, actions

    def query(self, q: Tensor) -> Tensor:
        q = self._each(q, lambda action, x: action.query(x))
        return torch.cat([q, torch.ones_like(q[..., :1])], -1) if self.op.euclid else q

    def key(self, k: Tensor) -> Tensor:
        k = self._each(k, lambda action, x: action.key(x))
        # the query's own norm shifts a whole row and drops out of the softmax
        return torch.cat([k, -0.5 * k.square().sum(-1, keepdim=True)], -1) if self.op.euclid else k

    def value(self, v: Tensor) -> Tensor:
        return self._each(v, lambda action, x: action.value(x)) if self.op.v_transform else v

    def back(self, out: Tensor) -> Tensor:
        if not self.op.v_transform:
            return out
        return self._each(out, lambda action, x: action.back(x), back=True)

    def _each(self, x: Tensor, act: Callable[[geometry.Action, Tensor], Tensor], back: bool = False) -> Tensor:
        if not any(self.actions.values()):
            return x
        four = {kind for kind, action in self.actions.items() if back and isinstance(action, geometry.Points)}
        sizes = [width * 4 // 3 if kind in four else width for kind, width in self.op.dims.items()]
        parts = zip(self.actions.values(), x.split(sizes, -1), strict=True)
        return torch.cat([part if action is None else act(action, part) for action, part in parts], -1)
