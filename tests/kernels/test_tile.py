"""The kernels' window coordinates (kernels/tile.py) against geometry.py, their one home."""

from itertools import product

import pytest
import torch

from ptattn.geometry import WindowGrid

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from ptattn.kernels import host  # noqa: E402
from ptattn.kernels.tile import (  # noqa: E402
    box_size,
    num_windows,
    quotient,
    token_in_box,
    window_box,
    window_of,
)

SLOTS = 64


@triton.jit
def _coordinates(
    tokens, counts, owners, f, h, w, pf, ph, pw, of, oh, ow,
    WINDOWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Of WINDOWS windows the tokens in SLOTS slots, -1 in the rest; of SLOTS tokens the window."""
    geometry = (f, h, w, pf, ph, pw, of, oh, ow)
    row = tl.arange(0, WINDOWS * SLOTS)
    window, slot = row // SLOTS, row % SLOTS
    box = window_box(window, geometry)
    found = token_in_box(slot, box, geometry)
    held = (window < num_windows(geometry)) & (slot < box_size(box))
    tl.store(tokens + row, tl.where(held, found, -1))
    tl.store(counts, num_windows(geometry))
    token = tl.arange(0, SLOTS)
    tl.store(owners + token, window_of(token, geometry))


def coordinates(windows):
    """By the kernels: the tokens of every window, and the window of every token."""
    count = triton.next_power_of_2(windows.num_windows + 1)  # with one past the last
    tokens = torch.empty(count, SLOTS, dtype=torch.int32)
    counts, owners = torch.empty(1, dtype=torch.int32), torch.empty(SLOTS, dtype=torch.int32)
    geometry = host.geometry(windows)
    _coordinates[(1,)](tokens, counts, owners, *geometry, WINDOWS=count, SLOTS=SLOTS)
    assert counts.item() == windows.num_windows
    members = [row[row >= 0].tolist() for row in tokens]
    assert not any(members[windows.num_windows :]), "tokens past the last window"
    return members[: windows.num_windows], owners[: windows.num_tokens].tolist()


def agrees(windows):
    members, owners = coordinates(windows)
    ids = windows.window_ids()
    assert owners == ids.tolist(), windows
    expected = [(ids == w).nonzero()[:, 0].tolist() for w in range(windows.num_windows)]
    assert members == expected, windows


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("length", range(1, 8))
def test_every_small_axis(length, axis):
    """Every window and shift; the other axes have two and three positions, in windows of two."""
    grid, window, shift = [2, 3, 3], [1, 2, 2], [0, 1, 0]
    for size in range(1, 9):
        for first in sorted({0, 1, size // 2, size - 1}):
            if first < size:
                grid[axis], window[axis], shift[axis] = length, size, first
                agrees(WindowGrid(grid, window, shift))


GRIDS = ((1, 1, 1), (2, 4, 5), (3, 3, 7), (1, 8, 8), (5, 1, 6), (4, 4, 4))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_window_together(grid):
    for window in ((1, 1, 1), (2, 2, 3), (3, 4, 2), (9, 9, 9)):
        for half in product((0, 1), repeat=3):
            shift = [p // 2 * s for p, s in zip(window, half, strict=True)]
            agrees(WindowGrid(grid, window, shift))


@triton.jit
def _divide(x, y, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, quotient(tl.load(x + i), tl.load(y + i)))


def test_quotient_is_exact():
    """Where it is hardest: at and next to the multiples of y, up to the largest window."""
    limit = host.MAX_WINDOW
    y = torch.randint(1, 3000, (2**16,))
    y[:3000] = torch.arange(1, 3001)
    multiple = (limit - 1 - torch.randint(0, limit // 2, y.shape)) // y * y
    for x in (multiple, multiple - 1, multiple + y // 2, torch.full_like(y, limit - 1)):
        x = x.clamp(0, limit - 1).int()
        out = torch.empty_like(x)
        _divide[(1,)](x, y.int(), out, SIZE=len(x))
        assert torch.equal(out, x // y.int())
