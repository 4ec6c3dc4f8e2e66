"""Windows in blocks (kernels/blocks.py) against geometry.py, and against the launchers' count."""

from itertools import product

import pytest
import torch

from ptattn.geometry import WindowGrid

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from ptattn.kernels import host  # noqa: E402
from ptattn.kernels.blocks import cut, rows_of  # noqa: E402
from ptattn.kernels.tile import window_box  # noqa: E402


@triton.jit
def _walk(
    tokens, counts, whole_counts, f, h, w, pf, ph, pw, of, oh, ow, blocks,
    STACKED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Of a window, slot for slot, the tokens of its blocks, -1 where there is none."""
    window, geometry = tl.program_id(0), (f, h, w, pf, ph, pw, of, oh, ow)
    box = window_box(window, geometry)
    shape, count, whole = cut(0, box, SIZE, True)
    tl.store(counts + window, count)
    tl.store(whole_counts + window, whole)
    for block in range(0, count):
        row, first, present = rows_of(
            block, shape, 0, box, geometry, tokens, True, True, STACKED, False, SIZE
        )
        slot = (window * blocks + block) * SIZE + tl.arange(0, SIZE)
        tl.store(tokens + slot, tl.where(present, first + row, -1))


# (grid, window, shift), and whether blocks lie one below the other.
WINDOWS = {
    "cut": ((1, 7, 9), (1, 5, 8), (0, 3, 4), True),
    "whole": ((1, 8, 12), (1, 8, 8), (0, 0, 4), True),
    "one-line": ((1, 2, 19), (1, 1, 16), (0, 0, 5), True),
    "video": ((4, 5, 7), (3, 4, 8), (1, 0, 0), False),
    "several-frames": ((7, 2, 3), (6, 2, 3), (2, 0, 0), False),
    "long-lines": ((2, 2, 45), (2, 2, 40), (0, 0, 9), False),
    "over-axis": ((2, 3, 5), (4, 8, 8), (0, 0, 4), False),
}


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("case", WINDOWS)
def test_blocks_hold_their_window_in_order(case, size):
    *geometry, stacked = WINDOWS[case]
    windows = WindowGrid(*geometry)
    blocks = host.num_blocks(windows, size)
    tokens = torch.full((windows.num_windows, blocks, size), -1, dtype=torch.int32)
    counts, whole = torch.empty(2, windows.num_windows, dtype=torch.int32)
    numbers = (*host.geometry(windows), blocks)
    _walk[(windows.num_windows,)](tokens, counts, whole, *numbers, STACKED=stacked, SIZE=size)
    for window, held in enumerate(tokens):
        members = (windows.window_ids() == window).nonzero()[:, 0]
        assert held[held >= 0].tolist() == members.tolist()
        places = torch.unravel_index(members, windows.grid)
        extents = [int(place.max() - place.min()) + 1 for place in places]
        assert counts[window] == host.blocks_of_box(extents, size) <= blocks
        # Only blocks without an empty slot may be read without a mask.
        full = bool((held[: counts[window]] >= 0).all())
        assert whole[window] == (counts[window] if full else 0)


@pytest.mark.parametrize("size", [16, 32, 64])
def test_no_window_has_more_blocks_than_the_largest(size):
    """There are programs for as many blocks as the largest window has: a smaller one in any
    direction must not need more, or its last tokens are never written."""
    for extents in product(range(1, 6), range(1, 20), range(1, 20)):
        for axis in range(3):
            larger = [n + (axis == i) for i, n in enumerate(extents)]
            assert host.blocks_of_box(extents, size) <= host.blocks_of_box(larger, size), extents
