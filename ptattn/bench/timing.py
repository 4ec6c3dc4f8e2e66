"""Times by quantiles: contenders take turns, so that whatever slows the machine slows them alike.

On a GPU there are events around every call and a cold L2 cache. Calls are queued while the GPU is
kept busy, for at least as long as the host takes to launch them, so that a time is the GPU's alone;
what the host takes stands beside it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F

Run = Callable[[], Any]

CLEARED = 256 * 2**20  # bytes read before every call: several times the L2 of any GPU so far
WARM_UP = 3
CYCLES = 2e9  # of a GPU per second, at most
# A first run this long needs no second to warm up: what that hides takes some ten milliseconds.
LONG_RUN = 1.0  # seconds


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median, the 20th and 80th of 100; `host` until the call returns, 0
    where that is all of it."""

    median: float
    low: float
    high: float
    host: float
    calls: int


@dataclass(frozen=True)
class Rates:
    """What the machine does at best: bytes read plus written, and operations, per second.

    `launch` is the time, in seconds, that the clock shows for an operation with nothing to do.
    """

    copy: float
    products: float
    launch: float


class Clock(Protocol):
    calls: tuple[int, int]  # the fewest and the most that a measurement makes of each contender

    def warm_up(self, run: Run) -> float:
        """Run a few times; seconds until a call returns, where that is less than it takes."""

    def sample(self, run: Run, host: float) -> float:
        """Seconds that one call takes, its inputs out of cache."""


class CpuClock:
    """Wall time."""

    calls = (3, 100)

    def warm_up(self, run: Run) -> float:
        if self.sample(run, 0.0) < LONG_RUN:
            run()
        return 0.0

    def sample(self, run: Run, host: float) -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin


class GpuClock:
    """The clock of the current CUDA device."""

    calls = (15, 100)

    def __init__(self) -> None:
        self._cache = torch.zeros(CLEARED // 4, dtype=torch.float32, device="cuda")
        self._sum = torch.zeros((), device="cuda")
        self._clear()

    def warm_up(self, run: Run) -> float:
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if time.perf_counter() - begin >= LONG_RUN:
            return self._host(run)
        for _ in range(WARM_UP - 1):
            run()
        return min(self._host(run) for _ in range(3))

    @staticmethod
    def _host(run: Run) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        seconds = time.perf_counter() - begin
        torch.cuda.synchronize()
        return seconds

    def sample(self, run: Run, host: float) -> float:
        return self._between(partial(self._occupy, 1.5 * (host + 20e-6)), run)

    def _occupy(self, seconds: float) -> None:
        """Clear the cache, and keep the GPU busy until the host has queued a call."""
        torch.cuda._sleep(int(seconds * CYCLES))
        self._clear()

    def _clear(self) -> None:
        # By reading: lines that were written would still have to leave the cache during the call.
        torch.sum(self._cache, dim=0, out=self._sum)

    @staticmethod
    def _between(before: Run, run: Run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


def summarize(samples: Sequence[float], host: float) -> Timing:
    ordered = sorted(samples)
    last = len(ordered) - 1
    low, high = (ordered[round(share * last)] for share in (0.2, 0.8))
    return Timing(statistics.median(ordered), low, high, host, len(ordered))


def measure(
    clock: Clock, runs: dict[str, Run], seconds: float, calls: tuple[int, int] | None = None
) -> dict[str, Timing]:
    """Time each run, in turns, in an order that moves on by one every round.

    A round is repeated for `seconds` in all, but at least and at most so many times as `calls`, by
    default the clock's; a long round at least three times.
    """
    fewest, most = calls or clock.calls
    hosts = {name: clock.warm_up(run) for name, run in runs.items()}
    begin = time.perf_counter()
    samples = {name: [clock.sample(run, hosts[name])] for name, run in runs.items()}
    took = time.perf_counter() - begin
    rounds = int(seconds / max(took, 1e-9))
    if took > LONG_RUN:
        fewest = min(fewest, 3)
    names = list(runs)
    for i in range(1, min(max(rounds, fewest), most)):
        start = i % max(1, len(names))
        for name in names[start:] + names[:start]:
            samples[name].append(clock.sample(runs[name], hosts[name]))
    return {name: summarize(values, hosts[name]) for name, values in samples.items()}


def clock_of(device: str) -> Clock:
    return GpuClock() if device == "cuda" else CpuClock()


def rates(
    clock: Clock,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    copied: int | None = None,
    side: int | None = None,
) -> Rates:
    """Measure a copy of `copied` bytes and a product of two side x side matrices.

    On random numbers, as zeros multiply faster, and laid out as in a linear layer. By default the
    sizes are far beyond the caches: 2 GiB and 8192 on a GPU, 256 MiB and 2048 on the CPU.
    """
    large = device == "cuda"
    copied, side = copied or (2**31 if large else 2**28), side or (8192 if large else 2048)
    options: Any = dict(device=device, dtype=dtype)
    source = torch.randn(copied // dtype.itemsize, **options)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, **options) for _ in range(2))
    one = torch.zeros(1, device=device)
    runs = {
        "copy": lambda: target.copy_(source),
        "products": lambda: F.linear(a, b),
        "launch": lambda: one.add_(1),
    }
    times = {name: t.median for name, t in measure(clock, runs, 0.5, (20, 50)).items()}
    return Rates(2 * copied / times["copy"], 2 * side**3 / times["products"], times["launch"])
