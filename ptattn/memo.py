"""A memory of what was found out before, by what it depends on."""

from __future__ import annotations

from typing import Any, TypeVar

V = TypeVar("V")


class Memo(dict[Any, V]):
    """A dict that starts anew once it holds `most` entries, as resolutions have no end."""

    def __init__(self, most: int = 4096) -> None:
        super().__init__()
        self.most = most

    def keep(self, key: Any, value: V) -> V:
        if len(self) >= self.most:
            self.clear()
        self[key] = value
        return value
