"""What defines a model, and the published sizes by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..geometry import WindowGrid, default_window, window_grid

_COUNTS = (
    "depth", "dim", "num_heads", "in_channels", "out_channels", "patch_size", "sample_size",
    "caption_channels", "num_classes",
)  # fmt: skip


def is_positive(value: object) -> bool:
    """Whether it is an integer >= 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_window(value: object) -> bool:
    return isinstance(value, Sequence) and len(value) in (2, 3) and all(map(is_positive, value))


def check_positive(name: str, value: object) -> None:
    if not is_positive(value):
        raise ValueError(f"{name} must be an integer >= 1; got {value!r}")


@dataclass(frozen=True)
class ModelConfig:
    """What defines a model, whichever of the three it is.

    Args:
        depth: number of blocks.
        dim: channels D, a multiple of 16 and of num_heads.
        num_heads: attention heads.
        window: attention window in tokens, (pf, ph, pw) or (ph, pw); None follows the resolution as
            in the paper (`geometry.default_window`). PT-DiT only.
        proxy_window: the window averaged into one proxy; None is `window`. PT-DiT only.
        shift: whether the second window attention is shifted. PT-DiT only.
        in_channels, out_channels: latent channels; the first in_channels of the output are the
            prediction, the rest a learned sigma.
        patch_size: latent pixels per token side.
        sample_size: latent side that position embeddings are scaled for: positions are divided by
            max(sample_size // 64, 1).
        caption_channels: width of the text encoder, for text-conditional models.
        num_classes: number of classes, for class-conditional models; one more is the null class.

    Raises:
        ValueError: a number or window that is not of positive integers, or sizes that do not fit
            each other.
    """

    depth: int
    dim: int
    num_heads: int
    window: Sequence[int] | None = None
    proxy_window: Sequence[int] | None = None
    shift: bool = True
    in_channels: int = 4
    out_channels: int = 8
    patch_size: int = 2
    sample_size: int = 32
    caption_channels: int | None = 4096
    num_classes: int | None = None

    def __post_init__(self) -> None:
        for name in ("window", "proxy_window"):
            value = getattr(self, name)
            if isinstance(value, list):  # as JSON has it
                object.__setattr__(self, name, tuple(value))
            if value is not None and not _is_window(value):
                raise ValueError(f"{name} must be 2 or 3 integers >= 1; got {value!r}")
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None or name not in ("caption_channels", "num_classes"):
                check_positive(name, value)
        if (self.caption_channels is None) == (self.num_classes is None):
            raise ValueError(
                "exactly one of caption_channels (text) and num_classes (classes) must be given; "
                f"got {self.caption_channels} and {self.num_classes}"
            )
        if self.dim % 16 or self.dim % self.num_heads:
            raise ValueError(
                f"dim must be a multiple of 16 and of num_heads; got {self.dim}, {self.num_heads}"
            )

    def window_grids(self, grid: Sequence[int]) -> tuple[WindowGrid, WindowGrid]:
        """The windows of proxies and of attention that a PT-DiT uses on a token grid."""
        windows = window_grid(grid, self.window or default_window(grid))
        return window_grid(grid, self.proxy_window or windows.window), windows


class Configured:
    """What every model has: what defines it.

    `config` is the same by its usual name, which diffusers' models have for a mapping of theirs.
    """

    model_config: ModelConfig

    @property
    def config(self) -> ModelConfig:
        return self.model_config


def _classes(depth: int, dim: int, num_heads: int) -> ModelConfig:
    return ModelConfig(depth, dim, num_heads, caption_channels=None, num_classes=1000)


# PT-DiT: arXiv 2409.04005, table 4. DiT: arXiv 2212.09748, table 1, patch 2. PixArt-α: arXiv
# 2310.00426.
PT_DIT = {
    "pt-dit-s-class": _classes(10, 288, 6),
    "pt-dit-b": ModelConfig(12, 640, 10),
    "pt-dit-l": ModelConfig(28, 864, 12),
    "pt-dit-xl": ModelConfig(28, 1152, 16),
    "pt-dit-h": ModelConfig(30, 1440, 20),
    "qihoo-t2i": ModelConfig(28, 1152, 16, window=(1, 8, 8)),
}
DIT = {
    "dit-s": _classes(12, 384, 6),
    "dit-b": _classes(12, 768, 12),
    "dit-l": _classes(24, 1024, 16),
    "dit-xl": _classes(28, 1152, 16),
}
PIXART = {"pixart-alpha": ModelConfig(28, 1152, 16)}
