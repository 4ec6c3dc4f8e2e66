"""What holds on every grid, of the kernels; test_properties.py looks for more on the other
backends, where an example costs less."""

from functools import partial

import pytest
import torch

import ptattn
from ptattn.geometry import WindowGrid
from tests.cases import normal

SMALL = WindowGrid((2, 4, 5), (2, 2, 3), (1, 1, 2))
LARGE = WindowGrid((2, 6, 7), (2, 6, 6), (1, 3, 2))
each_size = pytest.mark.parametrize("windows", [SMALL, LARGE], ids=["small", "large"])


def qkv(windows, dtype=torch.float64, heads=1):
    return [normal((1, windows.num_tokens, heads, 8), dtype) for _ in "qkv"]


def attend(tensors, windows, shift=None):
    shift = windows.shift if shift is None else shift
    return ptattn.window_attention(*tensors, windows.grid, windows.window, shift, backend="triton")


dense = partial(ptattn.attention, backend="triton")
close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-11)


@each_size
def test_permuted_heads(windows):
    tensors, order = qkv(windows, torch.float32, heads=3), [2, 0, 1]
    out = attend(tensors, windows)
    assert torch.equal(attend([t[:, :, order] for t in tensors], windows), out[:, :, order])


def test_rolled_by_whole_windows():
    windows = WindowGrid((2, 4, 6), (1, 2, 3))
    tensors = qkv(windows)

    def roll(t):
        return t.unflatten(1, windows.grid).roll((1, 2, 3), (1, 2, 3)).flatten(1, 3)

    close(roll(attend(tensors, windows)), attend([roll(t) for t in tensors], windows))


def test_shifted_is_roll_and_mask():
    """Swin's shifted windows, on a grid that they divide: roll, attend within windows to what was
    not wrapped, roll back."""
    windows = WindowGrid((2, 4, 6), (2, 2, 3), (1, 1, 1))
    plain = WindowGrid(windows.grid, windows.window)
    tensors = qkv(windows)

    def roll(t, sign):
        shift = tuple(sign * s for s in windows.shift)
        return t.unflatten(1, windows.grid).roll(shift, (1, 2, 3)).flatten(1, 3)

    # The pieces of the grid that a wrapped window joins, by the cuts of the shifted grid.
    pieces = roll(windows.window_ids()[None, :, None, None], -1).flatten()
    out = torch.empty_like(tensors[0])
    rolled = [roll(t, -1) for t in tensors]
    for w in range(plain.num_windows):
        own = (plain.window_ids() == w).nonzero()[:, 0]
        q, k, v = (t[:, own, 0] for t in rolled)
        s = (q @ k.mT) * 8**-0.5
        s = s.masked_fill(pieces[own][:, None] != pieces[own][None, :], -torch.inf)
        out[:, own, 0] = s.softmax(-1) @ v
    close(attend(tensors, windows), roll(out, 1))


@each_size
def test_linear_in_values(windows):
    q, k, v = qkv(windows)
    other = torch.randn_like(v)
    both = attend((q, k, 2 * v - other), windows)
    close(both, 2 * attend((q, k, v), windows) - attend((q, k, other), windows))
    close(attend((q, k, torch.full_like(v, 3.0)), windows), torch.full_like(v, 3.0))


@pytest.mark.parametrize("size", [(2, 4, 5), (9, 9, 9)], ids=["fits", "longer"])
def test_one_window_is_dense(size):
    windows = WindowGrid((2, 4, 5), size)
    tensors = qkv(windows)
    close(attend(tensors, windows), dense(*tensors))


@pytest.mark.parametrize("keys", [9, 140])
def test_masked_keys_are_as_if_not_there(keys):
    q, k, v = (normal((1, n, 1, 8), torch.float64) for n in (4, keys, keys))
    mask = torch.rand(1, keys) < 0.5
    mask[0, 0] = True
    close(dense(q, k, v, key_mask=mask), dense(q, k[:, mask[0]], v[:, mask[0]]))


def test_proxies_of_single_tokens_are_the_tokens():
    x = normal((2, 6, 24), torch.float32)
    assert torch.equal(ptattn.window_mean(x, (2, 3), (1, 1), backend="triton"), x)


def test_inputs_are_unchanged():
    tensors = [t.requires_grad_() for t in qkv(SMALL, torch.bfloat16)]
    before = [t.detach().clone() for t in tensors]
    out = attend(tensors, SMALL)
    grad_out = torch.randn_like(out)
    kept = grad_out.clone()
    out.backward(grad_out)
    for t, b in zip((*tensors, grad_out), (*before, kept), strict=True):
        assert torch.equal(t, b)
