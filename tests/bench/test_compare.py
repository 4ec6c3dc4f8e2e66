"""What `ptattn compare` does with its cases: plan, budget, failures, times, findings, files."""

import argparse
import dataclasses
import io
import json
import os
import signal
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from rich.console import Console

from ptattn import environment, files
from ptattn.compare import cases, findings, plots, report, runner, settings_of, tables, worker
from ptattn.compare.cases import Block, Entry, Size
from ptattn.compare.runner import Outcome, Result
from ptattn.compare.worker import CaseError, Measurement, Settings, Worker

TINY = ("pt-dit-s-class", "dit-s")
SETTINGS = Settings(threads=1)


class Silent:
    """A progress that remembers what it was told."""

    def __init__(self) -> None:
        self.left: list[float] = []

    def start(self, entry: Entry, left: float) -> None:
        self.left.append(left)

    def finish(self, entry: Entry, outcome: Outcome) -> None: ...


class InProcess:
    """In place of the worker: every run takes a second, or what `seconds` says; no time passes."""

    reusable = True
    asked: ClassVar[list[Block]] = []

    def __init__(self, settings: Settings, measure: object) -> None: ...

    def measure(self, block: Block, share: float, limit: float) -> Measurement:
        self.asked.append(block)
        return Measurement((1.0, 1.0), 10**6)

    def close(self) -> None: ...


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> type[InProcess]:
    monkeypatch.setattr(runner, "Worker", InProcess)
    monkeypatch.setattr(InProcess, "asked", [])
    return InProcess


def plan(*sides: int, models: tuple[str, ...] = TINY) -> list[Entry]:
    return cases.plan(models, [Size(side) for side in sides])


# Run by a child process, which imports them from here.
def kill_dit(block: Block, settings: Settings, share: float) -> Measurement:
    if block.family == "DiT":
        os.kill(os.getpid(), signal.SIGKILL)
    return Measurement((0.001, 0.001), None)


def raise_for_dit(block: Block, settings: Settings, share: float) -> Measurement:
    if block.family == "DiT":
        raise RuntimeError("no luck\nwith details")
    return Measurement((0.001, 0.001), None)


def never_end(block: Block, settings: Settings, share: float) -> Measurement:
    time.sleep(600)
    raise AssertionError


def test_plan_puts_images_before_videos_and_keeps_the_models_order() -> None:
    sizes = [Size(32, frames=4), Size(64), Size(32), Size(64)]
    entries = cases.plan([*TINY, TINY[0]], sizes)
    assert [str(entry.size) for entry in entries[::2]] == ["32 px", "64 px", "4×32 px"]
    assert [entry.model for entry in entries] == list(TINY) * 3
    assert [entry.block.grid for entry in entries[::2]] == [(1, 2, 2), (1, 4, 4), (4, 2, 2)]


def test_models_with_one_block_are_measured_once(instant: type[InProcess]) -> None:
    """At 1024 px the released model has the window that pt-dit-xl chooses; at 512 px it has not."""
    entries = plan(512, 1024, models=("pt-dit-xl", "qihoo-t2i"))
    assert entries[2].block == entries[3].block
    result = runner.run(entries, SETTINGS, 1e9, Silent())
    assert len(instant.asked) == len(set(instant.asked)) == 3
    assert all(result.outcomes[entry.block].seconds for entry in entries)


def test_what_exceeds_the_budget_is_skipped(instant: type[InProcess]) -> None:
    entries = plan(32, 256)
    progress = Silent()
    result = runner.run(entries, SETTINGS, 30.0, progress)
    small, large = entries[:2], entries[2:]
    assert all(result.outcomes[entry.block].seconds == (1.0, 1.0) for entry in small)
    for entry in large:
        outcome = result.outcomes[entry.block]
        assert not outcome.seconds
        assert outcome.predicted is not None
        least = worker.MIN_RUNS * outcome.predicted
        assert outcome.skipped == f"predicted {least:.0f} s, 30 s of the budget left"
    assert all(0 <= left <= 30 for left in progress.left)
    assert progress.left[-1] > progress.left[0] == 0


