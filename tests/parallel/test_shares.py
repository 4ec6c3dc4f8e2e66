"""Who holds what, on every small grid, without a process."""

import functools
import itertools

import pytest
import torch

from ptattn.geometry import WindowGrid
from ptattn.parallel.exchange import join, split
from ptattn.parallel.shares import Share, Trip, find_cut

AXES = [(length, p, q) for length in range(1, 11) for p in (1, 2, 3, 4) for q in (1, 2, 4)]


def grids():
    """One axis at a time, and all together."""
    for length, p, q in AXES:
        yield WindowGrid((1, length, 1), (1, p, 1)), WindowGrid((1, length, 1), (1, q, 1))
    for grid in ((4, 6, 7), (3, 9, 8), (5, 4, 12), (2, 2, 2)):
        for window in ((1, 2, 3), (2, 4, 4), (2, 1, 2)):
            for proxy in (window, (1, 1, 1), (2, 2, 2)):
                yield WindowGrid(grid, window), WindowGrid(grid, proxy)


@functools.cache
def cuts(most=12):
    found = []
    for windows, proxies in grids():
        for ranks in range(1, most + 1):
            try:
                found.append((windows, proxies, find_cut(windows, proxies, ranks)))
            except ValueError:
                continue
    return found


def boxes(x, cut):
    """Of a tensor (f, h, w), each rank's."""
    return [
        x[f.start : f.stop, h.start : h.stop, w.start : w.stop]
        for f, h, w in map(cut.box, range(cut.ranks))
    ]


def moved(own, trips):
    """What every rank of a trip has at its end, of what each has at its beginning."""
    mail = {}
    for rank, (box, trip) in enumerate(zip(own, trips, strict=True)):
        pieces = split(box, trip.given.lengths, first=0)
        stay = pieces.pop(trip.given.own)
        flat = torch.cat([piece.flatten() for piece in pieces])
        for other, part in enumerate(flat.split(list(trip.given.counts))):
            mail[rank, other] = part
        mail[rank, rank] = stay
    found = []
    for rank, trip in enumerate(trips):
        come = torch.cat([mail[other, rank] for other in range(len(own)) if other != rank])
        pieces = list(come.split(list(trip.taken.others)))
        pieces.insert(trip.taken.own, mail[rank, rank])
        shaped = [p.reshape(s) for p, s in zip(pieces, trip.taken.shapes, strict=True)]
        found.append(join(shaped, trip.taken.lengths, first=0))
    return found


def groups(ids, positions):
    """Which positions are together."""
    found = {}
    for window, position in zip(ids.tolist(), positions.flatten().tolist(), strict=True):
        found.setdefault(window, []).append(position)
    return {tuple(together) for together in found.values()}


def test_the_cases_are_many():
    parts = [cut.parts for _, _, cut in cuts()]
    assert len(parts) > 400
    assert sum(min(p) > 1 for p in parts) > 5  # on all three axes


def test_every_token_has_one_rank():
    for windows, _, cut in cuts():
        positions = torch.arange(windows.num_tokens).view(*windows.grid)
        own = torch.cat([box.flatten() for box in boxes(positions, cut)])
        assert torch.equal(own.sort().values, positions.flatten())
        assert min(cut.sizes) > 0


def test_windows_and_proxies_are_whole():
    for windows, proxies, cut in cuts():
        positions = torch.arange(windows.num_tokens).view(*windows.grid)
        for whole in (windows, proxies):
            together = set()
            for rank, box in enumerate(boxes(positions, cut)):
                share = Share.of(whole, cut, rank, "")
                assert share.grid == tuple(box.shape)
                together |= groups(share.window_ids(), box)
            assert together == groups(whole.window_ids(), positions)


def test_proxies_are_cut_as_their_tokens_are():
    for _, proxies, cut in cuts():
        numbers = torch.arange(proxies.num_windows).view(proxies.counts)
        ids = proxies.window_ids().view(proxies.grid)
        for own, tokens in zip(
            boxes(numbers, cut.of_windows(proxies.window)), boxes(ids, cut), strict=True
        ):
            assert own.flatten().tolist() == tokens.unique().tolist()


def test_shifted_windows_are_whole_once_tokens_have_moved():
    for windows, _, cut in cuts():
        positions = torch.arange(windows.num_tokens).view(*windows.grid)
        shares = [Share.of(windows, cut, rank, "") for rank in range(cut.ranks)]
        here = boxes(positions, cut)
        trips = [share.trip for share in shares]
        there = here if None in trips else moved(here, trips)
        together = set()
        for share, box in zip(shares, there, strict=True):
            shifted = share.shifted()
            assert shifted.grid == tuple(box.shape)
            together |= groups(shifted.window_ids(), box)
        assert together == groups(windows.shifted().window_ids(), positions)


def test_tokens_come_back_to_where_they_were():
    for windows, _, cut in cuts():
        trips = [Share.of(windows, cut, rank, "").trip for rank in range(cut.ranks)]
        if None not in trips:
            here = boxes(torch.arange(windows.num_tokens).view(*windows.grid), cut)
            back = moved(moved(here, trips), [trip.back() for trip in trips])
            assert all(map(torch.equal, here, back))


def test_what_one_rank_gives_another_takes():
    for windows, _, cut in cuts():
        target = cut.moved(tuple(p // 2 for p in windows.window))
        trips = [Trip.of(rank, cut, target) for rank in range(cut.ranks)]
        for (i, a), (j, b) in itertools.product(enumerate(trips), repeat=2):
            assert a.given.counts[j] == b.taken.counts[i]


def test_shares_are_as_equal_as_windows_allow():
    """Two axes may balance what one cannot; of equal ones the cheapest to shift is taken."""
    whole = WindowGrid((12, 8, 8), (4, 2, 2))
    assert find_cut(whole, whole, 4).sizes == (192,) * 4
    still = WindowGrid((12, 8, 8), (1, 2, 2))
    assert find_cut(still, still, 4).parts == (4, 1, 1)  # no window reaches across frames


def test_ranks_that_a_grid_does_not_have():
    image = WindowGrid((1, 8, 12), (1, 4, 4))
    with pytest.raises(ValueError, match=r"5 ranks cannot share .* can: 1, 2, 3, 4, 6$"):
        find_cut(image, image, 5)
