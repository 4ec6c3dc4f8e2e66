"""The command line: arguments, exit codes, output, and the comparison from end to end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from ptattn.backends.triton import INTERPRETED
from ptattn.bench import compare
from ptattn.bench.harness import Bench, Workload, run_here
from ptattn.bench.isolation import Isolated, WorkerError
from ptattn.bench.results import Row
from ptattn.cli import main

ROOT = Path(__file__).resolve().parent.parent
MODELS = ["--models", "pt-dit-s-class", "dit-s"]
TINY = ["compare", *MODELS, "--sizes", "32", "64", "--threads", "1", "--device", "cpu", "--video"]
FILES = {"compare.json", "compare.md", "gflops.png", "latency.png"}


def start(*arguments: str, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ptattn", *arguments]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, text=True, cwd=ROOT, **{**pipes, **options})  # type: ignore[call-overload]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    process = start(*arguments)
    stdout, stderr = process.communicate(timeout=120)
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


def test_compare_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its child process starts afresh."""
    out = tmp_path / "deep" / "results"
    arguments = [*TINY, "2x32", "--dtype", "fp32", "--budget", "100", "--out", str(out)]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert {path.name for path in out.iterdir()} == FILES
    assert "block 2×32 px b1  forward  DiT/S: eager" in shown.err
    assert "PT-DiT/S-Class" in shown.out
    check_json(json.loads((out / "compare.json").read_text()))
    markdown = (out / "compare.md").read_text()
    assert f"`ptattn {' '.join(TINY)}" in markdown
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 6
    assert len({line.count("|") for line in table}) == 1


def check_json(record: dict) -> None:
    assert record["schema"] == "ptattn.bench/2"
    assert record["command"].startswith("ptattn compare")
    assert record["settings"]["dtype"] == "fp32"
    assert record["settings"]["threads"] == record["environment"]["threads"] == 1
    assert {"cpu", "cores", "memory", "gpus", "os", "python", "torch", "triton", "commit"} <= set(
        record["environment"]
    )
    assert len(record["rows"]) == 6
    for row in record["rows"]:
        assert row["status"] == "ok"
        assert row["baseline"] == (row["model"] == "DiT/S")
        assert 2 <= row["timing"]["calls"] <= 20
        assert 0 < row["timing"]["least"] <= row["timing"]["median"]
        assert row["error"] < 1e-5
        assert 0 < row["facts"]["macs_paper"] < row["facts"]["macs"] < 1e10


@pytest.mark.long  # waits for processes that a busy machine may starve
def test_interrupt_keeps_what_was_measured(tmp_path: Path) -> None:
    sizes = ["--sizes", "32", "4096", "--budget", "1000000", "--out", str(tmp_path)]
    # Where the tests run in the background of a shell, it and its children would ignore Ctrl-C.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start(*TINY, "none", *sizes, start_new_session=True)
    signal.signal(signal.SIGINT, handler)
    assert process.stderr is not None
    measured = [process.stderr.readline() for _ in range(2)]
    assert measured[1].startswith("block 32 px b1  forward  DiT/S: eager")
    time.sleep(1)  # until the next has begun
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does, the child process too
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "(interrupted)" in stdout
    assert "Traceback" not in stderr
    assert {path.name for path in tmp_path.iterdir()} == FILES - {"latency.png"}  # of one size
    record = json.loads((tmp_path / "compare.json").read_text())
    assert record["interrupted"]
    statuses = [(row["status"], row["note"]) for row in record["rows"]]
    assert statuses == [("ok", "")] * 2 + [("not reached", "interrupted")] * 2


