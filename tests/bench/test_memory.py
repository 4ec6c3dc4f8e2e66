"""Peak memory: of a long video, and as `ptattn bench memory` predicts it for a training step."""

import itertools
import json
import subprocess
import sys

import pytest
import torch

from ptattn import paper
from ptattn.bench import memory, results
from ptattn.cli import main

CODE = """
import resource, sys, torch, ptattn

torch.set_num_threads(1)
grid, window, shift = (48, 64, 64), (4, 8, 8), {shift}
packed = torch.ones(1, 48 * 64 * 64, 3, 16, 72, dtype=torch.bfloat16)
q, k, v = packed.unbind(2)
with torch.no_grad():
    out = ptattn.window_attention(q, k, v, grid, window, shift, backend="sdpa")
assert out.shape == q.shape and out.eq(1).all()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak * (1 if sys.platform == "darwin" else 1024))
"""


@pytest.mark.parametrize(
    "shift",
    [
        pytest.param((0, 0, 0), id="unshifted", marks=pytest.mark.long),
        pytest.param((2, 4, 4), id="shifted"),
    ],
)
def test_peak_memory(shift):
    """In a process of its own, as a peak covers all that a process did. Inputs are 1.4 GB of it."""
    code = CODE.format(shift=shift)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout)
    print(f"peak {peak / 1e9:.2f} GB")
    assert peak < 6e9


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


def test_training_memory_is_predicted(tmp_path, capsys):
    options = ("--models", "pt-dit-b", "--frames", 32, "--out", tmp_path)
    assert run(*options) == 0
    found = results.load(tmp_path / "memory.json").rows
    rows = {(row.facts["recipe"], row.name): row for row in found}
    kinds = [f"keeps {kept}" for kept in memory.KEPT]
    assert list(rows) == list(itertools.product(memory.RECIPES, kinds))
    count = paper.parameters("pt-dit-b")
    for (recipe, _), row in rows.items():
        assert row.tokens == 32 * 1024
        assert row.facts["fixed"] == count * {"master": 16, "plain": 8}[recipe]
        assert row.peak >= row.facts["fixed"] + (4 * count if recipe == "master" else 0)
    everything, attention, inputs = (rows["plain", kind].peak for kind in kinds)
    unit = 32 * 1024 * 640 * 2  # bytes of C numbers per token
    # At the peak, in the last block's backward, each of 11 others keeps 26 C, 5 C or C.
    assert 11 * 24 * unit < everything - inputs < 11 * 26 * unit
    assert 11 * 3 * unit < attention - inputs < 11 * 5 * unit
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
