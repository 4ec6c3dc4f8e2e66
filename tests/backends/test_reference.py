"""The specification itself: cases computed by hand, gradients by differences, precision."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import ptattn

LOG3 = math.log(3)


def tokens(*values):
    """(1, N, 1, 1): one sample, one head, one number per token."""
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)


def mean(x, grid, window):
    return ptattn.window_mean(x, grid, window, backend="reference")


def attend(q, k, v, key_mask=None, scale=None):
    return ptattn.attention(q, k, v, key_mask=key_mask, scale=scale, backend="reference")


def attend_windows(q, k, v, grid=(3, 5), window=(2, 3), shift=(1, 2)):
    return ptattn.window_attention(q, k, v, grid, window, shift, backend="reference")


def assert_equal(got, expected):
    """To the last few bits of float64."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got.flatten(), expected, rtol=1e-15, atol=0)


def test_mean_by_hand():
    x = torch.arange(6.0).view(1, 6, 1)  # 0 1 2 / 3 4 5
    assert mean(x, (2, 3), (2, 2)).flatten().tolist() == [2, 3.5]
    assert mean(x, (2, 3), (1, 2)).flatten().tolist() == [0.5, 2, 3.5, 5]
    assert mean(x, (2, 1, 3), (2, 1, 1)).flatten().tolist() == [1.5, 2.5, 3.5]
    assert mean(x, (2, 3), (9, 9)).flatten().tolist() == [2.5]


def test_attention_by_hand():
    q, k, v = tokens(1, 0, -1), tokens(0, LOG3), tokens(4, 8)
    # Weights 1/4, 3/4; then equal; then 3/4, 1/4.
    assert_equal(attend(q, k, v), [7, 6, 5])
    assert_equal(attend(q, k, v, scale=0), [6, 6, 6])
    assert_equal(attend(2 * q, k, v, scale=0.5), [7, 6, 5])
    assert_equal(attend(q, k, v, key_mask=torch.tensor([[True, False]])), [4, 4, 4])


def test_scale_is_head_dim_to_the_minus_half():
    q, k, v = torch.randn(3, 1, 5, 2, 16, dtype=torch.float64).unbind()
    assert torch.equal(attend(q, k, v), attend(q, k, v, scale=0.25))


def test_window_attention_by_hand():
    """Equal keys: every token gets the mean of its window."""
    zero, v = tokens(*[0] * 4), tokens(2, 4, 6, 9)
    options = dict(grid=(1, 4), window=(1, 2))
    assert_equal(attend_windows(zero, zero, v, **options, shift=(0, 0)), [3, 3, 7.5, 7.5])
    assert_equal(attend_windows(zero, zero, v, **options, shift=(0, 1)), [2, 5, 5, 9])


def test_window_attention_does_not_mix_axes():
    """2 × 3 tokens in windows of one row, or one column, or one column cut by the shift."""
    zero, v = tokens(*[0] * 6), tokens(0, 1, 2, 6, 7, 8)
    rows = attend_windows(zero, zero, v, (2, 3), (1, 3), (0, 0))
    assert_equal(rows, [1, 1, 1, 7, 7, 7])
    columns = attend_windows(zero, zero, v, (2, 3), (2, 1), (0, 0))
    assert_equal(columns, [3, 4, 5, 3, 4, 5])
    alone = attend_windows(zero, zero, v, (2, 3), (2, 1), (1, 0))
    assert_equal(alone, [0, 1, 2, 6, 7, 8])


def double(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


MASK = torch.tensor([[True, False, True, True, False], [False] * 5])
DIFFERENTIABLE = {
    "window_mean": (lambda x: mean(x, (3, 5), (2, 2)), [(2, 15, 2)]),
    "attention": (attend, [(2, 3, 2, 2), (2, 5, 2, 2), (2, 5, 2, 2)]),
    "attention-masked": (
        lambda q, k, v: attend(q, k, v, key_mask=MASK),
        [(2, 3, 2, 2), (2, 5, 2, 2), (2, 5, 2, 2)],
    ),
    "window_attention": (attend_windows, [(1, 15, 1, 2)] * 3),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients(name):
    function, shapes = DIFFERENTIABLE[name]
    inputs = [double(*shape) for shape in shapes]
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def call(name, inputs):
    return DIFFERENTIABLE[name][0](*inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_promotes_to_float32(name, dtype):
    """Computed in float32 and rounded once, at the end."""
    inputs = [torch.randn(shape, dtype=dtype) for shape in DIFFERENTIABLE[name][1]]
    out = call(name, inputs)
    assert out.dtype == dtype
    assert torch.equal(out, call(name, [t.float() for t in inputs]).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_autocast_changes_nothing(name, dtype):
    inputs = [torch.randn(shape, dtype=dtype) for shape in DIFFERENTIABLE[name][1]]
    with torch.autocast("cpu", torch.bfloat16):
        inside = call(name, inputs)
    assert inside.dtype == dtype
    assert torch.equal(inside, call(name, inputs))


def test_no_key_to_attend_to():
    inputs = [double(2, 3, 2, 2), double(2, 5, 2, 2), double(2, 5, 2, 2)]
    out = attend(*inputs, key_mask=MASK)
    grads = torch.autograd.grad(out, inputs, torch.randn_like(out))
    for name, t in zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True):
        assert t[1].eq(0).all(), name
        assert t[0].ne(0).any(), name