def test_what_exceeds_the_memory_is_skipped(
    instant: type[InProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = plan(32, 256, models=TINY[:1])
    between = (small.block.memory(torch.bfloat16, "auto") + 10**6) * 1.0
    monkeypatch.setattr(environment, "available_memory", lambda device: between)
    result = runner.run([small, large], SETTINGS, 1e9, Silent())
    assert result.outcomes[small.block].seconds
    reason = result.outcomes[large.block].skipped
    assert reason is not None
    assert reason.startswith("needs about")
    assert "GB available" in reason


def test_the_reference_needs_memory_for_all_scores() -> None:
    ours, theirs = plan(1024)
    tokens, heads = 64 * 64, 6
    assert theirs.block.memory(torch.bfloat16, "reference") > 4 * heads * tokens**2
    assert theirs.block.memory(torch.bfloat16, "sdpa") < 4 * heads * tokens**2
    assert ours.block.memory(torch.bfloat16, "reference") < 4 * heads * tokens**2


@pytest.mark.parametrize("after", [0, 1])
def test_interrupt_keeps_what_was_measured(
    instant: type[InProcess], monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    def interrupt(self: InProcess, block: Block, share: float, limit: float) -> Measurement:
        if len(self.asked) == after:
            raise KeyboardInterrupt
        return measure(self, block, share, limit)

    measure = InProcess.measure
    monkeypatch.setattr(InProcess, "measure", interrupt)
    entries = plan(32, 64)
    result = runner.run(entries, SETTINGS, 1e9, Silent())
    assert result.interrupted
    assert result.measured == bool(after)
    outcomes = [result.outcomes[entry.block] for entry in entries]
    assert [outcome.skipped for outcome in outcomes].count("interrupted") == 4 - after


@pytest.mark.parametrize(
    ("measure", "reason"),
    [
        (kill_dit, "the measuring process was ended by SIGKILL, most likely out of memory"),
        (raise_for_dit, "RuntimeError: no luck"),
    ],
)
def test_a_case_that_dies_costs_itself_alone(measure: worker.Measure, reason: str) -> None:
    entries = plan(32)  # the case that dies comes first
    result = runner.run(entries, SETTINGS, 1e9, Silent(), measure)
    for entry in entries:
        outcome = result.outcomes[entry.block]
        if entry.is_proxy_tokenized:
            assert outcome.seconds
        else:
            assert outcome.skipped == reason


def test_a_case_that_hangs_is_stopped() -> None:
    child = Worker(SETTINGS, never_end)
    with pytest.raises(CaseError, match="stopped after 1 s"):
        child.measure(plan(32)[0].block, share=1.0, limit=0.6)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("model", ["pt-dit-s-class", "dit-s", "pixart-alpha", "pt-dit-l"])
def test_blocks_of_every_family_are_measured(model: str, backend: str) -> None:
    (entry,) = cases.plan([model], [Size(32, frames=2)])
    seen = worker.measure(entry.block, Settings(backend=backend, dtype="fp32"), share=0.0)
    assert len(seen.seconds) == worker.MIN_RUNS
    assert min(seen.seconds) > 0


def test_peak_memory_is_what_the_call_needs() -> None:
    size = 200 * 10**6
    worker.watched(lambda: torch.ones(size, dtype=torch.uint8), "cpu")
    _, peak = worker.watched(lambda: torch.ones(size, dtype=torch.uint8), "cpu")
    if not worker._reset_peak():
        pytest.skip("this system does not reset a process's peak of memory")
    assert peak == pytest.approx(size, rel=0.05)


def test_peak_memory_where_a_peak_cannot_be_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """The repeated run once replaced the first one's peak by zero there."""
    peaks = iter([100, 150, 150, 150])
    monkeypatch.setattr(worker, "_reset_peak", lambda: False)
    monkeypatch.setattr(worker, "_process_peak", lambda: next(peaks))
    (entry, _) = plan(32)
    assert worker.measure(entry.block, SETTINGS, share=0.0).peak == 50


def test_an_idle_worker_that_dies_is_reported() -> None:
    child = Worker(SETTINGS, never_end)
    os.kill(child._process.pid or 0, signal.SIGKILL)
    child._process.join()
    with pytest.raises(CaseError, match="SIGKILL"):
        child.measure(plan(32)[0].block, share=1.0, limit=60.0)


def rows(speeds: dict[int, tuple[float, float]], models: tuple[str, str]) -> list[report.Row]:
    """Rows of two models from the seconds of their blocks at every size."""
    entries = plan(*speeds, models=models)
    outcomes = {
        entry.block: Outcome((speeds[entry.size.side][models.index(entry.model)],) * 2)
        for entry in entries
    }
    return report.rows(entries, Result(outcomes))


EQUAL_WIDTH = ("pt-dit-xl", "dit-xl")


def test_findings_name_where_it_wins_and_where_it_loses() -> None:
    table = rows({256: (2, 1), 512: (2, 2.5), 1024: (2, 5)}, EQUAL_WIDTH)
    won, lost, counts = findings.sentences(table)
    assert won == (
        "On this machine, at equal width (D = 1152) PT-DiT/XL is faster than DiT/XL "
        "from 512 px (1,024 tokens) on (1.25× to 2.50×)."
    )
    assert lost == "PT-DiT/XL loses at 256 px (0.50× DiT/XL's speed)."
    assert "PT-DiT/XL at 1024 px takes 0.87× and 1.19× of DiT/XL's multiply-adds" in counts


def test_findings_without_a_threshold() -> None:
    slower = findings.sentences(rows({256: (2, 1), 512: (2, 1)}, EQUAL_WIDTH))
    assert "slower than DiT/XL at every size measured" in slower[0]
    faster = findings.sentences(rows({256: (1, 2), 512: (1, 2)}, EQUAL_WIDTH))
    assert "faster than DiT/XL at every size measured (2.00×)" in faster[0]
    assert not any("loses" in sentence for sentence in faster)
    mixed = findings.sentences(rows({256: (1, 2), 512: (2, 1)}, EQUAL_WIDTH))
    assert "faster than DiT/XL at 256 px (2.00×)" in mixed[0]


def test_findings_at_equal_parameters() -> None:
    won, *_ = findings.sentences(rows({256: (1, 2)}, ("pt-dit-l", "pixart-alpha")))
    assert "at equal parameters (within 10 %) PT-DiT/L is faster than PixArt-α at 256 px" in won


def test_findings_say_nothing_of_what_was_not_measured() -> None:
    entries = plan(256, 512, models=EQUAL_WIDTH)
    skipped = Result({entry.block: Outcome(skipped="no time") for entry in entries})
    (counts,) = findings.sentences(report.rows(entries, skipped))
    assert counts.startswith("The paper's count")
    assert findings.sentences(report.rows(plan(256, models=("dit-xl",)), skipped)) == []


def full_report() -> report.Report:
    """The default comparison with invented times; one case skipped."""
    sizes = [Size(side) for side in cases.SIZES] + [Size(256, 48)]
    entries = cases.plan(cases.MODELS, sizes)
    outcomes = {
        entry.block: Outcome((entry.cost / 1e11, entry.cost / 0.9e11), peak=10**8)
        for entry in entries
    }
    outcomes[entries[-1].block] = Outcome(skipped="no time")
    table = report.rows(entries, Result(outcomes))
    return report.Report(
        findings=findings.sentences(table),
        environment=environment.describe(),
        settings={**dataclasses.asdict(SETTINGS), "budget": 1.0},
        command="ptattn compare",
        date="2030-01-01T00:00:00+00:00",
        seconds=1.0,
        interrupted=False,
        rows=table,
    )


def test_latency_crossover_is_between_the_sizes_that_enclose_it() -> None:
    table = rows({256: (2, 1), 512: (2, 4), 1024: (2, 8)}, EQUAL_WIDTH)
    ((side, seconds),) = plots._measured_crossovers(table, "PT-DiT/XL", "DiT/XL")
    assert side == pytest.approx(256 * 2**0.5)
    assert seconds == pytest.approx(2 * 28)


@pytest.mark.parametrize("width", [80, 160])
def test_table_fits_the_terminal(width: int) -> None:
    text = io.StringIO()
    tables.show(full_report(), Console(file=text, width=width), "results/")
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    assert any("PT-DiT/XL" in line and "×" in line for line in lines)
    assert ("did not fit here" in text.getvalue()) == (width == 80)
    assert ("All blocks" in text.getvalue()) == (width == 160)


def test_json_round_trip_gives_the_same_report() -> None:
    whole = full_report()
    read = json.loads(whole.to_json())
    assert read.pop("schema") == report.SCHEMA
    read["rows"] = [report.Row(**row) for row in read["rows"]]
    assert report.Report(**read) == whole


def test_write_leaves_the_old_file_where_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write("old", path)
    with pytest.raises(TypeError):
        files.write(3, path)  # type: ignore[arg-type]
    assert path.read_text() == "old"
    files.write("new", path)
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(("ratio", "dtype"), [(0.5, "bf16"), (20, "fp32")])
def test_dtype_is_the_one_that_multiplies_faster(
    ratio: float, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that only products move: of one second in fp32, of `ratio` in bf16."""
    now = 0.0

    def linear(x: torch.Tensor, weight: torch.Tensor) -> None:
        nonlocal now
        now += ratio if x.dtype == torch.bfloat16 else 1.0

    monkeypatch.setattr(environment.F, "linear", linear)
    monkeypatch.setattr(environment.time, "perf_counter", lambda: now)
    options = argparse.Namespace(device="cpu", dtype="auto", backend="auto", threads=None)
    assert settings_of(options).dtype == dtype
    assert environment.bf16_is_fast("cuda")


def test_environment() -> None:
    known = environment.describe()
    assert known["torch"] == torch.__version__
    assert known["cores"] >= 1
    json.dumps(known)
    available, total = environment.available_memory(), environment.total_memory()
    assert available is None or total is None or 0 < available <= total


def test_commit_is_that_of_the_package_own_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An environment inside somebody else's checkout once reported that one's commit."""
    monkeypatch.setattr(environment, "PACKAGE", Path(__file__).parent / "ptattn")
    assert environment.commit() is None
    monkeypatch.setattr(environment, "PACKAGE", tmp_path)
    assert environment.commit() is None
