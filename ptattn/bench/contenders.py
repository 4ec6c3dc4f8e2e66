"""Who takes part in a block or model case: each with its weights, its inputs and its call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import flops
from ..compare.cases import TEXT_TOKENS, Block, Entry
from ..compare.worker import DTYPES, Settings, full_attention_by_torch, make
from ..geometry import WindowGrid
from ..layers import Residual
from ..models import create_model, get_config
from ..models.blocks import Condition
from . import baselines
from .baselines import FUSED, LAST_RESORT

Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to compute a model or block.

    `call` takes the subject's leaves; `order` are the windows in whose order it keeps its tokens,
    None where that is the raster's.
    """

    name: str
    module: nn.Module
    call: Call
    ours: bool = False
    fused: bool = False  # for inference only
    order: WindowGrid | None = None

    def enter(self, t: Tensor) -> Tensor:
        return t if self.order is None else baselines.partition(t, self.order)

    def leave(self, t: Tensor) -> Tensor:
        return t if self.order is None else baselines.reverse(t, self.order)


@dataclass(frozen=True)
class Subject:
    """A model or block of one shape, with the random weights that all its contenders share.

    `leaves` are the inputs that get a gradient, the first of them in the order of tokens; `call`
    runs any copy of the module on them, in any dtype.
    """

    name: str  # as tables show it
    module: Any  # of any family
    leaves: tuple[Tensor, ...]
    call: Callable[..., Tensor]  # of a module, then of the leaves
    upstream: Tensor  # the gradient of the output
    proxy_tokenized: bool
    block: Block | None = None
    rest: tuple[Any, ...] = ()  # windows and condition, of a block

    @property
    def heads(self) -> int:
        return self.block.config.num_heads if self.block else 0


def block_subject(entry: Entry, settings: Settings, batch: int) -> Subject:
    """One block; the gradients are of its tokens and of the vectors that modulate it."""
    module, (stream, *grids, condition) = make(entry.block, settings, batch)
    for parameter in module.parameters():
        # As training leaves them: what a layer makes is of the order of what it gets.
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    embedding, vector, text, _ = condition
    condition = condition._replace(text_mask=_text_mask(batch, settings))

    def call(module: nn.Module, x: Tensor, vector: Tensor) -> Tensor:
        like = x.dtype
        known = Condition(embedding.to(like), vector, text.to(like), condition.text_mask)
        return module(Residual(x), *grids, known).total()

    leaves, rest = (stream.x, vector), (*grids, condition)
    upstream, proxy = torch.randn_like(stream.x), entry.is_proxy_tokenized
    return Subject(entry.name, module, leaves, call, upstream, proxy, entry.block, rest)


def _text_mask(batch: int, settings: Settings) -> Tensor:
    """Padded captions, as in use."""
    present = torch.arange(TEXT_TOKENS, device=settings.device) < TEXT_TOKENS - 20
    return present.expand(batch, -1)


def model_subject(entry: Entry, settings: Settings, batch: int, depth: int | None) -> Subject:
    """A whole model; the gradient of an input is that of its latents."""
    config = get_config(entry.model)
    options: dict[str, Any] = dict(device=settings.device, dtype=DTYPES[settings.dtype])
    overrides = {} if depth is None else dict(depth=depth)
    with torch.device(settings.device):
        model = create_model(entry.model, backend=settings.backend, **overrides)
    model = model.to(**options).eval()
    if not entry.is_proxy_tokenized and settings.backend == "triton":
        full_attention_by_torch(model)
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

    def call(module: nn.Module, latents: Tensor) -> Tensor:
        cast = {k: t.to(latents.dtype) if t.is_floating_point() else t for k, t in known.items()}
        return module(latents, timestep, **cast)

    upstream = torch.randn(batch, config.out_channels, *latents.shape[2:], **options)
    return Subject(entry.name, model, (latents,), call, upstream, entry.is_proxy_tokenized)


def contenders(subject: Subject, *, compiled: bool) -> Iterator[dict[str, Callable[[], Contender]]]:
    """Makers by name; those of a later dict are tried if no earlier one runs.

    One may refuse when it is made, or when it is called.
    """
    name = subject.name
    if subject.proxy_tokenized:
        first = {name: lambda: _own(subject, name, ours=True)}
        if compiled:
            first[f"{name} compiled"] = lambda: _compiled(subject, ours=True)
        if subject.block is None:
            first[f"{name} fused"] = lambda: _fused(subject)
        elif subject.block.config.num_classes is None:
            first[f"{name} {baselines.RELEASED}"] = lambda: _roll_mask(subject)
        yield first
        return
    first = _by_sdpa(subject, FUSED)
    if compiled:
        first[f"{name} compiled"] = lambda: _compiled(subject)
    if subject.block is not None and subject.block.family == "PixArt":
        first[f"{name} diffusers"] = lambda: _diffusers(subject)
        if compiled:
            first[f"{name} diffusers compiled"] = lambda: _diffusers(subject, compiled=True)
    yield first
    yield _by_sdpa(subject, LAST_RESORT)


def _own(
    subject: Subject, name: str, kind: SDPBackend | None = None, ours: bool = False
) -> Contender:
    def call(*leaves: Tensor) -> Tensor:
        with nullcontext() if kind is None else sdpa_kernel(kind):
            return subject.call(subject.module, *leaves)

    return Contender(name, subject.module, call, ours)


def _by_sdpa(subject: Subject, kinds: dict[str, SDPBackend]) -> dict[str, Callable[[], Contender]]:
    names = {f"{subject.name} {name}": kind for name, kind in kinds.items()}
    return {name: partial(_own, subject, name, kind) for name, kind in names.items()}


def _compiled(subject: Subject, ours: bool = False) -> Contender:
    call = torch.compile(partial(subject.call, subject.module), fullgraph=True, dynamic=False)
    return Contender(f"{subject.name} compiled", subject.module, call, ours)


def _fused(subject: Subject) -> Contender:
    model = copy.deepcopy(subject.module)
    model.fuse_for_inference()
    call = partial(subject.call, model)
    return Contender(f"{subject.name} fused", model, call, ours=True, fused=True)


def _roll_mask(subject: Subject) -> Contender:
    proxies, windows, condition = subject.rest
    if proxies.window != windows.window:
        raise ValueError("its proxies are those of its windows")
    like = subject.leaves[0]
    module = baselines.RollMaskBlock(like.shape[-1], subject.heads).to(like).eval()
    module.copy_weights(subject.module)
    shifted = windows.shifted()
    mask = baselines.region_mask(shifted, like.dtype).to(like.device)

    def call(x: Tensor, vector: Tensor) -> Tensor:
        return module(x, shifted, vector, condition.text, condition.text_mask, mask)

    return Contender(f"{subject.name} {baselines.RELEASED}", module, call, order=windows)


def _diffusers(subject: Subject, compiled: bool = False) -> Contender:
    (condition,) = subject.rest
    like = subject.leaves[0]
    module = baselines.DiffusersPixArtBlock(like.shape[-1], subject.heads).to(like).eval()
    module.copy_weights(subject.module)

    def call(x: Tensor, vector: Tensor) -> Tensor:
        return module(x, condition._replace(modulation=vector))

    name = f"{subject.name} diffusers"
    if compiled:
        compiled_call = torch.compile(call, fullgraph=True, dynamic=False)
        return Contender(f"{name} compiled", module, compiled_call)
    return Contender(name, module, call)
