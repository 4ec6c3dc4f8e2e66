"""Pictures and videos from files, as uint8 tensors of one size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .dataset import need

IMAGES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
VIDEOS = frozenset({".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".webm"})
# What Pillow raises on files that are not what their name says, or are cut short.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def read_image(path: Path, channels: int, size: tuple[int, int]) -> Tensor:
    """uint8 (channels, H, W) of a file, upright; raises one of `UNREADABLE`."""
    with Image.open(path) as image:
        return fit(ImageOps.exif_transpose(image), channels, size)


def fit(image: Image.Image, channels: int, size: tuple[int, int]) -> Tensor:
    """uint8 (channels, H, W): scaled to cover `size` and cropped around its centre.

    What is transparent becomes white. 1 channel is grey, 3 are RGB.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no range of its own; use 8 or 16 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), size[::-1])
    return torch.from_numpy(np.array(image)).view(*size, channels).permute(2, 0, 1).contiguous()


def read_video(path: Path, channels: int, size: tuple[int, int]) -> Iterator[Tensor]:
    """The frames of a file, as `fit` gives them.

    Raises:
        ImportError: no PyAV.
        ValueError: a file that it cannot decode.
    """
    av = need("av")
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                upright = frame.to_image().rotate(frame.rotation, expand=True)
                yield fit(upright, channels, size)
    except (av.error.FFmpegError, IndexError) as error:  # IndexError: no video in it
        raise ValueError(f"cannot be decoded: {error}") from error
