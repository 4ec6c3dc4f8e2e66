"""One workload after another: time limits, memory, what dies or hangs, Ctrl-C."""

import multiprocessing
import os
import signal
import time
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from ptattn.bench import harness, isolation
from ptattn.bench.clocks import WallClock
from ptattn.bench.harness import Pace, Workload
from ptattn.bench.isolation import Isolated
from ptattn.bench.results import COMPILED, ERROR, NOT_REACHED, OK, SKIPPED
from ptattn.bench.workloads import Settings
from tests.support.measured import Watch, bench, timed, workload

DEADLY = {"dies": lambda: os.kill(os.getpid(), signal.SIGKILL), "hangs": lambda: time.sleep(600)}


@dataclass(frozen=True)
class Fake:
    """A workload that takes a second for each of `cost`, or ends otherwise; no time passes."""

    name: str = "fine"
    cost: float = 1.0
    memory: int = 0
    family: str = "fake"
    checks: int = 0
    compiling: int = 0

    def __str__(self):
        return self.name

    def measure(self, bench):
        if self.name == "errs":
            raise RuntimeError("no luck\nwith details")
        if self.name == "interrupted":
            raise KeyboardInterrupt
        DEADLY.get(self.name, bool)()
        return [timed(self.cost, workload=self.name)]

    def blank(self, status, note=""):
        row = timed(self.cost, workload=self.name, status=status, note=note)
        return [replace(row, timing=None)]


def measure(*workloads, run=harness.run_here, **known):
    watch = Watch()
    harness.measure(workloads, bench(**known), watch, {}, run)
    return watch.rows


# Time.


def in_seconds(seconds):
    return time.monotonic() + seconds


def test_what_would_end_after_the_deadline_is_not_begun():
    costs = map(Fake, ("fine",) * 3, (1.0, 100.0, 2.0))
    rows = measure(*costs, deadline=in_seconds(30.5), calls=(2, 20))
    assert [row.status for row in rows] == [OK, NOT_REACHED, OK]  # a later one may fit
    assert rows[1].note == "predicted 200 s, 30 s of it left"
    rows = measure(Fake(), Fake(), deadline=in_seconds(-1.0))
    assert [(row.status, row.note) for row in rows] == [(NOT_REACHED, "the budget is used up")] * 2


def test_the_pace_is_that_of_the_family_s_last_workload():
    pace, known = Pace(), bench(calls=(5, 100))
    assert pace.expected(Fake(), known) == 0.0  # of the first nothing is known
    pace.learn(Fake(cost=2.0), known, [timed(0.01), timed(0.03)], 1.0)
    assert pace.expected(Fake(cost=4.0), known) == pytest.approx(5 * 0.08)
    assert pace.expected(Fake(cost=4.0, checks=6), known) == pytest.approx(11 * 0.08)
    assert pace.expected(Fake(cost=100.0), known) == pytest.approx(3 * 2.0)  # long: fewer calls
    filled = replace(known, seconds=3.0)
    assert pace.expected(Fake(cost=4.0), filled) == pytest.approx(3.0)  # calls to fill the time
    other = Fake(family="other")
    assert pace.expected(other, known) == pytest.approx(5 * 0.02)  # for want of its own
    pace.learn(other, known, [timed(1.0)], 1.0)
    pace.learn(other, known, Fake().blank(ERROR), 1.0)  # of what did not run nothing is learnt
    assert pace.expected(Fake(), known) == pytest.approx(5 * 0.02)
    assert pace.expected(other, known) == pytest.approx(5.0)
    assert pace.expected(Workload(), known) == 0.0  # operations have no cost


def test_compiling_takes_time_as_the_last_workload_s_did():
    """What was to be compiled was once begun although it could not end in the budget."""
    pace, known = Pace(), bench(calls=(2, 20))
    compiled, row = Fake(compiling=2), replace(timed(0.5), mode=COMPILED)
    assert pace.expected(compiled, known) == 0.0  # of the first nothing is known
    pace.learn(compiled, known, [row, row], took=82.0)  # of which 2 were its calls'
    assert pace.expected(Fake(compiling=1), known) == pytest.approx(2.0 + 40.0)
    pace.learn(compiled, known, [timed(1.0)], took=2.0)  # what did not compile says nothing
    assert pace.expected(Fake(compiling=1), known) == pytest.approx(2.0 + 40.0)


def test_the_time_left_is_that_of_all_that_follow():
    watch = Watch()
    harness.measure([Fake(), Fake(), Fake(cost=2.0)], bench(calls=(1, 1)), watch, {})
    assert watch.left == [0.0, 3.0, 2.0]
    harness.measure([Fake(), Fake()], bench(deadline=in_seconds(0.5)), watch, {})
    assert watch.left[-1] <= 0.5


