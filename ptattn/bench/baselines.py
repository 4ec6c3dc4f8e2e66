"""What ptattn is measured against: the released block's way, a peer's block, and the time floor.

`RollMaskBlock` computes what `models.pt_dit.PTDiTBlock` computes, the way the released
inference code and Swin-type code do; tests/bench/test_baselines.py holds the two equal.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..geometry import WindowGrid
from ..models.condition import Condition
from ..models.pixart import PixArtBlock
from ..models.pt_dit import PTDiTBlock

EPS = 1e-6
RELEASED = "roll-and-mask"  # the released block's way
# torch's own attentions: the fast ones; for what those do not take, a slower one; and the one that
# holds all scores.
KERNELS = (
    {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION},
    {"efficient": SDPBackend.EFFICIENT_ATTENTION},
    {"math": SDPBackend.MATH},
)


def by_kernel(kind: SDPBackend, call: Callable[..., Any]) -> Callable[..., Any]:
    """The same, its attention by one of torch's kernels."""

    def run(*args: Any) -> Any:
        with sdpa_kernel(kind):
            return call(*args)

    return run


def _sizes(windows: WindowGrid) -> dict[str, int]:
    if any(n % p for n, p in zip(windows.grid, windows.window, strict=True)):
        raise ValueError(f"roll-and-mask needs window {windows.window} to divide {windows.grid}")
    counts = (n // p for n, p in zip(windows.grid, windows.window, strict=True))
    return dict(zip(("F", "H", "W", "x", "y", "z"), (*counts, *windows.window), strict=True))


def partition(x: Tensor, windows: WindowGrid) -> Tensor:
    """Raster (B, N, ...) -> windows (B·W, w, ...), by a copy; the window's shift is not applied."""
    x = x.unflatten(1, windows.grid)
    return rearrange(
        x, "b (F x) (H y) (W z) ... -> (b F H W) (x y z) ...", **_sizes(windows)
    ).contiguous()


def reverse(x: Tensor, windows: WindowGrid) -> Tensor:
    """Windows (B·W, w, ...) -> raster (B, N, ...), by a copy."""
    cut = "(b F H W) (x y z) ... -> b (F x H y W z) ..."
    return rearrange(x, cut, **_sizes(windows)).contiguous()


def roll(x: Tensor, windows: WindowGrid, back: bool = False) -> Tensor:
    """Roll a raster (B, N, ...) by -shift, or back."""
    shifts = [s if back else -s for s in windows.shift]
    return torch.roll(x.unflatten(1, windows.grid), shifts, (1, 2, 3)).flatten(1, 3)


def region_mask(windows: WindowGrid, dtype: torch.dtype) -> Tensor:
    """Additive (W, w, w): -inf between tokens that only the roll made neighbours."""
    label = torch.zeros(1, dtype=torch.int64)
    for n, p, s in zip(windows.grid, windows.window, windows.shift, strict=True):
        at = torch.arange(n)
        # Only the last window wraps: its far part comes from the start of the axis.
        own = (at >= n - p).long() + (at >= n - s).long()
        label = (label[:, None] * 3 + own).flatten()
    label = partition(label[None, :, None], windows)[..., 0]
    apart = label[:, None, :] != label[:, :, None]
    return torch.zeros(apart.shape, dtype=dtype).masked_fill(apart, float("-inf"))


def roll_mask_attention(
    q: Tensor, k: Tensor, v: Tensor, windows: WindowGrid, mask: Tensor | None
) -> Tensor:
    """Window attention on (B, N, H, D) by roll, partition, mask, reverse and roll back."""
    shifted = any(windows.shift)
    if shifted:
        q, k, v = (roll(t, windows) for t in (q, k, v))
    q, k, v = (partition(t, windows).transpose(1, 2) for t in (q, k, v))
    bias = None if mask is None else _per_window(mask, q.shape[0])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)
    out = reverse(out, windows)
    return roll(out, windows, back=True) if shifted else out


