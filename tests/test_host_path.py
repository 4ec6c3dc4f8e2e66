"""The way from a public function to a kernel: how much of our own Python a call goes through."""

import os
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import host
from benchmarks.host import FORWARD, NO_GRAD, TASKS
from ptattn import ops

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)
ROOT = Path(__file__).resolve().parent.parent
OPERATIONS = [name for name in host.CASES if hasattr(ops, name.split(",")[0])]


@pytest.mark.parametrize(("case", "task"), [*product(host.CASES, TASKS)])
def test_a_call_goes_through_little_of_our_own_python(case, task):
    """On an H200 the host once took 82 ms for a forward of which the GPU took 16."""
    assert host.count(case, task).calls <= host.limit(case, task)


@pytest.mark.parametrize("task", [NO_GRAD, FORWARD])
@pytest.mark.parametrize("case", OPERATIONS)
def test_an_operation_is_one_kernel(case, task):
    counts = host.count(case, task)
    assert (counts.launches, counts.operations) == (1, 0)


def function_in(folder):
    """A function whose file would lie in `folder`: itself, and a generator entered four times."""
    names = {}
    code = "def f():\n    return sum(i for i in range(3))\n"
    exec(compile(code, str(folder / "made.py"), "exec"), names)
    return names["f"]


def test_own_calls_are_those_of_the_package_and_its_kernels(tmp_path):
    package = ROOT / "ptattn"
    for folder in (package, package / "models", package / "kernels", ROOT / "kernels"):
        assert host.own_calls(function_in(folder)) == 5, folder
    for folder in (tmp_path, ROOT / "benchmarks", ROOT / "ptattn_of_others"):
        assert host.own_calls(function_in(folder)) == 0, folder


@pytest.mark.parametrize("over", [0, 1])
def test_the_command_names_what_is_over_its_limit(over, capsys, monkeypatch):
    monkeypatch.setattr(
        host, "count", lambda name, task: host.Counts(host.limit(name, task) + over, 1, 2)
    )
    monkeypatch.setattr(host, "seconds", lambda name, task: 1.234e-3)
    assert host.main(["--only", "^layer_norm$"]) == over
    out = capsys.readouterr().out
    assert f"| layer_norm | training | {60 + over}    | 60    | 3       | 1    | 1,234 |" in out
    assert f"Measured: 3. Over their limit: {3 * over}." in out
    assert ("layer_norm, training: 61 calls, of at most 60" in out) == over


def test_a_case_that_is_none_is_named(capsys):
    with pytest.raises(SystemExit):
        host.main(["--only", "norms"])
    assert "no case matches 'norms'; they are window_mean, " in capsys.readouterr().err
