"""Peak memory: of a long video, and as `ptattn bench memory` predicts it for a training step."""

import functools
import itertools
import json

import pytest
import torch

import ptattn
from ptattn.bench import memory, peaks, results
from ptattn.bench.workloads import Size
from ptattn.cli import main
from ptattn.models import create_model


@pytest.mark.parametrize("shift", [(0, 0, 0), (2, 4, 4)], ids=["unshifted", "shifted"])
@pytest.mark.parametrize(
    ("frames", "heads"),
    [
        pytest.param(8, 8, id="short"),
        pytest.param(48, 16, id="long", marks=pytest.mark.long),  # inputs of 1.4 GB
    ],
)
def test_windows_of_a_video_take_no_memory_for_scores(frames, heads, shift):
    """By sdpa: the output and copies of q, k and v; scores in bf16 would be 3.6 outputs more."""
    grid, window = (frames, 64, 64), (4, 8, 8)
    packed = torch.ones(1, frames * 64 * 64, 3, heads, 72, dtype=torch.bfloat16)

    def call():
        with torch.no_grad():
            return ptattn.window_attention(*packed.unbind(2), grid, window, shift, backend="sdpa")

    out = call()
    assert out.eq(1).all()
    peak, _ = peaks.added(call, "cpu")
    if not peaks.reset():
        pytest.skip("this system does not reset a process's peak of memory")
    assert out.nbytes <= peak < 4.3 * out.nbytes


def test_live_bytes_are_those_of_storages_that_live():
    x, w = torch.zeros(2, 1000, device="meta")
    with memory.LiveBytes([w]) as live:
        a = x + 1  # 4,000 bytes; x itself is seen in no output
        b = a.view(10, 100)[2:] + w.view(10, 100)[2:]  # 3,200 more
        del a
        assert (live.now, live.peak) == (3200, 7200)
        c = b.double()  # 6,400
        assert (live.now, live.peak) == (9600, 9600)
        del b, c
    assert (live.now, live.peak) == (0, 9600)


def run(*arguments):
    return main(["bench", "memory", *map(str, arguments)])


def test_training_memory_is_predicted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "create_model", functools.partial(create_model, depth=4))
    monkeypatch.setattr(memory, "predict", functools.cache(memory.predict))  # for three runs
    options = ("--models", "pt-dit-b", "--frames", 32, "--out", tmp_path)
    assert run(*options) == 0
    found = results.load(tmp_path / "memory.json").rows
    rows = {(row.facts["recipe"], row.name): row for row in found}
    kinds = [f"keeps {kept}" for kept in memory.KEPT]
    assert list(rows) == list(itertools.product(memory.RECIPES, kinds))
    model, *_ = memory.build("pt-dit-b", Size(512, 32), "all", "meta")
    count = sum(p.numel() for p in model.parameters())
    for (recipe, _), row in rows.items():
        assert row.tokens == 32 * 1024
        assert row.facts["fixed"] == count * {"master": 16, "plain": 8}[recipe]
        assert row.peak >= row.facts["fixed"] + (4 * count if recipe == "master" else 0)
    everything, attention, inputs = (rows["plain", kind].peak for kind in kinds)
    unit = 32 * 1024 * 640 * 2  # bytes of C numbers per token
    # At the peak, in the last block's backward, each of 3 others keeps 26 C, 5 C or C.
    assert 3 * 24 * unit < everything - inputs < 3 * 26 * unit
    assert 3 * 3 * unit < attention - inputs < 3 * 5 * unit
    shown, written = capsys.readouterr().out, (tmp_path / "memory.md").read_text()
    assert "Every number is predicted" in shown
    line = f"| PT-DiT/B | plain | 32 | 32,768 | {8e-9 * count:.1f} | {everything / 1e9:.1f} |"
    assert line in written
    assert (tmp_path / "memory.png").exists()
    # More memory than in an earlier file, which has no noise, is a regression.
    assert run(*options, "--against", tmp_path / "memory.json") == 0
    earlier = json.loads((tmp_path / "memory.json").read_text())
    earlier["rows"][0]["peak"] //= 2
    (tmp_path / "earlier.json").write_text(json.dumps(earlier))
    assert run(*options, "--against", tmp_path / "earlier.json") == 1
    assert "1 of 6 results are worse" in capsys.readouterr().out


def test_a_run_stopped_at_once_writes_nothing(tmp_path, monkeypatch):
    def stopped(*case):
        raise KeyboardInterrupt

    monkeypatch.setattr(memory, "predict", stopped)
    assert run("--out", tmp_path) == 130
    assert list(tmp_path.iterdir()) == []


def test_training_memory_says_what_is_wrong(tmp_path, capsys):
    for arguments in (("--frames", 0), ("--models", "dit-b"), ("--models", "pt-dit-s-class")):
        with pytest.raises(SystemExit):
            run(*arguments)
    assert "expected a positive integer; got '0'" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert run("--out", tmp_path / "file") == 2
    assert "argument --out" in capsys.readouterr().err