# Memory and errors.


def test_what_exceeds_the_memory_is_skipped():
    small, large = (workload("block", "forward", "dit-s", side=side) for side in (32, 1024))
    between = (small.memory + large.memory) // 2
    rows = measure(small, large, free_memory=lambda device: between)
    assert rows[0].timing
    assert rows[-1].status == SKIPPED
    needed, there = large.memory / 1e9, between / 1e9
    assert rows[-1].note == f"needs about {needed:.3g} GB of memory, {there:.3g} GB available"


def test_what_runs_out_of_memory_or_errs_costs_itself_alone(monkeypatch):
    def full():
        raise torch.OutOfMemoryError("tried to allocate\nso much")

    monkeypatch.setitem(DEADLY, "grows", full)
    rows = measure(Fake("errs"), Fake("grows"), Fake())
    assert [(row.status, row.note) for row in rows] == [
        (ERROR, "RuntimeError: no luck"),
        (SKIPPED, "out of memory: OutOfMemoryError: tried to allocate"),
        (OK, ""),
    ]


def test_any_number_of_workloads_compiles():
    """Three implementations of each share their code, of which torch keeps few graphs."""

    class Compiling(Fake):
        compiling = 3

        def measure(self, bench):
            for times in range(3):
                call = torch.compile(partial(torch.mul, times), backend="eager", fullgraph=True)
                call(torch.ones(int(self.cost)))
            return super().measure(bench)

    rows = measure(*(Compiling(cost=size) for size in range(1, 5)))
    assert [(row.status, row.note) for row in rows] == [(OK, "")] * 4


@pytest.mark.parametrize("where", ["first", "second", "between"])
def test_interrupt_names_what_it_kept_from_being_measured(where):
    class Interrupted(Watch):
        def finish(self, rows):
            if where == "between":  # such as while a row is printed
                raise KeyboardInterrupt

    found = {}
    after = 0 if where == "first" else 1
    workloads = [Fake()] * after + [Fake("interrupted" if where != "between" else "fine"), Fake()]
    with pytest.raises(KeyboardInterrupt):
        harness.measure(workloads, bench(), Interrupted(), found)
    rows = [row for i in range(len(workloads)) for row in found[i]]
    assert [row.status for row in rows] == [OK] * after + [NOT_REACHED] * 2
    assert {row.note for row in rows[after:]} == {"interrupted"}


# A child process.


@pytest.fixture
def isolated(monkeypatch):
    """A child by fork, which starts at once; `ptattn compare` starts it afresh (test_cli)."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(isolation.multiprocessing, "get_context", lambda how: fork)
    monkeypatch.setattr(isolation, "GRACE", 0.3)
    found = Isolated(Settings(threads=1), lambda settings: bench(clock=WallClock()))
    yield found
    found.close()


def test_what_dies_costs_itself_alone(isolated):
    rows = measure(Fake("dies"), Fake(), Fake("errs"), Fake(), run=isolated)
    assert [row.status for row in rows] == [SKIPPED, OK, ERROR, OK]
    killed = "the measuring process was ended by SIGKILL, most likely out of memory"
    assert (rows[0].note, rows[2].note) == (killed, "RuntimeError: no luck")
    idle = isolated._process
    idle.kill()
    idle.join()
    rows = measure(Fake(), Fake(), run=isolated)
    assert [(row.status, row.note) for row in rows] == [(SKIPPED, killed), (OK, "")]


@pytest.fixture
def _interruptible():
    """What is started in the background of a shell ignores Ctrl-C, and so do its children."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("_interruptible")
def test_ctrl_c_while_a_child_starts_is_ours(isolated, monkeypatch):
    """It was ignored in that moment, and so lost."""
    process = multiprocessing.context.ForkProcess
    start = process.start

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGINT)
        start(self)

    monkeypatch.setattr(process, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        isolated.start()
    assert isolated._process.is_alive()  # it started whole, to be closed
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.usefixtures("_interruptible")
def test_ctrl_c_does_not_reach_the_child(isolated):
    isolated.start()
    os.kill(isolated._process.pid, signal.SIGINT)
    (row,) = measure(Fake(), run=isolated)
    assert row.status == OK


def test_what_hangs_is_stopped(isolated):
    rows = measure(Fake("hangs"), Fake(cost=0.0), run=isolated, deadline=in_seconds(0.2))
    assert (rows[0].status, rows[0].note) == (SKIPPED, "stopped after 0 s")
