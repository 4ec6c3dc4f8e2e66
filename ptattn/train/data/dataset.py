"""Examples with what they are conditioned on, whatever their source."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

Condition = int | str | Sequence[str]  # a label, a caption, or several captions


@dataclass
class Dataset:
    """Examples by index.

    Args:
        conditions: of every example, its label, its caption, or several captions, one of which is
            drawn each time.
        pixels: index to uint8 (C, H, W) or (C, F, H, W), or to latents as float32.
        classes: the labels' names; none where conditions are captions.
        skipped: files that cannot be used, with the reason.
        notes: what else there is to know of the files, a line each.
    """

    conditions: Sequence[Condition]
    pixels: Callable[[int], Tensor]
    classes: Sequence[str] = ()
    skipped: Sequence[tuple[Path, str]] = ()
    notes: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.conditions)

    @property
    def captions(self) -> list[str]:
        """Of all examples, one after the other; none where conditions are labels."""
        return [
            caption
            for condition in self.conditions
            if not isinstance(condition, int)
            for caption in ([condition] if isinstance(condition, str) else condition)
        ]


def need(package: str, extra: str = "train") -> Any:
    """Import an optional package, or say how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{error}; it comes with: pip install ptattn[{extra}]") from error


def package_folder(package: str) -> Path:
    """Where a package lies that is needed for its files alone; it is not imported.

    Raises:
        ImportError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"No module named {package!r}; it comes with: pip install ptattn[demo]")
    return Path(next(iter(spec.submodule_search_locations)))
