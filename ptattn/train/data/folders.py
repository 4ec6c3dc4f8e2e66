"""Your own folders of images or videos, with captions or with subfolders as classes."""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import PngImagePlugin
from torch import Tensor

from ...files import read_tensors
from ..config import Config
from . import captions
from .dataset import Condition, Dataset, need
from .pixels import VIDEOS, UnusableError, image_suffixes, read_image, read_video, reading
from .walk import Walk, walk


@dataclass
class Files:
    """Files with the condition of each, those that cannot be used, with the reason, and notes."""

    conditions: dict[Path, Condition]
    classes: Sequence[str] = ()
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def images(config: Config) -> Dataset:
    """Each file is decoded once at the start, to find the corrupt ones, and again when used."""
    files = find(config, image_suffixes())
    # A colour profile or text of more than 1 MB beside the pixels must not cost the picture.
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

    def read(path: Path) -> Tensor:
        return read_image(path, config.model.in_channels, config.data.size)

    return _checked(files, read)


def latents(config: Config) -> Dataset:
    """What `ptattn encode` has written.

    Raises:
        ValueError, OSError: as `find`, or pictures could not be decoded: as `encode.encoder`.
    """
    from ..encode import encoder  # which reads its pictures by this module

    def read(path: Path) -> Tensor:
        with reading(path):
            found = read_tensors(path).get("latents", torch.empty(0))
            if found.shape != config.shape or not found.is_floating_point():
                raise ValueError(
                    f"must hold latents {config.shape}; got {found.dtype} {tuple(found.shape)}"
                )
            return found.float()

    found = find(config, frozenset({".safetensors"}))
    encoder(Path(config.data.folder or ""))  # loaded, as a run draws its first picture late
    return _checked(found, read)


def _checked(files: Files, read: Callable[[Path], Tensor]) -> Dataset:
    """The examples that can be read now, to be read again when they are used."""

    def problem(path: Path) -> str | None:
        try:
            read(path)
        except UnusableError as error:
            return error.reason
        return None

    with ThreadPoolExecutor() as pool:
        problems = dict(zip(files.conditions, pool.map(problem, files.conditions), strict=True))
    files.skipped += [(path, text) for path, text in problems.items() if text is not None]
    usable = [path for path, text in problems.items() if text is None]
    conditions = [files.conditions[path] for path in usable]
    return Dataset(conditions, lambda i: read(usable[i]), files.classes, files.skipped, files.notes)


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
        except UnusableError as error:
            files.skipped.append((path, error.reason))
            continue
        if len(clip) < frames:
            files.skipped.append((path, f"has {len(clip)} frames; {frames} are needed"))
            continue
        own = [clip[i : i + frames] for i in range(0, len(clip) - frames + 1, max(1, frames // 2))]
        pieces += own
        conditions += [condition] * len(own)

    def pixels(index: int) -> Tensor:
        return pieces[index].transpose(0, 1).reshape(config.shape)

    return Dataset(conditions, pixels, files.classes, files.skipped, files.notes)


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

    A file with a caption is taken whatever it is called; the others by their suffix.

    Raises:
        ValueError: no folder, no captions where the model needs them or some where it takes
            classes, or no file to use.
    """
    source = config.data.source
    if config.data.folder is None:
        raise ValueError(f"data.source {source} needs data.folder")
    folder = Path(config.data.folder)
    if not folder.is_dir():
        raise ValueError(f"data.folder is no folder: {folder}")
    if config.data.captions is not None and config.model.num_classes is not None:
        raise ValueError(
            f"data.captions {config.data.captions} needs model.caption_channels; with "
            f"model.num_classes {config.model.num_classes}, subfolders are classes"
        )
    found = walk(folder)
    listing = Path(config.data.captions or folder / captions.FILE)
    if config.model.num_classes is None:
        files = _by_caption(folder, found, listing, suffixes)
    else:
        files = _by_class(folder, [path for path in found.paths if _suffix(path) in suffixes])
    files.skipped += found.skipped
    other = Counter(
        _suffix(path) or "without"
        for path in found.paths
        if _suffix(path) not in suffixes and path not in files.conditions and path != listing
    )
    if other:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(other.items()))
        files.notes.append(f"left out for their suffix: {counts}")
    if not files.conditions and not files.skipped:
        raise ValueError("; ".join([f"data.folder {folder} holds no {source}", *files.notes]))
    return files


def _suffix(path: Path) -> str:
    return path.suffix.lower()


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


def _by_caption(folder: Path, found: Walk, listing: Path, suffixes: frozenset[str]) -> Files:
    names, notes = captions.read(listing)
    there = set(found.paths)
    known = {_plain(path.relative_to(folder).as_posix()): path for path in found.paths}
    texts: dict[Path, list[str]] = {}
    outside: list[Path] = []
    for name, own in names.items():
        inside = os.path.normpath(name)
        path = folder / inside
        if os.path.isabs(inside) or Path(inside).parts[:1] == ("..",):
            outside.append(path)
            continue
        if path not in there and not os.path.exists(path):
            path = known.get(_plain(name), path)
        texts.setdefault(path, []).extend(own)
    # Not Path.exists, which fails for names that are longer than a file's can be.
    missing = {path for path in texts if path not in there and not os.path.exists(path)}
    silent = [path for path in found.paths if _suffix(path) in suffixes and path not in texts]
    return Files(
        {
            path: own[0] if len(own) == 1 else own
            for path, own in sorted(texts.items())
            if path not in missing
        },
        skipped=[(path, f"has no caption in {listing}") for path in silent]
        + [(path, f"is in {listing}, but not there") for path in sorted(missing)]
        + [(path, f"is in {listing}, but absolute or outside of data.folder") for path in outside],
        notes=notes,
    )


def _plain(name: str) -> str:
    """The same for a name as Linux, macOS (decomposed) and Windows (backslashes) write it."""
    return unicodedata.normalize("NFC", posixpath.normpath(name.replace("\\", "/")))
