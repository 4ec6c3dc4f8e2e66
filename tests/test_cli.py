"""The command line: arguments, exit codes, output, and the comparison from end to end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ptattn.cli import main

ROOT = Path(__file__).resolve().parent.parent
MODELS = ["--models", "pt-dit-s-class", "dit-s"]
TINY = ["compare", *MODELS, "--sizes", "32", "64", "--video", "none", "--threads", "1"]
FILES = {"compare.json", "compare.md", "gflops.png", "latency.png"}


def start(*arguments: str, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ptattn", *arguments]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, text=True, cwd=ROOT, **{**pipes, **options})  # type: ignore[call-overload]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    process = start(*arguments)
    stdout, stderr = process.communicate(timeout=120)
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


def test_compare_from_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "results"
    done = run(*TINY, "--video", "2x32", "--dtype", "fp32", "--budget", "20", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == FILES
    assert "[6/6]" in done.stderr
    assert "PT-DiT/S-Class" in done.stdout
    check_json(json.loads((out / "compare.json").read_text()))
    markdown = (out / "compare.md").read_text()
    assert f"`ptattn {' '.join(TINY)}" in markdown
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 6
    assert len({line.count("|") for line in table}) == 1
    for name in ("gflops.png", "latency.png"):
        check_plot(out / name)


def check_json(report: dict) -> None:
    assert report["schema"] == 1
    assert report["command"].startswith("ptattn compare")
    assert report["settings"]["dtype"] == "fp32"
    assert report["settings"]["threads"] == report["environment"]["threads"] == 1
    assert {"cpu", "cores", "memory", "gpus", "os", "python", "torch", "triton", "commit"} <= set(
        report["environment"]
    )
    assert len(report["rows"]) == 6
    for row in report["rows"]:
        assert row["skipped"] is None
        assert 2 <= len(row["block_runs"]) <= 20
        assert row["block_fastest"] == min(row["block_runs"]) <= row["block_median"]
        assert row["model_extrapolated"] == pytest.approx(row["depth"] * row["block_median"])
        assert 0 < row["macs_paper"] < row["macs_full"] < 1e10
    ours, theirs = report["rows"][:2]
    ratio = theirs["model_extrapolated"] / ours["model_extrapolated"]
    assert ours["speedup"] == {"DiT/S": pytest.approx(ratio)}
    assert theirs["speedup"] == {}


def check_plot(path: Path) -> None:
    image = pytest.importorskip("matplotlib.image").imread(path)
    assert image.shape[:2] == (1000, 1600)
    assert 0.01 < (image[..., :3].min(axis=-1) < 0.9).mean() < 0.5  # neither empty nor black


def test_interrupt_keeps_what_was_measured(tmp_path: Path) -> None:
    sizes = ["--sizes", "32", "4096", "--budget", "1000000", "--out", str(tmp_path)]
    process = start(*TINY, *sizes, start_new_session=True)
    assert process.stderr is not None
    measured = [process.stderr.readline() for _ in range(2)]
    assert measured[1].startswith("[2/4]")
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does, the child process too
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "(interrupted)" in stdout
    assert "Traceback" not in stderr
    assert {path.name for path in tmp_path.iterdir()} == FILES
    report = json.loads((tmp_path / "compare.json").read_text())
    assert report["interrupted"]
    assert [row["skipped"] for row in report["rows"]] == [None, None, "interrupted", "interrupted"]


def test_a_folder_that_cannot_be_written_is_found_out_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder" / "latency.png").mkdir(parents=True)
    (tmp_path / "folder" / "compare.json").write_text("mine")
    for out in ("file", "file/below", "folder"):
        assert main([*TINY, "--out", str(tmp_path / out)]) == 2
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


def test_compare_on_the_kernels(tmp_path: Path) -> None:
    """At a tiny size under Triton's interpreter; of their times it says that they mean nothing."""
    sizes = ["--sizes", "32", "--video", "none", "--dtype", "fp32", "--budget", "60"]
    arguments = ["compare", *MODELS, *sizes, "--threads", "1", "--backend", "triton"]
    interpreting = {**os.environ, "TRITON_INTERPRET": "1"}
    with start(*arguments, "--out", str(tmp_path), env=interpreting) as process:
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "no time here says how fast they are" in stdout
    assert "PT-DiT/S-Class is slower" not in stdout
    report = json.loads((tmp_path / "compare.json").read_text())
    assert report["settings"]["backend"] == "triton"
    assert all(row["block_runs"] for row in report["rows"])


def test_what_cannot_run_here_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("ptattn.backends.triton.INTERPRETED", False)
    for arguments, part in (
        (["--device", "cuda"], "argument --device: got cuda"),
        (["--backend", "triton"], "argument --backend: backend 'triton' cannot run here: "),
        (["--video", "none", "2x32"], "argument --video: none"),
    ):
        assert main([*TINY, *arguments, "--out", str(tmp_path / "out")]) == 2
        assert part in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_missing_packages_are_named_with_the_way_to_get_them(
    package: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # importing it raises
    assert main([*TINY, "--out", str(tmp_path / "out")]) == 2
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
