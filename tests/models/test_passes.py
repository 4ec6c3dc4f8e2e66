"""How often a block goes over its tokens: four fused passes, and copies nothing."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ptattn.layers import Residual
from ptattn.models.condition import Condition
from ptattn.models.configs import ModelConfig
from ptattn.models.pt_dit import PTDiTBlock

DIM, HEADS, TEXT = 16, 2, 5
FREE = {"view", "_unsafe_view", "unsqueeze", "squeeze", "expand", "slice", "select", "alias"}
FREE |= {"t", "transpose", "permute", "split", "unbind", "detach", "as_strided", "unflatten"}


class Operations(TorchDispatchMode):
    """Counts operations whose results have `size` elements or more, views left out."""

    def __init__(self, size):
        super().__init__()
        self.size, self.counts = size, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        outs = out if isinstance(out, tuple | list) else (out,)
        largest = max((t.numel() for t in outs if isinstance(t, torch.Tensor)), default=0)
        if largest >= self.size and name not in FREE:
            self.counts[name] += 1
        return out


def counted(config, batch, backend, grid=(1, 6, 5)):
    torch.manual_seed(0)
    block = PTDiTBlock(config, backend=backend)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.1)
    tokens = grid[1] * grid[2]
    rows = 1 if config.num_classes else 6
    condition = Condition(
        torch.randn(batch, DIM), torch.randn(batch, rows * DIM), torch.randn(batch, TEXT, DIM)
    )
    x, y = torch.randn(2, batch, tokens, DIM, requires_grad=True).unbind()
    stream = Residual(x, y, torch.randn(batch, DIM))
    proxies, windows = config.window_grids(grid)
    with Operations(batch * tokens * DIM) as found:
        block(stream, proxies, windows, condition)
    return dict(found.counts)


CONFIGS = {
    "text": ModelConfig(1, DIM, HEADS, window=(1, 4, 4), caption_channels=8),
    "classes": ModelConfig(1, DIM, HEADS, window=(1, 4, 4), caption_channels=None, num_classes=3),
}
each_kind = pytest.mark.parametrize("kind", CONFIGS)


@each_kind
@pytest.mark.parametrize("batch", [1, 2])
def test_passes_of_a_training_forward(kind, batch):
    """Besides products, attention and the MLP's activation: the four fused passes; one addition
    before the text's queries, which are un-normed; and the gate of shifted attention, unless it
    scales the weights for the one sample."""
    text = kind == "text"
    expected = {
        "norm": 4,
        "addmm": 12 if text else 10,
        "attention": 2 if text else 1,
        "window_attention": 2,
        "gelu": 1,
        "add": int(text),
        "mul": int(batch > 1),
    }
    found = counted(CONFIGS[kind], batch, "triton")
    assert found == {name: count for name, count in expected.items() if count}


def test_passes_on_the_cpu():
    """By torch's own operations: for each fused pass a sum and a norm, and three modulations."""
    found = counted(CONFIGS["text"], 1, "sdpa")
    assert found["native_layer_norm"] == 4
    assert (found["addcmul"], found["add"]) == (2 + 3, 3)
    assert {"roll", "index", "masked_fill", "where"}.isdisjoint(found)
