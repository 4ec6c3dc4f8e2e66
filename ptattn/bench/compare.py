"""`ptattn compare`: proxy-tokenized against full attention, counted and measured on this machine.

One block of each model is measured in a child process, and held to the gate on a corner of its
grid, as the finer arithmetic of whole images would take longer than all that is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from functools import partial
from pathlib import Path

import torch

from .. import backends, environment
from ..command_line import UsageError, count, now, number, open_folder, require
from ..models import list_models
from . import clocks, harness, workloads
from .harness import Bench
from .isolation import WorkerError
from .model_run import ModelWorkload
from .results import Result
from .workloads import DTYPES, Settings, Size

FILES = ("compare.json", "compare.md", "gflops.png", "latency.png")
SHARE = 1 / 50  # of the budget, for repeating one case
CALLS = 2, 20  # of one block
CHECKED = 256  # tokens, or two windows a side


def settings_of(options: argparse.Namespace) -> Settings:
    """Raises UsageError for a device or backend that is not here."""
    cuda = torch.cuda.is_available()
    if options.device == "cuda" and not cuda:
        raise UsageError("argument --device: got cuda, but torch finds no CUDA GPU here")
    device = "cuda" if cuda and options.device != "cpu" else "cpu"
    dtype = options.dtype
    if dtype == "auto":
        dtype = "bf16" if environment.bf16_is_fast(device) else "fp32"
    sample = torch.empty(1, device=device, dtype=DTYPES[dtype])
    try:
        backend = backends.resolve(options.backend, sample)
    except RuntimeError as error:
        raise UsageError(f"argument --backend: {error}") from None
    if options.threads is not None:
        torch.set_num_threads(options.threads)  # here for the record; each child does the same
    return Settings(device, dtype, backend, torch.get_num_threads())


def compare(options: argparse.Namespace, command: str) -> int:
    """Measure, write and print; `options` as the parser has them, `command` as it was typed.

    Returns:
        The exit code: 0, 1 where a candidate is wrong, or 130 after Ctrl-C.

    Raises:
        UsageError: no rich or matplotlib, no such device, a backend that cannot run here, a folder
            that cannot be written: nothing has been measured then.
    """
    require("rich", "matplotlib")
    from . import report
    from .progress import Progress

    settings, out = settings_of(options), Path(options.out)
    open_folder(out, FILES)
    done = Result(
        "compare", {**dataclasses.asdict(settings), "budget": options.budget}, {}, command, now()
    )
    chosen = [
        ModelWorkload("block", entry.size, (entry,), settings, one=True, checked=CHECKED)
        for entry in workloads.plan(options.models, [*options.sizes, *options.video])
    ]
    make = partial(_bench, options.budget)
    isolated = harness.Isolated(settings, make)
    progress = Progress(len(chosen))
    try:
        try:
            isolated.start()  # before the budget begins
        except WorkerError as failure:
            raise UsageError(str(failure)) from None
        found = harness.measure(chosen, make(settings), progress, isolated)
        return report.carry_out(done, found, out, progress)
    finally:
        isolated.close()


def _bench(budget: float, settings: Settings) -> Bench:
    return Bench(
        clocks.clock_of(settings.device), None, settings.device, settings.backend,
        time.monotonic() + budget, budget * SHARE, CALLS,
    )  # fmt: skip


def add_options(parser: argparse.ArgumentParser, *, budget: float) -> None:
    """What all measurements of blocks and models have."""
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="default: %(default)s, cuda if there is one")  # fmt: skip
    add("--backend", choices=backends.CHOICES, default="auto",
        help="of PT-DiT's attention; full attention runs on sdpa beside triton "
        "(default: %(default)s, triton on a GPU)")  # fmt: skip
    add("--threads", type=count, metavar="N", help="CPU threads (default: torch's own choice)")
    add("--budget", type=number, metavar="SECONDS", default=budget,
        help="what would end after it is not begun (default: %(default)s)")  # fmt: skip


def add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", choices=("auto", *DTYPES), default="auto",
        help="of weights and activations (default: bf16 where that multiplies faster, else fp32)",
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
    add_options(parser, budget=150.0)
    add("--out", metavar="FOLDER", default="results/compare",
        help="where the results are written (default: %(default)s)")  # fmt: skip
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace, command: str) -> int:
    if None in options.video and len(options.video) > 1:
        raise UsageError("argument --video: none stands alone")
    options.video = [size for size in options.video if size is not None]
    return compare(options, command)


def _video(text: str) -> Size | None:
    return None if text == "none" else workloads.video(text)
