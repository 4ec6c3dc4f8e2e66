"""Files that are written whole or not at all, and the formats that weights come in."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how what Git keeps in its place begins


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


def read_tensors(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """Tensors by name, on the CPU; mapped into memory, so that reading a part costs that part.

    Args:
        path: of a .safetensors file, or of a pickle, read with `weights_only=True`.
        key: of the weights, where a pickle holds several sets of them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another ending, a corrupt or truncated file, or other content.
        ImportError: .safetensors without the safetensors package.
    """
    return tensors_in(read(path), str(path), key)


def read(path: Path) -> Any:
    """All that a file holds, of which `read_tensors` takes the weights; raises as it does."""
    check_ending(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{path} is a Git LFS pointer, not the file: run `git lfs pull` there")
    return (_read_safetensors if path.suffix == ".safetensors" else _read_pickle)(path)


def tensors_in(content: Any, where: str, key: str | None = None) -> dict[str, Tensor]:
    """The weights in what a training script has saved: itself, or the one dictionary of tensors in
    it, beside an epoch, arguments and the like; the one at `key` where there are several.

    Raises:
        ValueError: none, or several and no key.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must hold a dictionary of tensors; got {type(content).__name__}")
    if _are_weights(content) and key is None:
        return dict(content)
    sets = {name: value for name, value in content.items() if _are_weights(value)}
    if key in sets or (key is None and len(sets) == 1):
        return dict(sets[next(iter(sets)) if key is None else key])
    if sets and key is None:
        raise ValueError(f"{where} holds several sets of weights: give key, one of {_join(sets)}")
    others = [f"{n} ({type(v).__name__})" for n, v in content.items() if not isinstance(v, Tensor)]
    at = "" if key is None else f" at key {key!r}"
    got = _join(others) or ("tensors" if content else "nothing")
    raise ValueError(f"{where} must hold a dictionary of tensors{at}; got a dictionary of {got}")


def _are_weights(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in value.items())
    )


def _join(names: Iterable[str], most: int = 6) -> str:
    shown = sorted(map(str, names))
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if shown[most:] else "")


def write_tensors(tensors: Mapping[str, Tensor], path: Path, within: str | None = None) -> None:
    """Write tensors by name, in the format of the path's ending.

    Args:
        within: the key that a pickle has them at; None is the pickle itself.

    Raises:
        ValueError: another ending.
        OSError: what cannot be written, such as on a full disk; `path` is then what it was.
        ImportError: .safetensors without the safetensors package.
    """
    check_ending(path)
    with replacing(path) as temporary:
        if path.suffix == ".safetensors":
            _write_safetensors(tensors, temporary)
        else:
            _write_pickle(dict(tensors) if within is None else {within: dict(tensors)}, temporary)


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


def _write_pickle(content: Mapping[str, Any], path: Path) -> None:
    try:
        torch.save(content, path)
    except RuntimeError as error:  # torch's own for a disk that is full, or no folder
        raise OSError(f"cannot write {path}: {error}") from error


def _read_pickle(path: Path) -> Any:
    mapped = False
    try:
        # Files from before torch 1.6 are no zip files and cannot be mapped.
        mapped = zipfile.is_zipfile(path)
        # A training script's arguments: attributes, and no code that loading them would run.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # pickle and torch raise of any kind over bytes that are not theirs
        refused = mapped and isinstance(error, pickle.UnpicklingError)
        if not refused or not (found := _unsafe_classes(path)):
            reason = _reason(error)
            raise ValueError(f"{path} is not a whole file of plain tensors: {reason}") from error
        raise ValueError(
            f"{path} is not a whole file of plain tensors: it holds {_join(found)}, which is not "
            "loaded, as that can run code. Save its state dict alone"
        ) from error


def _unsafe_classes(path: Path) -> list[str]:
    """Those in a file that was refused; none where that is for bytes that are no pickle's."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:
        return []


def _reason(error: Exception) -> str:
    """In one line, and without torch's advice to load what can run code."""
    text = re.sub(r"(?s).*WeightsUnpickler error:|Check the documentation.*", "", str(error))
    return ": ".join(filter(None, (type(error).__name__, " ".join(text.split()))))
