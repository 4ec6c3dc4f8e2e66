"""`ProxyAttention`, the drop-in for a host's self-attention: both halves behind one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import ops
from .geometry import WindowGrid, window_grid
from .layers import GlobalInteraction, Residual, TextureComplement, check_like_weights
from .parallel import Share, TokenSplit
from .parallel.exchange import all_proxies


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
        prenormed: project x as the host has normed it, as weights taken from a host expect; the
            default norms it once more.
        grid: (f, h, w) or (h, w), the grid of (B, N, C) inputs where forward is given none.
        backend: "auto", "reference", "sdpa" or "triton".
        device, dtype: of the parameters.

    Raises:
        ValueError: dim not a multiple of num_heads, a window or grid that is not positive integers,
            an unknown backend.

    Examples:
        >>> attn = ProxyAttention(64, num_heads=4, window=(4, 4))
        >>> attn(torch.randn(2, 16, 24, 64)).shape
        torch.Size([2, 16, 24, 64])
    """

    token_split: TokenSplit | None = None  # while ranks share its tokens

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: Sequence[int] = (1, 8, 8),
        proxy_window: Sequence[int] | None = None,
        *,
        shift: bool = True,
        qkv_bias: bool = True,
        prenormed: bool = False,
        grid: Sequence[int] | None = None,
        backend: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.prenormed = dim, prenormed
        self.backend = backend
        self.window = WindowGrid((1, 1), window).window
        proxy_window = window if proxy_window is None else proxy_window
        self.proxy_window = WindowGrid((1, 1), proxy_window).window
        self.grid = None if grid is None else WindowGrid(grid, self.window).grid
        options: dict[str, Any] = dict(
            qkv_bias=qkv_bias, backend=backend, device=device, dtype=dtype
        )
        self.global_interaction = GlobalInteraction(dim, num_heads, **options)
        self.texture_complement = TextureComplement(dim, num_heads, shift=shift, **options)

    def forward(self, x: Tensor, grid: Sequence[int] | None = None, **host: Any) -> Tensor:
        """Attend over a grid of tokens.

        Args:
            x: (B, N, C) with a grid from here or the constructor, or (B, h, w, C) or
                (B, f, h, w, C).
            grid: (f, h, w) or (h, w), with f·h·w = N.
            host: what else the host passes to its attention, such as `attention_mask=None` or
                `is_causal=False`; taken where it asks for nothing.

        Returns:
            The shape it got.

        Raises:
            ValueError: another shape, C != dim, no grid, a grid that does not hold N tokens, or a
                mask or other argument of the host that asks for something.
        """
        if self.token_split is not None:
            self.token_split.check(self, x=x, grid=grid, **host)
        _refuse(host)
        if x.ndim not in (3, 4, 5) or x.shape[-1] != self.dim:
            raise ValueError(
                f"x must have shape (B, N, {self.dim}), (B, h, w, {self.dim}) or "
                f"(B, f, h, w, {self.dim}); got {tuple(x.shape)}"
            )
        check_like_weights("x", x, self.texture_complement.window_attn.qkv)
        grid, tokens = self._grid_of(x, grid), x.flatten(1, -2)
        proxies, windows = window_grid(grid, self.proxy_window), window_grid(grid, self.window)
        if self.token_split is None:
            return self._attend(tokens, proxies, windows).view(x.shape)
        box = tokens.unflatten(1, tuple(windows.grid))
        out = self.token_split.share(self, self._attend_box, (proxies, windows), box, first=1)
        return out.view(x.shape)

    def _attend_box(self, proxies: WindowGrid, windows: WindowGrid, box: Tensor) -> Tensor:
        """What to add to a rank's box of tokens (B, f, h, w, C)."""
        return self._attend(box.flatten(1, 3), proxies, windows).view(box.shape)

    def _attend(self, tokens: Tensor, proxies: WindowGrid, windows: WindowGrid) -> Tensor:
        """What to add to tokens (B, N, C)."""
        backend = self.backend
        if self.prenormed:
            means = ops.window_mean(tokens, proxies, backend=backend)
            if isinstance(proxies, Share):
                means = all_proxies(means, proxies)
            delta = self.global_interaction._branch(tokens, means)
            total = normed = tokens + delta
        else:
            _, normed, means = Residual(tokens).norm_and_means(proxies, backend)
            delta = self.global_interaction._branch(normed, means)
            total, normed = Residual(tokens, delta).norm(None, backend)
        branches: Any = self.texture_complement._branches(total, normed, windows)
        return sum((branch.y for branch in branches), delta)

    @staticmethod
    def for_grid(
        grid: Sequence[int], window: Sequence[int] = (1, 8, 8), **options: Any
    ) -> type[ProxyAttention]:
        """A class to give to timm's models as `attn_layer`, or wherever a class is asked for.

        timm makes it with its own arguments. Dropout, the norms of queries and keys and a missing
        bias of the output projection are refused; so are class and register tokens, at the first
        call, as they have no place on a grid.

        Args:
            grid: (h, w) or (f, h, w) patches.
            window: see ProxyAttention.
            options: others of ProxyAttention, such as proxy_window and backend.

        Raises:
            ValueError: a window or grid that is not positive integers.

        Examples:
            >>> from timm.models.vision_transformer import VisionTransformer
            >>> attn = ProxyAttention.for_grid((14, 14), window=(7, 7))
            >>> VisionTransformer(attn_layer=attn, class_token=False, global_pool="avg")
        """
        WindowGrid(grid, window)  # checks them now, not when timm makes its blocks
        options = dict(grid=grid, window=window, **options)
        return type("GridProxyAttention", (_GridProxyAttention,), {"options": options})

    def _grid_of(self, x: Tensor, grid: Sequence[int] | None) -> Sequence[int]:
        if x.ndim == 3:
            found = self.grid if grid is None else grid
            if found is None:
                raise ValueError("x is (B, N, C): give its grid, (f, h, w) or (h, w)")
            return found
        own = tuple(x.shape[1:-1])
        if grid is not None:
            given, shown = window_grid(grid, self.window), window_grid(own, self.window)
            if given.grid != shown.grid:
                raise ValueError(f"x has grid {own} by its shape {tuple(x.shape)}; got grid {grid}")
        return own

    def extra_repr(self) -> str:
        return f"window={self.window}, proxy_window={self.proxy_window}, grid={self.grid}"


