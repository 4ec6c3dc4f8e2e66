"""Attention layers and the two halves of a block: projections and calls of the operations, no math.

A half called by itself takes tokens and returns them. Within a block, and in ProxyAttention, the
sums are left to the norms: a `Residual`, which is not public, hands on a branch that is not added
yet, and the pass of the next norm adds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backends, ops
from .context import autocast_dtype, has_hooks
from .geometry import WindowGrid
from .parallel.exchange import all_proxies, shifted_attention
from .parallel.shares import Share
from .recompute import feed, recomputed

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

    def total(self) -> Tensor:  # no property: torch 2.9 compiles none of a named tuple
        if self.y is None:
            return self.x
        if self.gate is None:
            return self.x + self.y
        return torch.addcmul(self.x, self.gate[:, None], self.y)

    def norm(self, modulation: Sequence[Tensor] | None, backend: str) -> tuple[Tensor, Tensor]:
        """The sum and its LayerNorm, modulated by (shift, scale, ...)."""
        # Not a slice: older torch does not compile those of named tuples.
        vectors = () if modulation is None else (modulation[0], modulation[1])
        norm = partial(ops.layer_norm, eps=NORM_EPS, backend=backend)
        if self.y is None:
            total, normed = self.x, norm(self.x, *vectors)
        else:
            total, normed = ops.residual_layer_norm(
                self.x, self.y, self.gate, *vectors, eps=NORM_EPS, backend=backend
            )
        return total, recomputed(normed, norm, total, *vectors)

    def norm_and_means(self, windows: WindowGrid, backend: str) -> tuple[Tensor, Tensor, Tensor]:
        """The sum, its LayerNorm and the window means of the whole grid, of which ranks may share
        the tokens."""
        options: dict[str, Any] = dict(eps=NORM_EPS, backend=backend)
        if self.y is None:
            total, (normed, means) = self.x, ops.layer_norm_window_mean(self.x, windows, **options)
        else:
            total, normed, means = ops.residual_layer_norm_window_mean(
                self.x, self.y, self.gate, windows, **options
            )
        if isinstance(windows, Share):
            means = all_proxies(means, windows)
        return total, normed, means


class KeysValues(NamedTuple):
    """A context as a CrossAttention has projected it."""

    packed: Tensor  # (B, M, 2C): keys, then values


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

    def attend(
        self, x: Tensor, windows: WindowGrid | None = None, *, packed: bool = False
    ) -> Tensor:
        """The heads' outputs, not yet projected; of (B, N, 3C) where x is `packed` already."""
        qkv = x if packed else feed(self.qkv, x)
        qkv = qkv.unflatten(-1, (3, self.num_heads, self.head_dim))
        if windows is None:
            out = ops.packed_attention(qkv, backend=self.backend)
        else:
            out = ops.packed_window_attention(qkv, windows, backend=self.backend)
        return out.flatten(2)


class CrossAttention(_Attention):
    """Multi-head attention from one sequence to another; keys and values share one projection."""

    INPUTS: ClassVar[dict[str, int]] = {"q": 1, "kv": 2}
    q: nn.Linear
    kv: nn.Linear

    def forward(
        self, x: Tensor, context: Tensor | KeysValues, key_mask: Tensor | None = None
    ) -> Tensor:
        """(B, N, C) attending to (B, M, C), where `key_mask` (B, M) is True -> (B, N, C).

        What attends to one context many times gives its `keys_values` in its place.
        """
        return self.proj(self.attend(x, context, key_mask))

    def attend(
        self, x: Tensor, context: Tensor | KeysValues, key_mask: Tensor | None = None
    ) -> Tensor:
        """The heads' outputs, not yet projected."""
        q = self.q(x).unflatten(-1, (self.num_heads, self.head_dim))
        packed = context.packed if isinstance(context, KeysValues) else self.kv(context)
        kv = packed.unflatten(-1, (2, self.num_heads, self.head_dim))
        return ops.packed_attention(q, kv, key_mask=key_mask, backend=self.backend).flatten(2)

    def keys_values(self, context: Tensor) -> KeysValues:
        """Of a context (B, M, C), by the weights as they are now."""
        return KeysValues(self.kv(context))


