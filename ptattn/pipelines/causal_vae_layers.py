"""Layers of the causal video autoencoder, on (B, F, H, W, C): frames, rows, columns, channels last.

A convolution takes its input through `Rows`: a tensor, or what is made of one on the way, such as
its norm or its enlargement. Where no gradient is wanted it goes over slabs of rows, so that nothing
but the feature maps themselves is ever held for a whole clip: neither padded, normalised nor
enlarged copies, nor what a library allocates for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLAB = 2**27  # bytes of its input that a convolution reads at a time
EPS = 1e-6


class Rows(Protocol):
    """A feature map that is read by rows."""

    shape: tuple[int, ...]  # (B, F, H, W, C)
    dtype: torch.dtype

    def read(self, first: int, last: int) -> Tensor:
        """Rows `first` to `last` - 1, (B, F, rows, W, C)."""


class Plain:
    """A tensor's own rows."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.dtype = x, x.dtype
        self.shape: tuple[int, ...] = tuple(x.shape)

    def read(self, first: int, last: int) -> Tensor:
        return self.x[:, :, first:last]


class Affine(Plain):
    """silu(x · scale + shift), or without the SiLU; scale and shift are (B, 1, 1, 1, C)."""

    def __init__(self, x: Tensor, scale: Tensor, shift: Tensor, silu: bool) -> None:
        super().__init__(x)
        self.scale, self.shift, self.silu = scale, shift, silu

    def read(self, first: int, last: int) -> Tensor:
        y = torch.addcmul(self.shift, super().read(first, last), self.scale)
        return (F.silu(y, inplace=True) if self.silu else y).to(self.dtype)


