"""Put `ProxyAttention` in the place of other people's self-attention, and take it out again.

The hosts are diffusers' `Attention`, as in its PixArt and DiT transformers, and timm's, as in its
vision transformers. They are known by name: neither library is imported.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .geometry import WindowGrid
from .layers import is_plain
from .proxy_attention import ProxyAttention


@dataclass(frozen=True)
class AttentionReport:
    """What `replace_attention` did: names of modules, and of each that it kept, why."""

    replaced: tuple[str, ...]
    kept: dict[str, str]

    def __str__(self) -> str:
        groups = {"replaced": list(self.replaced)} if self.replaced else {}
        for name, reason in self.kept.items():
            groups.setdefault(f"kept ({reason})", []).append(name)
        return "\n".join(f"{what}: {_span(names)}" for what, names in groups.items())


def replace_attention(
    model: nn.Module,
    *,
    window: Sequence[int],
    grid: Sequence[int] | None = None,
    match: str | None = None,
    proxy_window: Sequence[int] | None = None,
    backend: str = "auto",
) -> AttentionReport:
    """Replace a model's self-attention, in place, by ProxyAttention made from its projections.

    All four attentions of each ProxyAttention start from the old weights, and the layers Z from
    zero. So the model starts as itself with attention within windows: with one window as large as
    the grid it computes what it did before. The old modules are kept aside, outside `parameters()`
    and `state_dict()`, for `restore_attention`.

    Args:
        model: holds diffusers' or timm's `Attention` modules.
        window: (ph, pw) or (pf, ph, pw) tokens.
        grid: (h, w) or (f, h, w) tokens; None takes it at each call from the model's patch
            embedding.
        match: regular expression for the whole name of a module, such as r".*\\.attn1"; None
            replaces all self-attention.
        proxy_window, backend: see ProxyAttention.

    Returns:
        Which attentions were replaced, and which were kept and why.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: nothing can be replaced, with all reasons; a window, grid, match or backend that
            is none; tokens before the grid (class, register); no grid to be found. The model is
            then as it was.

    Example:
        >>> model = PixArtTransformer2DModel.from_pretrained(path)
        >>> print(ptattn.replace_attention(model, window=(8, 8)))
        replaced: transformer_blocks.0.attn1 ... transformer_blocks.27.attn1 (28)
        kept (cross-attention): transformer_blocks.0.attn2 ... transformer_blocks.27.attn2 (28)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be an nn.Module, such as pipeline.transformer; got {type(model).__name__}"
        )
    WindowGrid((1, 1) if grid is None else grid, window)  # checks both before anything else
    _check_prefix(model)
    patches = _patch_projection(model) if grid is None else None
    pattern = _compile(match)

    options: dict[str, Any] = dict(
        window=window, proxy_window=proxy_window, grid=grid, backend=backend
    )
    places, kept = [], {}
    for place in _attentions(model):
        if pattern is not None and not pattern.fullmatch(place.name):
            kept[place.name] = "not matched"
        elif reasons := _obstacles(place.module):
            kept[place.name] = ", ".join(reasons)
        else:
            places.append(place)
    report = AttentionReport(tuple(place.name for place in places), kept)
    if not places:
        raise ValueError(f"{type(model).__name__} has no self-attention to replace\n{report}")

    # By the old modules: one that is in two places stays one.
    new = {old: ReplacedAttention(old, **options) for old in {place.module for place in places}}
    if patches is not None:
        follow = patches.register_forward_hook(functools.partial(_follow, list(new.values())))
        for attn in new.values():
            attn.follow = follow
    for place in places:
        setattr(place.parent, place.attribute, new[place.module])
    return report


def restore_attention(model: nn.Module) -> tuple[str, ...]:
    """Undo `replace_attention`: the old modules return, on the device and in the dtype of the new.

    What the new modules have learned is lost.

    Returns:
        The names of the modules restored.

    Raises:
        ValueError: nothing in the model was replaced.
    """
    places = [p for p in _attentions(model) if isinstance(p.module, ReplacedAttention)]
    if not places:
        raise ValueError(f"{type(model).__name__} has no attention that replace_attention made")
    for place in places:
        setattr(place.parent, place.attribute, place.module.take_out())
    return tuple(place.name for place in places)


class ReplacedAttention(ProxyAttention):
    """ProxyAttention that starts from the weights of the attention in whose place it is."""

    follow: RemovableHandle | None = None  # what sets `grid` at each call

    def __init__(self, old: nn.Module, **options: Any) -> None:
        weights = HOSTS[_class_name(old)].weights(old)
        qkv, proj = weights.qkv, weights.proj
        super().__init__(
            proj.weight.shape[0],
            weights.num_heads,
            prenormed=True,  # by the host, for whose norm and modulation the weights were trained
            qkv_bias=qkv.bias is not None,
            device=qkv.weight.device,
            dtype=qkv.weight.dtype,
            **options,
        )
        self.train(old.training)
        self._old = (old,)  # in a tuple it is no submodule: not trained, saved or moved
        texture, interaction = self.texture_complement, self.global_interaction
        for attn in (texture.window_attn, texture.shifted_attn, interaction.proxy_attn):
            _fill(attn.qkv, qkv)
            _fill(attn.proj, proj)
        cross, dim = interaction.cross_attn, self.dim
        _fill(cross.q, qkv.rows(0, dim))
        _fill(cross.kv, qkv.rows(dim, 3 * dim))
        _fill(cross.proj, proj)

    def take_out(self) -> nn.Module:
        """The old module, fit for the place of this one."""
        if self.follow is not None:
            self.follow.remove()
        (old,) = self._old
        weight = next(self.parameters())
        return old.to(weight.device, weight.dtype).train(self.training)