class GlobalInteraction(nn.Module):
    """The first half, GIIM: proxies attend to each other, then all tokens attend to the proxies.

        p = mean(x);  p = p + gate · SA(modulate(LN(p)));  x = x + Z · CA(q = LN(x), kv = LN(p))

    Z is linear and zero-initialised. Source: arXiv 2409.04005, the global information interaction
    module.

    Args:
        dim: channels C, a multiple of num_heads.
        num_heads: attention heads.
        qkv_bias: biases on the query, key and value projections.
        backend: "auto", "reference", "sdpa" or "triton".
        device, dtype: of the parameters.

    Raises:
        ValueError: dim not a multiple of num_heads, an unknown backend.

    Examples:
        >>> half = GlobalInteraction(64, num_heads=4)
        >>> half(torch.randn(2, 384, 64), WindowGrid((16, 24), (4, 4))).shape
        torch.Size([2, 384, 64])
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
        """The tokens with what the proxies tell them.

        Args:
            x: (B, N, C).
            windows: without a shift; the mean of each is one proxy.
            modulation: of the proxies' self-attention.

        Returns:
            (B, N, C).

        Raises:
            TypeError, ValueError, RuntimeError: as `ops.window_mean` and `ops.attention`.
        """
        _check_windows(windows)
        _, normed, proxies = Residual(x).norm_and_means(windows, self.proxy_attn.backend)
        return x + self._branch(normed, proxies, modulation)

    def _branch(
        self, normed: Tensor, proxies: Tensor, modulation: Modulation | None = None
    ) -> Tensor:
        """What to add to x, of LN(x) (B, N, C) and the window means of x (B, M, C)."""
        shift, scale, gate = modulation or (None, None, None)
        options: dict[str, Any] = dict(eps=NORM_EPS, backend=self.proxy_attn.backend)
        p = self.proxy_attn(ops.layer_norm(proxies, shift, scale, **options))
        _, p = ops.residual_layer_norm(proxies, p, gate, **options)
        return self._inject(normed, p)

    def _inject(self, normed: Tensor, p: Tensor) -> Tensor:
        return self.zero(self.cross_attn(normed, p))


class TextureComplement(nn.Module):
    """The second half, TCM: window attention, then shifted-window attention on its result.

        x = x + gate · WA(modulate(LN(x)));  x = x + Z · (gate' · SWA(modulate'(LN(x))))

    Z is linear and zero-initialised. Source: arXiv 2409.04005, the texture complement module.

    Args:
        shift: shift the second window attention by window // 2 per axis; else it is unshifted.
        dim, num_heads, qkv_bias, backend, device, dtype: as of GlobalInteraction.

    Raises:
        ValueError: as GlobalInteraction.

    Examples:
        >>> half = TextureComplement(64, num_heads=4)
        >>> half(torch.randn(2, 384, 64), WindowGrid((16, 24), (4, 4))).shape
        torch.Size([2, 384, 64])
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
        """The tokens with what their windows tell them.

        Args:
            x: (B, N, C).
            windows: without a shift, which the second attention adds.
            modulation: of each attention.

        Returns:
            (B, N, C).

        Raises:
            ValueError: windows with a shift.
            TypeError, ValueError, RuntimeError: as `ops.window_attention`.
        """
        _check_windows(windows)
        gates = [] if modulation is None else [m.gate.shape for m in modulation]
        if modulation is not None and gates != [(x.shape[0], x.shape[-1])] * 2:
            raise ValueError(
                f"modulation must be two, with gates (B, C) = {(x.shape[0], x.shape[-1])}; "
                f"got gates {[tuple(shape) for shape in gates]}"
            )
        first = None if modulation is None else modulation[0]
        _, normed = Residual(x).norm(first, self.window_attn.backend)
        return self._branches(x, normed, windows, modulation)[1].total()

    def _branches(
        self,
        x: Tensor,
        normed: Tensor,
        windows: WindowGrid,
        modulation: tuple[Modulation, Modulation] | None = None,
    ) -> tuple[Residual, Residual]:
        """The stream with what each attention adds to it, not yet added, of x and modulate(LN(x));
        the shift and scale of the first modulation are in the latter."""
        plain, shifted = modulation or (None, None)
        first = Residual(x, self.window_attn(normed, windows), plain.gate if plain else None)
        x, normed = first.norm(shifted, self.window_attn.backend)
        attn, gate = self.shifted_attn, shifted.gate if shifted else None
        if self.shift and isinstance(windows, Share) and windows.trip is not None:
            project, attend = partial(feed, attn.qkv), partial(attn.attend, packed=True)
            close = partial(self._close, gate=gate)
            y = shifted_attention(project, attend, close, normed, windows, windows.trip)
        else:
            z = attn.attend(normed, windows.shifted() if self.shift else windows)
            y = self._close(z, gate)
        return first, Residual(x, y)

    def _close(self, attended: Tensor, gate: Tensor | None) -> Tensor:
        """Z · (gate · projection of the heads' outputs)."""
        x = self.shifted_attn.proj(attended)
        return self.zero(x) if gate is None else gated_linear(x, gate, self.zero)


def gated_linear(x: Tensor, gate: Tensor, linear: nn.Linear) -> Tensor:
    """linear(gate · x): of one sample, where its tokens outnumber its channels, the gate scales the
    weights instead, which is no pass over the tokens."""
    if x.shape[0] == 1 and x.shape[1] > x.shape[2] and is_plain(linear):
        return F.linear(x, linear.weight * gate, linear.bias)
    gates = gate[:, None]
    return feed(linear, recomputed(gates * x, torch.mul, gates, x))


def is_plain(layer: Any) -> bool:
    """Whether it does what its weight and bias say and nothing more, as layers of LoRA, with hooks
    and offloaded ones do, and its weight is a plain tensor, which a quantized one is not."""
    if type(layer) not in (nn.Linear, ZeroLinear) or type(layer.weight) is not nn.Parameter:
        return False
    hooks = layer._backward_hooks or layer._backward_pre_hooks
    return not (hooks or has_hooks(layer))


def check_like_weights(name: str, x: Tensor, layer: nn.Module) -> None:
    """Raise ValueError unless a layer can take x: of its weights' dtype, but for autocast, and on
    their device. Layers whose weights are not theirs alone, quantized or hooked, are not asked."""
    weight: Any = layer.weight
    if type(weight) is not nn.Parameter or has_hooks(layer):
        return
    for what in ("device", "dtype"):
        got, wanted = getattr(x, what), getattr(weight, what)
        cast = what == "dtype" and x.dtype != torch.float64 and autocast_dtype(x) is not None
        if got != wanted and not (cast and x.is_floating_point()):
            advice = "" if what == "device" else ", or use torch.autocast"
            raise ValueError(f"{name} must be {wanted}, as the weights are{advice}; got {got}")


def _check_windows(windows: Any) -> None:
    if not isinstance(windows, WindowGrid):
        raise TypeError(f"windows must be a WindowGrid; got {type(windows).__name__}")
    if windows.shift != (0, 0, 0):
        raise ValueError(f"windows must have no shift; got {windows.shift}")


def _check_heads(dim: int, num_heads: int) -> None:
    if dim < 1 or num_heads < 1 or dim % num_heads:
        raise ValueError(f"dim must be a positive multiple of num_heads; got {dim}, {num_heads}")
