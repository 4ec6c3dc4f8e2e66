"""What the commands of `ptattn` share: values of arguments, checks before a run, the terminal."""

from __future__ import annotations

import argparse
import datetime
import importlib
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


class UsageError(Exception):
    """What was asked for cannot be done here; the message says why."""


def count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a positive integer; got {text!r}")
    return int(text)


def seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected 0 or a positive integer; got {text!r}")
    return int(text)


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number; got {text!r}")
    return value


def pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"expected a regular expression: {error}") from None


def require(*packages: str, install: str = "ptattn[bench]") -> None:
    """Raise UsageError unless these can be imported, which come with `install`."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UsageError(f"{error}; it comes with: pip install {install}") from None


def open_folder(out: Path, files: Sequence[str] = ()) -> None:
    """Make the folder of --out; raise UsageError if these files could not be written there.

    No file in it is changed.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
        for name in files:
            if (out / name).is_dir():
                raise IsADirectoryError(f"{out / name} is a folder")
    except OSError as error:
        raise UsageError(f"argument --out: cannot write to {out}: {error}") from None


def console() -> Console:
    """Of standard output. A file or a pipe has no width of its own, and is best read whole."""
    from rich.console import Console

    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else 160)


def now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
