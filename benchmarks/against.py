"""What the gate's model predicts for the operations that a GPU has measured.

    python -m benchmarks.against RESULT.json [--only REGEX]

Of every operation of `ptattn bench ops` or `gpu` in that file: its measured time, and what the
model of `roofline` predicts for the kernels of this checkout, compiled now for sm_90; then how
often that is right. No GPU is needed. A file says which commit's kernels it measured.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import compiled, roofline
from benchmarks.tables import table
from ptattn.bench import op_workloads, results
from ptattn.bench.command import pattern
from ptattn.bench.results import OK, Row
from ptattn.command_line import UsageError

ARCH = "sm90"


def predictions(rows: Sequence[Row], copy_rate: float) -> list[float]:
    """Seconds of each row, by this checkout's kernels, each compiled once."""
    operations = {str(operation): operation for operation in op_workloads.operations()}
    launches = [compiled.launches(operations[row.workload], row.task, ARCH) for row in rows]
    distinct = {compiled.key(launch): launch for own in launches for launch in own}
    built = compiled.build_all([*distinct.values()], ARCH)
    known = dict(zip(distinct, built, strict=True))
    if failed := [f"{key}: {one}" for key, one in known.items() if isinstance(one, str)]:
        sys.exit(f"what does not build has no prediction: {failed}")

    def seconds(launch: compiled.Launch) -> float:
        start = roofline.start(launch, known[compiled.key(launch)])
        return roofline.predict(start, copy_rate)

    return [sum(map(seconds, own)) for own in launches]


def report(rows: Sequence[Row], predicted: Sequence[float]) -> Iterator[str]:
    """In Markdown."""
    ratios = [ours / (row.seconds or math.nan) for row, ours in zip(rows, predicted, strict=True)]
    lines = [
        (row.workload, row.task, *(f"{t * 1e6:,.1f}" for t in (row.seconds, ours)), f"{ratio:.2f}")
        for row, ours, ratio in zip(rows, predicted, ratios, strict=True)
    ]
    titles = ("operation", "task", "measured, µs", "predicted, µs", "÷ measured")
    yield table(titles, lines) + "\n"
    near = {limit: sum(1 / limit <= r <= limit for r in ratios) for limit in (1.5, 1.25)}
    shares = (f"within {limit}× in {n} ({n / len(ratios):.0%})" for limit, n in near.items())
    yield (
        f"Predicted over measured, in {len(ratios)} rows: {', '.join(shares)}, from "
        f"{min(ratios):.2f} to {max(ratios):.2f}, geometric mean "
        f"{statistics.geometric_mean(ratios):.2f}."
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", type=Path, help="a result of `ptattn bench ops` or `gpu`")
    parser.add_argument("--only", metavar="REGEX", type=pattern, default=re.compile(""))
    args = parser.parse_args(argv)
    try:
        result = results.load(args.file)
    except UsageError as error:
        parser.error(str(error))
    rows = [
        row
        for row in result.rows
        if "op" in row.facts and not row.baseline and row.status == OK
        if args.only.search(f"{row.workload} {row.task}")
    ]
    if not rows:
        parser.error(f"no operation of ours in {args.file} matches {args.only.pattern!r}")
    print(*report(rows, predictions(rows, result.rates["copy"])), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
