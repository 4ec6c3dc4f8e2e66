"""WindowGrid against plain loops over coordinates and against Swin's roll and mask, exactly."""

import dataclasses
from itertools import product

import pytest
import torch

from ptattn.geometry import WindowGrid, default_window

# (length, window, shift) of one axis: every small one, and those that differ in kind.
EVERY_AXIS = [(n, p, s) for n in range(1, 10) for p in range(1, 11) for s in range(p)]
AXES = [
    (1, 1, 0),  # one token
    (1, 4, 3),
    (3, 1, 0),  # every token alone
    (4, 2, 0),  # divides
    (4, 2, 1),
    (5, 3, 0),  # does not
    (5, 3, 2),
    (4, 4, 2),  # one window, shifted
    (2, 5, 0),  # window over axis
    (3, 5, 4),  # shift over axis
]


def plain_axis(length, p, s):
    """Window of every position of an axis, by walking along it and cutting at s, s + p, ..."""
    ids, current = [], 0
    for position in range(length):
        if position > 0 and position >= s and (position - s) % p == 0:
            current += 1
        ids.append(current)
    return ids


def check(axes):
    grid, window, shift = zip(*axes, strict=True)
    windows = WindowGrid(grid, window, shift)
    axes = [(1, 1, 0)] * (3 - len(axes)) + list(axes)
    per_axis = [plain_axis(*axis) for axis in axes]
    counts = [ids[-1] + 1 for ids in per_axis]
    tokens = list(product(*per_axis))
    ids = [(f * counts[1] + h) * counts[2] + w for f, h, w in tokens]
    sizes = [ids.count(i) for i in range(max(ids) + 1)]

    assert windows.window_ids().tolist() == ids
    assert windows.num_tokens == len(tokens)
    assert windows.counts == tuple(counts)
    assert windows.num_windows == len(sizes)
    assert windows.num_pairs == sum(size**2 for size in sizes)


@pytest.mark.parametrize("axis", range(3), ids="fhw".__getitem__)
def test_every_axis(axis):
    for case in EVERY_AXIS:
        axes = [(2, 1, 0)] * 3
        axes[axis] = case
        check(axes)


def test_every_axis_cut():
    """The cuts, the segments and the id of a position are three views of one partition."""
    for length, p, s in EVERY_AXIS:
        windows = WindowGrid((1, length), (1, p), (0, s))
        ids = plain_axis(length, p, s)
        assert [windows.axis_id(2, i) for i in range(length)] == ids
        assert windows.axis_id(2, torch.arange(length)).tolist() == ids
        sizes = [ids.count(i) for i in range(ids[-1] + 1)]
        cuts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        assert windows.cuts(2) == tuple(cuts)
        wanted = {0, length} | {c for c in range(s, length, p)}
        assert set(cuts) == wanted
        segments = windows.segments(2)
        assert [run.size for run in segments for _ in range(run.number)] == sizes
        assert sum(run.length for run in segments) == length
        assert len(segments) <= 3


@pytest.mark.parametrize("dimensions", [2, 3])
def test_combinations(dimensions):
    for axes in product(AXES, repeat=dimensions):
        check(axes)


