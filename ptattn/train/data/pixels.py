"""Pictures and videos from files, as uint8 tensors of one size."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from .dataset import need

VIDEOS = frozenset(
    {".3gp", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg"}
    | {".mpg", ".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv", ".y4m"}
)
# Demuxers of files that hold frames themselves. Others, of playlists and scripts, open the files
# that are named within, wherever these lie.
DEMUXERS = (
    *("apng", "asf", "av1", "avi", "dv", "flv", "gif", "h264", "hevc", "ivf", "m4v", "matroska"),
    *("mjpeg", "mov", "mpeg", "mpegts", "mpegvideo", "mxf", "nut", "obu", "ogg", "rm", "vc1"),
    *("vvc", "wtv", "yuv4mpegpipe"),
)
UPRIGHT = {  # by the orientation in EXIF
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnusableError(ValueError):
    """A file that cannot be used; `reason` says why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)  # as processes that hand it on build it anew
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def image_formats() -> list[str]:
    """Those that Pillow opens by itself: for EPS it runs Ghostscript, on a program in the file."""
    Image.init()
    return [name for name in Image.OPEN if name != "EPS"]


def image_suffixes() -> frozenset[str]:
    registered, known = Image.registered_extensions().items(), image_formats()
    return frozenset(suffix for suffix, name in registered if name in known)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within it, whatever a reader raises becomes `UnusableError`: on a broken file that is any."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("is no file")
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        if not reason or not isinstance(error, OSError | ValueError):
            reason = f"{type(error).__name__}: {reason}"  # a slip of the reader says little else
        raise UnusableError(path, reason) from error


def read_image(path: Path, channels: int, size: tuple[int, int]) -> Tensor:
    """uint8 (channels, H, W) of a file, upright; raises UnusableError."""
    with reading(path), Image.open(path, formats=image_formats()) as image:
        image.load()  # first: Pillow turns TIFFs within it, and removes their orientation
        # Not ImageOps.exif_transpose, which writes EXIF anew and fails where that is broken.
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        return fit(image if turn is None else image.transpose(turn), channels, size)


def fit(image: Image.Image, channels: int, size: tuple[int, int]) -> Tensor:
    """uint8 (channels, H, W): scaled to cover `size` and cropped around its centre.

    What is transparent becomes white. 1 channel is grey, 3 are RGB.
    """
    if image.mode.startswith("I;16"):
        values, transparent = np.asarray(image), image.info.get("transparency")
        shades = (values >> 8).astype(np.uint8)
        if transparent is not None:  # one of the 65,536 values
            shades[values == transparent] = 255
        image = Image.fromarray(shades)
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no range of its own; use 8 or 16 bits a channel")
    if image.mode == "LAB":  # which Pillow turns into RGB alone
        image = image.convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), size[::-1])
    return torch.from_numpy(np.array(image)).view(*size, channels).permute(2, 0, 1).contiguous()


def read_video(path: Path, channels: int, size: tuple[int, int]) -> Iterator[Tensor]:
    """The frames of a file, upright, as `fit` gives them.

    Raises:
        ImportError: no PyAV.
        UnusableError: a file that it cannot decode.
    """
    cover = need("av").stream.Disposition.attached_pic
    with reading(path), _open(path) as container:
        moving = [own for own in container.streams.video if not own.disposition & cover]
        if not moving:
            raise ValueError("holds no video")
        for frame in container.decode(moving[0]):
            upright = frame.to_image().rotate(frame.rotation, expand=True)
            yield fit(upright, channels, size)


def _open(path: Path) -> Any:
    av = need("av")
    try:
        return av.open(
            os.path.abspath(path),  # what precedes a colon would be taken as a protocol
            options={"format_whitelist": ",".join(DEMUXERS)},
            metadata_errors="ignore",  # titles may be in any encoding; nobody reads them here
        )
    except av.error.ArgumentError as error:
        raise ValueError(f"is of no format that holds frames: {', '.join(DEMUXERS)}") from error
