"""Who computes a block or model: candidates, which are PT-DiT, and baselines, full attention.

All implementations of a model have its weights and inputs; each is called in its own way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

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
from .baselines import KERNELS
from .workloads import DTYPES, TEXT_TOKENS, Block, Entry, Settings

Make = Callable[[], "Implementation"]


@dataclass(frozen=True)
class Model:
    """A model or block of one shape with random weights.

    `leaves` are the inputs that get a gradient, the first of them in the order of tokens; `forward`
    runs any copy of the module on them, in any dtype; `upstream` is the gradient of its output.
    """

    name: str  # as tables show it
    module: nn.Module
    leaves: tuple[Tensor, ...]
    forward: Callable[..., Tensor]  # of a module, then of the leaves
    upstream: Tensor
    proxy_tokenized: bool
    block: Block | None = None
    rest: tuple[Any, ...] = ()  # windows and condition, of a block


@dataclass(frozen=True)
class Implementation:
    """One way to compute a model or block.

    `order` are the windows in whose order it keeps its tokens, None where that is the raster's.
    """

    name: str
    module: nn.Module
    forward: Callable[..., Tensor]  # of the module, then of the model's leaves
    baseline: bool
    for_inference: bool = False  # only
    quantized: bool = False
    order: WindowGrid | None = None

    def __call__(self, *leaves: Tensor) -> Tensor:
        return self.forward(self.module, *leaves)

    def enter(self, t: Tensor) -> Tensor:
        return t if self.order is None else baselines.partition(t, self.order)

    def leave(self, t: Tensor) -> Tensor:
        return t if self.order is None else baselines.reverse(t, self.order)

    def compiled(self) -> Implementation:
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

    def fp8(self) -> Implementation:
        """Every linear layer by torchao's float8, scaled row by row as it runs."""
        from torchao.quantization import (  # type: ignore[import-untyped]
            Float8DynamicActivationFloat8WeightConfig,
            PerRow,
            quantize_,
        )

        module = copy.deepcopy(self.module)
        # Its settings for inductor would stay, and change what is compiled afterwards.
        quantize_(
            module,
            Float8DynamicActivationFloat8WeightConfig(
                granularity=PerRow(), set_inductor_config=False
            ),
        )
        name = f"{self.name} fp8"
        return replace(self, name=name, module=module, for_inference=True, quantized=True)


def make_block(
    block: Block, settings: Settings, batch: int = 1
) -> tuple[nn.Module, tuple[Any, ...]]:
    """A block with random weights, and what it takes: tokens, their windows, the condition."""
    options: dict[str, Any] = dict(device=settings.device, dtype=DTYPES[settings.dtype])
    config, dim = block.config, block.config.dim
    classes = {"PT-DiT": PTDiTBlock, "DiT": DiTBlock, "PixArt": PixArtBlock}
    module = classes[block.family](config, backend=settings.backend).to(**options).eval()
    if block.family != "PT-DiT" and settings.backend == "triton":
        _attend_by_torch(module)
    for parameter in module.parameters():
        # As training leaves them: what a layer makes is of the order of what it gets.
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    rows = 1 if config.num_classes is not None else 6
    condition = Condition(
        embedding=torch.randn(batch, dim, **options),
        modulation=torch.randn(batch, rows * dim, **options),
        text=torch.randn(batch, TEXT_TOKENS, dim, **options),
        text_mask=_text_mask(batch, settings),
    )
    x = torch.randn(batch, block.tokens, dim, **options)
    grids = config.window_grids(block.grid) if block.family == "PT-DiT" else ()
    return module, (Residual(x), *grids, condition)


def _attend_by_torch(module: nn.Module) -> None:
    """Full attention is at its best on torch's own kernels; the norms stay fused."""
    for attention in module.modules():
        if isinstance(attention, SelfAttention | CrossAttention):
            attention.backend = "sdpa"


def _text_mask(batch: int, settings: Settings) -> Tensor:
    """Padded captions, as in use."""
    present = torch.arange(TEXT_TOKENS, device=settings.device) < TEXT_TOKENS - 20
    return present.expand(batch, -1)


