"""The block floor: the least time that a block or model can take at given rates, and its parts.

    matrix products of the linear layers, two operations per multiply-add, at the product rate
    + the fused residual/norm passes: four tensors of the tokens each, at the copy rate
    + each attention: the larger of its bytes and its products
    + the MLP's activation: its hidden layer read and written

A training step is forward and backward: three times the linear layers' products; passes that read
the sum, both gradients and, where the branch is gated, the branch, and write one or two; attention
with 2.5 times the products, and 7 tensors for 4 (windows, full) or 3 for 2 (to few keys); the
activation's three tensors for two.

What is left out: launches, the embeddings' and the output's own bytes, the addition before text
attention, and every pass that is not fused into one of these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .. import flops
from ..models import DiT, PTDiT, find_model
from .clocks import Rates
from .workloads import TEXT_TOKENS, Size

FORWARD, TRAINING = "forward", "training"
TASKS = (FORWARD, TRAINING)
# Of a whole model, what is no part of a block.
OUTSIDE = ("embeddings", "caption", "modulation", "output")


@dataclass(frozen=True)
class Attention:
    """Bytes and operations of one attention of one block; `full`: of all tokens to all."""

    bytes: int
    operations: float
    full: bool = False


@dataclass(frozen=True)
class Work:
    """What one block does, and how many there are; `outside` are operations around the blocks."""

    blocks: int
    operations: float
    passes: int  # bytes
    activation: int  # bytes
    attention: tuple[Attention, ...]
    outside: float = 0.0

    def seconds(self, rates: Rates, full_attention: float | None = None) -> float:
        """At these rates; `full_attention` is another product rate for full attention."""
        block = self.operations / rates.products + (self.passes + self.activation) / rates.copy
        for part in self.attention:
            products = full_attention if part.full and full_attention else rates.products
            block += max(part.bytes / rates.copy, part.operations / products)
        return self.blocks * block + self.outside / rates.products


def work(
    model: str, size: Size, task: str, *, batch: int = 1, itemsize: int = 2,
    depth: int | None = None, fused: bool = False,
) -> Work:  # fmt: skip
    """Of a model; with depth None of one block alone.

    Args:
        model: a name of `models.list_models()`.
        task: FORWARD or TRAINING.
        depth: blocks of the whole model; None leaves all that is outside the block out.
        fused: after `ptattn.fuse`.
    """
    family, config = find_model(model)
    grid = flops.token_grid(config, size.side, size.frames)
    parts = flops.count(model, size.side, size.frames, text_tokens=TEXT_TOKENS).parts
    tokens, dim = batch * grid[0] * grid[1] * grid[2], config.dim
    own = {name: part for name, part in parts.items() if name not in OUTSIDE}
    linear = batch * sum(part.linear for part in own.values()) / config.depth
    if fused and tokens > 2 * batch * dim:  # one of two matrices twice, made for all and per sample
        linear -= dim**2 * (2 * tokens - (1 + batch) * dim)
    training = task == TRAINING
    stream = tokens * dim * itemsize  # bytes of one tensor of tokens
    attention = tuple(
        _attention(name, part, config, stream, batch, itemsize, training)
        for name, part in own.items()
        if part.products
    )
    outside = sum(part.linear for name, part in parts.items() if name in OUTSIDE)
    step = 3 if training else 1  # of linear layers
    return Work(
        blocks=depth or 1,
        operations=2 * step * linear,
        passes=_pass_tensors(family, training) * stream,
        activation=(20 if training else 8) * stream,
        attention=attention,
        outside=0.0 if depth is None else 2.0 * step * batch * outside,
    )


def _pass_tensors(family: type[nn.Module], training: bool) -> int:
    """Tensors that the fused passes read and write: 4 forward; 6 backward if gated, 4 if not."""
    known: dict[type[nn.Module], tuple[int, int]] = {PTDiT: (2, 2), DiT: (2, 0)}
    gated, plain = known.get(family, (1, 1))
    return 4 * (gated + plain) + (6 * gated + 4 * plain if training else 0)


def _attention(
    name: str, part: flops.Part, config: Any, stream: int, batch: int, itemsize: int, training: bool
) -> Attention:
    products = 2.0 * batch * part.products / config.depth * (3.5 if training else 1)
    if name in ("proxy-to-token attention", "text attention"):
        tensors = 5 if training else 2  # q and out; q, g and dq
    elif name == "proxy self-attention":
        tensors = 0  # of the few proxies
    else:
        tensors = 11 if training else 4
    return Attention(tensors * stream, products, full=name == "self-attention")
