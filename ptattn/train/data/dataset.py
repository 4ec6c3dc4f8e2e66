"""Examples with what they are conditioned on, whatever their source."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass
class Dataset:
    """Examples by index.

    Args:
        conditions: of every example, its label or its caption.
        pixels: index to uint8 (C, H, W) or (C, F, H, W).
        classes: the labels' names; none where conditions are captions.
        skipped: files that cannot be used, with the reason.
    """

    conditions: Sequence[int | str]
    pixels: Callable[[int], Tensor]
    classes: Sequence[str] = ()
    skipped: Sequence[tuple[Path, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.conditions)


def need(package: str) -> Any:
    """Import an optional package, or say how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{error}; it comes with: pip install ptattn[train]") from error


def package_folder(package: str) -> Path:
    """Where a package lies that is needed for its files alone; it is not imported.

    Raises:
        ImportError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"No module named {package!r}; it comes with: pip install ptattn[train]")
    return Path(next(iter(spec.submodule_search_locations)))
