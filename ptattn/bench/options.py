"""What the commands that measure share: their arguments, and what is checked before a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from .. import backends, environment
from ..command_line import UsageError, count, number, require
from .workloads import DTYPES, Settings


def add_out(parser: argparse.ArgumentParser, files: str, folder: str) -> None:
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=Path(folder),
                        help=f"where {files} are written (default: %(default)s)")  # fmt: skip


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


def carry_out(*args: Any, **known: Any) -> int:
    """`report.carry_out`; raises UsageError where what that needs is not installed."""
    require("rich", "matplotlib")
    from . import report

    return report.carry_out(*args, **known)