def swin_same(grid, window, shift):
    """Swin's rule, (N, N) bool: after a roll by -shift two tokens attend to each other if they lie
    in one window and in one of the regions between which the wrapped windows are masked.
    """
    windows, regions = (torch.zeros(grid, dtype=torch.int64) for _ in range(2))
    for axis, (n, p, s) in enumerate(zip(grid, window, shift, strict=True)):
        shape = [-1 if i == axis else 1 for i in range(3)]
        place = torch.arange(n)
        windows = windows * n + (place // p).view(shape)
        region = torch.zeros(n, dtype=torch.int64)
        if s:
            region[n - p : n - s] = 1
            region[n - s :] = 2
        regions = regions * 3 + region.view(shape)
    undo = [shift, (0, 1, 2)]
    windows, regions = (t.roll(*undo).flatten() for t in (windows, regions))
    same = windows[:, None] == windows
    return same & (regions[:, None] == regions)


def test_equals_swin_on_every_axis():
    """Also where the axis holds a single window, as the release has it."""
    cases = [(n, p, s) for n, p, s in EVERY_AXIS if n % p == 0]
    assert (4, 4, 2) in cases
    for n, p, s in cases:
        for axis in range(3):
            grid, window, shift = ([1, 1, 1], [1, 1, 1], [0, 0, 0])
            grid[axis], window[axis], shift[axis] = n, p, s
            assert_swin(grid, window, shift)


def test_equals_swin_on_combinations():
    axes = [(1, 1, 0), (2, 2, 1), (4, 2, 0), (4, 2, 1), (6, 3, 1), (3, 3, 2)]
    for case in product(axes, repeat=3):
        assert_swin(*zip(*case, strict=True))


def assert_swin(grid, window, shift):
    ids = WindowGrid(tuple(grid), tuple(window), tuple(shift)).window_ids()
    same = ids[:, None] == ids
    assert torch.equal(same, swin_same(tuple(grid), tuple(window), tuple(shift)))


def test_shifted_is_half_a_window():
    windows = WindowGrid((4, 9, 9), (2, 3, 8)).shifted()
    assert windows == WindowGrid((4, 9, 9), (2, 3, 8), (1, 1, 4))


def test_a_large_grid():
    """No loop over tokens: a second of 720p video costs what its formulas cost."""
    windows = WindowGrid((48, 512, 512), (4, 16, 16), (2, 8, 8))
    assert windows.counts == (13, 33, 33)
    assert windows.num_windows == 13 * 33 * 33
    pairs = 1
    for n, p in ((48, 4), (512, 16), (512, 16)):
        pairs *= (n // p - 1) * p**2 + 2 * (p // 2) ** 2
    assert windows.num_pairs == pairs


def test_two_numbers_mean_one_frame():
    image = WindowGrid((5, 6), (2, 3), (1, 2))
    assert image == WindowGrid((1, 5, 6), (1, 2, 3), (0, 1, 2))
    assert image == WindowGrid([1, 5, 6], [1, 2, 3], [0, 1, 2])
    assert (image.grid, image.window, image.shift) == ((1, 5, 6), (1, 2, 3), (0, 1, 2))
    assert WindowGrid(torch.Size((5, 6)), (2, 3)).grid == (1, 5, 6)


def test_frozen_and_hashable():
    windows = WindowGrid((5, 6), (2, 3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        windows.grid = (1, 1, 1)
    assert {windows: 1}[WindowGrid((1, 5, 6), (1, 2, 3))] == 1


@pytest.mark.parametrize(
    ("grid", "window"),
    [
        ((16, 16), (1, 2, 2)),  # 256²
        ((32, 32), (1, 4, 4)),  # 512²
        ((64, 64), (1, 8, 8)),  # 1024²
        ((128, 128), (1, 16, 16)),  # 2048²
        ((1, 64, 64), (1, 8, 8)),
        ((48, 16, 16), (4, 2, 2)),  # video
        ((24, 32, 32), (4, 4, 4)),  # 24 views
        ((2, 64, 64), (4, 8, 8)),
        ((12, 20), (1, 2, 2)),  # about 256², 3:5
        ((24, 42), (1, 4, 4)),  # about 512², 9:16
        ((42, 24), (1, 4, 4)),
        ((48, 80), (1, 8, 8)),  # about 1024², 3:5
        ((32, 128), (1, 8, 8)),  # 1:4
        ((96, 170), (1, 16, 16)),  # about 2048², 9:16
        ((1, 1), (1, 2, 2)),
    ],
    ids=str,
)
def test_default_window(grid, window):
    assert default_window(grid) == window
