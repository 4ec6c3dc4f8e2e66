"""Times on a GPU: events around every call, a cold L2 cache, and contenders that take turns.

Calls are queued while the GPU is still busy clearing its cache, for at least as long as the host
takes to launch them, so that a time is the GPU's alone; what the host takes stands beside it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Run = Callable[[], Any]

CLEARED = 256 * 2**20  # bytes read before every call: several times the L2 of any GPU so far
WARM_UP = 3


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median, the 20th and 80th of 100; `host` until the call returns."""

    median: float
    low: float
    high: float
    host: float
    calls: int


@dataclass(frozen=True)
class Rates:
    """What the GPU does at best: bytes read plus written, and operations, per second.

    `launch` is the time, in seconds, that the clock shows for a kernel with nothing to do.
    """

    copy: float
    products: float
    launch: float


class Clock(Protocol):
    def host(self, run: Run) -> float:
        """Seconds until a call returns; waits for the GPU before and after."""

    def sample(self, run: Run, host: float) -> float:
        """Seconds that one call takes, its inputs out of cache."""


class GpuClock:
    """The clock of the current CUDA device."""

    def __init__(self) -> None:
        self._cache = torch.zeros(CLEARED // 4, dtype=torch.float32, device="cuda")
        self._sum = torch.zeros((), device="cuda")
        self._clear()
        self._clear_seconds = min(self._between(lambda: None, 1, self._clear) for _ in range(5))

    def host(self, run: Run) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        seconds = time.perf_counter() - begin
        torch.cuda.synchronize()
        return seconds

    def sample(self, run: Run, host: float) -> float:
        return self._between(self._clear, self._clears(host), run)

    def _clears(self, host: float) -> int:
        """How often to clear the cache so that the GPU is busy until the host has queued a call."""
        return min(64, 1 + math.ceil(1.5 * (host + 20e-6) / self._clear_seconds))

    def _clear(self) -> None:
        # By reading: lines that were written would still have to leave the cache during the call.
        torch.sum(self._cache, dim=0, out=self._sum)

    @staticmethod
    def _between(before: Run, times: int, run: Run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(times):
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
    clock: Clock, runs: dict[str, Run], seconds: float, calls: tuple[int, int] = (15, 100)
) -> dict[str, Timing]:
    """Time each run, in turns, in an order that moves on by one every round.

    A round is repeated for `seconds` in all, but at least and at most so many times as `calls`.
    """
    hosts = {}
    for name, run in runs.items():
        for _ in range(WARM_UP):
            run()
        hosts[name] = min(clock.host(run) for _ in range(3))
    begin = time.perf_counter()
    samples = {name: [clock.sample(run, hosts[name])] for name, run in runs.items()}
    rounds = int(seconds / max(time.perf_counter() - begin, 1e-9))
    names = list(runs)
    for i in range(1, min(max(rounds, calls[0]), calls[1])):
        start = i % len(names)
        for name in names[start:] + names[:start]:
            samples[name].append(clock.sample(runs[name], hosts[name]))
    return {name: summarize(values, hosts[name]) for name, values in samples.items()}


def rates(clock: Clock, device: str, *, copied: int = 2**31, side: int = 8192) -> Rates:
    """Measure a copy of `copied` bytes and a bf16 product of two side x side matrices.

    On random numbers: zeros multiply faster.
    """
    source = torch.randn(copied // 2, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product, one = torch.empty_like(a), torch.zeros(1, device=device)
    runs = {
        "copy": lambda: target.copy_(source),
        "products": lambda: torch.mm(a, b, out=product),
        "launch": lambda: one.add_(1),
    }
    times = {name: t.median for name, t in measure(clock, runs, 0.5, (20, 50)).items()}
    return Rates(2 * copied / times["copy"], 2 * side**3 / times["products"], times["launch"])
