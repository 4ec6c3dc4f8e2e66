"""`ptattn bench parallel`: what several GPUs send, predicted."""

import json

import pytest

from ptattn import communication
from ptattn.bench import parallel
from ptattn.bench.harness import Bench
from ptattn.bench.workloads import Size
from ptattn.cli import main

pytest.importorskip("matplotlib")
pytest.importorskip("triton")
SMALL = {"windows": "pt-dit-s-class", "ulysses": "dit-s", "ring": "dit-s"}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(parallel, "MODELS", SMALL)


def test_the_command_writes_a_table_and_a_plot(tmp_path, capsys):
    command = ["bench", "parallel", "--sizes", "8x256", "--gpus", "2", "4", "5", "--out"]
    assert main([*command, str(tmp_path)]) == 0
    found = json.loads((tmp_path / "parallel.json").read_text())
    rows = {(row["facts"]["ranks"], row["name"]): row for row in found["rows"]}
    assert rows[5, "ulysses"]["note"] == "6 heads, which the ranks must divide"
    assert rows[4, "ulysses"]["status"] == "refused"
    ours, ring = rows[4, "windows"], rows[4, "ring"]
    sent = communication.of_model("pt-dit-s-class", (8, 16, 16), 4, "windows")
    assert ours["facts"]["sent"] == sent.mean() * 288 * 2
    assert ours["facts"]["busiest"] == sent.most() * 288 * 2
    assert ours["facts"]["of ring"] == ours["facts"]["sent"] / ring["facts"]["sent"]
    assert ours["facts"]["NVLink"] < ours["facts"]["InfiniBand"]
    text = (tmp_path / "parallel.md").read_text()
    assert "PREDICTED" in text
    assert (tmp_path / "parallel.png").stat().st_size > 10_000
    assert "nothing here was measured" in capsys.readouterr().out


@pytest.mark.long
def test_more_gpus_compute_and_hold_less():
    two, four = (parallel.Split(Size(512, 8), n).measure(Bench())[0] for n in (2, 4))
    assert four.seconds < two.seconds < 2 * four.seconds
    assert four.peak <= two.peak


def test_memory_is_of_the_rank_with_most_tokens(monkeypatch):
    """Three parts of a video's width: the one between two cuts has half a window more."""
    ranks = []
    monkeypatch.setattr(parallel, "_peak_of_whole", lambda *_: (0, 0))
    monkeypatch.setattr(parallel, "_peak", lambda *_, rank: ranks.append(rank) or 0)
    parallel.Split(Size(256, 8), 3).measure(Bench())
    assert ranks == [1]


def test_one_gpu_sends_nothing(tmp_path, capsys):
    assert main(["bench", "parallel", "--gpus", "1", "--out", str(tmp_path)]) == 2
    assert "2 GPUs at least" in capsys.readouterr().err
