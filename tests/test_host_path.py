"""The way from a public function to a kernel: how much of our own Python a call goes through."""

import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")

from benchmarks import host, host_worker
from benchmarks.host import FORWARD, NO_GRAD, TRAINING, Row, Sample
from benchmarks.tables import table
from ptattn import ops

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)
ROOT = Path(__file__).resolve().parent.parent
OPERATIONS = [name for name in host_worker.CASES if hasattr(ops, name.split(",")[0])]


@pytest.mark.parametrize(("case", "task"), host.LIMITS)
def test_a_call_goes_through_little_of_our_own_python(case, task):
    """On an H200 the host once took 82 ms for a forward of which the GPU took 16."""
    calls, _, _ = host_worker.count(case, task)
    assert calls <= host.LIMITS[case, task]


@pytest.mark.parametrize("task", [NO_GRAD, FORWARD])
@pytest.mark.parametrize("case", OPERATIONS)
def test_an_operation_is_one_kernel(case, task):
    _, launches, operations = host_worker.count(case, task)
    assert (launches, operations) == (1, 0)


# What is counted, and how it is shown.


def function_in(folder):
    """A function whose file would lie in `folder`: itself, and a generator entered four times."""
    names = {}
    code = "def f():\n    return sum(i for i in range(3))\n"
    exec(compile(code, str(folder / "made.py"), "exec"), names)
    return names["f"]


def test_own_calls_are_those_of_the_package_and_its_kernels(tmp_path):
    package = ROOT / "ptattn"
    for folder in (package, package / "models", package / "kernels", ROOT / "kernels"):
        assert host_worker.own_calls(function_in(folder)) == 5, folder
    for folder in (tmp_path, ROOT / "benchmarks", ROOT / "ptattn_of_others"):
        assert host_worker.own_calls(function_in(folder)) == 0, folder


def sample(seconds, calls=10):
    return Sample(calls, launches=1, operations=2, seconds=seconds, torch_seconds=1e-5)


def test_a_row_has_medians_and_ratios_of_what_was_measured_in_turns():
    """A slow repeat, slow for both, moves no ratio."""
    now, then = (2e-5, 9e-5, 3e-5), (4e-5, 18e-5, 6e-5)
    row = Row("attention", NO_GRAD, tuple(map(sample, now)), tuple(map(sample, then)))
    assert row.timing.median == 3e-5
    assert row.over_before == pytest.approx(0.5)
    assert row.over_torch == pytest.approx(3)
    assert Row("attention", NO_GRAD, (sample(1e-5),)).over_before is None


def test_a_row_over_its_limit():
    limit = host.LIMITS["window_attention", TRAINING]
    for calls in (limit, limit + 1):
        row = Row("window_attention", TRAINING, (sample(1e-5, calls),))
        assert row.too_many == (calls > limit)
    assert not Row("a case without a limit", TRAINING, (sample(1e-5, 10**6),)).too_many


@pytest.mark.parametrize("width", [80, 160])
def test_the_table_fits_the_terminal(width):
    longest = max(host_worker.CASES, key=len)
    samples = (sample(1.234e-3, 1234),) * 2
    columns = (*host.COLUMNS, *host.AGAINST)
    text = table([Row(longest, TRAINING, samples, samples)], columns, width)
    assert max(map(len, text.splitlines())) <= width
    assert ("its calls" in text) == (width == 160)


def test_the_command_compares_two_checkouts(tmp_path, capsys):
    file = tmp_path / "host.json"
    once = ["--repeats", "1", "--seconds", "0.01", "--json", str(file)]
    assert host.main(["--only", "^layer_norm$", "--against", str(ROOT), *once]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["task"] for row in rows] == list(host.TASKS)
    for row in rows:
        (now,), (then,) = row["samples"], row["before"]
        assert now["calls"] == then["calls"] > 0
        assert row["over_before"] == pytest.approx(now["seconds"] / then["seconds"])
    assert "Measured: 3. Over their limit: 0." in capsys.readouterr().out


def test_a_case_or_a_checkout_that_is_none_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match="no case matches 'norms'; they are window_mean, "):
        host.main(["--only", "norms"])
    with pytest.raises(SystemExit):
        host.parse(["--against", str(tmp_path)])
    assert f"{tmp_path} is no checkout: it has no ptattn/__init__.py" in capsys.readouterr().err


def test_no_module_of_another_checkout_is_measured(monkeypatch):
    """An older checkout without ptattn.later was given that of the editable install."""
    later = ModuleType("ptattn.later")
    later.__file__ = "/elsewhere/ptattn/later.py"
    host_worker.check_modules()
    monkeypatch.setitem(sys.modules, "ptattn.later", later)
    with pytest.raises(SystemExit, match=r"has no ptattn\.later: it came from /elsewhere/"):
        host_worker.check_modules()
