"""Put `ProxyAttention` in the place of other people's self-attention, and take it out again.

The hosts are diffusers' `Attention`, as in its PixArt and DiT transformers, and timm's, as in its
vision transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import hosts
from .call_grid import CallGrid
from .geometry import WindowGrid
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

    Examples:
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
        elif reasons := hosts.obstacles(place.module):
            kept[place.name] = ", ".join(reasons)
        else:
            places.append(place)
    report = AttentionReport(tuple(place.name for place in places), kept)
    if not places:
        raise ValueError(f"{type(model).__name__} has no self-attention to replace\n{report}")

    # By the old modules: one that is in two places stays one.
    new = {old: ReplacedAttention(old, **options) for old in {place.module for place in places}}
    if patches is not None:
        calls = CallGrid(model, patches, report.replaced)
        for attn in new.values():
            attn.follow(calls)
    for place in places:
        setattr(place.parent, place.attribute, new[place.module])
    return report


def restore_attention(model: nn.Module) -> tuple[str, ...]:
    """Undo `replace_attention`: the old modules return, on the device and in the dtype of the new.

    What the new modules have learned is lost.

    Returns:
        The names of the modules restored.

    Raises:
        ValueError: nothing in the model was replaced, or it was made by `load_replaced` of a class,
            which leaves nothing to restore, or weights are offloaded or cast at each forward. The
            model is then as it was.
    """
    places = [p for p in _attentions(model) if isinstance(p.module, ReplacedAttention)]
    if not places:
        raise ValueError(f"{type(model).__name__} has no attention that replace_attention made")
    if lost := [place.name for place in places if not place.module.has_old]:
        raise ValueError(
            f"the old attention of {_span(lost)} is not kept in the folder that this "
            f"{type(model).__name__} was loaded from"
        )
    held = [p.name for p in places if any("forward" in vars(m) for m in p.module.modules())]
    if held:
        raise ValueError(
            f"weights of {_span(held)} are offloaded or cast at each forward: end that first"
        )
    old = {new: new.take_out() for new in {place.module for place in places}}
    for place in places:
        setattr(place.parent, place.attribute, old[place.module])
    return tuple(place.name for place in places)


class ReplacedAttention(ProxyAttention):
    """ProxyAttention that starts from the weights of the attention in whose place it is."""

    calls: CallGrid | None = None  # knows each call's grid, where `grid` is None

    def __init__(self, old: nn.Module, **options: Any) -> None:
        weights = hosts.weights(old)
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
        self._old: tuple[nn.Module, ...] = (
            old,
        )  # in a tuple it is no submodule: not trained, saved or moved
        texture, interaction = self.texture_complement, self.global_interaction
        for attn in (texture.window_attn, texture.shifted_attn, interaction.proxy_attn):
            _fill(attn.qkv, qkv)
            _fill(attn.proj, proj)
        cross, dim = interaction.cross_attn, self.dim
        _fill(cross.q, qkv.rows(0, dim))
        _fill(cross.kv, qkv.rows(dim, 3 * dim))
        _fill(cross.proj, proj)

    def options(self) -> dict[str, Any]:
        """Of `replace_attention`, which make this module of the old one."""
        return dict(
            window=self.window,
            proxy_window=self.proxy_window,
            grid=self.grid,
            backend=self.backend,
        )

    @property
    def has_old(self) -> bool:
        return bool(self._old)

    def drop_old(self) -> None:
        """There is nothing to restore: its weights are not those that this module came from."""
        self._old = ()

    def follow(self, calls: CallGrid) -> None:
        self.calls = calls
        calls.layers += 1

    def forward(self, x: Tensor, grid: Sequence[int] | None = None, **host: Any) -> Tensor:
        """As ProxyAttention's."""
        if grid is None and self.calls is not None and x.ndim == 3:
            grid = self.calls.of(x)
        return super().forward(x, grid, **host)

    def take_out(self) -> nn.Module:
        """The old module, fit for the place of this one."""
        if self.calls is not None:
            self.calls.release()
        (old,) = self._old
        weight = next(self.parameters())
        return old.to(weight.device, weight.dtype).train(self.training)


@torch.no_grad()
def _fill(layer: nn.Linear, source: hosts.Linear) -> None:
    layer.weight.copy_(source.weight)
    if layer.bias is not None:
        layer.bias.zero_() if source.bias is None else layer.bias.copy_(source.bias)


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
