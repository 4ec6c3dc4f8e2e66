"""Who computes a block or model: candidates, which are PT-DiT, and baselines, full attention.

All implementations of a model have its weights and inputs; each is called in its own way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from .. import flops
from ..geometry import WindowGrid
from ..layers import CrossAttention, Residual, SelfAttention
from ..models import create_model, get_config
from ..models.condition import Condition
from ..models.dit import DiTBlock
from ..models.fuse import fuse
from ..models.pixart import PixArtBlock
from ..models.pt_dit import PTDiTBlock
from . import baselines
from .baselines import KERNELS, RELEASED
from .workloads import DTYPES, TEXT_TOKENS, Entry, Settings

OWN, FUSED = "", "fused"


@dataclass(frozen=True)
class Model:
    """A model or block of one shape with random weights, and one way to compute it.

    `leaves` are the inputs that get a gradient, the first of them in the order of tokens; `forward`
    runs any copy of the module on them, in any dtype; `upstream` is the gradient of its output.
    `order` are the windows in whose order it keeps its tokens, None where that is the raster's.
    """

    entry: Entry
    module: nn.Module
    leaves: tuple[Tensor, ...]
    forward: Callable[..., Tensor]  # of a module, then of the leaves
    upstream: Tensor
    rest: tuple[Any, ...] = ()  # of a block: windows and condition
    for_inference: bool = False  # only
    quantized: bool = False
    order: WindowGrid | None = None

    def compiled(self) -> Model:
        """Each block by torch.compile, as one graph.

        torch keeps graphs by code and backend, and does not look at which attention kernel is
        asked for: a backend of its own keeps an implementation's graphs from the others.
        """
        from torch._inductor.compile_fx import compile_fx

        module = copy.deepcopy(self.module)
        blocks: Any = getattr(module, "blocks", [module])
        backend = partial(compile_fx)
        for block in blocks:
            block.compile(fullgraph=True, dynamic=False, backend=backend)
        return replace(self, module=module)

    def fp8(self) -> Model:
        """Every linear layer by torchao's float8, scaled row by row as it runs."""
        from torchao.quantization import (  # type: ignore[import-untyped]
            Float8DynamicActivationFloat8WeightConfig,
            PerRow,
            quantize_,
        )

        module = copy.deepcopy(self.module)
        # Its settings for inductor would stay, and change what is compiled afterwards.
        own = dict(granularity=PerRow(), set_inductor_config=False)
        quantize_(module, Float8DynamicActivationFloat8WeightConfig(**own))
        return replace(self, module=module, for_inference=True, quantized=True)


Make = Callable[[Model], Model]


def block_model(entry: Entry, settings: Settings, batch: int = 1) -> Model:
    """One block; the gradients are of its tokens and of the vectors that modulate it."""
    options: dict[str, Any] = dict(device=settings.device, dtype=DTYPES[settings.dtype])
    config, dim = entry.config, entry.config.dim
    classes = {"PT-DiT": PTDiTBlock, "DiT": DiTBlock, "PixArt": PixArtBlock}
    module = classes[entry.family](config, backend=settings.backend).to(**options).eval()
    # As training leaves them: what a layer makes is of the order of what it gets.
    _prepare(module, entry, settings, std=1.0)
    rows = 1 if config.num_classes is not None else 6
    embedding = torch.randn(batch, dim, **options)
    vector = torch.randn(batch, rows * dim, **options)
    text = torch.randn(batch, TEXT_TOKENS, dim, **options)
    condition = Condition(embedding, vector, text, _text_mask(batch, settings))
    x = torch.randn(batch, entry.tokens, dim, **options)
    grids = config.window_grids(entry.grid) if entry.is_proxy_tokenized else ()

    def forward(module: nn.Module, x: Tensor, vector: Tensor) -> Tensor:
        known = Condition(embedding.to(x.dtype), vector, text.to(x.dtype), condition.text_mask)
        return module(Residual(x), *grids, known).total()

    upstream, rest = torch.randn_like(x), (*grids, condition)
    return Model(entry, module, (x, vector), forward, upstream, rest)


