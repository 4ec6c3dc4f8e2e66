"""What a measurement ran on, the dtype that multiplies faster, files never half written."""

import argparse
import json
import os
from pathlib import Path

import pytest
import torch

from ptattn import environment, files
from ptattn.bench.options import settings_of


def test_environment():
    known = environment.describe()
    assert known["torch"] == torch.__version__
    assert known["cores"] >= 1
    json.dumps(known)
    available, total = environment.available_memory(), environment.total_memory()
    assert available is None or total is None or 0 < available <= total


def test_commit_is_that_of_the_package_own_checkout(tmp_path, monkeypatch):
    """An environment inside somebody else's checkout once reported that one's commit."""
    monkeypatch.setattr(environment, "PACKAGE", Path(__file__).parent / "ptattn")
    assert environment.commit() is None
    monkeypatch.setattr(environment, "PACKAGE", tmp_path)
    assert environment.commit() is None


@pytest.mark.parametrize(("ratio", "dtype"), [(0.5, "bf16"), (20, "fp32")])
def test_dtype_is_the_one_that_multiplies_faster(ratio, dtype, monkeypatch):
    """A clock that only products move: of one second in fp32, of `ratio` in bf16."""
    now = 0.0

    def linear(x, weight):
        nonlocal now
        now += ratio if x.dtype == torch.bfloat16 else 1.0

    monkeypatch.setattr(environment.F, "linear", linear)
    monkeypatch.setattr(environment.time, "perf_counter", lambda: now)
    options = argparse.Namespace(device="cpu", dtype="auto", backend="auto", threads=None)
    assert settings_of(options).dtype == dtype
    assert environment.bf16_is_fast("cuda")


def test_write_leaves_the_old_file_where_it_fails(tmp_path):
    path = tmp_path / "file"
    files.write("old", path)
    with pytest.raises(TypeError):
        files.write(3, path)
    assert path.read_text() == "old"
    files.write("new", path)
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]
