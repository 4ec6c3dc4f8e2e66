"""Token grids, sizes and memory layouts that every backend must handle."""

import math

import torch

HALF = (torch.float16, torch.bfloat16)
EXACT = (torch.float32, torch.float64)
DTYPES = HALF + EXACT
HEAD_DIMS = (8, 16, 24, 32, 40, 48, 64, 72, 80, 96, 128)

# name: (grid, window, shift)
GRIDS = {
    "image": ((8, 8), (4, 4), (0, 0)),
    "image-shifted": ((8, 8), (4, 4), (2, 2)),
    "ragged": ((7, 9), (4, 3), (0, 0)),
    "ragged-shifted": ((7, 9), (4, 3), (3, 1)),
    "primes": ((5, 13), (3, 7), (0, 0)),
    "video": ((4, 6, 6), (2, 3, 3), (1, 1, 1)),
    "video-ragged": ((3, 5, 7), (2, 4, 3), (1, 0, 2)),
    "window-is-grid": ((3, 4, 5), (3, 4, 5), (0, 0, 0)),
    "window-is-grid-shifted": ((3, 4, 5), (3, 4, 5), (1, 2, 2)),
    "window-over-axis": ((5, 6), (8, 16), (0, 0)),
    "window-over-axis-shifted": ((5, 6), (8, 16), (4, 8)),
    "shift-over-axis": ((5, 6), (16, 16), (15, 1)),
    "row": ((1, 1, 17), (4, 4, 4), (2, 2, 2)),
    "column": ((1, 17, 1), (2, 4, 4), (1, 3, 0)),
    "frames": ((9, 1, 1), (2, 1, 1), (1, 0, 0)),
}


def _transposed(draw, shape):
    """Axes 1 and 2 swapped in memory, as heads before tokens."""
    batch, tokens, heads, *rest = shape
    return draw(batch, heads, tokens, *rest).transpose(1, 2)


# Each lays out what `draw`, which gives a contiguous tensor of a shape, fills it with.
LAYOUTS = {
    "contiguous": lambda draw, shape: draw(*shape),
    "transposed": _transposed,
    "step-2": lambda draw, shape: draw(*shape[:-1], 2 * shape[-1])[..., ::2],
    "packed": lambda draw, shape: draw(*shape[:2], 3, *shape[2:])[:, :, 1],
    "expanded": lambda draw, shape: draw(1, shape[1], 1, *shape[3:]).expand(shape),
    "offset-1": lambda draw, shape: draw(1 + math.prod(shape))[1:].view(shape),
}


def normal(shape, dtype, layout="contiguous", scale=1.0):
    """Normal numbers, `scale` their deviation, rounded to a dtype and laid out as named."""

    def draw(*shape):
        return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)

    return LAYOUTS[layout](draw, shape)