def whole_model(entry: Entry, settings: Settings, batch: int, depth: int | None) -> Model:
    """The gradient of an input is that of its latents."""
    config = get_config(entry.model)
    options: dict[str, Any] = dict(device=settings.device, dtype=DTYPES[settings.dtype])
    overrides = {} if depth is None else dict(depth=depth)
    with torch.device(settings.device):
        model = create_model(entry.model, backend=settings.backend, **overrides)
    model = model.to(**options).eval()
    _prepare(model, entry, settings, std=0.5)
    frames, height, width = flops.token_grid(config, entry.size.side, entry.size.frames)
    side = config.patch_size
    latents = torch.randn(batch, config.in_channels, frames, side * height, side * width, **options)
    timestep = torch.linspace(100, 900, batch, device=settings.device)
    known: dict[str, Tensor]
    if config.num_classes is None:
        caption = torch.randn(batch, TEXT_TOKENS, config.caption_channels or 0, **options)
        known = dict(caption=caption, caption_mask=_text_mask(batch, settings))
    else:
        known = dict(labels=torch.arange(batch, device=settings.device))

    def forward(module: nn.Module, latents: Tensor) -> Tensor:
        cast = {k: t.to(latents.dtype) if t.is_floating_point() else t for k, t in known.items()}
        return module(latents, timestep, **cast)

    upstream = torch.randn(batch, config.out_channels, *latents.shape[2:], **options)
    return Model(entry, model, (latents,), forward, upstream)


def _prepare(module: nn.Module, entry: Entry, settings: Settings, std: float) -> None:
    """Random weights; full attention at its best on torch's own kernels, the norms still fused."""
    if not entry.is_proxy_tokenized and settings.backend == "triton":
        for attention in module.modules():
            if isinstance(attention, SelfAttention | CrossAttention):
                attention.backend = "sdpa"
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std * parameter.shape[-1] ** -0.5)


def _text_mask(batch: int, settings: Settings) -> Tensor:
    """Padded captions, as in use."""
    present = torch.arange(TEXT_TOKENS, device=settings.device) < TEXT_TOKENS - 20
    return present.expand(batch, -1)


def implementations(model: Model, *, one: bool = False) -> Iterator[dict[str, Make]]:
    """What makes them of a model like this one, by name; those of a later dict are tried if none
    of an earlier one runs.

    One may refuse when it is made, or when it is called. `one`: for each model just one, full
    attention by the kernel that torch chooses.
    """
    is_block, entry = bool(model.rest), model.entry
    if one or entry.is_proxy_tokenized:
        found: dict[str, Make] = {OWN: lambda model: model}
        if not is_block and not one:
            found[FUSED] = _fused
        elif is_block and entry.config.num_classes is None and not one:
            found[RELEASED] = _roll_mask
        yield found
        return
    for kinds in KERNELS:
        found = {name: partial(_by_kernel, kind) for name, kind in kinds.items()}
        if kinds is KERNELS[0] and is_block and entry.family == "PixArt":
            found["diffusers"] = _diffusers
        yield found


def _by_kernel(kind: SDPBackend, model: Model) -> Model:
    return replace(model, forward=baselines.by_kernel(kind, model.forward))


def _fused(model: Model) -> Model:
    module: Any = copy.deepcopy(model.module)
    return replace(model, module=fuse(module), for_inference=True)


def _roll_mask(model: Model) -> Model:
    proxies, windows, condition = model.rest
    if proxies.window != windows.window:
        raise ValueError("its proxies are those of its windows")
    module = baselines.RollMaskBlock(model.module)  # type: ignore[arg-type]
    x, vector = model.leaves
    shifted = windows.shifted()
    mask = baselines.region_mask(shifted, x.dtype).to(x.device)

    def forward(module: nn.Module, x: Tensor, vector: Tensor) -> Tensor:
        return module(x, shifted, vector, condition.text, condition.text_mask, mask)

    leaves = baselines.partition(x, windows), vector
    upstream = baselines.partition(model.upstream, windows)
    return replace(
        model, module=module, leaves=leaves, forward=forward, upstream=upstream, order=windows
    )


def _diffusers(model: Model) -> Model:
    (condition,) = model.rest
    module = baselines.DiffusersPixArtBlock(model.module)  # type: ignore[arg-type]

    def forward(module: nn.Module, x: Tensor, vector: Tensor) -> Tensor:
        return module(x, condition._replace(modulation=vector))

    return replace(model, module=module, forward=forward)