class _GridProxyAttention(ProxyAttention):
    """ProxyAttention as timm makes its attention; `for_grid` adds the options."""

    options: ClassVar[dict[str, Any]]

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        *,
        proj_bias: bool = True,
        norm_layer: Any = None,  # of the norms of queries and keys, which must be off
        device: Any = None,
        dtype: torch.dtype | None = None,
        **host: Any,
    ) -> None:
        _refuse({**host, "proj_bias=False": not proj_bias})
        options: dict[str, Any] = dict(qkv_bias=qkv_bias, device=device, dtype=dtype)
        super().__init__(dim, num_heads, **options, **self.options)

    def forward(self, x: Tensor, grid: Sequence[int] | None = None, **host: Any) -> Tensor:
        """As ProxyAttention's."""
        own = self.grid if grid is None else grid
        if x.ndim == 3 and own is not None and x.shape[1] != math.prod(own):
            raise ValueError(
                f"x has {x.shape[1]} tokens, but grid {tuple(own)} has {math.prod(own)}: class and "
                "register tokens have no place on it (timm: class_token=False, reg_tokens=0)"
            )
        return super().forward(x, grid, **host)

    def init_weights(self) -> None:
        """Zero again what starts at zero: timm calls this after it has filled all linear layers."""
        self.global_interaction.zero.reset_parameters()
        self.texture_complement.zero.reset_parameters()

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made at run time, so pickle does not find it by its name.
        return _new_for_grid, (self.options,), self.__dict__


def _new_for_grid(options: dict[str, Any]) -> ProxyAttention:
    made = ProxyAttention.for_grid(**options)
    return made.__new__(made)


def _refuse(host: dict[str, Any]) -> None:
    """Raise for a host's arguments that ask for something, which None, False and 0 do not."""
    asked = [name for name, value in host.items() if isinstance(value, Tensor) or value]
    if asked:
        raise ValueError(f"ProxyAttention has no {', '.join(asked)}: leave it out, or pass None")
