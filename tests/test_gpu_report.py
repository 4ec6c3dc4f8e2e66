"""The tables of benchmarks.gpu, and its verdicts on the targets."""

from benchmarks import gpu_cases, gpu_report
from benchmarks.gpu_run import OK, SKIPPED, Row
from benchmarks.timing import Rates, Timing

RATES = Rates(copy=4.3e12, products=790e12, launch=2e-6)


def first(name):
    return next(case for case in gpu_cases.cases() if str(case).startswith(name))


def row(name, seconds, task="forward", opponent=None):
    case = first(name)
    ours = Timing(seconds, seconds, seconds, 5e-5, 20)
    others = {"sdpa flash": Timing(opponent, opponent, opponent, 1e-4, 20)} if opponent else {}
    return Row(case, task, OK, "", ours, case.floor(task, RATES), {"out": 0.5}, others)


def test_table():
    rows = [row("window XL 2048 px", 123.4e-6, opponent=246.8e-6), row("mean XL 2048 px", 2e-3)]
    rows.append(Row(first("text XL 2048 px"), "forward", SKIPPED, "out of memory"))
    head, marks, *lines = gpu_report.table(rows).splitlines()
    assert {line.count("|") for line in (head, marks, *lines)} == {len(gpu_report.COLUMNS) + 1}
    assert "| window XL 2048 px w1x16x16 b1 | forward | 123.4 | 123.4–123.4 |" in lines[0]
    assert "| sdpa flash | 246.8 | 2.00× | 50.0 |" in lines[0]
    assert "| 2,000 |" in lines[1]
    assert "| none ran |" in lines[1]
    assert "| skipped | out of memory |" in lines[2]


def test_verdicts():
    cross = "cross XL 2048 px w1x16x16"
    floor = first(cross).floor("forward", RATES)
    flops = first("window XL 2048 px").flops("forward")
    rows = [
        row(cross, 1.2 * floor),
        row(cross, 1.4 * floor),
        row("window XL 2048 px", flops / 500e12),
        row("window XL 1024 px", 1.0),  # launch-bound
    ]
    lines = gpu_report.verdicts(rows)
    assert len(lines) == len(gpu_report.TARGETS)
    (missed,) = (line for line in lines if line.startswith("missed"))
    assert "1 of 2 cases" in missed
    assert "(1.4)" in missed
    assert any(line.startswith("met") and "500 to 500" in line for line in lines)
    small = next(line for line in lines if "windows ≤ 64 tokens: ≤ 1.25" in line)
    assert small.startswith("not judged")
    assert "1 launch-bound" in small


def test_omissions_name_each_reason_once():
    rows = [row("window XL 2048 px", 1e-3), row("window XL 1024 px", 1e-3)]
    for r in rows:
        r.refused = {"flex": "ValueError: NYI"}
    (line,) = gpu_report.omissions(rows)
    assert line.startswith("flex did not run for window XL 2048 px")
    assert line.endswith("and 1 more: ValueError: NYI")
