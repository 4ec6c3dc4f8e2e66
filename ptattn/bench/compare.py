"""`ptattn compare`: proxy-tokenized against full attention, counted and measured on this machine.

One block of each model is measured in a child process, and held to the gate on a corner of its
grid, as the finer arithmetic of whole images would take longer than all that is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from functools import partial

from ..command_line import UsageError
from ..models import list_models
from . import workloads
from .clocks import WallClock
from .harness import Bench, Workload
from .isolation import Isolated, WorkerError
from .model_run import ModelWorkload
from .options import add_dtype, add_measuring, add_out, carry_out, settings_of
from .workloads import Settings, Size

SHARE = 1 / 50  # of the budget, for repeating one case
CALLS = 2, 20  # of one block
CHECKED = 256  # tokens, or two windows a side


def compare(options: argparse.Namespace, command: str) -> int:
    """Measure, write and print; returns and raises as `report.carry_out`."""
    if None in options.video and len(options.video) > 1:
        raise UsageError("argument --video: none stands alone")
    settings = settings_of(options)
    sizes = [*options.sizes, *(size for size in options.video if size is not None)]
    make = partial(_bench, options.budget)
    isolated = Isolated(settings, make)

    def prepare() -> tuple[list[Workload], Bench]:
        try:
            isolated.start()  # before the budget begins
        except WorkerError as failure:
            raise UsageError(str(failure)) from None
        chosen: list[Workload] = [
            ModelWorkload("block", entry.size, (entry,), settings, one=True, checked=CHECKED)
            for entry in workloads.plan(options.models, sizes)
        ]
        return chosen, make(settings)

    known = {**dataclasses.asdict(settings), "budget": options.budget}
    try:
        return carry_out(options, command, known, prepare, run=isolated)
    finally:
        isolated.close()


def _bench(budget: float, settings: Settings) -> Bench:
    return Bench(
        WallClock(settings.device), None, settings.device, settings.backend,
        time.monotonic() + budget, budget * SHARE, CALLS,
    )  # fmt: skip


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "compare",
        help="proxy-tokenized against full attention: multiply-adds, latency, memory",
        description="Compare proxy-tokenized with full attention: multiply-adds, and the latency "
        "and memory of one block measured on this machine. Writes a table, its numbers and two "
        "plots. What exceeds the time or the memory is skipped and named.",
    )
    sizes = [Size(side) for side in workloads.SIZES]
    videos = [Size(side, frames) for frames, side in workloads.VIDEOS]
    shown = " ".join(f"{frames}x{side}" for frames, side in workloads.VIDEOS)
    add = parser.add_argument
    add("--models", nargs="+", metavar="MODEL", choices=list_models(), default=workloads.MODELS,
        help=f"of {', '.join(list_models())} (default: {' '.join(workloads.MODELS)})")  # fmt: skip
    add("--sizes", nargs="+", metavar="SIDE", type=workloads.image, default=sizes,
        help="square images, pixels a side "
        f"(default: {' '.join(map(str, workloads.SIZES))})")  # fmt: skip
    add("--video", nargs="+", metavar="FRAMESxSIDE", type=_video, default=videos,
        help=f"latent frames and pixels a side, or none (default: {shown})")  # fmt: skip
    add_dtype(parser)
    add_measuring(parser, budget=150.0)
    add_out(parser, "the results", "results/compare")
    parser.set_defaults(run=compare, kind="compare")


def _video(text: str) -> Size | None:
    return None if text == "none" else workloads.video(text)
