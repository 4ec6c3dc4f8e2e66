"""What one PT-DiT block keeps for its backward: by tensor, nothing twice (docs/ARCHITECTURE.md)."""

import math

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from ptattn.layers import Residual
from ptattn.models import create_model
from ptattn.models.condition import Condition

C, GRID = 32, (2, 12, 16)
N = math.prod(GRID)
MODELS = {"text": ("pt-dit-xl", dict(caption_channels=24)), "classes": ("pt-dit-s-class", {})}

# In units of C per token. A shape of tokens is once C; of heads, what attention keeps.
TABLE = {
    "pass 1: sum, MLP before it": 2,
    "cross-attention: normed, q, attended, projected": 4,
    "pass 2: sum": 1,
    "window attention: normed, qkv, attended": 5,
    "pass 3: sum, window attention before it": 2,
    "shifted attention: normed, qkv, attended, projected, gated": 7,
    "text attention: x, q, attended": 3,
    "pass 4: sum": 1,
    "MLP: normed, hidden, activated": 9,
}
TEXT_ONLY = 3


def storages(kind, batch, *, backend="triton", device="meta"):
    """Bytes of every storage that a block's forward keeps, without its parameters."""
    name, overrides = MODELS[kind]
    sizes = dict(depth=1, dim=C, num_heads=2, window=(2, 3, 4), backend=backend)
    model = create_model(name, **sizes, **overrides).to(device)
    block = model.blocks[0]

    def made(*shape):
        # Not a leaf, as in a model.
        return torch.randn(shape, device=device, requires_grad=True) * 1

    stream = Residual(made(batch, N, C), made(batch, N, C), made(batch, C))
    rows = 6 if kind == "text" else 1
    condition = Condition(made(batch, C), made(batch, rows * C), made(batch, 5, C))
    parameters = {p.untyped_storage()._cdata for p in block.parameters()}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage  # held, so that no other takes its address
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        block(stream, *model.config.window_grids(GRID), condition)
    return [s.nbytes() for s in kept.values()]


def of_tokens(sizes, batch):
    """Units of C per token; `rest` is what is kept per window, caption token or sample."""
    unit = batch * N * C * 4
    large = sum(size for size in sizes if size >= unit)
    return large / unit, (sum(sizes) - large) / unit


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_a_block_keeps_its_table_on_the_kernels(kind, batch):
    expected = sum(TABLE.values()) - (0 if kind == "text" else TEXT_ONLY)
    if batch == 1:
        expected -= 1  # the gate of one sample scales weights, and no product with it is kept
    tokens, rest = of_tokens(storages(kind, batch), batch)
    assert tokens == expected
    # A proxy, the mean of 24 tokens, keeps some 12 C and the text's 5 tokens 2 C each.
    assert rest <= 16 / 24


@pytest.mark.parametrize("kind", MODELS)
def test_the_portable_path_keeps_no_projection_beside_its_windows(kind):
    """A slab of one window was a view, which kept the packed projection beside the other slabs."""
    packed = 3 * N * C * 4
    assert packed not in storages(kind, 1, backend="sdpa", device="cpu")
    assert packed in storages(kind, 1)  # the kernels read it where it lies, and keep it alone
