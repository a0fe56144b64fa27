"""Values behind the output projection, in pieces of bounded size."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foveate.core.errors import UnsupportedModel
from foveate.host import output_projection
from foveate.host.output_projection import projected_norms


def call(width: int = 12, heads: int = 4) -> Any:
    torch.manual_seed(0)
    v, module = torch.randn(2, 2, 9, 3), nn.Module()
    module.o_proj = nn.Linear(width, 7)
    return SimpleNamespace(v=v, q=torch.zeros(2, heads, 1, 3), module=module)


@pytest.mark.parametrize(("tile", "pieces"), [(1 << 22, 1), (14 * 4, 3), (1, 9)])
def test_norms_are_those_of_projected_values_a_tile_at_a_time(
    tile: int, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, made = call(), []
    kernel = Tensor.matmul

    def counted(self: Tensor, other: Tensor) -> Tensor:
        made.append(self.shape[1])
        return kernel(self, other)

    weight = site.module.o_proj.weight.detach().view(7, 4, 3)
    expected = torch.einsum("bhnd,chd->bhnc", site.v.repeat_interleave(2, 1), weight).abs().sum(-1)
    monkeypatch.setattr(output_projection, "TILE", tile)
    monkeypatch.setattr(Tensor, "__matmul__", counted)
    found = projected_norms(site)
    torch.testing.assert_close(found, expected)
    assert len(made) == 4 * pieces and sum(made) == 4 * 9
    assert max(made) <= max(1, tile // (2 * 7))


def test_a_projection_of_another_width_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="takes 10 numbers, and 4 heads give 12"):
        projected_norms(call(10))
    with pytest.raises(UnsupportedModel, match="has no linear o_proj or out_proj"):
        projected_norms(SimpleNamespace(v=torch.zeros(1, 1, 1, 1), q=torch.zeros(1, 1, 1, 1), module=nn.Module()))  # type: ignore[arg-type]
