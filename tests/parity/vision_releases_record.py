"""Records what the releases of BiFormer, CrossFormer, VSA and FlatFormer make of a few maps: four files of this folder.

The releases are repositories, not packages, and ask for packages that their networks hardly use. By hand, from here,
with the repositories cloned beside each other:

    git clone https://github.com/rayleizhu/BiFormer /tmp/releases/BiFormer
    git clone https://github.com/cheerss/CrossFormer /tmp/releases/CrossFormer
    git clone https://github.com/ViTAE-Transformer/ViTAE-VSA /tmp/releases/ViTAE-VSA
    git clone https://github.com/mit-han-lab/flatformer /tmp/releases/flatformer
    PYTHONPATH=. .venv/bin/python tests/parity/vision_releases_record.py /tmp/releases

Both sides make the same maps and the same parameters, from one generator.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tests.parity.speechbrain_record import parameters

FOLDER = Path(__file__).parent
DIM, HEADS = 12, 3
#: Sizes of maps for bi-level routing with two regions along a side, the last two filled up.
ROUTED = ((8, 8), (6, 10), (7, 9), (5, 6))
#: Size, kind and interval for blocks with groups of 3 x 3.
BLOCKS = (
    ((6, 9), 0, 2), ((5, 8), 0, 2), ((6, 12), 1, 2), ((7, 9), 1, 2), ((5, 8), 1, 3), ((2, 7), 1, 2), ((3, 3), 1, 1),
)  # fmt: skip
#: Sizes of maps for windows of 3 x 3.
VARIED = ((6, 9), (5, 7), (4, 10))
#: Cells of each sample of a cloud, and height and width of windows, for groups of 16.
CLOUDS = (((61, 40), (4, 6)), ((48,), (5, 3)), ((33, 17, 64), (3, 3)))


def images(channels: int, side: int) -> Tensor:
    return maps(2, channels, side, side)


def maps(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def cloud(counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Make vectors of 12 channels, and (sample, row, column) of their cells in a grid of 18 x 20."""
    draw = torch.Generator().manual_seed(1)
    cells = [torch.randperm(18 * 20, generator=draw)[:count] for count in counts]
    coords = [torch.stack([torch.full_like(at, sample), at // 20, at % 20], 1) for sample, at in enumerate(cells)]
    return maps(sum(counts), DIM), torch.cat(coords)


def filled(module: nn.Module) -> nn.Module:
    """Give a released module the parameters that the test gives ours; tables of indices stay."""
    shapes = {name: list(x.shape) for name, x in module.state_dict().items() if x.is_floating_point()}
    module.double().eval().load_state_dict(parameters(shapes), strict=False)
    return module


def rounded(x: Tensor) -> Any:
    """Return the numbers of an output with ten decimals."""
    return json.loads(json.dumps(x.tolist()), parse_float=lambda text: round(float(text), 10))


def shapes_of(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(x.shape) for name, x in module.state_dict().items()}


class DropPath(nn.Module):
    """timm's, which does nothing in eval mode."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x


def provide(name: str, **names: Any) -> None:
    """Make a module of this name, for what is imported and not called."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        sys.modules.setdefault(".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    for each, value in names.items():
        setattr(sys.modules[name], each, value)


def biformer(folder: Path) -> dict[str, Any]:
    sys.path.insert(0, str(folder))
    from models.biformer import BiFormer, biformer_tiny  # type: ignore[import-not-found]
    from ops.bra_nchw import nchwBRA  # type: ignore[import-not-found]

    options = {
        "depth": [1, 2, 1, 1], "in_chans": 2, "num_classes": 5, "embed_dim": [8, 16, 24, 32], "head_dim": 4,
        "n_win": 2, "kv_downsample_mode": "identity", "kv_per_wins": [-1] * 4, "topks": [1, 3, 2, -2],
        "qk_dims": [8, 16, 24, 32], "mlp_ratios": [3] * 4,
    }  # fmt: skip
    net = filled(BiFormer(**options))
    layer = filled(nchwBRA(DIM, HEADS, 2, topk=2, side_dwconv=5))
    return {
        "parameters": shapes_of(net), "released": shapes_of(biformer_tiny()), "layer": shapes_of(layer),
        "out": rounded(net(images(2, 64))),
        "outs": [rounded(layer(maps(1, DIM, *size)).flatten(2).mT) for size in ROUTED],
    }  # fmt: skip


def crossformer(folder: Path) -> dict[str, Any]:
    for name in [each for each in sys.modules if each.partition(".")[0] in ("models", "ops")]:
        del sys.modules[name]
    package = ModuleType("models")  # without running its `__init__`
    package.__path__ = [str(folder / "models")]
    sys.modules["models"] = package
    warnings.filterwarnings("ignore", "torch.meshgrid")
    from models.crossformer import CrossFormer, CrossFormerBlock  # type: ignore[import-not-found]

    common = {"patch_size": [4, 8, 16, 32], "merge_size": [[2, 4]] * 3}
    small = CrossFormer(
        img_size=48, in_chans=2, num_classes=5, embed_dim=32, depths=[2, 2, 1], num_heads=[2, 4, 8],
        group_size=[3, 3, 3], crs_interval=[3, 2, 1], mlp_ratio=[2.0] * 3, **common,
    )  # fmt: skip
    tiny = CrossFormer(
        embed_dim=64, depths=[1, 1, 8, 6], num_heads=[2, 4, 8, 16], mlp_ratio=[4.0] * 4, **common
    )  # fmt: skip
    outs = []
    for size, kind, interval in BLOCKS:
        block = CrossFormerBlock(32, size, 4, 3, interval, kind, mlp_ratio=1.0, use_extra_conv=False)
        outs.append(rounded(filled(block)(maps(1, size[0] * size[1], 32))))
    return {
        "parameters": shapes_of(small), "released": shapes_of(tiny), "layer": shapes_of(block),
        "out": rounded(filled(small)(images(2, 48))), "outs": outs,
    }  # fmt: skip


def vsa(folder: Path) -> dict[str, Any]:
    sys.path.insert(0, str(folder / "Image-Classification" / "vitaev2_vsa"))
    from vsa import VSAWindowAttention  # type: ignore[import-not-found]

    torch.Tensor.cuda = lambda self: self  # type: ignore[method-assign, assignment]
    outs = []
    for size in VARIED:
        layer = filled(VSAWindowAttention(DIM, HEADS, DIM, window_size=3, img_size=size))
        layer.base_coords, layer.coords = layer.base_coords.double(), layer.coords.double()
        outs.append(rounded(layer(maps(1, DIM, *size)).flatten(2).mT))
    return {"parameters": shapes_of(layer), "outs": outs}


def flatformer(folder: Path) -> dict[str, Any]:
    provide("mmdet3d.models.builder", MIDDLE_ENCODERS=_Registry())
    provide("mmdet3d.models.middle_encoders")
    provide("mmcv.runner", auto_fp16=lambda **_: lambda call: call)
    provide("flash_attn.flash_attn_interface", flash_attn_unpadded_qkvpacked_func=_packed_attention)
    name = "mmdet3d.models.middle_encoders.flatformer"
    path = folder / "mmdet3d" / "models" / "middle_encoders" / "flatformer.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.torch = _OnCPU()  # type: ignore[attr-defined]
    orders, outs = [], []
    for counts, (height, width) in CLOUDS:
        net = filled(module.FlatFormer(DIM, HEADS, window_shape=(width, height, 1), group_size=16))
        net.recover_bev = lambda x, *_: x
        x, coords = cloud(counts)
        given = torch.stack([coords[:, 0], torch.zeros(len(coords)).long(), coords[:, 1], coords[:, 2]], 1)
        mapping = net.mapping(given, len(counts))
        orders.append([mapping[each].tolist() for each in ("x", "x_shift", "y", "y_shift")])
        outs.append(rounded(net(x, given, len(counts))))
    return {"parameters": shapes_of(net), "orders": orders, "outs": outs}


class _Registry:
    """A registry of mmcv that keeps nothing."""

    def register_module(self) -> Any:
        return lambda cls: cls


class _OnCPU:
    """torch, with a CPU where the release names a GPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def arange(self, *ends: int, device: Any = None, **options: Any) -> Tensor:
        return torch.arange(*ends, **options)


def _packed_attention(qkv: Tensor, ends: Tensor, length: int, dropout: float) -> Tensor:
    """FlashAttention's function for sequences of one length, `(tokens, 3, heads, width)`."""
    q, k, v = qkv.unflatten(0, (-1, length)).permute(2, 0, 3, 1, 4)
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


def main(folder: Path) -> None:
    provide("timm.models.layers", DropPath=DropPath, to_2tuple=_pair, trunc_normal_=nn.init.trunc_normal_)
    provide("timm.models", register_model=lambda make: make)
    provide("timm.models.vision_transformer", _cfg=dict)
    provide("fairscale.nn.checkpoint", checkpoint_wrapper=lambda module: module)
    for name, make, place in (
        ("biformer", biformer, "BiFormer"), ("crossformer", crossformer, "CrossFormer"), ("vsa", vsa, "ViTAE-VSA"),
        ("flatformer", flatformer, "flatformer"),
    ):  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            found = make(folder / place)
        (FOLDER / f"{name}.json").write_text(json.dumps(found) + "\n", "utf-8")


def _pair(x: Any) -> tuple[Any, Any]:
    return tuple(x) if isinstance(x, tuple | list) else (x, x)  # type: ignore[return-value]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
