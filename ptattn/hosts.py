"""The attention classes of other people's models: what can be replaced in each, and its weights.

They are known by name: neither diffusers nor timm is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .layers import is_plain
from .proxy_attention import ProxyAttention


class Linear(NamedTuple):
    """A linear layer's weight (out, in) and bias (out,)."""

    weight: Tensor
    bias: Tensor | None

    def rows(self, start: int, stop: int) -> Linear:
        bias = None if self.bias is None else self.bias[start:stop]
        return Linear(self.weight[start:stop], bias)


class Weights(NamedTuple):
    num_heads: int
    qkv: Linear
    proj: Linear


# Obstacles are what stands in the way of replacing a module; a false one does not.

NOT_LINEAR = (
    "projections that are not plain nn.Linear, such as LoRA's: merge them first, and offload, cast "
    "or quantize afterwards"
)
WIDTHS = "heads or projections of another width than its tokens"
NORMS = "norms inside it"
SCALE = "a softmax scale of its own"
DROPOUT = "dropout"


def _diffusers_obstacles(old: Any) -> dict[str, bool]:
    processor = type(old.processor).__name__
    return {
        "cross-attention": old.is_cross_attention,
        "joint attention with another stream": old.added_kv_proj_dim is not None,
        "projections fused, call unfuse_qkv_projections() first": old.fused_projections,
        NOT_LINEAR: not all(
            map(is_plain, (old.to_q, old.to_k, old.to_v, *(old.to_out or [None])[:1]))
        ),
        WIDTHS: {old.inner_dim, old.inner_kv_dim, old.out_dim} != {old.query_dim},
        NORMS: (old.norm_q, old.norm_k, old.group_norm, old.spatial_norm) != (None,) * 4,
        SCALE: not _usual_scale(old.scale, old.inner_dim // old.heads),
        "a causal mask": old.is_causal,
        DROPOUT: old.dropout > 0,
        "its own residual connection": old.residual_connection or old.rescale_output_factor != 1,
        f"processor {processor}": processor not in ("AttnProcessor", "AttnProcessor2_0"),
    }


def _diffusers_weights(old: Any) -> Weights:
    layers = (old.to_q, old.to_k, old.to_v)
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias = torch.cat(biases) if biases else None  # diffusers has all three or none
    qkv = Linear(torch.cat([layer.weight for layer in layers]), bias)
    return Weights(old.heads, qkv, Linear(old.to_out[0].weight, old.to_out[0].bias))


def _timm_obstacles(old: Any) -> dict[str, bool]:
    plain = is_plain(old.qkv) and is_plain(old.proj)
    norms = (old.q_norm, old.k_norm, getattr(old, "norm", None))
    dim = old.proj.weight.shape[0] if plain else 0
    return {
        NOT_LINEAR: not plain,
        WIDTHS: plain and (old.qkv.weight.shape, old.proj.weight.shape[1]) != ((3 * dim, dim), dim),
        NORMS: any(not isinstance(norm, nn.Identity | None) for norm in norms),
        SCALE: not _usual_scale(old.scale, old.head_dim),
        "a gate": getattr(old, "gate", None) is not None,
        DROPOUT: old.attn_drop.p > 0 or old.proj_drop.p > 0,
    }


def _timm_weights(old: Any) -> Weights:
    qkv, proj = (Linear(layer.weight, layer.bias) for layer in (old.qkv, old.proj))
    return Weights(old.num_heads, qkv, proj)


class _Host(NamedTuple):
    obstacles: Callable[[Any], dict[str, bool]]
    weights: Callable[[Any], Weights]


_TIMM = _Host(_timm_obstacles, _timm_weights)
_HOSTS = {
    "diffusers.models.attention_processor.Attention": _Host(
        _diffusers_obstacles, _diffusers_weights
    ),
    "timm.layers.attention.Attention": _TIMM,
    "timm.models.vision_transformer.Attention": _TIMM,  # where older versions have it
}


def obstacles(module: nn.Module) -> list[str]:
    """Why an attention cannot be replaced."""
    if isinstance(module, ProxyAttention):
        return ["ProxyAttention already"]
    host = _HOSTS.get(_class_name(module))
    if host is None:
        return [f"{_class_name(module)} is of no supported class"]
    return [reason for reason, holds in host.obstacles(module).items() if holds]


def weights(module: nn.Module) -> Weights:
    """Of an attention without obstacles."""
    return _HOSTS[_class_name(module)].weights(module)


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _usual_scale(scale: float, head_dim: int) -> bool:
    return abs(scale * head_dim**0.5 - 1) < 1e-6
