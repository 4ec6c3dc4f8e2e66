"""What one block sends where several GPUs share a sample's tokens: PT-DiT split at its windows, and
full attention split as Ulysses and as ring attention do. By formula, and counted.

In tokens of C channels that a rank sends in a block's forward, of N tokens on T ranks:

    PT-DiT    (T - 1) · its proxies, to all;  for shifted windows what lies across the cuts, there
              and back: neighbours alone
    Ulysses   4 · N/T · (T - 1)/T: queries, keys, values and outputs (arXiv 2309.14509)
    ring      2 · N/T · (T - 1): keys and values, once around (arXiv 2310.01889)

The backward of PT-DiT's and of Ulysses' sends the same once more; that of the ring keys, values and
their gradients, which end where they belong: 2 · N/T · (2·T - 1). A collective counts as what the
best algorithm sends: a gather among T ranks, and a sum that stays scattered, as T - 1 times a
rank's part; a sum that all get as twice that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from .geometry import Triple, WindowGrid
from .models import PTDiT, find_model
from .parallel import Share, find_cut

SCHEMES = ("windows", "ulysses", "ring")


@dataclass(frozen=True)
class Traffic:
    """What ranks send in one block, in tokens of C channels.

    Args:
        forward, backward: of each rank.
        messages: that a forward waits for, one after the other.
        held: the most tokens that a rank holds, over its equal share.
        shifted: the most that it has for shifted attention, over the same.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    messages: int
    held: float = 1.0
    shifted: float = 1.0

    def mean(self, training: bool = False) -> float:
        return sum(self._sent(training)) / len(self.forward)

    def most(self, training: bool = False) -> float:
        return max(self._sent(training))

    def _sent(self, training: bool) -> list[float]:
        return [a + training * b for a, b in zip(self.forward, self.backward, strict=True)]


def windows(windows: WindowGrid, proxies: WindowGrid, ranks: int, shift: bool = True) -> Traffic:
    """Of a PT-DiT block split by `parallel.split_tokens`.

    Raises:
        ValueError: a grid that so many ranks cannot share.
    """
    cut = find_cut(windows, proxies, ranks)
    shares = [Share.of(windows, cut, rank, "") for rank in range(ranks)]
    most = max(cut.of_windows(proxies.window).sizes)
    sent = []
    for share in shares:
        moved = sum(sum(side.counts) for side in share.trip or ()) if shift else 0
        sent.append(float((ranks - 1) * most + moved))
    messages = 1 + (2 if shift and shares[0].trip else 0)
    equal = windows.num_tokens / ranks
    shifted = max(share.shifted().num_tokens for share in shares) if shift else max(cut.sizes)
    return Traffic(tuple(sent), tuple(sent), messages, max(cut.sizes) / equal, shifted / equal)


def ulysses(tokens: int, ranks: int) -> Traffic:
    """Of a block with full attention, split over its heads."""
    sent = (4 * tokens / ranks * (ranks - 1) / ranks,) * ranks
    return Traffic(sent, sent, 2)


def ring(tokens: int, ranks: int) -> Traffic:
    """Of a block with full attention, whose keys and values go around."""
    forward, backward = (2 * tokens / ranks * n for n in (ranks - 1, 2 * ranks - 1))
    return Traffic((forward,) * ranks, (backward,) * ranks, ranks - 1)


def of_model(name: str, grid: Triple, ranks: int, scheme: str) -> Traffic:
    """Of one block of a published model.

    Raises:
        ValueError: a scheme that is not of this model, or a grid that ranks cannot share.
    """
    family, config = find_model(name)
    if (scheme == "windows") != (family is PTDiT) or scheme not in SCHEMES:
        raise ValueError(f"{name} is not split by {scheme!r}; schemes: {', '.join(SCHEMES)}")
    if scheme == "windows":
        proxies, attended = config.window_grids(grid)
        return windows(attended, proxies, ranks, config.shift)
    return (ulysses if scheme == "ulysses" else ring)(math.prod(grid), ranks)


def output(windows: WindowGrid, proxies: WindowGrid, ranks: int) -> int:
    """What each rank sends at the end of a call, in tokens of the output: its own, to all."""
    return (ranks - 1) * max(find_cut(windows, proxies, ranks).sizes)


# Counted.


@dataclass
class Sent(TorchDispatchMode):
    """Counts the bytes that this rank sends by functional collectives while it is on, per name."""

    ranks: int
    bytes: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func.name().partition("::")
        if space == "_c10d_functional" and name in _SENT:
            self.bytes[name] = self.bytes.get(name, 0) + _SENT[name](self.ranks, *args)
        return func(*args, **(kwargs or {}))


_SENT: dict[str, Any] = {
    "all_gather_into_tensor": lambda t, x, *_: (t - 1) * x.nbytes,
    "reduce_scatter_tensor": lambda t, x, *_: (t - 1) / t * x.nbytes,
    "all_reduce": lambda t, x, *_: 2 * (t - 1) / t * x.nbytes,
    # None of ours sends anything to itself.
    "all_to_all_single": lambda t, x, taken, given, *_: sum(given) * x.element_size(),
}


@contextmanager
def pretended(ranks: int, rank: int) -> Iterator[DeviceMesh]:
    """A mesh of which this process is one rank and there are no others, to count what it sends.

    Raises:
        RuntimeError: a process group is there already.
    """
    if dist.is_initialized():
        raise RuntimeError("a process group is there already, of which ranks cannot be pretended")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield init_device_mesh("cpu", (ranks,))
    finally:
        dist.destroy_process_group()
