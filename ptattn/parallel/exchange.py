"""What the ranks of a split tell each other, differentiably, by torch's functional collectives.

All ranks compute the same loss of the same output. So that the mean over the ranks of a parameter's
gradients is its gradient, as DDP and FSDP expect it, gradients within the split are multiplied by
the number of ranks where the output is gathered, and divided by it where inputs are cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..context import autocast_dtype
from ..geometry import WindowGrid
from .shares import Cut, Share, Trip

collectives = torch.ops._c10d_functional
Lengths = Sequence[Sequence[int]]


def wait(pending: Tensor) -> Tensor:
    """The result of a collective."""
    if torch.compiler.is_compiling():
        return collectives.wait_tensor(pending)
    try:
        return collectives.wait_tensor(pending)
    except RuntimeError as error:
        raise RuntimeError(
            "another rank of the split has failed, or has not answered within the time-out of the "
            "process group: what went wrong stands in that rank's error"
        ) from error


# Boxes, in pieces.


def split(x: Tensor, lengths: Lengths, first: int) -> list[Tensor]:
    """A box in pieces, in raster order; frames are dimension `first`."""
    pieces = [x]
    for axis, parts in enumerate(lengths):
        if len(parts) > 1:  # one axis at a time: each costs the backward one concatenation
            runs = (piece.split(list(parts), dim=first + axis) for piece in pieces)
            pieces = list(itertools.chain.from_iterable(runs))
    return pieces


def join(pieces: Sequence[Tensor], lengths: Lengths, first: int) -> Tensor:
    """The box that `split` has divided."""
    joined = list(pieces)
    for axis in (2, 1, 0):
        n = len(lengths[axis])
        if n > 1:
            runs = (joined[i : i + n] for i in range(0, len(joined), n))
            joined = [torch.cat(list(run), dim=first + axis) for run in runs]
    return joined[0]


# Shifted windows: tokens move to the neighbour that has the rest of their window, and back.


def shifted_attention(
    project: Callable[[Tensor], Tensor],
    attend: Callable[[Tensor, WindowGrid], Tensor],
    close: Callable[[Tensor], Tensor],
    x: Tensor,
    share: Share,
    trip: Trip,
) -> Tensor:
    """close(attend(project(x), shifted windows)) of a rank's share (B, N, C).

    `project` and `close` take each token by itself: they are at work on the tokens that stay while
    the others are on their way, and so are their backwards. What moves has C channels, twice; a
    packed projection would have three times as many.
    """
    dtype = autocast_dtype(x)
    if dtype is not None and x.dtype != torch.float64:
        x = x.to(dtype)  # as `project` would
    group = share.group
    stay, pending = depart(x.unflatten(1, share.grid), trip, group)
    own = project(stay)
    qkv = together(own, project(arrive(pending, x, trip, group)), trip)
    windows = share.shifted()
    z = attend(qkv, windows)
    trip = trip.back()
    stay, pending = depart(z.unflatten(1, windows.grid), trip, group)
    own = close(stay)
    return together(own, close(arrive(pending, z, trip, group)), trip)


def depart(x: Tensor, trip: Trip, group: str) -> tuple[Tensor, Any]:
    """Send off what leaves of (B, f, h, w, C): what stays, (B, n, C), and what is to `arrive`."""
    pieces = split(x, trip.given.lengths, first=1)
    own = pieces.pop(trip.given.own)
    leaving = torch.cat([piece.flatten() for piece in pieces])
    return own.flatten(1, 3), _Start.apply(leaving, *_counts(x, trip), group)


def arrive(pending: Any, like: Tensor, trip: Trip, group: str) -> Tensor:
    """What has come, (B, m, C), piece by piece."""
    flat = _Finish.apply(*pending, *_counts(like, trip), group)
    batch, channels, numbers = like.shape[0], like.shape[-1], trip.taken.others
    pieces = flat.split([batch * n * channels for n in numbers])
    rows = [p.view(batch, n, channels) for p, n in zip(pieces, numbers, strict=True)]
    return torch.cat(rows, dim=1)


def together(stay: Tensor, came: Tensor, trip: Trip) -> Tensor:
    """The box (B, N, C) of what has stayed and what has come."""
    taken = trip.taken
    pieces = list(came.split(taken.others, dim=1))
    pieces.insert(taken.own, stay)
    boxes = [piece.unflatten(1, shape) for piece, shape in zip(pieces, taken.shapes, strict=True)]
    return join(boxes, taken.lengths, first=1).flatten(1, 3)


def _counts(x: Tensor, trip: Trip) -> tuple[list[int], list[int]]:
    """How many numbers of x go to each rank, and come from it."""
    per_token = x.shape[0] * x.shape[-1]
    given, taken = trip.given.counts, trip.taken.counts
    return [per_token * n for n in given], [per_token * n for n in taken]


class _Start(torch.autograd.Function):
    """Begin an exchange of flat tensors: what is coming, not to be read yet, and what was sent.

    The backward of each of the two is the other's forward: gradients are on their way while what
    was computed in between is differentiated. They take the place of what was sent.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, given: list[int], taken: list[int], group: str) -> Any:
        coming = collectives.all_to_all_single(x, taken, given, group)
        ctx.mark_non_differentiable(coming)
        ctx.set_materialize_grads(False)
        return coming, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, _: None, returning: Tensor) -> Any:
        return wait(returning), None, None, None


