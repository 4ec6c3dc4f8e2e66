"""What one PT-DiT block keeps for its backward: by tensor, nothing twice, and nothing that follows
from the rest (docs/ARCHITECTURE.md)."""

import math

import pytest
import torch

from ptattn.bench.memory import LiveBytes
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
    "window attention: qkv, attended": 4,
    "pass 3: sum, window attention before it": 2,
    "shifted attention: qkv, attended, projected": 5,
    "text attention: x, q, attended": 3,
    "pass 4: sum": 1,
    "MLP: hidden": 4,
}
TEXT_ONLY = 3


def storages(kind, batch, *, backend="triton", device="meta"):
    """Bytes of every storage that lives after a block's forward, without its parameters."""
    name, overrides = MODELS[kind]
    sizes = dict(depth=1, dim=C, num_heads=2, window=(2, 3, 4), backend=backend)
    model = create_model(name, **sizes, **overrides).to(device)
    block = model.blocks[0]

    rows = 6 if kind == "text" else 1
    shapes = ((N, C), (N, C), (C,), (C,), (rows * C,), (5, C))
    leaves = [torch.randn(batch, *s, device=device, requires_grad=True) for s in shapes]
    with LiveBytes([*block.parameters(), *leaves]) as live:
        made = [leaf * 1 for leaf in leaves]  # as in a model, where the graph holds no input itself
        stream, condition = Residual(*made[:3]), Condition(*made[3:])
        out = block(stream, *model.config.window_grids(GRID), condition)
        del made, stream, condition
        sizes = live.living
    # What the branch left to the next block takes is counted there.
    sizes.remove(out.y.untyped_storage().nbytes())
    return sizes


def of_tokens(sizes, batch):
    """Units of C per token; `rest` is what is kept per window, caption token or sample."""
    unit = batch * N * C * 4
    large = sum(size for size in sizes if size >= unit)
    return large / unit, (sum(sizes) - large) / unit


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_a_block_keeps_its_table_on_the_kernels(kind, batch):
    expected = sum(TABLE.values()) - (0 if kind == "text" else TEXT_ONLY)
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