class Upsampled(Plain):
    """Twice the rows and columns: repeated, or interpolated with twice the frames after the first.

    The first frame is interpolated in space alone, the others among themselves; half-pixel centres,
    edges clamped.
    """

    def __init__(self, x: Tensor, time: bool) -> None:
        super().__init__(x)
        self.time = time
        batch, frames, height, width, channels = x.shape
        frames = 2 * frames - 1 if time else frames
        self.shape = (batch, frames, 2 * height, 2 * width, channels)

    def read(self, first: int, last: int) -> Tensor:
        begin = max(first // 2 - 1, 0)  # one more on each side, to interpolate with
        y = super().read(begin, (last - 1) // 2 + 2)
        if self.time and y.shape[1] > 1:
            y = _twice_the_frames(y)
        mode = "bilinear" if self.time else "nearest"
        y = _unfold(F.interpolate(_fold(y), scale_factor=2, mode=mode), len(y))
        return y[:, :, first - 2 * begin : last - 2 * begin]


class GroupNorm(nn.GroupNorm):
    """A norm over all frames; what it returns is read by rows, SiLU included."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__(groups, channels, eps=EPS)

    def forward(self, x: Tensor, silu: bool = True) -> Rows:  # type: ignore[override]
        if torch.is_grad_enabled():
            y = F.group_norm(x.movedim(-1, 1), self.num_groups, self.weight, self.bias, self.eps)
            y = y.movedim(1, -1)
            return Plain(F.silu(y) if silu else y)
        mean, var = (
            m.repeat_interleave(x.shape[-1] // self.num_groups, 1) for m in self._moments(x)
        )
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return Affine(x, scale[:, None, None, None], shift[:, None, None, None], silu)

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of every group, (B, groups), in float32 at least, by slabs."""
        height, groups = x.shape[2], (self.num_groups, -1)
        found: list[tuple[float, Tensor, Tensor]] = []  # a slab's share, its channels' moments
        for first, last in _slabs(height, x.nbytes // height):
            rows = x[:, :, first:last].to(torch.promote_types(x.dtype, torch.float32))
            count = rows[0, ..., 0].numel()
            # Columns first: torch adds what lies side by side fastest.
            mean = rows.sum(3).sum((1, 2)) / count
            var = (rows - mean[:, None, None, None]).square_().sum(3).sum((1, 2)) / count
            found.append(
                ((last - first) / height, mean.unflatten(1, groups), var.unflatten(1, groups))
            )
        mean = torch.stack([share * own.mean(2) for share, own, _ in found]).sum(0)
        parts = [
            share * (var + (own - mean[..., None]).square()).mean(2) for share, own, var in found
        ]
        return mean, torch.stack(parts).sum(0)


class Conv2d(nn.Conv2d):
    """`convolve` with a kernel of one frame."""

    def forward(self, x: Tensor | Rows, **settings: Any) -> Tensor:  # type: ignore[override]
        return convolve(self, x, **settings)


class Conv3d(nn.Conv3d):
    """`convolve` with a kernel of several frames."""

    def forward(self, x: Tensor | Rows, **settings: Any) -> Tensor:  # type: ignore[override]
        return convolve(self, x, **settings)


class CausalConv3d(nn.Module):
    """`Conv3d` by the name that the published weights have."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | tuple[int, int, int] = 3,
        stride: int = 1,
    ) -> None:
        super().__init__()
        self.conv = Conv3d(in_channels, out_channels, kernel, stride)

    def forward(self, x: Tensor | Rows, **settings: Any) -> Tensor:
        return self.conv(x, **settings)


def convolve(
    conv: nn.Conv2d | nn.Conv3d,
    x: Tensor | Rows,
    *,
    pad: tuple[int, int] | None = None,
    plus: Callable[[int, int], Tensor] | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """A convolution that is causal in time: copies of the first frame stand before it.

    Args:
        conv: weight, bias and stride.
        x: (B, F, H, W, C).
        pad: zeros before and behind rows and columns; by default half the kernel.
        plus: gives rows to add to the result.
        into: memory that the result may take; `plus` may read it, and `x` unless it is `Plain`.

    Returns:
        (B, F', H', W', C').
    """
    source = Plain(x) if isinstance(x, Tensor) else x
    batch, frames, height, width, channels = source.shape
    weight = conv.weight if conv.weight.ndim == 5 else conv.weight.unsqueeze(2)
    if frames == 1 and weight.shape[2] > 1:  # all that the kernel sees is this frame
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight = weight.sum(2, keepdim=True, dtype=wide).to(weight.dtype)
    front, kernel, stride = weight.shape[2] - 1, weight.shape[3], conv.stride[-1]
    before, behind = pad or (kernel // 2, kernel // 2)
    rows = (height + before + behind - kernel) // stride + 1
    row_bytes = batch * (frames + front) * width * channels * stride * source.dtype.itemsize

    def padded(first: int, last: int) -> Tensor:
        """What output rows are made of, but for the padding that torch adds on both sides."""
        begin, end = first * stride - before, (last - 1) * stride - before + kernel
        part = source.read(max(begin, 0), min(end, height))
        if front:
            part = torch.cat([part[:, :1]] * front + [part], 1)
        right = behind - before
        if begin < 0 or end > height or right:
            part = F.pad(part, (0, 0, 0, right, max(-begin, 0), max(end - height, 0)))
        return part

    slabs = _slabs(rows, row_bytes)
    part = padded(*slabs[0])
    for (first, last), following in zip(slabs, [*slabs[1:], None], strict=True):
        y = _convolved(part, weight, conv.bias, conv.stride, before)
        if plus is not None:
            y = y + plus(first, last) if torch.is_grad_enabled() else y.add_(plus(first, last))
        if len(slabs) == 1:
            return y
        if first == 0:
            out = y.new_empty(*y.shape[:2], rows, *y.shape[3:]) if into is None else into
        if following is not None:  # read before what it shares with this one is written
            part = padded(*following)
        out[:, :, first:last] = y
    return out


def _slabs(rows: int, row_bytes: int) -> list[tuple[int, int]]:
    """First and last row of every slab; one of all rows where gradients are wanted."""
    step = rows if torch.is_grad_enabled() else max(1, SLAB // max(1, row_bytes))
    return [(first, min(first + step, rows)) for first in range(0, rows, max(1, step))]


def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], side: int
) -> Tensor:
    """Of what is padded but for its columns."""
    if weight.shape[2] == 1:
        y = F.conv2d(_fold(x), weight[:, :, 0], bias, stride[-2:], (0, side))
        return _unfold(y, len(x))
    y = F.conv3d(x.movedim(-1, 1), weight, bias, stride, (0, 0, side))
    return y.movedim(1, -1).contiguous()


def _fold(x: Tensor) -> Tensor:
    """Frames as a batch of images, (B·F, C, H, W); a view."""
    return x.flatten(0, 1).movedim(-1, 1)


def _unfold(images: Tensor, batch: int) -> Tensor:
    return images.movedim(1, -1).contiguous().unflatten(0, (batch, -1))


def _twice_the_frames(x: Tensor) -> Tensor:
    """The first frame, and the others interpolated among themselves at half-frame centres."""
    first, rest = x[:, :1], x[:, 1:]
    before = torch.cat([rest[:, :1], rest[:, :-1]], 1)
    behind = torch.cat([rest[:, 1:], rest[:, -1:]], 1)
    pairs = torch.stack([torch.lerp(rest, before, 0.25), torch.lerp(rest, behind, 0.25)], 2)
    return torch.cat([first, pairs.flatten(1, 2)], 1)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))).

    Args:
        causal: convolutions over frames, too; else the frames must be a batch.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, causal: bool) -> None:
        super().__init__()
        conv = CausalConv3d if causal else Conv2d
        self.norm1 = GroupNorm(groups, in_channels)
        self.conv1 = conv(in_channels, out_channels, 3)
        self.norm2 = GroupNorm(groups, out_channels)
        self.conv2 = conv(out_channels, out_channels, 3)
        self.nin_shortcut = None
        if in_channels != out_channels:
            self.nin_shortcut = conv(in_channels, out_channels, 1)

    def forward(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """The result, in the memory of x or of what was made of it if that may be overwritten."""
        h = self.conv1(self.norm1(x))
        shortcut = self.nin_shortcut

        def plus(first: int, last: int) -> Tensor:
            rows = x[:, :, first:last]
            return rows if shortcut is None else shortcut(rows)

        free = x if shortcut is None else h
        return self.conv2(self.norm2(h), plus=plus, into=free if overwrite else None)


class AttnBlock(nn.Module):
    """x + attention of one head as wide as the channels, over the positions of each frame."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels)
        self.q = CausalConv3d(channels, channels, 1)
        self.k = CausalConv3d(channels, channels, 1)
        self.v = CausalConv3d(channels, channels, 1)
        self.proj_out = CausalConv3d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x, silu=False).read(0, x.shape[2])
        # As (B·F, 1, H·W, C), torch takes a kernel that never holds all scores.
        q, k, v = (
            layer(h).flatten(0, 1).flatten(1, 2)[:, None] for layer in (self.q, self.k, self.v)
        )
        h = F.scaled_dot_product_attention(q, k, v).view_as(x)
        return self.proj_out(h, plus=Plain(x).read)


class Downsample(nn.Module):
    """Half the rows and columns, zeros on the right and bottom; half the frames if causal."""

    def __init__(self, channels: int, causal: bool) -> None:
        super().__init__()
        self.conv = (CausalConv3d if causal else Conv2d)(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, pad=(0, 1))


class Upsample(nn.Module):
    """Twice the rows and columns, and frames after the first where `time`; then a convolution."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.time = time
        self.conv = CausalConv3d(channels, channels, (3 if time else 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(Upsampled(x, self.time))
