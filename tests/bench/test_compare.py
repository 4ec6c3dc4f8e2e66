"""What is made of rows: findings, tables, plots, and the files that a run leaves."""

import argparse
import dataclasses
import io
import os

import pytest
from matplotlib import image
from rich.console import Console

from ptattn.bench import findings, plots, report, results, tables, workloads
from ptattn.bench.harness import Workload
from ptattn.bench.results import COMPILED, EAGER, GRAPH, SKIPPED
from ptattn.bench.workloads import Size
from tests.support.measured import H200, WIDE, bench, compared, result, timed

GPU = H200.with_name("h200-2026-11-26-gpu") / "gpu.json"

# Findings.


def sentences(speeds, *models):
    return findings.sentences(result(*compared(speeds, *models), kind="compare"))


def test_findings_name_where_it_wins_and_where_it_loses():
    won, lost, counts = sentences({256: (2, 1), 512: (2, 2.5), 1024: (2, 5)}, *WIDE)
    assert won == (
        "On this machine, at equal width (D = 1152) PT-DiT/XL is faster than DiT/XL "
        "from 512 px (1,024 tokens) on (1.25× to 2.50×)."
    )
    assert lost == "PT-DiT/XL loses at 256 px (0.50× DiT/XL's speed)."
    assert "PT-DiT/XL at 1024 px takes 0.87× and 1.19× of DiT/XL's multiply-adds" in counts


@pytest.mark.parametrize(
    ("speeds", "part"),
    [
        ({256: (2, 1), 512: (2, 1)}, "slower than DiT/XL at every size measured"),
        ({256: (1, 2), 512: (1, 2)}, "faster than DiT/XL at every size measured (2.00×)"),
        ({256: (1, 2), 512: (2, 1)}, "faster than DiT/XL at 256 px (2.00×)"),
    ],
)
def test_findings_without_a_threshold(speeds, part):
    won, *others = sentences(speeds, *WIDE)
    assert part in won
    assert any("loses" in sentence for sentence in others) == ("every" not in won or "slow" in won)


def test_findings_at_equal_parameters():
    won, *_ = sentences({256: (1, 2)}, "pt-dit-l", "pixart-alpha")
    assert "at equal parameters (within 10 %) PT-DiT/L is faster than PixArt-α at 256 px" in won


def test_findings_say_nothing_of_what_was_not_measured():
    rows = [dataclasses.replace(row, timing=None) for row in compared({256: (1, 2)}, *WIDE)]
    (counts,) = findings.sentences(result(*rows, kind="compare"))
    assert counts.startswith("The paper's count")
    assert findings.sentences(result(*rows[1:], kind="compare")) == []
    interpreted = result(*compared({256: (1, 2)}, *WIDE), kind="compare", backend="triton")
    assert findings.sentences(interpreted)[0] == findings.INTERPRETED


# Tables and plots.


def default():
    """The default comparison with invented times; one workload skipped."""
    costs = {}
    for side in workloads.SIZES:
        costs[side] = [e.cost / 1e11 for e in workloads.plan(workloads.MODELS, [Size(side)])]
    rows = compared(costs, *workloads.MODELS)
    rows[-1] = dataclasses.replace(rows[-1], timing=None, status=SKIPPED, note="no time")
    return result(*rows, kind="compare")


def shown(done, width):
    text = io.StringIO()
    tables.show(done, Console(file=text, width=width))
    lines = text.getvalue().splitlines()[2:]  # below the title and the machine's line
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    return text.getvalue()


@pytest.mark.parametrize("width", [80, 160])
def test_table_fits_the_terminal(width):
    text = shown(default(), width)
    assert any("PT-DiT/XL" in line and "×" in line for line in text.splitlines())
    assert ("All blocks" in text) == ("Parameters" in text) == (width == 160)
    assert "PT-DiT/L skipped: block 2048 px b1 forward: no time" in text


def in_modes():
    """On a GPU: eager, compiled, and as a graph; the baseline is never compiled."""
    found = []
    for row in compared({256: (4.0, 2.0), 512: (4.0, 8.0)}, *WIDE):
        for mode, share in ((EAGER, 1), (COMPILED, 0.5), (GRAPH, 0.25)):
            if mode != COMPILED or not row.baseline:
                timing = timed(row.seconds * share).timing
                found.append(dataclasses.replace(row, timing=timing, mode=mode))
    return found


