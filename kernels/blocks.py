"""Rows in blocks of SIZE slots: the rows of a dense attention, or the tokens of a window.

A block of a window is a box within the window's own: as many whole lines as SIZE slots hold, or
whole frames where these are smaller, or a part of a line that is longer. So the blocks of a window
are alike: where slots lie, counted from the block's first token, is found once, before a loop over
blocks, and a block adds one number to all of them. A window that the grid cuts is a smaller box,
of blocks with more lines and fewer of them.

STACKED: blocks lie one below the other, as in windows of one frame and lines no longer than SIZE.
"""

import triton
import triton.language as tl

from .tile import box_size, num_windows, quotient, window_box


@triton.jit
def place(blocks, heads, geometry, WINDOWED: tl.constexpr):
    """This program's sample, head and block, and the box of its window.

    Heads are fastest: neighbouring programs read neighbouring bytes of the same tokens.
    """
    head = tl.program_id(0) % heads
    block = tl.program_id(0) // heads % blocks
    sample = tl.program_id(0) // heads // blocks
    window = sample * 0
    if WINDOWED:
        windows = num_windows(geometry)
        sample, window = sample // windows, sample % windows
    return sample, head, block, window_box(window, geometry)


@triton.jit
def cut(length, box, SIZE: tl.constexpr, WINDOWED: tl.constexpr):
    """`length` rows, or those of a box, in blocks: frames, lines and columns of a block; how many
    blocks there are, and how many of them, the first, have no empty slot.

    The twin of `host.blocks_of_box`.
    """
    if WINDOWED:
        _f0, _h0, _w0, frames, lines, columns = box
        depth = tl.minimum(frames, tl.maximum(SIZE // (lines * columns), 1))
        height = tl.minimum(lines, tl.maximum(SIZE // columns, 1))
        width = tl.minimum(columns, SIZE)
        count = tl.cdiv(frames, depth) * tl.cdiv(lines, height) * tl.cdiv(columns, width)
        whole = tl.where(count * SIZE == box_size(box), count, 0)
        return (depth, height, width), count, whole
    else:
        return (1, 1, SIZE), tl.cdiv(length, SIZE), length // SIZE


@triton.jit
def _slots(shape, geometry, SIZE: tl.constexpr, WINDOWED: tl.constexpr):
    """The rows in the slots of a block, counted from its first one."""
    slot = tl.arange(0, SIZE)
    if WINDOWED:
        _depth, height, width = shape
        line = quotient(slot, width)
        frame = quotient(line, height)
        column, line = slot - line * width, line - frame * height
        slot = (frame * geometry[1] + line) * geometry[2] + column
    return slot


@triton.jit
def _locate(block, shape, length, box, geometry, WINDOWED: tl.constexpr, STACKED: tl.constexpr):
    """A block's first row, and how many of its slots, the first, hold one."""
    depth, height, width = shape
    f0, h0, w0, frames, lines, columns = box
    if WINDOWED:
        frame, line, column = 0, block * height, 0
        if not STACKED:
            across, down = tl.cdiv(columns, width), tl.cdiv(lines, height)
            above = quotient(block, across)
            column = (block - above * across) * width
            frame = quotient(above, down)
            line = (above - frame * down) * height
            frame *= depth
        held = tl.minimum(frames - frame, depth) * tl.minimum(columns - column, width)
        held *= tl.minimum(lines - line, height)
        return ((f0 + frame) * geometry[1] + h0 + line) * geometry[2] + w0 + column, held
    else:
        return block * width, length - block * width


@triton.jit
def rows_of(
    block, shape, length, box, geometry, mask,
    REST: tl.constexpr, WINDOWED: tl.constexpr, STACKED: tl.constexpr, MASKED: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """A block's rows, counted from its first one [SIZE], that one, and which take part: all, unless
    the block is of the rest."""
    row = _slots(shape, geometry, SIZE, WINDOWED)
    first, held = _locate(block, shape, length, box, geometry, WINDOWED, STACKED)
    present = tl.full([SIZE], True, tl.int1)
    if REST:
        present = tl.arange(0, SIZE) < held
        if MASKED:
            present = present & (tl.load(mask + first + row, mask=present, other=0) != 0)
    return row, first, present
