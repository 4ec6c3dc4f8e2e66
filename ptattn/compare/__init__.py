"""`ptattn compare`: proxy-tokenized against full attention, counted and measured on this machine.

`cases` says what is compared, `runner` measures it in the child process of `worker`, `report` joins
the two, and `findings`, `tables` and `plots` show it. Only what shows things imports rich and
matplotlib.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import torch

from .. import backends, environment, files
from ..command_line import UsageError, console, now, open_folder, require
from . import cases, findings, report, runner
from .worker import DTYPES, Settings


def compare(options: argparse.Namespace, command: str) -> int:
    """Measure, write and print; `options` as `ptattn.cli` parses them, `command` as it was typed.

    Returns:
        The exit code: 0, or 130 after Ctrl-C.

    Raises:
        UsageError: no rich or matplotlib, no such device, a backend that cannot run here, a folder
            that cannot be written: nothing has been measured then.
    """
    require("rich", "matplotlib")
    from .progress import Progress

    settings = settings_of(options)
    out = Path(options.out)
    open_folder(out, report.FILES)
    begin, known = time.monotonic(), environment.describe()  # while the load is that of others
    entries = cases.plan(options.models, [*options.sizes, *options.video])
    with Progress(len({entry.block for entry in entries})) as progress:
        result = runner.run(entries, settings, options.budget, progress)
    if result.interrupted and not result.measured:
        return 130  # and leave the results of an earlier run alone
    rows = report.rows(entries, result)
    done = report.Report(
        rows=rows,
        findings=findings.sentences(
            rows, settings.backend == "triton" and settings.device == "cpu"
        ),
        environment=known,
        settings={**dataclasses.asdict(settings), "budget": options.budget},
        command=command,
        date=now(),
        seconds=time.monotonic() - begin,
        interrupted=result.interrupted,
    )
    failure = _write(done, out)
    _print(done, options.out)
    if failure is not None:
        raise UsageError(f"could not write to {options.out}: {failure}")
    return 130 if result.interrupted else 0


def settings_of(options: argparse.Namespace) -> Settings:
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


def _write(done: report.Report, out: Path) -> OSError | None:
    from . import plots, tables

    try:
        files.write(done.to_json(), out / "compare.json")
        files.write(tables.markdown(done), out / "compare.md")
        files.write(plots.gflops(done), out / "gflops.png")
        files.write(plots.latency(done), out / "latency.png")
    except OSError as error:
        return error
    return None


def _print(done: report.Report, out: str) -> None:
    from . import tables

    tables.show(done, console(), f"{out}/ ({', '.join(report.FILES)})")
