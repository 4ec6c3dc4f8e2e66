"""Who holds what of a token grid that several ranks share: geometry alone, no communication.

Each axis is cut between whole windows, so that windows and the means of proxies stay within one
rank. Windows shifted by s reach across a cut. Its neighbour's first s rows complete the windows of
the rank before it, so for shifted attention every cut moves on by s and is between windows again:
tokens move to their shifted rank, and what they get there moves back.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..geometry import Triple, WindowGrid, window_grid
from ..memo import Memo

Bounds = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Cut:
    """A grid as boxes, one per rank; ranks count in raster order, as tokens do.

    Args:
        bounds: per axis where it is cut, both ends included: part i holds [bounds[i], bounds[i+1]).
    """

    bounds: Bounds
    # Of every rank: its box's lengths, and how many positions it holds.
    shapes: tuple[Triple, ...] = field(init=False, compare=False, repr=False)
    sizes: tuple[int, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        shapes = tuple(itertools.product(*self.lengths))
        object.__setattr__(self, "shapes", shapes)
        object.__setattr__(self, "sizes", tuple(map(math.prod, shapes)))

    @property
    def parts(self) -> Triple:
        """Ranks per axis."""
        f, h, w = (len(points) - 1 for points in self.bounds)
        return (f, h, w)

    @property
    def ranks(self) -> int:
        return math.prod(self.parts)

    @property
    def grid(self) -> Triple:
        f, h, w = (points[-1] for points in self.bounds)
        return (f, h, w)

    def place(self, rank: int) -> Triple:
        """A rank's part of every axis."""
        _, h, w = self.parts
        return (rank // (h * w), rank // w % h, rank % w)

    def rank(self, place: Sequence[int]) -> int | None:
        """Who is at a place, if it is one."""
        if any(not 0 <= i < n for i, n in zip(place, self.parts, strict=True)):
            return None
        _, h, w = self.parts
        return (place[0] * h + place[1]) * w + place[2]

    def box(self, rank: int) -> tuple[range, range, range]:
        """The positions that a rank holds, per axis."""
        f, h, w = (
            range(points[i], points[i + 1])
            for points, i in zip(self.bounds, self.place(rank), strict=True)
        )
        return (f, h, w)

    @property
    def lengths(self) -> list[list[int]]:
        """Of the parts of each axis."""
        return [[b - a for a, b in itertools.pairwise(points)] for points in self.bounds]

    def scaled(self, *by: int) -> Cut:
        """The same cut of a finer grid, such as of pixels."""
        return self._mapped(lambda axis, point: point * by[axis])

    def of_windows(self, window: Sequence[int]) -> Cut:
        """The same cut of the grid of windows, none of which it divides."""
        return self._mapped(lambda axis, point: -(-point // window[axis]))

    def moved(self, shift: Triple) -> Cut:
        """The cut between shifted windows: all but the ends of an axis move on."""
        ends = self.grid
        return self._mapped(
            lambda axis, point: point + shift[axis] if 0 < point < ends[axis] else point
        )

    def _mapped(self, function: Callable[[int, int], int]) -> Cut:
        f, h, w = (
            tuple(function(axis, point) for point in points)
            for axis, points in enumerate(self.bounds)
        )
        return Cut((f, h, w))


class Pieces(NamedTuple):
    """A rank's box, divided by whom its tokens go to or come from."""

    lengths: tuple[tuple[int, ...], ...]  # of the parts of each axis
    shapes: tuple[Triple, ...]  # of the pieces, in raster order
    own: int  # the piece that stays
    others: tuple[int, ...]  # the tokens of each of the rest
    counts: tuple[int, ...]  # the tokens of every rank of the cut, without those that stay


class Trip(NamedTuple):
    """What moves, of one rank, where tokens go from the boxes of one cut to those of another."""

    given: Pieces  # of its box of the first
    taken: Pieces  # of its box of the second

    @classmethod
    def of(cls, rank: int, source: Cut, target: Cut) -> Trip:
        """Between cuts of as many parts, where those of the target lie up to a part further on."""
        return cls(_pieces(rank, source, target, -1), _pieces(rank, target, source, 1))

    def back(self) -> Trip:
        return Trip(self.taken, self.given)


def _pieces(rank: int, own: Cut, others: Cut, towards: int) -> Pieces:
    """Divide a rank's box among the same part and the next one `towards` of each axis.

    Where that is none, or has nothing of it, a piece is empty: every rank does the same.
    """
    axes: list[list[tuple[int, int]]] = []
    for here, there, i in zip(own.bounds, others.bounds, own.place(rank), strict=True):
        parts = [i] if here == there else sorted((i, i + towards))
        axes.append([(j, _overlap(here, i, there, j)) for j in parts])
    lengths = tuple(tuple(n for _, n in parts) for parts in axes)
    shapes: Any = tuple(itertools.product(*lengths))
    sizes = [math.prod(shape) for shape in shapes]
    places = itertools.product(*([j for j, _ in parts] for parts in axes))
    ranks = [own.rank(place) for place in places]
    mine, counts = ranks.index(rank), [0] * own.ranks
    for other, size in zip(ranks, sizes, strict=True):
        if other not in (None, rank):
            counts[other] = size
    return Pieces(lengths, shapes, mine, (*sizes[:mine], *sizes[mine + 1 :]), tuple(counts))


def _overlap(here: Sequence[int], i: int, there: Sequence[int], j: int) -> int:
    """The length that part i of one cut of an axis and part j of another have in common."""
    if not 0 <= j < len(there) - 1:
        return 0
    return max(0, min(here[i + 1], there[j + 1]) - max(here[i], there[j]))


@dataclass(frozen=True)
class Share(WindowGrid):
    """The windows of one rank: a WindowGrid of its own box, without a shift, which knows of others.

    Args:
        cut: who holds what.
        rank: within the cut.
        group: the name of the process group whose ranks these are.
        trip: of its tokens to where shifted windows are whole; None where they are.
        means: the same cut of the windows' means.
    """

    cut: Cut = Cut(((0, 1),) * 3)
    rank: int = 0
    group: str = ""
    trip: Trip | None = None
    means: Cut = Cut(((0, 1),) * 3)

    def __hash__(self) -> int:  # at every operation: not of all of it
        return hash((self.grid, self.window, self.rank))

    @classmethod
    def of(cls, windows: WindowGrid, cut: Cut, rank: int, group: str) -> Share:
        """A rank's share of an unshifted grid."""
        moved = cut.moved(half(windows.window))
        trip = None if moved == cut else Trip.of(rank, cut, moved)
        means = cut.of_windows(windows.window)
        return cls(
            cut.shapes[rank], windows.window, cut=cut, rank=rank, group=group, trip=trip,
            means=means,
        )  # fmt: skip

    def shifted(self) -> WindowGrid:
        """The shifted windows that this rank attends within, once tokens have moved."""
        grid = self.grid if self.trip is None else tuple(map(sum, self.trip.taken.lengths))
        # From the second part of an axis on, a box begins where a window does.
        places = zip(half(self.window), self.cut.place(self.rank), strict=True)
        return window_grid(grid, self.window, tuple(s if i == 0 else 0 for s, i in places))


def half(window: Sequence[int]) -> Triple:
    """Swin's shift."""
    f, h, w = window
    return (f // 2, h // 2, w // 2)


_cuts: Memo[Cut] = Memo()


def find_cut(windows: WindowGrid, proxies: WindowGrid, ranks: int) -> Cut:
    """The cut of a grid between windows of both kinds, one box per rank.

    Of all ways it takes one whose largest box is smallest, and of those one that moves the fewest
    tokens for shifted windows.

    Raises:
        ValueError: no such cut; the message names numbers of ranks that have one.
    """
    key = windows, proxies, ranks
    return _cuts.get(key) or _cuts.keep(key, _find_cut(windows, proxies, ranks))


def _find_cut(windows: WindowGrid, proxies: WindowGrid, ranks: int) -> Cut:
    points = [_points(windows, proxies, axis) for axis in range(3)]
    most = [len(own) for own in points]
    cuts = [
        Cut(tuple(map(_bounds, points, windows.grid, parts)))  # type: ignore[arg-type]
        for parts in itertools.product(*(range(1, n + 1) for n in most))
        if math.prod(parts) == ranks
    ]
    if not cuts:
        able = sorted({math.prod(p) for p in itertools.product(*(range(1, n + 1) for n in most))})
        known = ", ".join(map(str, able[:12])) + (", ..." if len(able) > 12 else "")
        raise ValueError(
            f"{ranks} ranks cannot share a grid of {windows.grid} tokens in windows of "
            f"{windows.window} and proxies of {proxies.window}: it has {tuple(most)} parts per "
            f"axis; these numbers of ranks can: {known}"
        )
    return min(cuts, key=lambda cut: (max(cut.sizes), _moved(cut, windows)))


def _moved(cut: Cut, windows: WindowGrid) -> int:
    target = cut.moved(half(windows.window))
    return sum(sum(Trip.of(rank, cut, target).given.counts) for rank in range(cut.ranks))


def _points(windows: WindowGrid, proxies: WindowGrid, axis: int) -> range:
    """Where an axis may be cut: between windows of both kinds, and, as the cut moves on, where more
    than the shift is left."""
    unit = math.lcm(windows.window[axis], proxies.window[axis])
    return range(0, max(1, windows.grid[axis] - half(windows.window)[axis]), unit)


def _bounds(points: range, length: int, parts: int) -> tuple[int, ...]:
    """As equal as they can be; the last part, whose last window may be smaller, has one more."""
    return (*(points[i * len(points) // parts] for i in range(parts)), length)
