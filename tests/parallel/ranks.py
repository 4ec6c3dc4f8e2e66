"""Processes that stand for the ranks of a mesh: they run one function after another."""

from __future__ import annotations

import datetime
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

TIMEOUT = 20  # seconds, of a collective, unless a test is about it

ANSWER = 600  # seconds that what a rank does may take; compiling does on a busy machine


class Ranks:
    """`number` processes with gloo; call it with a function of a module, which gets a mesh of them.

    A call returns what every rank returned, an exception as it is.
    """

    def __init__(self, number: int, timeout: float = TIMEOUT) -> None:
        self.number, self.lost = number, False
        # Forked from a process that has imported all that takes seconds, and computed nothing.
        context: Any = mp.get_context("forkserver")
        context.set_forkserver_preload(["tests.parallel.cases"])
        self.folder = tempfile.TemporaryDirectory()
        pipes = [context.Pipe() for _ in range(number)]
        self.pipes = [own for own, _ in pipes]
        self.processes = [
            context.Process(
                target=_serve, args=(rank, number, timeout, self.folder.name, theirs), daemon=True
            )
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()

    def __call__(self, function: Any, *args: Any, each: Any = None) -> list[Any]:
        """`each` has what one rank alone gets, as its last argument."""
        for rank, pipe in enumerate(self.pipes):
            pipe.send((function, (*args, each[rank]) if each else args))
        results = [self._receive(pipe) for pipe in self.pipes]
        self.lost = any(isinstance(r, TimeoutError | ProcessLookupError) for r in results)
        return results

    def all(self, function: Any, *args: Any, each: Any = None) -> list[Any]:
        """As a call; the first exception is raised, with the traceback of its rank."""
        results = self(function, *args, each=each)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()

    @staticmethod
    def _receive(pipe: Any) -> Any:
        if not pipe.poll(ANSWER):
            return TimeoutError("the rank hangs")
        try:
            return pipe.recv()
        except EOFError:
            return ProcessLookupError("the rank has ended")


def _serve(rank: int, number: int, timeout: float, folder: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{Path(folder) / 'store'}", rank=rank, world_size=number,
        timeout=datetime.timedelta(seconds=timeout),
    )  # fmt: skip
    mesh = init_device_mesh("cpu", (number,), mesh_dim_names=("tokens",))
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            pipe.send(function(mesh, *args))
        except Exception as error:
            error.add_note(traceback.format_exc()) if hasattr(error, "add_note") else None
            pipe.send(error)
