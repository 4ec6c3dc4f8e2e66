"""Your own folders of images or videos, with captions or with subfolders as classes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..config import Config
from .dataset import Dataset, need
from .pixels import IMAGES, UNREADABLE, VIDEOS, read_image, read_video

CAPTIONS = "metadata.jsonl"


@dataclass
class Files:
    """Files with the label or caption of each, and those that cannot be used, with the reason."""

    conditions: dict[Path, int] | dict[Path, str]
    classes: Sequence[str] = ()
    skipped: list[tuple[Path, str]] = field(default_factory=list)


def images(config: Config) -> Dataset:
    """Each file is decoded once at the start, to find the corrupt ones, and again when used."""
    files = find(config, IMAGES)

    def read(path: Path) -> Tensor:
        return read_image(path, config.model.in_channels, config.data.size)

    def problem(path: Path) -> str | None:
        try:
            read(path)
        except UNREADABLE as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        problems = dict(zip(files.conditions, pool.map(problem, files.conditions), strict=True))
    files.skipped += [(path, text) for path, text in problems.items() if text is not None]
    usable = [path for path, text in problems.items() if text is None]
    conditions = [files.conditions[path] for path in usable]
    return Dataset(conditions, lambda i: read(usable[i]), files.classes, files.skipped)


def videos(config: Config) -> Dataset:
    return clips(config, find(config, VIDEOS))


def clips(config: Config, files: Files) -> Dataset:
    """Pieces of `data.frames` frames, each half a piece later in the video than the one before.

    Frames are decoded once and kept in memory, at the size of the run.
    """
    frames = config.data.frames
    conditions, pieces = [], []
    for path, condition in files.conditions.items():
        try:
            clip = _decode(path, config)
            if len(clip) < frames:
                raise ValueError(f"has {len(clip)} frames; {frames} are needed")
        except UNREADABLE as error:
            files.skipped.append((path, str(error)))
            continue
        own = [clip[i : i + frames] for i in range(0, len(clip) - frames + 1, max(1, frames // 2))]
        pieces += own
        conditions += [condition] * len(own)

    def pixels(index: int) -> Tensor:
        return pieces[index].transpose(0, 1).reshape(config.shape)

    return Dataset(conditions, pixels, files.classes, files.skipped)


def _decode(path: Path, config: Config) -> Tensor:
    """(frames, C, H, W), as long as memory lasts."""
    channels, (height, width) = config.model.in_channels, config.data.size
    free, size = need("psutil").virtual_memory().available, channels * height * width
    frames: list[Tensor] = []
    for frame in read_video(path, channels, (height, width)):
        frames.append(frame)
        if 2 * len(frames) * size > free:  # twice: they are stacked at the end
            raise MemoryError(
                f"{path}: {len(frames)} frames of {height}x{width} and no end fill the free "
                f"memory, {free / 1e9:.1f} GB; use shorter or fewer videos, or a smaller data.size"
            )
    return torch.stack(frames) if frames else torch.empty(0)


def find(config: Config, suffixes: frozenset[str]) -> Files:
    """The files of `data.folder`, by captions or by subfolders as the model is conditioned.

    Raises:
        ValueError: no folder, or no file of such a kind in it.
    """
    if config.data.folder is None:
        raise ValueError(f"data.source {config.data.source} needs data.folder")
    folder = Path(config.data.folder)
    if not folder.is_dir():
        raise ValueError(f"data.folder is no folder: {folder}")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    if not paths:
        raise ValueError(f"data.folder {folder} holds no file in {' '.join(sorted(suffixes))}")
    if config.model.num_classes is not None:
        return _by_class(folder, paths)
    return _by_caption(folder, paths, Path(config.data.captions or folder / CAPTIONS))


def _by_class(folder: Path, paths: Sequence[Path]) -> Files:
    """The first folder below `folder` is the class."""
    parts = {path: path.relative_to(folder).parts for path in paths}
    classes = sorted({own[0] for own in parts.values() if len(own) > 1})
    return Files(
        {path: classes.index(own[0]) for path, own in parts.items() if len(own) > 1},
        classes,
        [(path, "is in no subfolder, which names its class") for path in paths
         if len(parts[path]) == 1],
    )  # fmt: skip


def _by_caption(folder: Path, paths: Sequence[Path], listing: Path) -> Files:
    captions = dict(_read_captions(folder, listing))
    return Files(
        {path: captions[path] for path in paths if path in captions},
        skipped=[(path, f"has no caption in {listing}") for path in paths if path not in captions]
        + [(path, f"is in {listing}, but not there") for path in captions if not path.exists()],
    )


def _read_captions(folder: Path, listing: Path) -> Iterator[tuple[Path, str]]:
    """Path and caption from lines {"file_name": ..., "text": ...}."""
    try:
        lines = listing.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the captions of {folder}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry["text"]
        except (ValueError, KeyError, TypeError):
            name = text = None
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(
                f'{listing}, line {number}: expected {{"file_name": ..., "text": ...}}; got {line}'
            )
        yield folder / name, text