class _Linear(NamedTuple):
    """A linear layer's weight (out, in) and bias (out,)."""

    weight: Tensor
    bias: Tensor | None

    def rows(self, start: int, stop: int) -> _Linear:
        bias = None if self.bias is None else self.bias[start:stop]
        return _Linear(self.weight[start:stop], bias)


class _Weights(NamedTuple):
    num_heads: int
    qkv: _Linear
    proj: _Linear


@torch.no_grad()
def _fill(layer: nn.Linear, source: _Linear) -> None:
    layer.weight.copy_(source.weight)
    if layer.bias is not None:
        layer.bias.zero_() if source.bias is None else layer.bias.copy_(source.bias)


def _follow(layers: list[ReplacedAttention], patches: nn.Module, args: Any, out: Tensor) -> None:
    """The forward hook of a patch embedding: its output (B, C, h, w) has the grid of the call."""
    for layer in layers:
        layer.grid = (1, *out.shape[-2:])


# The hosts. Obstacles are what stands in the way of replacing a module; a false one does not.

NOT_LINEAR = "projections that are not plain nn.Linear, such as LoRA's: merge them first"
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


def _diffusers_weights(old: Any) -> _Weights:
    layers = (old.to_q, old.to_k, old.to_v)
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias = torch.cat(biases) if biases else None  # diffusers has all three or none
    qkv = _Linear(torch.cat([layer.weight for layer in layers]), bias)
    return _Weights(old.heads, qkv, _Linear(old.to_out[0].weight, old.to_out[0].bias))


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


def _timm_weights(old: Any) -> _Weights:
    qkv, proj = (_Linear(layer.weight, layer.bias) for layer in (old.qkv, old.proj))
    return _Weights(old.num_heads, qkv, proj)


class _Host(NamedTuple):
    obstacles: Callable[[Any], dict[str, bool]]
    weights: Callable[[Any], _Weights]


_TIMM = _Host(_timm_obstacles, _timm_weights)
HOSTS = {
    "diffusers.models.attention_processor.Attention": _Host(
        _diffusers_obstacles, _diffusers_weights
    ),
    "timm.layers.attention.Attention": _TIMM,
    "timm.models.vision_transformer.Attention": _TIMM,  # where older versions have it
}


def _obstacles(module: nn.Module) -> list[str]:
    """Why an attention cannot be replaced."""
    if isinstance(module, ProxyAttention):
        return ["ProxyAttention already"]
    host = HOSTS.get(_class_name(module))
    if host is None:
        return [f"{_class_name(module)} is of no supported class"]
    return [reason for reason, holds in host.obstacles(module).items() if holds]


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _usual_scale(scale: float, head_dim: int) -> bool:
    return abs(scale * head_dim**0.5 - 1) < 1e-6


# The model around them.


class _Place(NamedTuple):
    name: str
    parent: nn.Module
    attribute: str
    module: Any


def _attentions(parent: nn.Module, prefix: str = "") -> Iterator[_Place]:
    """All places of modules that are called an attention, one module in two places twice."""
    for attribute, module in parent._modules.items():
        if module is None:
            continue
        name = prefix + attribute
        if "attention" in type(module).__name__.lower():
            yield _Place(name, parent, attribute, module)
        if not isinstance(module, ProxyAttention):
            yield from _attentions(module, f"{name}.")


def _check_prefix(model: nn.Module) -> None:
    for module in model.modules():
        if count := getattr(module, "num_prefix_tokens", 0):
            raise ValueError(
                f"{type(module).__name__} puts {count} class or register tokens before its "
                "patches; they have no place on a grid"
            )


def _patch_projection(model: nn.Module) -> nn.Conv2d:
    """The convolution that makes the model's tokens, of shape (B, C, h, w)."""
    embeds = (m for m in model.modules() if type(m).__name__ == "PatchEmbed")
    projections = (getattr(m, "proj", None) for m in embeds)
    found = [proj for proj in projections if isinstance(proj, nn.Conv2d)]
    if len(found) != 1:
        raise ValueError(
            "grid must be given, (h, w) or (f, h, w): it can be taken from a module PatchEmbed, of "
            f"which {type(model).__name__} has {len(found)}, not one"
        )
    return found[0]


def _compile(match: str | None) -> re.Pattern[str] | None:
    try:
        return None if match is None else re.compile(match)
    except re.error as error:
        raise ValueError(f"match must be a regular expression; got {match!r}: {error}") from None


def _span(names: list[str]) -> str:
    """Names in one line."""
    if len(names) < 3:
        return ", ".join(names)
    return f"{names[0]} ... {names[-1]} ({len(names)})"
