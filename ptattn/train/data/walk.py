"""Which files a folder of data holds."""

from __future__ import annotations

import os
from collections import deque
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

    Neither what is hidden or a system's own is data, nor is the folder of a run. What links lead to
    is taken once for each folder that lies directly in this one, such as a class.
    """
    paths: list[Path] = []
    skipped: list[tuple[Path, str]] = []

    def unreadable(error: OSError) -> None:
        skipped.append((Path(error.filename), error.strerror or str(error)))

    walked: set[tuple[tuple[str, ...], Path]] = set()
    starts = deque([folder])  # links come last, so that a folder is known by its own name
    while starts:
        for name, folders, files in os.walk(starts.popleft(), onerror=unreadable):
            parent = Path(name)
            top, real = parent.relative_to(folder).parts[:1], parent.resolve()
            if walked & {(top, real), ((), real)}:
                folders.clear()
                continue
            walked.add((top, real))
            inside = [parent / own for own in sorted(folders) if _holds_data(parent / own)]
            starts += [own for own in inside if own.is_symlink()]
            folders[:] = [own.name for own in inside if not own.is_symlink()]
            paths += [parent / own for own in files if not _of_system(own)]
    return Walk(sorted(paths), skipped)


def _holds_data(folder: Path) -> bool:
    if _of_system(folder.name):
        return False
    if (folder / CONFIG).is_file() and (folder / CLASSES).is_file():  # a run's
        return False
    # A link to what is around it would bring in more than the data.
    return not (folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve()))


def _of_system(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM
