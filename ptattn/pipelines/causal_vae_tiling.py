"""Tiles of the causal video autoencoder: large clips in parts that overlap, as in the release."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.models.autoencoders.vae import AutoencoderMixin
from torch import Tensor

from .components import check_numbers


class Tiling(AutoencoderMixin):
    """`enable_tiling` and what it sets; the model brings `_moments` and `_pixels` of one tile."""

    config: Any
    use_tiling: bool
    temporal_compression_ratio: int
    spatial_compression_ratio: int
    _moments: Callable[[Tensor], Tensor]
    _pixels: Callable[[Tensor], Tensor]

    tile_sample_min_size = 512
    tile_sample_min_num_frames = 29
    tile_latent_min_num_frames = 8
    tile_overlap_factor = 0.125

    def enable_tiling(
        self,
        tile_sample_min_size: int | None = None,
        tile_sample_min_num_frames: int | None = None,
        tile_latent_min_num_frames: int | None = None,
        tile_overlap_factor: float | None = None,
    ) -> None:
        """Code what exceeds a tile in tiles; the defaults are the release's.

        Tiles overlap in space and are blended there; chunks of frames share one frame and are not.
        Norms see a tile alone, so the result is not that of one pass.

        Args:
            tile_sample_min_size: side of a tile in pixels, a multiple of 8 (512).
            tile_sample_min_num_frames: of a chunk to encode, 1 + 4k (29).
            tile_latent_min_num_frames: latent frames of a chunk to decode, at least 2 (8).
            tile_overlap_factor: of a side, a whole number of latents (1/8).

        Raises:
            ValueError: numbers that are no positive integers, or tiles of no whole latents.
        """
        size = _or(tile_sample_min_size, self.tile_sample_min_size)
        frames = _or(tile_sample_min_num_frames, self.tile_sample_min_num_frames)
        latent_frames = _or(tile_latent_min_num_frames, self.tile_latent_min_num_frames)
        overlap = _or(tile_overlap_factor, self.tile_overlap_factor)
        side, time = self.spatial_compression_ratio, self.temporal_compression_ratio
        check_numbers(
            tile_sample_min_size=size,
            tile_sample_min_num_frames=frames,
            tile_latent_min_num_frames=latent_frames,
        )
        if size % side:
            raise ValueError(f"tile_sample_min_size must be a multiple of {side}; got {size}")
        if frames <= time or (frames - 1) % time:
            raise ValueError(
                f"tile_sample_min_num_frames must be 1 more than a multiple of {time}; got {frames}"
            )
        if latent_frames < 2:
            raise ValueError(f"tile_latent_min_num_frames must be 2 or more; got {latent_frames}")
        if not 0 <= overlap < 1 or not float(size // side * overlap).is_integer():
            raise ValueError(
                f"tile_overlap_factor must be below 1, and a whole number of the {size // side} "
                f"latents of a tile's side; got {overlap}"
            )
        self.tile_sample_min_size, self.tile_sample_min_num_frames = size, frames
        self.tile_latent_min_num_frames, self.tile_overlap_factor = latent_frames, overlap
        self.use_tiling = True

    def _exceeds(self, x: Tensor, pixels: bool) -> bool:
        """Whether to code in tiles."""
        frames, size = self._tile(pixels)
        return self.use_tiling and (x.shape[2] > frames or max(x.shape[3:]) > size)

    def _tile(self, pixels: bool) -> tuple[int, int]:
        """Frames and side of a tile, in pixels or latents."""
        if pixels:
            return self.tile_sample_min_num_frames, self.tile_sample_min_size
        latents = self.tile_sample_min_size // self.spatial_compression_ratio
        return self.tile_latent_min_num_frames, latents

    def _tiled_encode(self, x: Tensor) -> Tensor:
        time, side = self.temporal_compression_ratio, self.spatial_compression_ratio
        _, _, frames, height, width = x.shape
        shape = 1 + (frames - 1) // time, height // side, width // side
        out = x.new_empty(len(x), 2 * self.config.latent_channels, *shape)
        return self._tiled(self._moments, x, out, pixels=True)

    def _tiled_decode(self, z: Tensor) -> Tensor:
        time, side = self.temporal_compression_ratio, self.spatial_compression_ratio
        _, _, frames, height, width = z.shape
        out = z.new_empty(len(z), 3, 1 + (frames - 1) * time, height * side, width * side)
        return self._tiled(self._pixels, z, out, pixels=False)

    def _tiled(
        self, code: Callable[[Tensor], Tensor], x: Tensor, out: Tensor, pixels: bool
    ) -> Tensor:
        """Fill `out` with what `code` makes of tiles of `x`, chunk by chunk, row by row."""
        frames, size = self._tile(pixels)
        _, made = self._tile(not pixels)  # a tile's side in the result
        blend = round(made * self.tile_overlap_factor)
        step, kept = size - round(size * self.tile_overlap_factor), made - blend
        # A tile that gives no latent, as it is cut at the border, is none.
        latents = out if pixels else x
        rows, columns = (range(0, n * size // min(size, made), step) for n in latents.shape[3:])
        done = 0
        for begin, end in _chunks(x.shape[2], frames):
            above: list[Tensor] = []
            for i, row in enumerate(rows):
                below, left = [], None
                for j, column in enumerate(columns):
                    tile = code(x[:, :, begin:end, row : row + size, column : column + size])
                    if i:
                        _blend(tile, above[j], 3, blend)
                    if left is not None:
                        _blend(tile, left, 4, blend)
                    below.append(tile[..., -blend:, :].clone() if blend else tile)
                    left = tile
                    # The first frame of a chunk was the last one of the chunk before.
                    part = tile[:, :, 1 if begin else 0 :, :kept, :kept]
                    new, height, width = part.shape[2:]
                    rest = out[:, :, done : done + new, i * kept :, j * kept :]
                    rest[..., :height, :width] = part
                above = below
            done += new
        return out


def _or(given: Any, otherwise: Any) -> Any:
    return otherwise if given is None else given


def _chunks(frames: int, length: int) -> Iterator[tuple[int, int]]:
    """First frame and end of every chunk; each but the first begins with the last's last frame."""
    for begin in range(0, frames, length - 1):
        if begin == 0 or begin + 1 < frames:
            yield begin, min(begin + length, frames)


def _blend(tile: Tensor, neighbour: Tensor, dim: int, most: int) -> None:
    """Fade from the end of the neighbour to the tile, along rows (3) or columns (4), in place."""
    extent = min(most, tile.shape[dim], neighbour.shape[dim])
    if extent == 0:
        return
    weight = torch.arange(extent, device=tile.device, dtype=tile.dtype) / extent
    weight = weight.view(-1, *(1,) * (4 - dim))
    begin = tile.narrow(dim, 0, extent)
    end = neighbour.narrow(dim, neighbour.shape[dim] - extent, extent)
    begin.copy_(end * (1 - weight) + begin * weight)
