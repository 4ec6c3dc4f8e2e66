"""Files that are written whole or not at all, and the formats that weights come in."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ENDINGS = (".safetensors", ".pt", ".pth", ".bin")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`; what is written there replaces `path` at the end.

    After an exception, or a crash at any moment, `path` is what it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors leaves files that only their owner can read
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write(content: str | bytes, path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError where it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also of bytes that are not UTF-8
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(content).__name__}")
    return content


def write_json(content: Mapping[str, Any], path: Path) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    # A lone surrogate, as in names of files that are no UTF-8, becomes its escape in JSON.
    write(text.encode(errors="backslashreplace"), path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name, on the CPU; mapped into memory, so that reading a part costs that part.

    Args:
        path: of a .safetensors file, or .pt / .pth / .bin, read with `weights_only=True`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another ending, a corrupt or truncated file, or other content.
        ImportError: .safetensors without the safetensors package.
    """
    check_ending(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    return (_read_safetensors if path.suffix == ".safetensors" else _read_pickle)(path)


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors by name, in the format of the path's ending.

    Raises:
        ValueError: another ending.
        OSError: what cannot be written, such as on a full disk; `path` is then what it was.
        ImportError: .safetensors without the safetensors package.
    """
    check_ending(path)
    write = _write_safetensors if path.suffix == ".safetensors" else _write_pickle
    with replacing(path) as temporary:
        write(tensors, temporary)


def check_ending(path: Path) -> None:
    """Raise ValueError unless the path ends as a file of tensors does."""
    if path.suffix not in ENDINGS:
        raise ValueError(f"path must end in {', '.join(ENDINGS)}; got {path}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    library = _safetensors(path)
    try:
        tensors: dict[str, Tensor] = library.torch.load_file(path)
    except library.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    return tensors


def _write_safetensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    library = _safetensors(path)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        library.torch.save_file(whole, path, metadata={"format": "pt"})
    except library.SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def _safetensors(path: Path) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"{path} needs safetensors: pip install ptattn[hub]") from error
    return safetensors


def _write_pickle(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        torch.save(dict(tensors), path)
    except RuntimeError as error:  # torch's own for a disk that is full, or no folder
        raise OSError(f"cannot write {path}: {error}") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        # Files from before torch 1.6 are no zip files and cannot be mapped.
        mapped = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is not a whole file of plain tensors: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise ValueError(f"{path} must hold a dictionary of tensors; got {type(content).__name__}")
    return content
