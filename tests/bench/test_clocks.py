"""Times by quantiles, implementations in turns; the machine's rates; the memory of a run."""

import time

import pytest
import torch

from ptattn.bench import clocks, peaks
from ptattn.bench.clocks import LONG_RUN, WARM_UP, WallClock
from tests.support.measured import FakeClock


def test_summary_of_samples():
    t = clocks.summarize([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert (t.median, t.low, t.high, t.least, t.calls) == (3.5, 2.0, 5.0, 1.0, 6)


def test_runs_take_turns():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    times = clocks.measure(FakeClock(), runs, 0.0)
    assert times["a"].calls == 2
    assert order == [*"abc", *"abc", *"bca"]  # the first of each to warm up


def test_rounds_fill_the_time_but_not_beyond_the_most_calls():
    runs = {"nap": lambda: time.sleep(0.005)}
    assert clocks.measure(WallClock(), runs, 0.0, (3, 100))["nap"].calls == 3
    assert clocks.measure(WallClock(), runs, 60.0, (3, 8))["nap"].calls == 8
    found = clocks.measure(WallClock(), runs, 0.06, (3, 100))["nap"]
    assert 3 <= found.calls <= 12
    assert found.least >= 0.005


@pytest.mark.parametrize(("first", "known", "calls"), [(0.1, 0, WARM_UP - 1), (2.0, 1, 0)])
def test_a_long_first_run_is_a_sample_and_needs_no_second_to_warm_up(first, known, calls):
    made = []
    _, seconds = WallClock().prepare(lambda: made.append(None), first)
    assert (first >= LONG_RUN, seconds) == (bool(known), [first] * known)
    assert len(made) == calls


def test_rates(monkeypatch):
    monkeypatch.setattr(clocks, "WallClock", lambda: FakeClock(1e-3))
    monkeypatch.setitem(clocks.MEASURED, "cpu", (2**12, 8))
    got = clocks.rates("cpu")
    assert got.copy == pytest.approx(2 * 2**12 / 1e-3)
    assert got.products == pytest.approx(2 * 8**3 / 1e-3)
    assert got.launch == pytest.approx(1e-3)


def test_peak_memory_is_what_the_call_needs():
    size = 200 * 10**6
    for _ in range(2):
        peak, seconds = peaks.added(lambda: torch.ones(size, dtype=torch.uint8), "cpu")
    if not peaks.reset():
        pytest.skip("this system does not reset a process's peak of memory")
    assert peak == pytest.approx(size, rel=0.05)
    assert seconds > 0


def test_peak_memory_where_a_peak_cannot_be_reset(monkeypatch):
    seen = iter([100, 150])
    monkeypatch.setattr(peaks, "reset", lambda: False)
    monkeypatch.setattr(peaks, "_process_peak", lambda: next(seen))
    assert peaks.added(lambda: None, "cpu")[0] == 50
