"""The one home of grids, windows, shifts and proxies.

A token sequence lies on a grid (f, h, w) in raster order (w fastest). Every axis of length L is cut
at 0, s, s + p, s + 2p, ..., L for a window p and a shift s, so the first and the last window may be
smaller: every grid works, and nothing is padded, rolled or masked. A shifted grid cut this way
groups exactly the tokens that Swin's roll-and-mask lets attend to each other (arXiv 2103.14030,
section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .memo import Memo

Triple = tuple[int, int, int]
NO_SHIFT: Triple = (0, 0, 0)


def _triple(name: str, value: Sequence[int], fill: int, lowest: int) -> Triple:
    """Check two or three integers, each at least `lowest`; `fill` is the frame axis of two."""
    # bool is an int to Python, but a grid of True is a mistake; SymInt is torch.compile's int.
    ok = isinstance(value, Sequence) and not isinstance(value, str) and len(value) in (2, 3)
    if not ok or any(isinstance(v, bool) or not isinstance(v, (int, torch.SymInt)) for v in value):
        if ok and any(isinstance(v, torch.Tensor) for v in value):
            raise ValueError(
                f"{name} must be integers; got tensors, which torch.jit.trace makes of sizes: "
                f"use torch.export.export or torch.compile"
            )
        raise ValueError(f"{name} must be 2 or 3 integers, (h, w) or (f, h, w); got {value!r}")
    if any(v < lowest for v in value):
        raise ValueError(f"{name} must have every entry >= {lowest}; got {tuple(value)}")
    return (fill, *value) if len(value) == 2 else tuple(value)  # type: ignore[return-value]


class Segment(NamedTuple):
    """`number` neighbouring windows of equal `size` on one axis."""

    number: int
    size: int

    @property
    def length(self) -> int:
        return self.number * self.size


@dataclass(frozen=True)
class WindowGrid:
    """Windows on a token grid.

    Args:
        grid: (f, h, w) or (h, w), the tokens per axis.
        window: (pf, ph, pw) or (ph, pw), the window per axis; one longer than the axis is the axis.
        shift: (sf, sh, sw) or (sh, sw), the first cut per axis; each in [0, window).

    All three are kept as tuples of three integers.

    Raises:
        ValueError: an entry that is not an integer, not positive, or a shift outside [0, window).
    """

    grid: Sequence[int]
    window: Sequence[int]
    shift: Sequence[int] = NO_SHIFT

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", _triple("grid", self.grid, 1, 1))
        object.__setattr__(self, "window", _triple("window", self.window, 1, 1))
        object.__setattr__(self, "shift", _triple("shift", self.shift, 0, 0))
        if any(s >= p for s, p in zip(self.shift, self.window, strict=True)):
            raise ValueError(
                f"shift must lie in [0, window) on every axis; got shift {self.shift} "
                f"with window {self.window}"
            )

    def shifted(self) -> WindowGrid:
        """The same grid with Swin's shift, window // 2 on every axis."""
        f, h, w = self.window
        return window_grid(tuple(self.grid), tuple(self.window), (f // 2, h // 2, w // 2))

    @property
    def num_tokens(self) -> int:
        f, h, w = self.grid
        return f * h * w

    @property
    def num_windows(self) -> int:
        """How many windows there are: the number of proxy tokens where the grid is unshifted."""
        f, h, w = self.counts
        return f * h * w

    @property
    def counts(self) -> Triple:
        """Windows per axis."""
        f, h, w = (self.axis_id(axis, length - 1) + 1 for axis, length in enumerate(self.grid))
        return (f, h, w)

    def axis_id(self, axis: int, position: Any) -> Any:
        """Index along one axis of the window that holds `position` (an int, or a tensor of them).

        All else here follows from it, and the kernels compute the same.
        """
        p = self.window[axis]
        return (position + -self.shift[axis] % p) // p

    def segments(self, axis: int) -> tuple[Segment, ...]:
        """The axis as first / interior / last runs of equal windows; empty runs are dropped.

        These are a plan for one grid: torch.compile compiles anew where a grid gives another.
        """
        length, p, s = (int(t[axis]) for t in (self.grid, self.window, self.shift))
        first = min(s, length)
        rest = length - first
        runs = (Segment(1, first), Segment(rest // p, p), Segment(1, rest % p))
        return tuple(run for run in runs if run.length)

    def cuts(self, axis: int) -> tuple[int, ...]:
        """Where the axis is cut, both ends included: 0, s, s + p, ..., L."""
        points = [0]
        for run in self.segments(axis):
            points += [points[-1] + run.size * (i + 1) for i in range(run.number)]
        return tuple(points)

    def window_ids(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Window of every token in raster order, int64 (N,); windows too count in raster order."""
        ids = torch.zeros(1, dtype=torch.int64, device=device)
        for axis, (length, count) in enumerate(zip(self.grid, self.counts, strict=True)):
            own = self.axis_id(axis, torch.arange(length, device=device))
            ids = (ids[:, None] * count + own).flatten()
        return ids

    @property
    def num_pairs(self) -> int:
        """Query-key pairs within windows: the sum over windows of (tokens held)²."""
        return math.prod(
            sum(run.number * run.size**2 for run in self.segments(axis)) for axis in range(3)
        )


_SEQUENCES = {tuple, list, torch.Size}
# What `window_grid` has made.
_interned: Memo[WindowGrid] = Memo()


def window_grid(
    grid: Sequence[int] | WindowGrid,
    window: Sequence[int] | None = None,
    shift: Sequence[int] = NO_SHIFT,
) -> WindowGrid:
    """The one WindowGrid of a grid, window and shift; a WindowGrid in place of all three as it is.

    A call pays for its checks once: the same three give the same object again.

    Raises:
        TypeError: a WindowGrid with a window or shift.
        ValueError: as WindowGrid.
    """
    if isinstance(grid, WindowGrid):
        if window is not None or shift != NO_SHIFT:
            raise TypeError("grid is a WindowGrid, which has its window and shift: give no others")
        return grid
    given: tuple[Any, Any, Any] = grid, window, shift
    if torch.compiler.is_compiling() or not _SEQUENCES.issuperset(map(type, given)):
        return WindowGrid(*given)  # which names what is wrong
    if {*map(type, (*given[0], *given[1], *given[2]))} != {int}:  # symbolic, or True, equal to 1
        return WindowGrid(*given)
    key = tuple(grid), tuple(given[1]), tuple(shift)
    return _interned.get(key) or _interned.keep(key, WindowGrid(*key))


def default_window(grid: Sequence[int]) -> Triple:
    """The paper's window for a token grid: (1, 2, 2) at 16 x 16 tokens, growing with the side.

    A window of video has 4 frames. The side is the geometric mean of height and width, so that
    every aspect ratio of one resolution has one window. Source: arXiv 2409.04005.
    """
    f, h, w = _triple("grid", grid, 1, 1)
    side = 2
    while h * w >= 128 * side**2:  # nearer to 16·side than to 8·side, as a ratio
        side *= 2
    return (4 if f > 1 else 1, side, side)
