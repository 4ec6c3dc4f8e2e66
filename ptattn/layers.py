"""Attention layers and the two halves of a block: projections and calls of the operations, no math.

Norms stand between them: a `Residual` makes the sum of a branch in the pass of the norm after it.
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


class Residual(NamedTuple):
    """A residual stream whose last branch is not added yet: x + gate · y.

    The sum is left to the norm that follows, which makes it in the same pass.
    """

    x: Tensor  # (B, N, C)
    y: Tensor | None = None  # (B, N, C)
    gate: Tensor | None = None  # (B, C)

    def total(self) -> Tensor:  # torch 2.9 compiles no property of a tuple
        if self.y is None:
            return self.x
        if self.gate is None:
            return self.x + self.y
        return torch.addcmul(self.x, self.gate[:, None], self.y)

    def norm(self, modulation: Sequence[Tensor] | None, backend: str) -> tuple[Tensor, Tensor]:
        """The sum and its LayerNorm, modulated by (shift, scale, ...)."""
        vectors = (None, None) if modulation is None else (modulation[0], modulation[1])
        options: dict[str, Any] = dict(eps=NORM_EPS, backend=backend)
        if self.y is None:
            return self.x, ops.layer_norm(self.x, *vectors, **options)
        return ops.residual_layer_norm(self.x, self.y, self.gate, *vectors, **options)

    def norm_and_means(self, windows: WindowGrid, backend: str) -> tuple[Tensor, Tensor, Tensor]:
        """The sum, its LayerNorm and its window means."""
        geometry = windows.grid, windows.window
        options: dict[str, Any] = dict(eps=NORM_EPS, backend=backend)
        if self.y is None:
            return self.x, *ops.layer_norm_window_mean(self.x, *geometry, **options)
        return ops.residual_layer_norm_window_mean(self.x, self.y, self.gate, *geometry, **options)


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
        return self.proj(self.attend(x, windows))

    def attend(self, x: Tensor, windows: WindowGrid | None = None) -> Tensor:
        """The heads' outputs, not yet projected."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        if windows is None:
            out = ops.attention(q, k, v, backend=self.backend)
        else:
            grid, window, shift = windows.grid, windows.window, windows.shift
            out = ops.window_attention(q, k, v, grid, window, shift, backend=self.backend)
        return out.flatten(2)


