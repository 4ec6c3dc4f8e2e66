"""`ptattn bench`: blocks and models are checked, timed, compared; what cannot be done is named."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from ptattn import flops
from ptattn.bench import contenders, floor, harness, model_run, plots, predict, result, targets
from ptattn.bench.command import FIGURE_SIZES, FIGURES, model_cases
from ptattn.bench.harness import Bench
from ptattn.bench.model_run import ModelCase
from ptattn.bench.parity import WrongError
from ptattn.bench.result import Result, Row
from ptattn.bench.timing import CpuClock, Rates, Timing
from ptattn.cli import main
from ptattn.compare.cases import Size, plan
from ptattn.compare.worker import Settings
from ptattn.models import get_config

RATES = Rates(copy=4.3e12, products=790e12, launch=2e-6)
SETTINGS = Settings("cpu", "fp32", "sdpa")
MODELS = ("pt-dit-s-class", "dit-s")
H200 = predict.DEVICES["h200"]


def bench(**changes: object) -> Bench:
    known = dict(dtype=torch.float32, seconds=0.0, free_memory=lambda device: None) | changes
    return Bench(CpuClock(), RATES, "cpu", "sdpa", **known)  # type: ignore[arg-type]


def case(kind: str, task: str, *models: str, **changes: object) -> ModelCase:
    entries = tuple(plan(models, [Size(64)]))
    depth = 1 if kind == "model" else None
    return ModelCase(kind, Size(64), entries, SETTINGS, task, batch=2, depth=depth)


# Blocks and models.


@pytest.mark.parametrize("task", floor.TASKS)
def test_a_block_is_checked_and_timed_beside_its_opponents(task: str) -> None:
    rows = case("block", task, "pt-dit-s-class", "pt-dit-b", "dit-s").measure(bench())
    timed = {row.contender: row for row in rows if row.timing}
    expected = {"PT-DiT/S-Class", "PT-DiT/B", "PT-DiT/B roll-and-mask", "DiT/S flash"}
    assert timed.keys() == expected | ({"21 GEMMs"} if task == "forward" else set())
    assert {row.ours for row in timed.values() if row.contender.endswith(("B", "Class"))} == {True}
    for row in timed.values():
        assert row.contender == "21 GEMMs" or row.error < 1e-5
        assert row.tokens == 2 * 16
        assert row.timing.low <= row.timing.median <= row.timing.high
    refused = [row.contender for row in rows if row.status == result.REFUSED]
    assert "DiT/S cudnn" in refused


@pytest.mark.parametrize("task", floor.TASKS)
def test_a_model_is_checked_and_timed(task: str) -> None:
    timed = {r.contender for r in case("model", task, *MODELS).measure(bench()) if r.timing}
    fused = {"PT-DiT/S-Class fused"} if task == "forward" else set()
    assert timed == {"PT-DiT/S-Class", "DiT/S flash"} | fused


def test_a_wrong_block_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def falsified(subject: contenders.Subject) -> contenders.Contender:
        own = contenders._own(subject, subject.name, ours=True)
        return dataclasses.replace(own, call=lambda *x: 1.001 * own.call(*x))

    def offered(subject: contenders.Subject, compiled: bool) -> Iterator[dict]:
        yield {subject.name: lambda: falsified(subject)}

    monkeypatch.setattr(model_run, "contenders", offered)
    rows = case("block", "training", "pt-dit-s-class").measure(bench())
    assert [(row.status, row.timing) for row in rows] == [(result.FAILED, None)]
    assert rows[0].note.startswith("WrongError: PT-DiT/S-Class: output error 1.0e-03")
    assert result.status(rows) == 1


def test_gradients_are_part_of_the_gate() -> None:
    (entry,) = plan(["pt-dit-b"], [Size(64)])
    subject = contenders.block_subject(entry, SETTINGS, batch=2)
    gate = model_run.Gate(subject, floor.TRAINING)
    own = contenders._own(subject, subject.name)

    def call(x: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        return own.call(x, vector.detach() + 1.01 * (vector - vector.detach()))

    assert gate.check(own, subject) < 1e-5
    with pytest.raises(WrongError, match="gradient error"):
        gate.check(dataclasses.replace(own, call=call), subject)


# The floor and the prediction.


def test_block_floor_of_the_paper_s_block() -> None:
    """Per token 22·D² multiply-adds, four passes of 8·C bytes, 24·C of attention, 16·C of MLP."""
    config, tokens = get_config("pt-dit-xl"), 128 * 128
    dim = config.dim
    work = floor.work("pt-dit-xl", Size(2048), floor.FORWARD)
    proxies, text = 64, 120
    per_block = dim**2 * (22 * tokens + 6 * proxies + 2 * text)
    assert work.operations == 2 * per_block
    assert work.passes == 4 * 8 * dim * tokens
    assert work.activation == 16 * dim * tokens
    assert sum(part.bytes for part in work.attention) == 24 * dim * tokens
    training = floor.work("pt-dit-xl", Size(2048), floor.TRAINING)
    assert training.operations == 3 * work.operations
    assert (
        sum(p.bytes for p in training.attention) == (8 + 8 + 4 + 4 + 14 + 14 + 6 + 6) * dim * tokens
    )
    fused = floor.work("pt-dit-xl", Size(2048), floor.FORWARD, fused=True)
    assert work.operations - fused.operations == 2 * 2 * dim**2 * (tokens - dim)
    few = (floor.work("pt-dit-xl", Size(512), floor.FORWARD, fused=f) for f in (False, True))
    assert next(few) == next(few)


def test_the_operations_of_a_model_are_those_counted() -> None:
    for model in ("pt-dit-l", "dit-xl", "pixart-alpha"):
        depth = get_config(model).depth
        work = floor.work(model, Size(1024), floor.FORWARD, depth=depth)
        products = sum(part.operations for part in work.attention)
        total = depth * (work.operations + products) + work.outside
        assert total == 2 * flops.count(model, 1024).total


def predicted() -> Result:
    settings = Settings("cuda", "bf16", "triton")
    found = model_cases("model", FIGURES, FIGURE_SIZES, [floor.FORWARD], settings)
    known = {**dataclasses.asdict(settings), "predicted_for": H200.name}
    done = Result("predict", known, vars(H200.rates), "a command", "2030-01-01")
    done.rows = predict.rows(found, H200)
    return done


def test_predictions_are_marked_and_judged() -> None:
    done = predicted()
    assert {row.status for row in done.rows} == {result.PREDICTED}
    lines = targets.verdicts(done)
    assert len(lines) == 5
    assert all(line.startswith("predicted ") for line in lines)
    times = {row.contender: row.seconds for row in done.rows if row.case == "model 1024 px b1"}
    assert times["DiT/XL"] < times["PT-DiT/XL fused"] < times["PT-DiT/XL"]
    # One block of DiT/XL at 4,096 tokens: 12·D² per token, attention at 486 TFLOP/s, bytes.
    dim, tokens = 1152, 4096
    linear, attention = 24 * dim**2 * tokens / 790e12, 4 * dim * tokens**2 / 486e12
    block = linear + attention + (2 * 8 + 16) * dim * tokens / 4.3e12
    assert times["DiT/XL"] == pytest.approx(28 * block, rel=0.01)


def test_crossover_plot() -> None:
    image = pytest.importorskip("matplotlib.image")
    png = plots.crossover(predicted())
    assert png is not None
    import io

    pixels = image.imread(io.BytesIO(png))
    assert 0.005 < (pixels[..., :3].min(axis=-1) < 0.9).mean() < 0.5  # neither empty nor black
    assert plots._crossings([(256, 2.0), (1024, 4.0)], [(256, 1.0), (1024, 8.0)])[0][0] == 512


class Compiling:
    """A case of three contenders that share their code, as compiled ones do."""

    memory = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def measure(self, bench: Bench) -> list[Row]:
        for times in range(3):
            call = torch.compile(partial(torch.mul, times), backend="eager", fullgraph=True)
            call(torch.ones(self.size))
        return [Row(f"case {self.size}", "forward", "ours", "ours", True)]

    def blank(self, status: str, note: str = "") -> list[Row]:
        return [Row(f"case {self.size}", "forward", "ours", "ours", True, status, note)]


def test_any_number_of_cases_compiles() -> None:
    rows = [harness.run(Compiling(size), bench()) for size in range(1, 13)]
    assert [(row.status, row.note) for (row,) in rows] == [(result.OK, "")] * 12


def test_a_case_that_would_end_too_late_is_not_begun() -> None:
    case_of_now = case("block", "forward", *MODELS)
    hours = dataclasses.replace(RATES, products=1e6)
    late = dataclasses.replace(bench(), rates=hours, deadline=time.monotonic() + 60)
    rows = case_of_now.measure(late)
    assert {row.status for row in rows} == {result.NOT_REACHED}
    assert "would take some" in rows[0].note


# Results and their comparison.


def timed(seconds: float, spread: float = 0.01, **changes: object) -> Row:
    timing = Timing(seconds, seconds * (1 - spread), seconds * (1 + spread), 0.0, 10)
    return Row("block 256 px b1", "forward", "PT-DiT/B", "PT-DiT/B", True, timing=timing, **changes)  # type: ignore[arg-type]


def whole(*rows: Row, **settings: object) -> Result:
    known = {"device": "cpu", "dtype": "bf16"} | settings
    return Result("block", known, {}, "ptattn bench block", "2030-01-01", rows=list(rows))


@pytest.mark.parametrize(
    ("seconds", "spread", "slower"),
    [(1.0, 0.01, 0), (1.02, 0.001, 0), (1.1, 0.01, 1), (1.1, 0.2, 0), (0.5, 0.01, 0)],
)
def test_a_regression_lies_beyond_the_noise(seconds: float, spread: float, slower: int) -> None:
    found, common = result.regressions(whole(timed(1.0)), whole(timed(seconds, spread)))
    assert (len(found), common) == (slower, 1)


def test_a_result_that_became_wrong_is_a_regression() -> None:
    now = dataclasses.replace(timed(1.0), timing=None, status=result.FAILED, note="error 1")
    found, _ = result.regressions(whole(timed(1.0)), whole(now))
    assert found == ["block 256 px b1 forward PT-DiT/B: FAILED, error 1"]


def test_round_trip_of_a_result(tmp_path: Path) -> None:
    path = tmp_path / "block.json"
    path.write_text(whole(timed(1.0)).to_json())
    assert result.load(path) == whole(timed(1.0))


def test_cpu_targets_are_judged() -> None:
    def row(name: str, seconds: float, tokens: int, side: int) -> Row:
        facts = dict(kind="block", side=side, frames=1, batch=1)
        changes = dict(case=f"block {side}", contender=name, model=name, tokens=tokens, facts=facts)
        return dataclasses.replace(timed(seconds), **changes)  # type: ignore[arg-type]

    names = ("21 GEMMs", "PT-DiT/XL compiled", "PT-DiT/XL", "PixArt-α diffusers")
    rows = [row(n, s, 16384, 2048) for n, s in zip(names, (1, 1.4, 1.6, 5), strict=True)]
    rows += [row(n, s, 4096, 1024) for n, s in zip(names, (1, 1.8, 1.9, 1.8), strict=True)]
    first, second, third = targets.verdicts(whole(*rows))
    assert first.startswith("met: block, 16,384 tokens")
    assert second.startswith("NOT MET: block, 4,096 tokens")
    assert third.startswith("NOT MET: block, from 4,096 tokens on")
    assert "1.06" in third


# The command.

TINY = [
    "bench",
    "block",
    "--models",
    *MODELS,
    "--sizes",
    "32",
    "--seconds",
    "0.01",
    "--threads",
    "1",
]


@pytest.fixture(autouse=True)
def _small_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptattn.bench.timing.rates", lambda *args: RATES)


def test_bench_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, "--dtype", "fp32", "--out", str(tmp_path)]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "One block" in shown.out
    assert "block 32 px b1  forward  DiT/S flash" in shown.err
    record = json.loads((tmp_path / "block.json").read_text())
    assert record["schema"] == result.SCHEMA
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
    assert "1 of 1 results of ours are worse" in capsys.readouterr().out


@pytest.mark.parametrize("width", ["80", "160"])
def test_prediction_fits_the_terminal(
    width: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    assert main(["bench", "predict", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if not line.startswith("Written")]
    assert max(map(len, lines)) <= int(width)
    assert "PREDICTED" in lines[0]
    assert not any("…" in line for line in lines)
    assert {path.name for path in tmp_path.iterdir()} == {
        "predict.json",
        "predict.md",
        "predict.png",
    }


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('{"schema": 1}', "schema ptattn.bench/1; got schema 1"),
        ("[]", "got schema None"),
        ("no json", "cannot read"),
        (None, "cannot read"),
        ("other dtype", "its dtype is 'fp16', of this run 'fp32'"),
    ],
)
def test_a_file_that_cannot_be_compared_with_is_found_out_first(
    content: str | None, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier, out = tmp_path / "earlier.json", tmp_path / "out"
    if content is not None:
        text = whole(timed(1.0), dtype="fp16").to_json() if content == "other dtype" else content
        earlier.write_text(text)
    out.mkdir()
    (out / "block.json").write_text("mine")
    torch.set_num_threads(1)
    arguments = [*TINY, "--dtype", "fp32", "--out", str(out), "--against", str(earlier)]
    assert main(arguments) == 2
    assert part in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["block.json"]
    assert (out / "block.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("bench", "WHAT"),
        ("bench block --sizes 100", "multiples of 16"),
        ("bench block --sizes 0x256", "0x256"),
        ("bench block --tasks backward", "backward"),
        ("bench model --depth 0", "positive integer"),
        ("bench ops --only (", "regular expression"),
        ("bench ops --seconds never", "positive number"),
        ("bench predict --device abacus", "abacus"),
    ],
)
def test_nonsense_is_named(arguments: str, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments.split())
    assert exit.value.code == 2
    assert part in capsys.readouterr().err


def test_no_operation_matches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "ops", "--only", "nothing", "--out", str(tmp_path / "out")]) == 2
    assert "argument --only: no operation matches 'nothing'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