def _per_window(mask: Tensor, rows: int) -> Tensor:
    """(W, w, w) for every sample, broadcast over heads: (B·W, 1, w, w)."""
    return mask.repeat(rows // mask.shape[0], 1, 1)[:, None]


def separate(*packed: Any) -> list[nn.Linear]:
    """A layer with a copy of the weights for each of the square ones that ours pack into one, as
    they pack queries, keys and values."""
    layers = []
    for layer in packed:
        rows = layer.weight.detach().split(layer.in_features)
        for weight, bias in zip(rows, layer.bias.detach().split(layer.in_features), strict=True):
            layers.append(nn.Linear(len(weight), len(weight), device="meta"))
            layers[-1].weight = nn.Parameter(weight.clone())
            layers[-1].bias = nn.Parameter(bias.clone())
    return layers


class _Attention(nn.Module):
    """Separate q, k, v and out layers around torch's scaled_dot_product_attention."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.num_heads = ours.num_heads
        packed = (getattr(ours, name) for name in ours.INPUTS)
        self.q, self.k, self.v, self.out = separate(*packed, ours.proj)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        heads = (self.num_heads, x.shape[-1] // self.num_heads)
        q = self.q(x).unflatten(-1, heads).transpose(1, 2)
        k = self.k(context).unflatten(-1, heads).transpose(1, 2)
        v = self.v(context).unflatten(-1, heads).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


class RollMaskBlock(nn.Module):
    """A text-conditional PT-DiT block in eager torch, as the authors released it for NPUs.

    Tokens stay in windows, (B·W, w, D), from block to block, so that plain window attention copies
    nothing; the shifted one goes back to the raster, rolls, partitions, and all of it back. Kinder
    than the release in two ways: the mask is broadcast over heads, not repeated, and its entries
    are -inf, not -1.
    """

    def __init__(self, block: PTDiTBlock) -> None:
        super().__init__()
        giim, tcm = block.global_interaction, block.texture_complement
        attentions = dict(
            proxy=giim.proxy_attn, cross=giim.cross_attn, window=tcm.window_attn,
            shifted=tcm.shifted_attn, text=block.text_attn,
        )  # fmt: skip
        self.attn = nn.ModuleDict({name: _Attention(ours) for name, ours in attentions.items()})
        self.zero_cross, self.zero_shifted = separate(giim.zero, tcm.zero)
        self.mlp = nn.Sequential(*copy.deepcopy(list(block.mlp)))
        table: Any = block.modulation.table
        window, last, shifted = table.detach().clone()
        self.norm = nn.LayerNorm(window.shape[-1], eps=EPS, elementwise_affine=False)
        self.table, self.shifted_table = map(nn.Parameter, (torch.cat([window, last]), shifted))

    def forward(
        self,
        x: Tensor,
        windows: WindowGrid,
        vector: Tensor,
        text: Tensor,
        text_mask: Tensor | None,
        mask: Tensor,
    ) -> Tensor:
        """x (B·W, w, D), vector (B, 6D), text_mask (B, T) bool, mask (W, w, w) of the shift."""
        batch = text.shape[0]
        vectors = vector.unflatten(-1, (6, -1)).repeat_interleave(x.shape[0] // batch, dim=0)
        shift, scale, gate, shift2, scale2, gate2 = (self.table + vectors).chunk(6, dim=1)
        shift1, scale1, gate1 = (self.shifted_table + vectors[:, :3]).chunk(3, dim=1)

        proxies = x.mean(1).unflatten(0, (batch, -1))
        normed = self.norm(proxies)
        proxies = self.attn["proxy"](normed, normed) + proxies

        y = self.norm(x.view(batch, -1, x.shape[-1]))
        y = self.attn["cross"](y, self.norm(proxies)).view(x.shape)
        x = x + self.zero_cross(y)

        y = self.norm(x) * (1 + scale) + shift
        x = gate * self.attn["window"](y, y) + x

        y = partition(roll(reverse(x, windows), windows), windows)
        y = self.norm(y) * (1 + scale1) + shift1
        y = self.attn["shifted"](y, y, _per_window(mask, x.shape[0]))
        y = partition(roll(reverse(y, windows), windows, back=True), windows)
        x = self.zero_shifted(gate1 * y) + x

        flat = x.view(batch, -1, x.shape[-1])
        keys = None if text_mask is None else text_mask[:, None, None]
        x = (self.attn["text"](flat, text, keys) + flat).view(x.shape)

        y = self.norm(x) * (1 + scale2) + shift2
        return gate2 * self.mlp(y) + x


def gemms_21(x: Tensor) -> Callable[[], Tensor]:
    """What a block's products take, nearly: 21 of D x D over its tokens (B, N, D), nothing else."""
    dim = x.shape[-1]
    weights = [x.new_empty(dim, dim).normal_(std=dim**-0.5) for _ in range(21)]

    def run() -> Tensor:
        for weight in weights:
            y = F.linear(x, weight)
        return y

    return run


class DiffusersPixArtBlock(nn.Module):
    """diffusers' PixArt block behind the call of ours.

    Raises:
        ImportError: diffusers is not installed (`pip install ptattn[t2x]`).
    """

    def __init__(self, block: PixArtBlock) -> None:
        super().__init__()
        try:
            from diffusers.models.attention import BasicTransformerBlock
        except ImportError as error:
            raise ImportError("this baseline needs diffusers: pip install ptattn[t2x]") from error
        dim, heads = block.attn.qkv.in_features, block.attn.num_heads
        self.block = peer = BasicTransformerBlock(
            dim, heads, dim // heads, cross_attention_dim=dim, activation_fn="gelu-approximate",
            attention_bias=True, norm_type="ada_norm_single", norm_elementwise_affine=False,
            norm_eps=EPS,
        )  # fmt: skip
        for theirs, ours in ((peer.attn1, block.attn), (peer.attn2, block.text_attn)):
            packed = (getattr(ours, name) for name in ours.INPUTS)
            theirs.to_q, theirs.to_k, theirs.to_v, theirs.to_out[0] = separate(*packed, ours.proj)
        peer.ff.net[0].proj, _, peer.ff.net[2] = copy.deepcopy(list(block.mlp))
        peer.scale_shift_table = nn.Parameter(block.modulation.table.detach().flatten(0, 1))

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        # The additive form that diffusers' own model makes of a mask.
        text_mask = condition.text_mask
        bias = None if text_mask is None else (1 - text_mask.to(x.dtype))[:, None] * -10000.0
        return self.block(
            x,
            encoder_hidden_states=condition.text,
            encoder_attention_mask=bias,
            timestep=condition.modulation,
        )
