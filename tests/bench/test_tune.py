"""`python -m benchmarks.tune` and the file of its user: what is tried, kept, written and read."""

import dataclasses
import json
import time

import pytest
import torch

from benchmarks import tune
from ptattn.kernels import configs
from tests.bench.test_operations import falsify, tiny
from tests.support.measured import FakeClock


@pytest.fixture
def job(monkeypatch):
    bounds = (("max_bytes", 2), ("max_channels", 96))
    job = tune.Job("window_forward", bounds, (tiny("window", grid=(1, 2, 5), heads=1, batch=1),))
    few = tune.candidates(job.kernel)[:3]
    monkeypatch.setattr(tune, "jobs", lambda: [job])
    monkeypatch.setattr(tune, "candidates", lambda kernel: few)
    return job


@pytest.fixture
def fresh():
    """The table is read once in a process: read it anew, and anew afterwards."""
    configs.table.cache_clear()
    configs.find.cache_clear()
    yield
    configs.table.cache_clear()
    configs.find.cache_clear()


def search(job, path, *seconds, left=60.0, arch="cpu"):
    tune.search([job], arch, FakeClock(*seconds), "cpu", time.monotonic() + left, path)


@pytest.mark.usefixtures("fresh")
def test_a_user_s_file_gets_the_fastest_and_comes_first(job, tmp_path, monkeypatch):
    path, before = tmp_path / "mine.json", json.loads(configs.PATH.read_text())
    search(job, path, 4.0, 4.0, 3.0, 3.0, 1.0, 1.0, arch="sm90")
    assert json.loads(configs.PATH.read_text()) == before
    written = json.loads(path.read_text())
    assert list(written) == ["sm90"]  # nothing but the machine's own
    mine, *rest = written["sm90"]["window_forward"]
    assert rest == before["default"]["window_forward"]
    winner = {name: value for name, value in mine.items() if name not in dict(job.bounds)}
    assert configs.Config(**winner) in tune.candidates("window_forward")
    assert mine == dict(job.bounds) | winner

    sizes = dict(bytes=2, channels=96, keys=64)
    default = configs.find("window_forward", "sm90", **sizes)
    monkeypatch.setenv("PTATTN_CONFIGS", str(path))
    configs.table.cache_clear()
    configs.find.cache_clear()
    assert configs.find("window_forward", "sm90", **sizes) == configs.Config(**winner) != default
    own = [*written["sm90"]["window_forward"], *before["default"]["window_forward"]]
    assert configs.table() == before | {"sm90": before["sm90"] | {"window_forward": own}}


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("content", ["no json", "[]", None])
def test_a_user_s_file_that_cannot_be_read_is_named(content, tmp_path, monkeypatch):
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("PTATTN_CONFIGS", str(path))
    with pytest.raises(ValueError, match=r"cannot read .*mine.json, which PTATTN_CONFIGS names"):
        configs.find("window_forward", "cpu", bytes=2)


def test_what_is_no_faster_is_not_written(job, tmp_path):
    search(job, tmp_path / "mine.json")  # all as fast as the present setting
    assert not (tmp_path / "mine.json").exists()


def test_the_other_classes_of_a_kernel_keep_their_settings(tmp_path, monkeypatch):
    """Bounds are upper ones: the entry of the wider class alone would have served both."""
    near, wide = (
        tune.Job("window_forward", (("max_bytes", 2), ("max_channels", channels)), ())
        for channels in (64, 96)
    )
    faster = configs.Config(warps=8, stages=3)
    monkeypatch.setattr(tune, "jobs", lambda: [wide, near])
    monkeypatch.setattr(tune, "try_job", lambda job, *_, **__: (faster, "seen"))
    tune.search([wide], "cpu", None, "cpu", time.monotonic() + 60, tmp_path / "mine.json")
    first, second, *rest = json.loads((tmp_path / "mine.json").read_text())["cpu"]["window_forward"]
    present = tune.present(near, "cpu")
    assert present != faster
    assert first == dict(near.bounds) | dataclasses.asdict(present)
    assert second == dict(wide.bounds) | dataclasses.asdict(faster)
    assert rest == configs.table()["default"]["window_forward"]


def test_tuning_stops_at_its_deadline(job, tmp_path, capsys):
    search(job, tmp_path / "mine.json", left=-1.0)
    assert capsys.readouterr().out == "not reached: window_forward max_bytes=2 max_channels=96\n"
    assert not (tmp_path / "mine.json").exists()


def test_tuning_rejects_wrong_results(job, monkeypatch):
    falsify(monkeypatch, "out")
    first = tune.present(job, "cpu")
    best, seen = tune.try_job(job, first, "cpu", FakeClock(), "cpu", 0.0)
    assert best == first
    assert "WrongError: out" in seen


def test_a_setting_holds_only_while_it_is_tried():
    table, found = json.dumps(configs.table()), configs.find("window_forward", "cpu", bytes=2)
    tried = configs.Config(8, rows=128)
    with tune.setting("cpu", "window_forward", tried):
        assert configs.find("window_forward", "cpu", bytes=2) == tried
    assert configs.find("window_forward", "cpu", bytes=2) == found
    assert {"cpu": {}} | configs.table() == {"cpu": {}} | json.loads(table)


def test_tuning_covers_every_kernel_of_the_table():
    jobs = tune.jobs()
    assert {job.kernel for job in jobs} == set(configs.table()["default"])
    for job in jobs:
        assert tune.present(job, "cpu")
        assert tune.candidates(job.kernel)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--write", "mine.json", "--only", "nothing"], "no job matches 'nothing'"),
        (["--write", "mine.json", "--only", "("], "regular expression"),
        (["--write", "mine.json"], "needs a CUDA GPU"),
        ([], "required: --write"),
    ],
)
def test_arguments_of_tuning(arguments, part, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        tune.main(arguments)
    assert exit.value.code == 2
    assert part in capsys.readouterr().err
