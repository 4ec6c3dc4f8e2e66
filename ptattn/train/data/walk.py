"""Which files a folder of data holds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..state import CLASSES, CONFIG

# What systems leave in folders, besides all names that begin with a dot.
SYSTEM = frozenset(
    {"__MACOSX", "__pycache__", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"}
    | {"System Volume Information", "Thumbs.db", "desktop.ini"}
)


@dataclass
class Walk:
    """The files below a folder in order, and folders that cannot be read, with the reason."""

    paths: Sequence[Path]
    skipped: list[tuple[Path, str]] = field(default_factory=list)


def walk(folder: Path) -> Walk:
    """All files below a folder, also behind links.

    Neither what is hidden or a system's own is data, nor is the folder of a run.
    """
    paths: list[Path] = []
    skipped: list[tuple[Path, str]] = []

    def unreadable(error: OSError) -> None:
        skipped.append((Path(error.filename), error.strerror or str(error)))

    for name, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        parent = Path(name)
        folders[:] = [own for own in folders if _holds_data(parent / own)]
        paths += [parent / own for own in files if not _of_system(own)]
    return Walk(sorted(paths), skipped)


def _holds_data(folder: Path) -> bool:
    if _of_system(folder.name):
        return False
    if (folder / CONFIG).is_file() and (folder / CLASSES).is_file():  # a run's
        return False
    around = folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())
    return not around  # a link to where it lies has no end


def _of_system(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM
