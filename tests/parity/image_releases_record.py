"""Records what the releases of CATANet, DFFreq and PT-DiT make of a few images: three files of this folder.

The releases are repositories, not packages. By hand, from here, with the repositories cloned beside each other, and
`pytorch_wavelets` and `PyWavelets` on the path:

    git clone https://github.com/EquationWalker/CATANet /tmp/releases/CATANet
    git clone https://github.com/HorizonTEL/DFFreq-main /tmp/releases/DFFreq-main
    git clone https://gitee.com/ascend/MindSpeed-MM /tmp/releases/MindSpeed-MM
    PYTHONPATH=. .venv/bin/python tests/parity/image_releases_record.py /tmp/releases

Both sides make the same images and the same parameters, from one generator. CATANet's release sorts tokens by numbers
that many of them share, and leaves their order to the sort; it gets one that keeps it, as ours does.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.parity.speechbrain_record import parameters
from tests.parity.vision_releases_record import maps, provide, rounded

FOLDER = Path(__file__).parent
DIM, HEADS = 12, 3
#: Sides of images for super-resolution, in which no row or column belongs to three windows; there the release errs.
SIZE = (10, 8)
#: Grids and windows for blocks of a diffusion transformer; the release takes grids that windows divide.
BLOCKS = (((1, 4, 6), (1, 2, 2)), ((1, 8, 8), (1, 4, 4)), ((4, 4, 4), (2, 2, 2)))


def filled(module: nn.Module) -> Any:
    """Give a released module the parameters that the test gives ours; the filters of wavelets stay."""
    module.double().eval().load_state_dict(parameters(trained(shapes_of(module))), strict=False)
    return module


def trained(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """Return the shapes of parameters, without counters, flags and filters of wavelets."""
    other = ("num_batches_tracked", "initted", "dwt_transform")
    return {name: shape for name, shape in shapes.items() if not any(part in name for part in other)}


def shapes_of(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(x.shape) for name, x in module.state_dict().items()}


def loaded(path: Path, name: str) -> ModuleType:
    """Run a file of a release under a name."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def catanet(folder: Path) -> dict[str, Any]:
    provide("basicsr.utils.registry", ARCH_REGISTRY=SimpleNamespace(register=lambda: lambda cls: cls))
    provide("basicsr.archs.arch_util", trunc_normal_=nn.init.trunc_normal_)
    cls = loaded(folder / "basicsr" / "archs" / "catanet_arch.py", "catanet_arch").CATANet
    big = shapes_of(cls(upscale=4))
    cls.setting = dict(dim=8, block_num=2, qk_dim=6, mlp_dim=12, heads=2, patch_size=[4, 5])
    small = {"in_chans": 2, "n_iters": [2, 2], "num_tokens": [3, 4], "group_size": [16, 8]}
    unstable = torch.argsort
    torch.argsort = lambda x, dim=-1: unstable(x, dim=dim, stable=True)  # type: ignore[assignment, misc]
    net = filled(cls(**small, upscale=2))
    for blocks in net.blocks:
        blocks[0].initted.fill_(True)
    out = rounded(net(maps(2, 2, *SIZE)))
    net.train()(maps(3, 2, *SIZE))
    centres = [rounded(blocks[0].means) for blocks in net.blocks]
    return {"parameters": shapes_of(net), "released": big, "out": out, "centres": centres}


def dffreq(folder: Path) -> dict[str, Any]:
    provide("pkg_resources", resource_stream=None)  # the package of wavelets imports it and does not call it here
    package = ModuleType("networks")
    package.__path__ = [str(folder / "networks")]
    sys.modules["networks"] = package
    from networks.FreqLC import FreqLCBlock, LocalAttention  # type: ignore[import-not-found]
    from networks.resnet import Bottleneck, ResNet, resnet50  # type: ignore[import-not-found]

    net = filled(ResNet(Bottleneck, [1, 1], num_classes=2))
    layer, block = filled(LocalAttention(6, 2, True, window_size=3)), filled(FreqLCBlock(3, window_size=4))
    return {
        "parameters": shapes_of(net), "released": shapes_of(resnet50()), "layer": shapes_of(layer),
        "block": shapes_of(block), "out": rounded(net(maps(2, 3, 32, 24))),
        "layer_out": rounded(layer(maps(1, 6, 7, 8))), "block_out": rounded(block(maps(1, 3, 16, 20))),
    }  # fmt: skip


def pt_dit(folder: Path) -> dict[str, Any]:
    # before there is a false package that these would look for
    for name in ("attention", "attention_processor", "embeddings", "modeling_utils", "normalization"):
        importlib.import_module(f"diffusers.models.{name}")
    provide("torch_npu")
    provide("mindspeed_mm.models.common.embeddings", PatchEmbed2D_3DsincosPE=None)
    module = loaded(folder / "mindspeed_mm" / "models" / "predictor" / "dits" / "pt_dit_diffusers.py", "pt_dit_release")
    outs = []
    for grid, window in BLOCKS:
        block = filled(module.ProxyTokensTransformerBlock(
            DIM, HEADS, DIM // HEADS, cross_attention_dim=DIM, activation_fn="gelu-approximate", attention_bias=True,
            norm_elementwise_affine=False, norm_type="ada_norm_single", norm_eps=1e-6, shift_window=True,
            compress_ratios=window, proxy_compress_ratios=window,
        ))  # fmt: skip
        holder = SimpleNamespace()
        module.PTDiTDiffuser.get_shift_window_attention_mask(holder, *grid, window, torch.float64, "cpu")
        out = block(
            cut(maps(1, *grid, DIM), window), encoder_hidden_states=maps(1, 5, DIM), timestep=maps(1, 6 * DIM),
            shift_window_attention_mask=10_000.0 * holder.shift_window_attention_mask, compress_ratios=window,
            proxy_compress_ratios=window, num_frames=grid[0], height=grid[1], width=grid[2],
        )  # fmt: skip
        outs.append(rounded(out))
    slots = filled(module.AdaLayerNormSingle(DIM))
    times = slots(
        torch.tensor([0.0, 10.0, 999.0]).double(), {"resolution": None, "aspect_ratio": None}, 3, torch.float64
    )
    return {"block": shapes_of(block), "outs": outs, "slots": shapes_of(slots), "times": rounded(times[0])}


def cut(z: Tensor, window: tuple[int, int, int]) -> Tensor:
    """Return the tokens of each window, the form in which the release's blocks have them."""
    (_, f, h, w, c), (i, j, k) = z.shape, window
    z = z.view(-1, f // i, i, h // j, j, w // k, k, c)
    return z.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, i * j * k, c)


def main(folder: Path) -> None:
    for name, make, place in (
        ("catanet", catanet, "CATANet"), ("dffreq", dffreq, "DFFreq-main"), ("pt_dit", pt_dit, "MindSpeed-MM"),
    ):  # fmt: skip
        with torch.no_grad():
            found = make(folder / place)
        (FOLDER / f"{name}.json").write_text(json.dumps(found) + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
