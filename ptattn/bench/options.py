"""What the commands that measure share: their arguments, and what is checked before a run."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import backends, environment
from ..command_line import UsageError, count, now, number, open_folder, require
from . import results
from .harness import Bench, Runner, Workload, run_here
from .results import Result
from .workloads import DTYPES, Settings

# Makes what is measured, and with what, once all that can be wrong has been checked.
Prepare = Callable[[], tuple[Sequence[Workload], Bench]]


def add_out(parser: argparse.ArgumentParser, kind: str, folder: str) -> None:
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=Path(folder),
                        help=f"where {kind}.json, .md and .png are written "
                        "(default: %(default)s)")  # fmt: skip


def add_budget(parser: argparse.ArgumentParser, budget: float) -> None:
    parser.add_argument("--budget", type=number, metavar="SECONDS", default=budget,
                        help="what would end after it is not begun "
                        "(default: %(default)s)")  # fmt: skip


def add_measuring(parser: argparse.ArgumentParser, *, budget: float) -> None:
    """What all measurements of blocks and models have."""
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="default: %(default)s, cuda if there is one")  # fmt: skip
    add("--backend", choices=backends.CHOICES, default="auto",
        help="of PT-DiT's attention; full attention runs on sdpa beside triton "
        "(default: %(default)s, triton on a GPU)")  # fmt: skip
    add("--threads", type=count, metavar="N", help="CPU threads (default: torch's own choice)")
    add_budget(parser, budget)


def add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", choices=("auto", *DTYPES), default="auto",
        help="of weights and activations (default: bf16 where that multiplies faster, else fp32)",
    )  # fmt: skip


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


def carry_out(
    options: argparse.Namespace,
    command: str,
    known: dict[str, Any],
    prepare: Prepare,
    *,
    notes: Sequence[str] = (),
    run: Runner = run_here,
) -> int:
    """Check all that can be wrong, then measure, write and print.

    Args:
        options: as the parser has them: `kind`, `out` and, of `ptattn bench`, `against`.
        command: as it was typed.
        known: the settings, as the result has them.
        notes, run: of `report.carry_out`.

    Returns:
        The exit code of `report.carry_out`.

    Raises:
        UsageError: no rich or matplotlib, a result of --against that cannot be compared with, a
            folder that cannot be written: nothing has been measured then.
    """
    require("rich", "matplotlib")
    from . import plots, report

    if getattr(options, "quantize", None):
        require("torchao", install="torchao")
    done = Result(options.kind, known, {}, command, now())
    earlier = None
    if getattr(options, "against", None):
        try:
            earlier = results.load(options.against)
        except UsageError as error:
            raise UsageError(f"argument --against: {error}") from None
        results.check_comparable(earlier, done)
    pictures = [name for _, name, _ in plots.pictures(done.kind)]
    open_folder(options.out, [f"{done.kind}.json", f"{done.kind}.md", *pictures])
    workloads, bench = prepare()
    if bench.rates is not None:
        done.rates.update(dataclasses.asdict(bench.rates))
    return report.carry_out(done, workloads, bench, options.out, earlier, notes, run)
