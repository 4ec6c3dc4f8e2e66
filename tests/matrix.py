"""The tests of what torch and Triton decide, on one torch after the other: `make torch-matrix`.

Each torch is installed as pip gives it, with the triton it brings and the torchvision that fits it,
which timm takes, into an environment of its own in the temporary folder (TMPDIR): 6 GB, deleted
before the next. Where there is a GPU, the tests of the kernels within torch run on it too. Exit
status 1 if a torch does not install or a test fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import venv
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# Compiling and exporting, operators, layers, models, and kernels under the interpreter.
TESTS = (
    "tests/test_compile.py",
    "tests/test_layers.py",
    "tests/test_replace.py",
    "tests/test_timm.py",
    "tests/backends",
    "tests/models",
    "tests/kernels",
)
ON_GPU = ("tests/gpu/test_runtime.py",)


class Row(NamedTuple):
    torch: str
    triton: str
    outcomes: Counter[str]  # "passed", "failed", "skipped"
    seconds: float

    @property
    def failed(self) -> bool:
        return not self.outcomes["passed"] or bool(self.outcomes["failed"])


def pytest(python: Path, *options: str, **environment: str) -> Counter[str]:
    """Run tests and count their outcomes; what does not even run has failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [python, "-m", "pytest", "-q", "-n", "logical", *options, f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT, env=os.environ | environment)
        if not report.exists():
            return Counter(failed=1)
        suite = ET.parse(report).getroot()[0]
    count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed, skipped = count["failures"] + count["errors"], count["skipped"]
    return Counter(passed=count["tests"] - failed - skipped, failed=failed, skipped=skipped)


def run(version: str) -> Row:
    """Install a torch, test it, delete it."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"torch-{version}-") as home:
        print(f"torch {version}: installing", flush=True)
        venv.create(home, with_pip=True)
        python = Path(home, "bin", "python")
        install = [python, "-m", "pip", "install", "-q", "--no-cache-dir"]
        wanted = (f"torch=={version}", "torchvision", "timm", "-e", ".[matrix]")
        if subprocess.run([*install, *wanted], cwd=ROOT).returncode:
            return Row(version, "", Counter(failed=1), time.monotonic() - start)
        query = "import torch, triton; print(torch.__version__, triton.__version__)"
        versions = subprocess.check_output([python, "-c", query], text=True).split()
        on_cpu = dict(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
        quick = ("-m", "not long and not gpu", "--maxprocesses", "2")
        outcomes = pytest(python, *quick, *TESTS, **on_cpu)
        if has_gpu():
            outcomes += pytest(python, "-m", "gpu", "--maxprocesses", "8", *ON_GPU)
        return Row(*versions, outcomes, time.monotonic() - start)


def has_gpu() -> bool:
    try:
        return b"GPU" in subprocess.run(["nvidia-smi", "-L"], capture_output=True).stdout
    except FileNotFoundError:
        return False


def table(rows: Sequence[Row]) -> str:
    cells = [("torch", "triton", "passed", "failed", "skipped", "minutes", "")]
    for row in rows:
        counts = (str(row.outcomes[name]) for name in ("passed", "failed", "skipped"))
        verdict = "FAILED" if row.failed else "ok"
        cells.append((row.torch, row.triton, *counts, f"{row.seconds / 60:.0f}", verdict))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("versions", nargs="+", metavar="VERSION", help="of torch, such as 2.11.0")
    rows = [run(version) for version in parser.parse_args(argv).versions]
    print(f"\n{table(rows)}")
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
