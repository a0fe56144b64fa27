"""Windows of a grid, with and without a halo."""

from __future__ import annotations

import pytest
import torch

from foveate.nn.parts.window import Windows


@pytest.mark.parametrize("halo", [0, 1, 3])
@pytest.mark.parametrize(
    ("size", "window"),
    [((4, 6), (2, 3)), ((5, 4), (2, 3)), ((5, 6), (2, 3)), ((4, 4), (2, 3)), ((2, 3), (4, 5)), ((1, 1), (1, 1))],
)
def test_windows_and_their_halos_token_by_token(size: tuple[int, int], window: tuple[int, int], halo: int) -> None:
    (rows, columns), (h, w) = size, window
    x = torch.randn(2, rows * columns, 3, generator=torch.Generator().manual_seed(0))
    windows = Windows(size, window)
    around, real = windows.around(x, halo), windows.real(halo=halo)
    grid, index = x.unflatten(1, size), 0
    for image in range(2):
        for top in range(0, rows, h):
            for left in range(0, columns, w):
                expected, inside = [], []
                for row in range(top - halo, top + h + halo):
                    for column in range(left - halo, left + w + halo):
                        on = 0 <= row < rows and 0 <= column < columns
                        expected.append(grid[image, row, column] if on else torch.zeros(3))
                        inside.append(on)
                assert torch.equal(around[index], torch.stack(expected))
                assert real[index % len(real)].tolist() == inside
                index += 1
    assert index == len(around) == 2 * len(real)
    if halo == 0:
        assert torch.equal(windows.partition(x), around)
        assert torch.equal(windows.merge(around), x)
