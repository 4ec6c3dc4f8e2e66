"""Times by quantiles: runs take turns, so that whatever slows the machine slows them alike.

Whole blocks and models are timed as their user waits for them (`WallClock`). Operations on a GPU
are timed as the GPU alone has them, with a cold L2 cache (`GpuClock`): what the host takes to start
them is another matter, which `benchmarks.host` counts.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F

Run = Callable[[], Any]
# How to time a run that is warm once more, and the times already known.
Prepared = tuple[Callable[[], float], list[float]]

CLEARED = 256 * 2**20  # bytes read before every call: several times the L2 of any GPU so far
WARM_UP = 3
CYCLES = 2e9  # of a GPU per second, at most
# A first run this long needs no second to warm up: what that hides takes some ten milliseconds.
LONG_RUN = 1.0  # seconds
# What the rates are measured on: bytes, and the side of a matrix.
MEASURED = {"cuda": (2**31, 8192), "cpu": (2**28, 2048)}
# GPU times up to this one are those of a CUDA graph; longer ones hide what the host takes.
SHORT = 0.5e-3  # seconds


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median, the 20th and 80th of 100, and the least."""

    median: float
    low: float
    high: float
    least: float
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
    calls: tuple[int, int]  # the fewest and the most that a measurement makes of each run

    def prepare(self, run: Run, first: float | None = None) -> Prepared:
        """Warm up; `first` are the seconds of a call that was made before."""


class WallClock:
    """The time until a call's result is there, on the CPU or on the current CUDA device."""

    def __init__(self, device: str = "cpu") -> None:
        self._cuda = device == "cuda"
        self.calls = (9, 100) if self._cuda else (3, 100)
        if self._cuda:
            _leave_default_stream()

    def prepare(self, run: Run, first: float | None = None) -> Prepared:
        sample = partial(self._sample, run)
        first = sample() if first is None else first
        if first >= LONG_RUN and not self._cuda:  # there it may have compiled kernels
            return sample, [first]
        for _ in range(WARM_UP - 1 if first < LONG_RUN else 1):
            run()
        return sample, []

    def _sample(self, run: Run) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin


class GpuClock:
    """The time that the current CUDA device alone takes, its inputs out of cache.

    There are events around every call. A short one is replayed as a CUDA graph; others are queued
    while the GPU is kept busy for as long as the host takes to launch them, as are those that
    cannot be captured.
    """

    calls = (15, 100)

    def __init__(self) -> None:
        _leave_default_stream()
        self._cache = torch.zeros(CLEARED // 4, dtype=torch.float32, device="cuda")
        self._sum = torch.zeros((), device="cuda")
        self._clear()

    def prepare(self, run: Run, first: float | None = None) -> Prepared:
        for _ in range(WARM_UP):
            run()
        host = min(self._host(run) for _ in range(3))
        queued = partial(self._between, 1.5 * (host + 20e-6), run)
        if min(queued() for _ in range(3)) > SHORT:  # one of them may have waited for the host
            return queued, []
        try:
            return partial(self._between, 100e-6, captured(run)[0]), []
        except RuntimeError:  # such as a copy from the host
            torch.cuda.synchronize()
            return queued, []

    @staticmethod
    def _host(run: Run) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        seconds = time.perf_counter() - begin
        torch.cuda.synchronize()
        return seconds

    def _clear(self) -> None:
        # By reading: lines that were written would still have to leave the cache during the call.
        torch.sum(self._cache, dim=0, out=self._sum)

    def _between(self, busy: float, run: Run) -> float:
        """Seconds of a call that is queued while the GPU is busy, and then clears its cache."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(busy * CYCLES))
        self._clear()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


def _leave_default_stream() -> None:
    """The default stream is never captured, and a backward runs on the stream of its forward."""
    if torch.cuda.current_stream() == torch.cuda.default_stream():
        torch.cuda.synchronize()
        torch.cuda.set_stream(torch.cuda.Stream())


def captured(run: Run) -> tuple[Run, Any]:
    """What a warm run does, as the replay of a CUDA graph; and what that writes to.

    Raises:
        RuntimeError: it cannot be captured.
    """
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    try:
        results = run()
    finally:
        graph.capture_end()
    torch.cuda.synchronize()

    def replay(kept: Run = run) -> None:  # whose inputs the graph reads
        graph.replay()

    return replay, results


def summarize(samples: Sequence[float]) -> Timing:
    ordered = sorted(samples)
    last = len(ordered) - 1
    low, high = (ordered[round(share * last)] for share in (0.2, 0.8))
    return Timing(statistics.median(ordered), low, high, ordered[0], len(ordered))


def measure(
    clock: Clock,
    runs: Mapping[Any, Run],
    seconds: float,
    calls: tuple[int, int] | None = None,
    first: Mapping[Any, float] | None = None,
) -> dict[Any, Timing]:
    """Time each run, in turns, in an order that moves on by one every round.

    A round is repeated for `seconds` in all, but at least and at most so many times as `calls`, by
    default the clock's; a long round at least three times. `first` are the seconds of calls that
    were made before.
    """
    fewest, most = calls or clock.calls
    before = first or {}
    prepared = {name: clock.prepare(run, before.get(name)) for name, run in runs.items()}
    begin = time.perf_counter()
    samples = {name: [*known, sample()] for name, (sample, known) in prepared.items()}
    took = time.perf_counter() - begin
    rounds = int(seconds / max(took, 1e-9))
    fewest = min(fewest, 3) if took > LONG_RUN else fewest
    known = min((len(values) for values in samples.values()), default=0)
    names = list(runs)
    for i in range(known, min(max(rounds, fewest), most)):
        start = i % max(1, len(names))
        for name in names[start:] + names[:start]:
            sample, _ = prepared[name]
            samples[name].append(sample())
    return {name: summarize(values) for name, values in samples.items()}


@functools.cache
def gpu_clock() -> Clock:
    """One for all operations: what it clears the cache with is large."""
    return GpuClock()


def rates(device: str, dtype: torch.dtype = torch.bfloat16) -> Rates:
    """Measure a copy and a product of two square matrices, both far beyond the caches: on random
    numbers, as zeros multiply faster, and laid out as in a linear layer."""
    copied, side = MEASURED[device]
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
    found = measure(gpu_clock() if device == "cuda" else WallClock(), runs, 0.5, (20, 50))
    times = {name: timing.median for name, timing in found.items()}
    return Rates(2 * copied / times["copy"], 2 * side**3 / times["products"], times["launch"])