class _Finish(torch.autograd.Function):
    """End an exchange."""

    @staticmethod
    def forward(
        ctx: Any, coming: Tensor, sent: Tensor, given: list[int], taken: list[int], group: str
    ) -> Tensor:
        ctx.exchange = given, taken, group
        return wait(coming)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        given, taken, group = ctx.exchange
        returning = collectives.all_to_all_single(grad.contiguous(), given, taken, group)
        if not torch.compiler.is_compiling() and torch.is_anomaly_enabled():
            wait(returning)  # autograd looks at every gradient for NaN, as soon as it is given one
        return None, returning, None, None, None


# Between a rank's box and the whole grid.


def all_proxies(means: Tensor, share: Share) -> Tensor:
    """The proxies of the whole grid, (B, M, C), of a rank's own."""
    own = means.unflatten(1, share.means.shapes[share.rank])
    return _GatherProxies.apply(own, share.means, share.rank, share.group).flatten(1, 3)


def cut_input(x: Tensor, cut: Cut, share: Share, first: int) -> Tensor:
    """A rank's box of a tensor that all ranks have; frames are dimension `first`."""
    return _CutInput.apply(x, cut, share.rank, share.group, first)


def same_input(x: Tensor, share: Share) -> Tensor:
    """A tensor that all ranks have, and take whole."""
    return _SameInput.apply(x, share.cut.ranks, share.group) if x.requires_grad else x


def gather_output(
    x: Tensor, cut: Cut, share: Share, first: int, then: Callable[[], None]
) -> Tensor:
    """What all ranks have, of a rank's box; `then` is called once a backward pass begins here."""
    return _GatherOutput.apply(x, cut, share.rank, share.group, first, then)


class _GatherProxies(torch.autograd.Function):
    """Each rank goes on with all proxies, for its own tokens: their gradients are added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: Cut, rank: int, group: str) -> Tensor:
        ctx.gathered = cut, rank, group
        return _gather(x, cut, group, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        cut, rank, group = ctx.gathered
        return _scatter_sum(grad, cut, rank, group, 1), None, None, None


class _CutInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: Cut, rank: int, group: str, first: int) -> Tensor:
        ctx.cut = cut, group, first
        return _box(x, cut, rank, first)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        cut, *others = ctx.cut
        return _gather(grad, cut, *others) / cut.ranks, None, None, None, None


class _SameInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int, group: str) -> Tensor:
        ctx.ranks, ctx.group = ranks, group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        total = wait(collectives.all_reduce(grad.contiguous(), "sum", ctx.group))
        return total / ctx.ranks, None, None


class _GatherOutput(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cut: Cut, rank: int, group: str, first: int, then: Callable[[], None]
    ) -> Tensor:
        ctx.gathered = cut, rank, first
        ctx.then = then
        return _gather(x, cut, group, first)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.then()
        cut, *others = ctx.gathered
        return _box(grad, cut, *others) * cut.ranks, None, None, None, None, None


def _box(x: Tensor, cut: Cut, rank: int, first: int) -> Tensor:
    for axis, own in enumerate(cut.box(rank)):
        x = x.narrow(first + axis, own.start, len(own))
    return x.contiguous()


def _gather(x: Tensor, cut: Cut, group: str, first: int) -> Tensor:
    """Boxes differ in size, and what is sent does not: each is filled up to the largest."""
    before, after = x.shape[:first], x.shape[first + 3 :]
    per_token = before.numel() * after.numel()
    flat = x.flatten()
    flat = F.pad(flat, (0, per_token * max(cut.sizes) - flat.numel()))
    rows = wait(collectives.all_gather_into_tensor(flat, cut.ranks, group)).chunk(cut.ranks)
    boxes = [
        row[: per_token * size].view(*before, *shape, *after)
        for row, size, shape in zip(rows, cut.sizes, cut.shapes, strict=True)
    ]
    return join(boxes, cut.lengths, first)


def _scatter_sum(x: Tensor, cut: Cut, rank: int, group: str, first: int) -> Tensor:
    """The transpose of `_gather`: the sum over ranks, of which each keeps its box."""
    boxes = split(x, cut.lengths, first)
    sizes = [box.numel() for box in boxes]
    flat = torch.cat([F.pad(box.flatten(), (0, max(sizes) - box.numel())) for box in boxes])
    own = wait(collectives.reduce_scatter_tensor(flat, "sum", cut.ranks, group))
    return own[: sizes[rank]].view(boxes[rank].shape)
