"""What the tests of measuring share: a clock that is told what to show, rows, a silent watch."""

import dataclasses
import itertools
from functools import partial
from pathlib import Path

from ptattn.bench.clocks import Rates, Timing
from ptattn.bench.harness import Bench
from ptattn.bench.model_run import ModelWorkload
from ptattn.bench.results import Result, Row
from ptattn.bench.workloads import Settings, Size, plan

RATES = Rates(copy=4.3e12, products=790e12, launch=2e-6)
SETTINGS = Settings("cpu", "fp32", "sdpa")
TINY = ("pt-dit-s-class", "dit-s")
H200 = Path(__file__).parents[2] / "benchmarks/results/h200-2026-11-26"
WIDE = ("pt-dit-xl", "dit-xl")  # of one width


class FakeClock:
    """Every call runs, and is said to take as long as told, by its number."""

    calls = (2, 2)  # the interpreter takes milliseconds where a GPU takes microseconds

    def __init__(self, *seconds):
        self.seconds = itertools.cycle(seconds or (1e-5,))

    def prepare(self, run, first=None):
        run()
        return partial(self.sample, run), []

    def sample(self, run):
        run()
        return next(self.seconds)


class Watch:
    """Remembers in how many seconds all were expected to be done, and the rows."""

    def __init__(self):
        self.left, self.rows = [], []

    def start(self, workload, left):
        self.left.append(left)

    def finish(self, rows):
        self.rows += rows


def bench(**changes):
    known = dict(clock=FakeClock(), rates=RATES, device="cpu", backend="sdpa", seconds=0.0)
    known |= dict(free_memory=lambda device: None)
    return Bench(**(known | changes))


def workload(kind, task, *models, side=64, **changes):
    entries = tuple(plan(models, [Size(side)]))
    known = dict(batch=2, depth=1 if kind == "model" else None) | changes
    return ModelWorkload(kind, Size(side), entries, SETTINGS, task, **known)


def timed(seconds, spread=0.01, **changes):
    """A row of PT-DiT/B, or whatever `changes` say."""
    low, high = seconds * (1 - spread), seconds * (1 + spread)
    row = Row("block 256 px b1", "forward", "PT-DiT/B", "PT-DiT/B")
    return dataclasses.replace(row, timing=Timing(seconds, low, high, low, 10), **changes)


def result(*rows, kind="block", **settings):
    known = {"device": "cpu", "dtype": "bf16", "backend": "sdpa"} | settings
    return Result(kind, known, {}, f"ptattn {kind}", "2030-01-01", rows=list(rows))


def compared(speeds, *models):
    """Rows as `ptattn compare` has them, of the seconds of each model's block at every size."""
    found = []
    for side, seconds in speeds.items():
        for model, one in zip(models, seconds, strict=True):
            (row,) = workload("block", "forward", model, side=side, batch=1).blank("ok")
            found.append(dataclasses.replace(row, timing=timed(one).timing, peak=10**8))
    return found
