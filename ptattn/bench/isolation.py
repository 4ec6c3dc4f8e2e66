"""Workloads measured in a child process, so that an end by the kernel costs one of them alone."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from . import peaks
from .workloads import Settings

START_LIMIT = 120.0  # seconds for a child to import torch
LONGEST_WAIT = 1e6  # seconds; the system call counts milliseconds in 31 bits

# Makes, in the child, what measures one workload after the other.
Make = Callable[[Settings], Callable[[Any], Any]]


class WorkerError(Exception):
    """A workload that gave no result; the message says why."""


class Worker:
    """A child process that measures workloads.

    Args:
        settings: how.
        make: a function that the child can import.

    Attributes:
        reusable: whether one child can see the memory of more than one run.

    Raises:
        WorkerError: the child did not start.
    """

    def __init__(self, settings: Settings, make: Make) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, settings, make), daemon=True)
        # Ctrl-C reaches the whole process group; the child, which inherits this, leaves it to us.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self._process.start()
        finally:
            signal.signal(signal.SIGINT, handler)
        theirs.close()  # else the pipe stays open when the child dies
        self.reusable = bool(self._receive(START_LIMIT))

    def measure(self, workload: Any, limit: float) -> Any:
        """Measure a workload, `limit` seconds at most. After an error the worker is of no more use.

        Raises:
            WorkerError: the child died, or the limit was reached.
        """
        return self._receive(limit, send=workload)

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _receive(self, limit: float, send: Any = None) -> Any:
        try:
            if send is not None:
                self._pipe.send(send)
            if self._pipe.poll(min(limit, LONGEST_WAIT)):
                return self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(10)  # the pipe is closed: it has ended, or is about to
            raise WorkerError(_why(self._process.exitcode)) from None
        self.close()
        raise WorkerError(f"stopped after {limit:.0f} s")


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
    measure = make(settings)
    pipe.send(settings.device == "cuda" or peaks.reset())
    while True:
        try:
            workload = pipe.recv()
        except EOFError:
            return
        pipe.send(measure(workload))
