"""`ProxyAttention` and its two halves: projections and calls of the operations, no attention math.

Every module here returns what its host adds to the residual stream, and holds its own norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backends, ops
from .geometry import WindowGrid

NORM_EPS = 1e-6


class Modulation(NamedTuple):
    """Adaptive layer norm: shift, scale and gate of every sample, each (B, C)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def gated(self, y: Tensor) -> Tensor:
        """gate · y for (B, N, C)."""
        return self.gate[:, None] * y

    def add_gated(self, x: Tensor, y: Tensor) -> Tensor:
        """x + gate · y for (B, N, C), in one pass."""
        return torch.addcmul(x, self.gate[:, None], y)


def layer_norm(x: Tensor, modulation: Sequence[Tensor] | None = None) -> Tensor:
    """LayerNorm without affine parameters, then · (1 + scale) + shift of (shift, scale, ...)."""
    channels = x.shape[-1:]
    if modulation is None:
        return F.layer_norm(x, channels, eps=NORM_EPS)
    shift, scale = modulation[:2]
    if x.shape[0] == 1:  # one sample's modulation is an affine norm: one pass less
        return F.layer_norm(x, channels, 1 + scale[0], shift[0], NORM_EPS)
    normed = F.layer_norm(x, channels, eps=NORM_EPS)
    return torch.addcmul(shift[:, None], normed, 1 + scale[:, None])


class ZeroLinear(nn.Linear):
    """A linear layer initialised to zero, so that what it closes starts as no change."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class _Attention(nn.Module):
    """What both attentions hold: INPUTS, each packing that many projections, and `proj`."""

    INPUTS: ClassVar[dict[str, int]]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        backend: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        backends.check(backend)
        self.num_heads, self.head_dim, self.backend = num_heads, dim // num_heads, backend
        for name, count in self.INPUTS.items():
            linear = nn.Linear(dim, count * dim, bias=qkv_bias, device=device, dtype=dtype)
            self.add_module(name, linear)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)


class SelfAttention(_Attention):
    """Multi-head self-attention with one packed projection: dense, or within windows of a grid."""

    INPUTS: ClassVar[dict[str, int]] = {"qkv": 3}
    qkv: nn.Linear

    def forward(self, x: Tensor, windows: WindowGrid | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C), dense or within `windows`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        if windows is None:
            out = ops.attention(q, k, v, backend=self.backend)
        else:
            grid, window, shift = windows.grid, windows.window, windows.shift
            out = ops.window_attention(q, k, v, grid, window, shift, backend=self.backend)
        return self.proj(out.flatten(2))


class CrossAttention(_Attention):
    """Multi-head attention from one sequence to another; keys and values share one projection."""

    INPUTS: ClassVar[dict[str, int]] = {"q": 1, "kv": 2}
    q: nn.Linear
    kv: nn.Linear

    def forward(self, x: Tensor, context: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """(B, N, C) attending to (B, M, C), where `key_mask` (B, M) is True -> (B, N, C)."""
        q = self.q(x).unflatten(-1, (self.num_heads, self.head_dim))
        k, v = self.kv(context).unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(2)
        return self.proj(ops.attention(q, k, v, key_mask=key_mask, backend=self.backend).flatten(2))


class GlobalInteraction(nn.Module):
    """The first half, GIIM: proxies attend to each other, then all tokens attend to the proxies.

        p = mean(x);  p = p + gate · SA(modulate(LN(p)));  return Z · CA(q = LN(x), kv = LN(p))

    Z is linear and zero-initialised. Source: arXiv 2409.04005, the global information interaction
    module.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        backend: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = dict(
            qkv_bias=qkv_bias, backend=backend, device=device, dtype=dtype
        )
        self.proxy_attn = SelfAttention(dim, num_heads, **options)
        self.cross_attn = CrossAttention(dim, num_heads, **options)
        self.zero = ZeroLinear(dim, dim, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, windows: WindowGrid, modulation: Modulation | None = None
    ) -> Tensor:
        """(B, N, C) -> (B, N, C), one proxy per window; `modulation` is of their self-attention."""
        backend = self.proxy_attn.backend
        normed, proxies = ops.layer_norm_window_mean(
            x, windows.grid, windows.window, eps=NORM_EPS, backend=backend
        )
        update = self.proxy_attn(layer_norm(proxies, modulation))
        proxies = modulation.add_gated(proxies, update) if modulation else proxies + update
        return self.zero(self.cross_attn(normed, layer_norm(proxies)))


