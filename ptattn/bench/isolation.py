"""Workloads measured in a child process, so that an end by the kernel costs one of them alone."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

import torch

from . import peaks
from .harness import Bench, Workload, run_here
from .results import SKIPPED, Row
from .workloads import Settings

START_LIMIT = 120.0  # seconds for a child to import torch
GRACE = 10.0  # seconds that a workload may take beyond the budget before it is stopped
LONGEST_WAIT = 1e6  # seconds; the system call counts milliseconds in 31 bits

Make = Callable[[Settings], Bench]


class WorkerError(Exception):
    """A child that gave no result; the message says why."""


class Isolated:
    """`run_here`, but in a child process, which is started anew after one that ended.

    Args:
        settings: of the child.
        bench: makes there what workloads are measured with; the child must be able to import it.
    """

    def __init__(self, settings: Settings, bench: Make) -> None:
        self._arguments = settings, bench
        self._process: Any = None

    def start(self) -> None:
        """Raises WorkerError if the child does not start."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
        with _interrupts_held():
            process.start()
            self._process = process
        theirs.close()  # else the pipe stays open when the child dies
        # Whether one child can see the memory of more than one run.
        self._reusable = bool(self._receive(START_LIMIT))

    def __call__(self, workload: Workload, bench: Bench) -> list[Row]:
        try:
            if self._process is None:
                self.start()
            left = max(0.0, bench.deadline - time.monotonic())
            rows: list[Row] = self._receive(left + GRACE, send=workload)
        except WorkerError as failure:
            self.close()
            return workload.blank(SKIPPED, str(failure))
        if not self._reusable:
            self.close()
        return rows

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None

    def _receive(self, limit: float, send: Any = None) -> Any:
        try:
            if send is not None:
                self._pipe.send(send)
            if self._pipe.poll(min(limit, LONGEST_WAIT)):
                return self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(10)  # the pipe is closed: it has ended, or is about to
            raise WorkerError(_why(self._process.exitcode)) from None
        raise WorkerError(f"stopped after {limit:.0f} s")


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C reaches the whole process group. A child that starts within leaves it to us, as it
    inherits the mask of signals; ours comes at the end. What ignored the signal would lose it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # which would take the signal out of the mask
    held: list[object] = []
    handler = signal.signal(signal.SIGINT, lambda *caught: held.append(caught))
    # Another thread may still take the signal, and then the handler runs in spite of the mask.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, handler)
    if held:
        signal.raise_signal(signal.SIGINT)


def _why(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"the measuring process ended with exit code {exitcode}"
    name = signal.Signals(-exitcode).name
    hint = ", most likely out of memory" if name == "SIGKILL" else ""
    return f"the measuring process was ended by {name}{hint}"


def _serve(pipe: Connection, settings: Settings, make: Make) -> None:
    """The child: measure what comes through the pipe until the parent is gone."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    bench = make(settings)
    pipe.send(settings.device == "cuda" or peaks.reset())
    while True:
        try:
            workload = pipe.recv()
        except EOFError:
            return
        pipe.send(run_here(workload, bench))
