"""`ptattn bench`: from end to end, its files and those of --against, and its arguments."""

import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks import test_bench
from ptattn.bench import clocks, results
from ptattn.cli import main
from tests.bench.test_operations import tiny
from tests.support.measured import RATES, TINY, result, timed

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
BLOCK = ["bench", "block", "--models", *TINY, "--sizes", "32", "--seconds", "0.01"]
BLOCK += ["--threads", "1", "--dtype", "fp32", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _small_rates(monkeypatch):
    monkeypatch.setattr(clocks, "rates", lambda *args: RATES)


def test_bench_from_end_to_end(tmp_path, capsys):
    arguments = [*BLOCK, "--out", str(tmp_path)]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "One block" in shown.out
    assert "block 32 px b1  forward  DiT/S flash: eager" in shown.err
    record = json.loads((tmp_path / "block.json").read_text())
    assert record["schema"] == results.SCHEMA
    assert record["command"].startswith("ptattn bench block --models")
    written = (tmp_path / "block.md").read_text()
    assert "PT-DiT/S-Class" in written
    assert "21 GEMMs" in written
    # Times a hundredth of what they can be make the next run a regression.
    for row in record["rows"]:
        for name in ("median", "low", "high") if row["timing"] else ():
            row["timing"][name] /= 100
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps(record))
    assert main([*arguments, "--against", str(earlier)]) == 1
    assert "1 of 1 results are worse beyond noise" in capsys.readouterr().out


def test_operations_from_end_to_end(tmp_path, capsys):
    ops = ["bench", "ops", "--only", "pool B 256 px .* b1$", "--backend", "sdpa", "--device", "cpu"]
    assert main([*ops, "--seconds", "0.01", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"ops.json", "ops.md"}
    found = results.load(tmp_path / "ops.json").rows
    assert {row.task for row in found if row.timing} == {"forward", "backward"}
    assert "norm-pool B 256 px" in capsys.readouterr().out


def test_predictions_at_80_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["bench", "predict", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if not line.startswith("Written")) <= 80
    assert "PREDICTED" in lines[0]
    assert not any("…" in line for line in lines)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"predict.json", "predict.md", "predict.png"}


def test_the_committed_prediction_is_today_s(tmp_path, capsys):
    committed = RESULTS / "predict" / "predict.json"
    options = ["--out", str(tmp_path), "--against", str(committed)]
    assert main(["bench", "predict", *options]) == 0
    rows = sum(not row.baseline for row in results.load(committed).rows)
    assert f"0 of {rows} results are worse" in " ".join(capsys.readouterr().out.split())


def test_nothing_is_written_where_nothing_was_measured(tmp_path, capsys):
    assert main([*BLOCK, "--budget", "1e-9", "--out", str(tmp_path)]) == 0
    assert "Nothing was measured, nothing is written." in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "part"),
    [("no json", "cannot read"), ("other dtype", "its dtype is 'fp16', of this run 'fp32'")],
)
def test_a_file_that_cannot_be_compared_with_is_found_out_first(content, part, tmp_path, capsys):
    earlier, out = tmp_path / "earlier.json", tmp_path / "out"
    text = result(timed(1.0), dtype="fp16").to_json() if content == "other dtype" else content
    earlier.write_text(text)
    out.mkdir()
    (out / "block.json").write_text("mine")
    torch.set_num_threads(1)
    assert main([*BLOCK, "--out", str(out), "--against", str(earlier)]) == 2
    assert part in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["block.json"]
    assert (out / "block.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("", "WHAT"),
        ("block --sizes 100", "multiple of 16"),
        ("block --sizes 0x256", "0x256"),
        ("block --tasks backward", "backward"),
        ("model --depth 0", "positive integer"),
        ("model --quantize int3", "int3"),
        ("ops --only (", "regular expression"),
        ("ops --seconds never", "positive number"),
        ("gpu --budget 0", "positive number"),
        ("predict --device abacus", "abacus"),
    ],
)
def test_nonsense_is_named(arguments, part, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["bench", *arguments.split()])
    assert exit.value.code == 2
    assert part in capsys.readouterr().err


def test_what_cannot_be_done_here_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)  # importing it raises
    for arguments, part in (
        (["bench", "ops", "--only", "nothing"], "argument --only: no operation matches 'nothing'"),
        ([*BLOCK, "--quantize", "fp8"], "pip install torchao"),
    ):
        assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
        assert part in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("task", "part"), [("forward", "forward"), ("training", "backward")])
def test_make_bench_checks_and_runs_blocks_and_operations(task, part):
    """benchmarks/test_bench.py, where pytest-benchmark would repeat what is run here once."""
    ran = []
    benchmark = mock.Mock(pedantic=lambda run, **options: ran.append(run()))
    test_bench.test_block(benchmark, "dit-s", 32, task)
    assert benchmark.name == "DiT/S"
    test_bench.test_operation(benchmark, tiny("window"), part)
    assert len(ran) == 2