class CrossAttention(_Attention):
    """Multi-head attention from one sequence to another; keys and values share one projection."""

    INPUTS: ClassVar[dict[str, int]] = {"q": 1, "kv": 2}
    q: nn.Linear
    kv: nn.Linear

    def forward(self, x: Tensor, context: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """(B, N, C) attending to (B, M, C), where `key_mask` (B, M) is True -> (B, N, C)."""
        return self.proj(self.attend(x, context, key_mask))

    def attend(self, x: Tensor, context: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """The heads' outputs, not yet projected."""
        q = self.q(x).unflatten(-1, (self.num_heads, self.head_dim))
        k, v = self.kv(context).unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(2)
        return ops.attention(q, k, v, key_mask=key_mask, backend=self.backend).flatten(2)


class GlobalInteraction(nn.Module):
    """The first half, GIIM: proxies attend to each other, then all tokens attend to the proxies.

        p = mean(x);  p = p + gate · SA(modulate(LN(p)));  return Z · CA(q = LN(x), kv = LN(p))

    It takes LN(x) and mean(x) from the pass that makes x. Z is linear and zero-initialised. Source:
    arXiv 2409.04005, the global information interaction module.
    """

    # Z times the attention's output projection, once `fold` has made it.
    folded_weight: Tensor | None
    folded_bias: Tensor | None

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
        self.unfold()

    @torch.no_grad()
    def fold(self) -> None:
        """Make one layer of the last two, which follow each other, for inference."""
        proj = self.cross_attn.proj
        weight, bias = fold_linear(self.zero.weight, self.zero.bias, proj)
        self.register_buffer("folded_weight", weight, persistent=False)
        self.register_buffer("folded_bias", bias, persistent=False)

    @property
    def foldable(self) -> bool:
        return is_plain(self.zero) and is_plain(self.cross_attn.proj)

    def unfold(self) -> None:
        for name in ("folded_weight", "folded_bias"):
            self.register_buffer(name, None, persistent=False)

    def forward(
        self, normed: Tensor, proxies: Tensor, modulation: Modulation | None = None
    ) -> Tensor:
        """What to add to x, (B, N, C).

        Args:
            normed, proxies: LN(x) (B, N, C) and its window means (B, M, C), as
                `ops.layer_norm_window_mean` gives them.
            modulation: of the proxies' self-attention.
        """
        backend = self.proxy_attn.backend
        _, p = Residual(proxies).norm(modulation, backend)
        gate = None if modulation is None else modulation.gate
        _, p = Residual(proxies, self.proxy_attn(p), gate).norm(None, backend)
        if self.folded_weight is None or not self.foldable:
            return self.zero(self.cross_attn(normed, p))
        return F.linear(self.cross_attn.attend(normed, p), self.folded_weight, self.folded_bias)


class TextureComplement(nn.Module):
    """The second half, TCM: window attention, then shifted-window attention on its result.

        x = x + gate · WA(n);  return x + Z · (gate' · SWA(modulate'(LN(x))))

    It takes n = modulate(LN(x)) from the pass that makes x. Z is linear and zero-initialised.
    Source: arXiv 2409.04005, the texture complement module.
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
        self.folds = False  # whether the last two layers and the gate are made one, for inference
        options: dict[str, Any] = dict(
            qkv_bias=qkv_bias, backend=backend, device=device, dtype=dtype
        )
        self.window_attn = SelfAttention(dim, num_heads, **options)
        self.shifted_attn = SelfAttention(dim, num_heads, **options)
        self.zero = ZeroLinear(dim, dim, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        normed: Tensor,
        windows: WindowGrid,
        modulation: tuple[Modulation, Modulation] | None = None,
    ) -> tuple[Residual, Residual]:
        """The stream with what each attention adds to it, not yet added.

        Args:
            x, normed: (B, N, C) tokens and their modulated LayerNorm.
            windows: unshifted.
            modulation: of each attention; shift and scale of the first are in `normed` already.
        """
        plain, shifted = modulation or (None, None)
        first = Residual(x, self.window_attn(normed, windows), plain.gate if plain else None)
        x, normed = first.norm(shifted, self.window_attn.backend)
        z = self.shifted_attn.attend(normed, windows.shifted() if self.shift else windows)
        return first, Residual(x, self._close(z, shifted.gate if shifted else None))

    def _close(self, x: Tensor, gate: Tensor | None) -> Tensor:
        """Z · (gate · projection of x)."""
        proj, zero = self.shifted_attn.proj, self.zero
        # One matrix per sample costs C products for each channel, two layers one for each token.
        if self.folds and self.foldable and gate is not None and x.shape[1] > 2 * x.shape[2]:
            weight, bias = fold_linear(zero.weight * gate[:, None], zero.bias, proj)
            if x.shape[0] == 1:  # the batched product copies its bias to every token first
                return F.linear(x, weight[0], bias[0])
            return torch.baddbmm(bias[:, None], x, weight.mT)
        x = proj(x)
        return zero(x) if gate is None else gated_linear(x, gate, zero)

    @property
    def foldable(self) -> bool:
        return is_plain(self.zero) and is_plain(self.shifted_attn.proj)


def fold_linear(weight: Tensor, bias: Tensor, inner: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias of one layer that does what `inner` and then (weight, bias) do; the weight is
    one matrix (C, C) or one per sample (B, C, C)."""
    return weight @ inner.weight, weight @ inner.bias + bias


def gated_linear(x: Tensor, gate: Tensor, linear: nn.Linear) -> Tensor:
    """linear(gate · x): of one sample, where its tokens outnumber its channels, the gate scales the
    weights instead, which is no pass over the tokens."""
    if x.shape[0] == 1 and x.shape[1] > x.shape[2] and is_plain(linear):
        return F.linear(x, linear.weight * gate, linear.bias)
    return linear(gate[:, None] * x)


def is_plain(layer: Any) -> bool:
    """Whether it does what its weight and bias say and nothing more, as layers of LoRA, with hooks
    and offloaded ones do, and its weight is a plain tensor, which a quantized one is not."""
    if type(layer) not in (nn.Linear, ZeroLinear) or type(layer.weight) is not nn.Parameter:
        return False
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    hooks = hooks or layer._backward_hooks or layer._backward_pre_hooks
    return not hooks and "forward" not in layer.__dict__


def _check_heads(dim: int, num_heads: int) -> None:
    if dim < 1 or num_heads < 1 or dim % num_heads:
        raise ValueError(f"dim must be a positive multiple of num_heads; got {dim}, {num_heads}")