class TextureComplement(nn.Module):
    """The second half, TCM: window attention, then shifted-window attention on its result.

        y = gate · WA(modulate(LN(x)));  return y + Z · (gate' · SWA(modulate'(LN(x + y))))

    Z is linear and zero-initialised. Source: arXiv 2409.04005, the texture complement module.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        shift: bool = True,
        qkv_bias: bool = True,
        backend: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.shift = shift
        options: dict[str, Any] = dict(
            qkv_bias=qkv_bias, backend=backend, device=device, dtype=dtype
        )
        self.window_attn = SelfAttention(dim, num_heads, **options)
        self.shifted_attn = SelfAttention(dim, num_heads, **options)
        self.zero = ZeroLinear(dim, dim, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        windows: WindowGrid,
        modulation: tuple[Modulation, Modulation] | None = None,
    ) -> Tensor:
        """(B, N, C) -> (B, N, C) on unshifted windows; `modulation` is of each attention."""
        plain, shifted = modulation or (None, None)
        y = self.window_attn(layer_norm(x, plain), windows)
        y = plain.gated(y) if plain else y
        z = layer_norm(x + y, shifted)
        z = self.shifted_attn(z, windows.shifted() if self.shift else windows)
        return y + self.zero(shifted.gated(z) if shifted else z)


class ProxyAttention(nn.Module):
    """Drop-in for a transformer block's self-attention: global context at the cost of windows.

    Proxy self-attention, proxy-to-token cross-attention, window and shifted-window attention, one
    after the other (arXiv 2409.04005). Returns what the host adds to its residual
    stream: `x = x + attn(norm(x))` works as before. At initialisation it is plain window attention,
    as the two output layers Z are zero.

    Args:
        dim: channels C, a multiple of num_heads.
        num_heads: attention heads.
        window: (pf, ph, pw) or (ph, pw) tokens; any size on any grid.
        proxy_window: the window averaged into one proxy; `window` by default.
        shift: shift the second window attention by window // 2 per axis; else it is unshifted.
        qkv_bias: biases on the query, key and value projections.
        grid: (f, h, w) or (h, w), the grid of (B, N, C) inputs where forward is given none.
        backend: "auto", "reference", "sdpa" or "triton".
        device, dtype: of the parameters.

    Raises:
        ValueError: dim not a multiple of num_heads, a window or grid that is not positive integers,
        an
            unknown backend.

    Example:
        >>> attn = ProxyAttention(64, num_heads=4, window=(4, 4))
        >>> attn(torch.randn(2, 16, 24, 64)).shape
        torch.Size([2, 16, 24, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: Sequence[int] = (1, 8, 8),
        proxy_window: Sequence[int] | None = None,
        *,
        shift: bool = True,
        qkv_bias: bool = True,
        grid: Sequence[int] | None = None,
        backend: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.window = WindowGrid((1, 1), window).window
        proxy_window = window if proxy_window is None else proxy_window
        self.proxy_window = WindowGrid((1, 1), proxy_window).window
        self.grid = None if grid is None else WindowGrid(grid, self.window).grid
        options: dict[str, Any] = dict(
            qkv_bias=qkv_bias, backend=backend, device=device, dtype=dtype
        )
        self.global_interaction = GlobalInteraction(dim, num_heads, **options)
        self.texture_complement = TextureComplement(dim, num_heads, shift=shift, **options)

    def forward(self, x: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """Attend over a grid of tokens.

        Args:
            x: (B, N, C) with a grid from here or the constructor, or (B, h, w, C) or (B, f, h, w,
            C).
            grid: (f, h, w) or (h, w), with f·h·w = N.

        Returns:
            The shape it got.

        Raises:
            ValueError: another shape, C != dim, no grid, or a grid that does not hold N tokens.
        """
        if x.ndim not in (3, 4, 5) or x.shape[-1] != self.dim:
            raise ValueError(
                f"x must have shape (B, N, {self.dim}), (B, h, w, {self.dim}) or "
                f"(B, f, h, w, {self.dim}); got {tuple(x.shape)}"
            )
        grid = self._grid_of(x, grid)
        tokens = x.flatten(1, -2)
        delta = self.global_interaction(tokens, WindowGrid(grid, self.proxy_window))
        windows = WindowGrid(grid, self.window)
        return (delta + self.texture_complement(tokens + delta, windows)).view(x.shape)

    def _grid_of(self, x: Tensor, grid: Sequence[int] | None) -> Sequence[int]:
        if x.ndim == 3:
            found = self.grid if grid is None else grid
            if found is None:
                raise ValueError("x is (B, N, C): give its grid, (f, h, w) or (h, w)")
            return found
        own = tuple(x.shape[1:-1])
        windows = WindowGrid(own, self.window)
        if grid is not None and WindowGrid(grid, self.window).grid != windows.grid:
            raise ValueError(f"x has grid {own} by its shape {tuple(x.shape)}; got grid {grid}")
        return own

    def extra_repr(self) -> str:
        return f"window={self.window}, proxy_window={self.proxy_window}, grid={self.grid}"


def _check_heads(dim: int, num_heads: int) -> None:
    if dim < 1 or num_heads < 1 or dim % num_heads:
        raise ValueError(f"dim must be a positive multiple of num_heads; got {dim}, {num_heads}")