def test_a_column_and_a_speed_up_for_every_mode():
    written = tables.markdown(result(*in_modes())).splitlines()
    titles, _, ours, theirs, *_ = (line.split(" | ") for line in written if line[:1] == "|")
    first = titles.index("Eager")
    assert titles[first:][:4] == ["Eager", "20–80 %", "Compiled", "CUDA graph"]
    assert ours[first:][:4] == ["4.00 s", "3.96 s – 4.04 s", "2.00 s", "1.00 s"]
    assert theirs[first + 2] == ""
    assert ours[-1] == "0.50× / – / 0.50× |"  # eager; not compiled; as graphs


@pytest.mark.parametrize("width", [80, 160])
def test_tables_of_a_gpu_fit_the_terminal(width):
    """Those of an H200 by `ptattn bench gpu`; and blocks in a third mode."""
    done = results.load(GPU)
    blocks = [row for row in done.rows if row.timing and row.mode == EAGER]
    done.rows += [dataclasses.replace(row, mode=COMPILED) for row in blocks]
    text = shown(done, width)
    for part in ("PT-DiT/XL", "roll-and-mask", "CUDA graph", "norm-pool XL"):
        assert part in text


def pixels(png):
    picture = image.imread(io.BytesIO(png))
    dark = (picture[..., :3].min(axis=-1) < 0.9).mean()
    assert 0.005 < dark < 0.5  # neither empty nor black
    return picture.shape[:2]


def test_plots_of_a_comparison():
    drawn = {name: png for _, name, png in plots.draw(default())}
    assert list(drawn) == ["gflops.png", "latency.png"]
    assert all(pixels(png)[0] > 700 for png in drawn.values())


def test_plots_show_graphs_where_there_are_some():
    for mode, seconds in ((None, 28.0), (EAGER, 112.0)):  # of 28 blocks
        points = plots._points(in_modes(), "PT-DiT/XL", mode)
        assert points == [(256, seconds), (1024, seconds)]
    ((_, name, png),) = plots.draw(result(*in_modes()))
    assert name == "block.png"
    pixels(png)
    drawn = plots.draw(results.load(GPU))
    assert [name for _, name, png in drawn if pixels(png)] == ["speed.png", "gpu.png"]
    assert plots.draw(result(*in_modes()[:5])) == []  # of one size no line can be drawn


def test_crossover_is_between_the_sizes_that_enclose_it():
    ((tokens, seconds),) = plots._crossings([(256, 2.0), (1024, 4.0)], [(256, 1.0), (1024, 8.0)])
    assert (tokens, seconds) == (512, pytest.approx(8**0.5))


# Files.


class Done(Workload):
    """Its rows are there, or Ctrl-C comes."""

    def __init__(self, rows=None):
        self.rows = rows

    def measure(self, bench):
        if self.rows is None:
            raise KeyboardInterrupt
        return self.rows

    def blank(self, status, note=""):
        return []


def carry_out(out, *workloads):
    options = argparse.Namespace(kind="compare", out=out)
    settings = result().settings
    return report.carry_out(options, "ptattn", settings, lambda: (workloads, bench(rates=None)))


def test_an_interrupted_run_keeps_what_was_measured(tmp_path, capsys):
    (tmp_path / "latency.png").write_text("of another run")
    measured = compared({64: (1.0, 2.0)}, *WIDE)
    assert carry_out(tmp_path, Done(measured), Done()) == 130
    assert "(interrupted)" in capsys.readouterr().out
    # A plot that would contradict the table is gone.
    assert set(os.listdir(tmp_path)) == {"compare.json", "compare.md", "gflops.png"}


@pytest.mark.parametrize("every", [report.WRITE_EVERY, 0.0])
def test_before_the_first_time_an_interrupted_run_leaves_old_files_alone(
    every, tmp_path, monkeypatch
):
    monkeypatch.setattr(report, "WRITE_EVERY", every)
    (tmp_path / "compare.json").write_text("mine")
    rows = compared({64: (1, 2)}, *WIDE)
    skipped = [dataclasses.replace(row, timing=None, peak=None) for row in rows]
    assert carry_out(tmp_path, Done(skipped), Done()) == 130
    assert os.listdir(tmp_path) == ["compare.json"]
    assert (tmp_path / "compare.json").read_text() == "mine"


def test_files_are_written_on_the_way(tmp_path, monkeypatch):
    """So that a run that is killed leaves some."""
    monkeypatch.setattr(report, "WRITE_EVERY", 0.0)
    seen = []

    class Looking(Done):
        def measure(self, bench):
            seen.append((tmp_path / "compare.json").exists())
            return self.rows

    rows = [Looking([row]) for row in compared({64: (1.0, 2.0)}, *WIDE)]
    assert carry_out(tmp_path, *rows) == 0
    assert seen == [False, True]