def block_model(entry: Entry, settings: Settings, batch: int) -> Model:
    """One block; the gradients are of its tokens and of the vectors that modulate it."""
    module, (stream, *grids, condition) = make_block(entry.block, settings, batch)
    embedding, vector, text, mask = condition

    def forward(module: nn.Module, x: Tensor, vector: Tensor) -> Tensor:
        known = Condition(embedding.to(x.dtype), vector, text.to(x.dtype), mask)
        return module(Residual(x), *grids, known).total()

    leaves, rest = (stream.x, vector), (*grids, condition)
    upstream, proxy = torch.randn_like(stream.x), entry.is_proxy_tokenized
    return Model(entry.name, module, leaves, forward, upstream, proxy, entry.block, rest)


def whole_model(entry: Entry, settings: Settings, batch: int, depth: int | None) -> Model:
    """The gradient of an input is that of its latents."""
    config = get_config(entry.model)
    options: dict[str, Any] = dict(device=settings.device, dtype=DTYPES[settings.dtype])
    overrides = {} if depth is None else dict(depth=depth)
    with torch.device(settings.device):
        model = create_model(entry.model, backend=settings.backend, **overrides)
    model = model.to(**options).eval()
    if not entry.is_proxy_tokenized and settings.backend == "triton":
        _attend_by_torch(model)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5 * parameter.shape[-1] ** -0.5)
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
    return Model(entry.name, model, (latents,), forward, upstream, entry.is_proxy_tokenized)


def implementations(model: Model, *, one: bool = False) -> Iterator[dict[str, Make]]:
    """Makers by name; those of a later dict are tried if none of an earlier one runs.

    One may refuse when it is made, or when it is called. `one`: for each model just one, full
    attention by the kernel that torch chooses.
    """
    if one:
        yield {model.name: lambda: _own(model, model.name)}
    elif model.proxy_tokenized:
        found = {model.name: lambda: _own(model, model.name)}
        if model.block is None:
            found[f"{model.name} fused"] = lambda: _fused(model)
        elif model.block.config.num_classes is None:
            found[f"{model.name} {baselines.RELEASED}"] = lambda: _roll_mask(model)
        yield found
    else:
        fast, *others = (_by_sdpa(model, kinds) for kinds in KERNELS)
        if model.block is not None and model.block.family == "PixArt":
            fast[f"{model.name} diffusers"] = lambda: _diffusers(model)
        yield from (fast, *others)


def _own(model: Model, name: str, kind: SDPBackend | None = None) -> Implementation:
    def forward(module: nn.Module, *leaves: Tensor) -> Tensor:
        with nullcontext() if kind is None else sdpa_kernel(kind):
            return model.forward(module, *leaves)

    return Implementation(name, model.module, forward, baseline=not model.proxy_tokenized)


def _by_sdpa(model: Model, kinds: dict[str, SDPBackend]) -> dict[str, Make]:
    names = {f"{model.name} {name}": kind for name, kind in kinds.items()}
    return {name: partial(_own, model, name, kind) for name, kind in names.items()}


def _fused(model: Model) -> Implementation:
    module: Any = copy.deepcopy(model.module)
    return Implementation(
        f"{model.name} fused", fuse(module), model.forward, baseline=False, for_inference=True
    )


def _roll_mask(model: Model) -> Implementation:
    proxies, windows, condition = model.rest
    if proxies.window != windows.window:
        raise ValueError("its proxies are those of its windows")
    like, own = model.leaves[0], baselines.RollMaskBlock(*_widths(model))
    module = own.to(like).eval().copy_weights(model.module)  # type: ignore[arg-type]
    shifted = windows.shifted()
    mask = baselines.region_mask(shifted, like.dtype).to(like.device)

    def forward(module: nn.Module, x: Tensor, vector: Tensor) -> Tensor:
        return module(x, shifted, vector, condition.text, condition.text_mask, mask)

    name = f"{model.name} {baselines.RELEASED}"
    return Implementation(name, module, forward, baseline=True, order=windows)


def _diffusers(model: Model) -> Implementation:
    (condition,) = model.rest
    own = baselines.DiffusersPixArtBlock(*_widths(model)).to(model.leaves[0]).eval()
    module = own.copy_weights(model.module)  # type: ignore[arg-type]

    def forward(module: nn.Module, x: Tensor, vector: Tensor) -> Tensor:
        return module(x, condition._replace(modulation=vector))

    return Implementation(f"{model.name} diffusers", module, forward, baseline=True)


def _widths(model: Model) -> tuple[int, int]:
    """Channels and heads of a block."""
    return model.leaves[0].shape[-1], model.block.config.num_heads if model.block else 0