def test_a_folder_that_cannot_be_written_is_found_out_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder" / "latency.png").mkdir(parents=True)
    (tmp_path / "folder" / "compare.json").write_text("mine")
    for out in ("file", "file/below", "folder"):
        assert main([*TINY, "none", "--out", str(tmp_path / out)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("ptattn compare: error: argument --out: cannot write")
        assert str(tmp_path / out) in error
    assert (tmp_path / "file").read_text() == "mine"
    assert set(os.listdir(tmp_path / "folder")) == {"compare.json", "latency.png"}
    assert (tmp_path / "folder" / "compare.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("compare --sizes 100", ["--sizes", "100", "multiple of 16"]),
        ("compare --sizes 0", ["--sizes", "'0'", "positive"]),
        ("compare --sizes -256", ["-256"]),
        ("compare --video 48", ["--video", "'48'", "FRAMESxSIDE"]),
        ("compare --video 48x256x2", ["--video", "48x256x2"]),
        ("compare --models dit-xxl", ["--models", "dit-xxl", "pt-dit-xl"]),
        ("compare --dtype int8", ["--dtype", "int8", "bf16"]),
        ("compare --backend cudnn", ["--backend", "cudnn", "sdpa"]),
        ("compare --budget nan", ["--budget", "nan", "positive number"]),
        ("compare --budget soon", ["--budget", "soon", "positive number"]),
        ("compare --threads 0", ["--threads", "'0'", "positive integer"]),
        ("flops dit-xxl 256", ["dit-xxl"]),
        ("flops pt-dit-xl big", ["RESOLUTION", "big"]),
        ("flops pt-dit-xl 256x100", ["RESOLUTION", "256x100", "multiple of 16"]),
        ("flops pt-dit-xl 256 --frames 1.5", ["--frames", "1.5"]),
        ("", ["COMMAND"]),
        ("compute", ["compute"]),
    ],
)
def test_nonsense_is_named(
    arguments: str, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments.split())
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert all(part in error for part in parts), error


class Here(Isolated):
    """In no child, which would take seconds to start."""

    def start(self) -> None: ...

    def __call__(self, workload: Workload, bench: Bench) -> list[Row]:
        return run_here(workload, bench)


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
def test_compare_on_the_kernels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a tiny size under Triton's interpreter; of their times it says that they mean nothing."""
    monkeypatch.setattr(compare, "Isolated", Here)
    monkeypatch.setattr(compare, "SHARE", 1e-6)  # no more calls than must be
    sizes = ["--sizes", "32", "--video", "none", "--dtype", "fp32", "--budget", "1000"]
    arguments = ["compare", *MODELS, *sizes, "--device", "cpu", "--backend", "triton"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "no time here says how fast they are" in shown
    assert "PT-DiT/S-Class is slower" not in shown
    record = json.loads((tmp_path / "compare.json").read_text())
    assert record["settings"]["backend"] == "triton"
    assert all(row["timing"] for row in record["rows"])


def test_what_cannot_run_here_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("ptattn.backends.triton.INTERPRETED", False)
    for arguments, part in (
        (["none", "--device", "cuda"], "argument --device: got cuda"),
        (["none", "--backend", "triton"], "argument --backend: backend 'triton' cannot run here: "),
        (["none", "2x32"], "argument --video: none"),
    ):
        assert main([*TINY, *arguments, "--out", str(tmp_path / "out")]) == 2
        assert part in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_child_that_does_not_start_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    why = WorkerError("the measuring process was ended by SIGKILL, most likely out of memory")
    monkeypatch.setattr(Isolated, "start", mock.Mock(side_effect=why))
    assert main([*TINY, "none", "--out", str(tmp_path)]) == 2
    assert f"ptattn compare: error: {why}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_missing_packages_are_named_with_the_way_to_get_them(
    package: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # importing it raises
    assert main([*TINY, "none", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert package in error
    assert "pip install ptattn[bench]" in error
    assert not (tmp_path / "out").exists()


def test_commands_need_neither_rich_nor_matplotlib() -> None:
    code = "import sys; sys.modules.update(rich=None, matplotlib=None); import ptattn.cli as c; "
    command = [sys.executable, "-c", code + "sys.exit(c.main(['info']))"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_flops(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flops", "pt-dit-xl", "1024"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = {line[:26].strip(): line[26:].split() for line in lines}
    assert cells["total"] == ["3,372.61", "80.66", "3,453.27", "2,530.86"]
    assert cells["shifted-window attention"][-1] == "–"  # one of two in the paper's count
    assert cells["layer norms"][:3] == ["–"] * 3
    assert main(["flops", "dit-xl", "256x512", "--frames", "2"]) == 0
    assert "2 latent frames: 1,024 tokens" in capsys.readouterr().out
    assert main(["flops", "dit-xl", "256", "--text-tokens", "77"]) == 2
    assert "--text-tokens: dit-xl takes classes" in capsys.readouterr().err


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    assert main(["info"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert torch.__version__ in lines["torch"]
    assert "threads" in lines["cpu"]
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for name in ("reference", "sdpa"):
        assert f"backend {name}".ljust(19) + "usable" in text
    assert "backend auto" in text


def test_a_reader_that_leaves_early_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    process = start("info", stdout=write)
    os.close(write)
    _, stderr = process.communicate(timeout=60)
    assert stderr == ""
    assert process.returncode == 141
