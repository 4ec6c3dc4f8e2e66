"""Samples as files: a PNG grid of images, a GIF grid of videos and views."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .. import files

CELL = 96  # pixels that the short side of a picture is enlarged to
GAP = 6
FONT_SIZE = 11
MILLISECONDS = 120  # per frame


def save_grid(pictures: Tensor, names: Sequence[str], path: Path) -> Path:
    """Write a grid of pictures with their names below.

    Args:
        pictures: uint8 (n, C, H, W) or (n, C, F, H, W), C of 1 or 3.
        names: of each.
        path: without ending; .png, or .gif for frames, is added.

    Returns:
        The path with its ending.
    """
    moving = pictures.ndim == 5
    frames = [grid(frame, names) for frame in (pictures.unbind(2) if moving else [pictures])]
    path = path.with_name(path.name + (".gif" if moving else ".png"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as temporary:
        if moving:
            frames[0].save(
                temporary, "GIF", save_all=True, append_images=frames[1:],
                duration=MILLISECONDS, loop=0,
            )  # fmt: skip
        else:
            frames[0].save(temporary, "PNG")
    return path


def grid(pictures: Tensor, names: Sequence[str]) -> Image.Image:
    """uint8 (n, C, H, W) in rows as wide as about two such grids are high."""
    height, width = pictures.shape[2:]
    scale = max(1, CELL // min(height, width))
    height, width = scale * height, scale * width
    columns = max(1, min(len(pictures), round(math.sqrt(2 * len(pictures) * height / width))))
    font = ImageFont.load_default(FONT_SIZE)
    texts = [
        textwrap.wrap(name, max(1, 2 * width // FONT_SIZE), max_lines=2, placeholder="…")
        for name in names
    ]
    line = FONT_SIZE + 2
    row = height + GAP + line * max(map(len, texts), default=0)
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * row + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        x, y = GAP + i % columns * (width + GAP), GAP + i // columns * row
        colour = picture.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
        sheet.paste(
            Image.fromarray(colour).resize((width, height), Image.Resampling.NEAREST), (x, y)
        )
        for k, part in enumerate(text):
            centre = (x + width / 2, y + height + k * line)
            pen.text(centre, part, fill="black", font=font, anchor="ma")
    return sheet


def still(pictures: Tensor) -> Tensor:
    """The first frame of each, (n, C, H, W)."""
    return pictures[:, :, 0] if pictures.ndim == 5 else pictures
