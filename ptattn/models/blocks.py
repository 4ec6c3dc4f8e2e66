"""What PT-DiT, DiT and PixArt-α share: patches, modulation, running the blocks, output."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ..context import autocast_dtype, has_hooks, intercepted, transformed
from ..geometry import Triple, WindowGrid
from ..layers import (
    CrossAttention,
    Modulation,
    Residual,
    ZeroLinear,
    check_like_weights,
    is_plain,
)
from ..parallel.shares import Share
from ..recompute import feed, recomputed
from .condition import ClassCondition, Condition, PreparedCaption, TextCondition
from .configs import Configured, ModelConfig
from .inputs import check_caption
from .position import position_embedding


class PatchEmbed(nn.Module):
    """Latents to tokens: a convolution per frame plus the position embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.position_scale = max(config.sample_size // 64, 1)
        self.proj = nn.Conv2d(config.in_channels, config.dim, config.patch_size, config.patch_size)

    def grid(self, latents: Tensor) -> Triple:
        """Of the tokens, (f, h, w)."""
        f = latents.shape[2] if latents.ndim == 5 else 1
        h, w = (side // self.patch_size for side in latents.shape[-2:])
        return (f, h, w)

    def forward(self, latents: Tensor, windows: WindowGrid | None = None) -> tuple[Tensor, Triple]:
        """(B, C, F, H, W) or (B, C, H, W) -> (B, N, D) tokens and their grid (f, h, w).

        Where `windows` are a rank's share of a grid, so are the latents.
        """
        check_like_weights("latents", latents, self.proj)
        grid = self.grid(latents)
        if latents.ndim == 4:
            latents = latents.unsqueeze(2)
        b, _, f, _, _ = latents.shape
        x = self.proj(latents.transpose(1, 2).flatten(0, 1))  # (B·F, D, h, w)
        x = x.unflatten(0, (b, f)).flatten(3).transpose(2, 3).flatten(1, 2)
        x = x.to(self.proj.weight.dtype)  # under autocast the residual stream stays wide
        whole, box = (grid, None)
        if isinstance(windows, Share):
            whole, box = windows.cut.grid, windows.cut.box(windows.rank)
        return x + position_embedding(whole, x, self.position_scale, box), grid


class AdaLNSingle(nn.Module):
    """Modulations from the model's one (B, 6D) vector plus a learned table of this block's own.

    The vector holds two (shift, scale, gate); `sources` says which of the two each modulation
    starts from.
    """

    def __init__(self, dim: int, sources: tuple[int, ...] = (0, 1)) -> None:
        super().__init__()
        self.sources = sources
        self.table = nn.Parameter(torch.randn(len(sources), 3, dim) / dim**0.5)

    def forward(self, vector: Tensor) -> list[Modulation]:
        """(B, 6D), or what `add_tables` has made of it for this block."""
        added = vector if vector.ndim == 4 else self.spread(vector) + self.table
        return [Modulation(*vectors.unbind(1)) for vectors in added.unbind(1)]

    def spread(self, vector: Tensor) -> Tensor:
        """What each modulation starts from, (B, 6D) -> (B, K, 3, D)."""
        groups = vector.unflatten(-1, (2, 3, -1)).unbind(1)
        return torch.stack([groups[source] for source in self.sources], dim=1)


class AdaLNZero(nn.Module):
    """Modulations by a zero-initialised linear layer of the block's own (arXiv 2212.09748)."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = ZeroLinear(dim, 3 * count * dim)

    def forward(self, activated: Tensor) -> list[Modulation]:
        """Of the SiLU of the embedding, (B, D)."""
        vectors = self.linear(activated).chunk(3 * self.count, dim=-1)
        return [Modulation(*vectors[3 * i : 3 * i + 3]) for i in range(self.count)]


class Mlp(nn.Sequential):
    """Linear(D, 4D), tanh-GELU, Linear(4D, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__(nn.Linear(dim, 4 * dim), nn.GELU("tanh"), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        layers: Any = self
        up, gelu, down = layers
        if type(gelu) is not nn.GELU or has_hooks(gelu):
            return down(gelu(feed(up, x)))
        if _in_epilogue(up, gelu, x):
            return down(_linear_gelu(up, x))
        hidden = feed(up, x)
        return feed(down, recomputed(gelu(hidden), gelu.forward, hidden))


def _in_epilogue(up: nn.Linear, gelu: nn.GELU, x: Tensor) -> bool:
    """Whether torch has one product for both: with tanh-GELU on NVIDIA GPUs alone, and in 16 bits,
    whose rounding hides that its tanh is approximate. It has no gradient, no place in autocast, and
    FLOP counters do not know it."""
    if not x.is_cuda or torch.version.hip is not None or gelu.approximate != "tanh":
        return False
    if not is_plain(up) or up.bias is None or intercepted() or transformed():
        return False
    given = (x, up.weight, up.bias)
    if type(x) is not Tensor or x.dtype not in (torch.float16, torch.bfloat16):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return False
    return up.weight.dtype == x.dtype == (autocast_dtype(x) or x.dtype)


def _linear_gelu(up: nn.Linear, x: Tensor) -> Tensor:
    """tanh-GELU of up(x), taken by the product before it writes; where `_in_epilogue` says so."""
    rows = x.reshape(-1, x.shape[-1])
    made = torch._addmm_activation(up.bias, rows, up.weight.t(), use_gelu=True)
    return made.view(*x.shape[:-1], up.out_features)


class Blocks(nn.ModuleList):
    """A model's blocks, one after the other."""

    _checkpoint: dict[str, Any] | None = None  # options of torch's, while it is on

    def checkpoint(self, enabled: bool = True, *, keep_attention: bool = False) -> None:
        """Activation checkpointing: in the backward, blocks run again from what they took.

        Each then keeps C numbers per token, in place of some 26·C of a text block.

        Args:
            enabled: False ends it.
            keep_attention: keep what the attentions give too, 4·C numbers per token of a text
                block, so that none of them runs again.
        """
        options: dict[str, Any] = dict(use_reentrant=False)
        if keep_attention:
            options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_attention)
        self._checkpoint = options if enabled else None

    @property
    def checkpointed(self) -> bool:
        return self._checkpoint is not None

    def forward(self, stream: Residual, condition: Condition, *windows: WindowGrid) -> Residual:
        """`windows` go to every block."""
        for block, own in zip(self, self._conditions(condition), strict=True):
            if self._checkpoint is None or not torch.is_grad_enabled():
                stream = block(stream, *windows, own)
            else:
                step = partial(_summed, block)
                stream = checkpoint(step, stream, *windows, own, **self._checkpoint)
        return stream

    def _conditions(self, condition: Condition) -> list[Condition]:
        """The condition of each block."""
        embedding, modulation, text, mask = condition
        texts = text.keys_values if isinstance(text, PreparedCaption) else [text] * len(self)
        vectors = self._modulations(modulation)
        return [
            Condition(embedding, vector, own, mask)
            for vector, own in zip(vectors, texts, strict=True)
        ]

    def _modulations(self, vector: Tensor) -> Sequence[Tensor]:
        """The vector with the tables of all blocks, each (B, K, 3, D), by one addition; as it is
        where the blocks have none, or their tables are seen from within them alone."""
        tables: list[Tensor] = []
        for block in self:
            own = block._modules.get("modulation")  # none of a block that something wraps
            if not isinstance(own, AdaLNSingle) or has_hooks(own) or has_hooks(block):
                return [vector] * len(self)
            if type(own.table) is not nn.Parameter:
                return [vector] * len(self)
            tables.append(own.table)
        first: Any = self[0]
        return (first.modulation.spread(vector) + torch.stack(tables)[:, None]).unbind(0)


def _summed(block: nn.Module, stream: Residual, *others: Any) -> Residual:
    """The stream alone: with a branch beside it there would be two tensors to keep."""
    return Residual(block(stream, *others).total())


def _keep_attention(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = "attention" in op.name()  # ours, and each of torch's
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


class Output(nn.Module):
    """Tokens to latents: modulated norm (by a table for text, a layer for classes), unpatchify."""

    def __init__(self, config: ModelConfig, *, backend: str = "auto") -> None:
        super().__init__()
        d, self.backend = config.dim, backend
        self.patch_size = config.patch_size
        self.table: nn.Parameter | None = None
        if config.num_classes is None:
            self.table = nn.Parameter(torch.randn(2, d) / d**0.5)
        else:
            self.linear = ZeroLinear(d, 2 * d)
        self.proj = ZeroLinear(d, config.patch_size**2 * config.out_channels)

    def forward(self, stream: Residual, grid: Triple, condition: Condition) -> Tensor:
        """(B, N, D) tokens on grid (f, h, w) -> (B, C, f, h·patch, w·patch)."""
        if self.table is not None:
            modulation = (self.table + condition.embedding[:, None]).unbind(1)
        else:
            modulation = self.linear(condition.modulation).chunk(2, dim=-1)
        _, x = stream.norm(modulation, self.backend)
        f, h, w = grid
        p = self.patch_size
        cut = "b (f h w) (p q c) -> b c f (h p) (w q)"
        return rearrange(self.proj(x), cut, f=f, h=h, w=w, p=p, q=p)


class Captioned(Configured):
    """What the text models have for sampling runs, whose steps share their captions."""

    condition: nn.Module
    blocks: Blocks

    @property
    def prepares_captions(self) -> bool:
        """Whether `prepare_caption` works: not for classes, nor where weights are sharded or
        offloaded block by block, which are at hand within the forward alone."""
        if not isinstance(self.condition, TextCondition) or has_hooks(self.condition):
            return False
        # accelerate's hook on a whole model can be asked to bring its weights.
        if has_hooks(cast(nn.Module, self)) and not hasattr(self, "_hf_hook"):
            return False
        return all(_has_own_text(block) for block in self.blocks)

    def prepare_caption(
        self, caption: Tensor, caption_mask: Tensor | None = None
    ) -> PreparedCaption:
        """The keys and values of a caption in every block, to give to `forward` as `caption`.

        They depend on neither latents nor timestep: the steps of a sampling run can share them, for
        2·D numbers per block and token of text. The result has the same bits. They are of the
        weights, and of the autocast, in force now.

        Args:
            caption: (B, T, caption_channels).
            caption_mask: (B, T) bool or a tokenizer's integers; None means all.

        Raises:
            TypeError, ValueError: as `forward`.
            RuntimeError: a model for classes, or with weights sharded or offloaded block by block.

        Examples:
            >>> text = model.prepare_caption(caption, caption_mask)
            >>> out = model(latents, timestep, text)
        """
        if not self.prepares_captions:
            raise RuntimeError(
                "prepare_caption needs a text model whose weights are at hand outside of its "
                "forward: neither sharded nor offloaded block by block, nor wrapped or hooked there"
            )
        caption_mask = check_caption(self.model_config, caption, caption_mask)
        hook: Any = getattr(self, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(self)  # brings them
        text = cast(TextCondition, self.condition).text(caption)
        made = (cast(Any, block).text_attn.keys_values(text) for block in self.blocks)
        return PreparedCaption(tuple(made), caption_mask)


def _has_own_text(block: nn.Module) -> bool:
    """Whether what its forward makes of the text can be made outside of it."""
    attn = block._modules.get("text_attn")  # none of a block that something wraps
    return isinstance(attn, CrossAttention) and not (has_hooks(block) or has_hooks(attn))


def initialize_weights(model: nn.Module) -> None:
    """Xavier for linear and patch layers, 0.02 for embeddings; what starts at zero stays there."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not isinstance(module, ZeroLinear):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, TextCondition | ClassCondition):
            for weight in module.parameters():
                if weight.ndim == 2:
                    nn.init.normal_(weight, std=0.02)
