"""What the tests on a GPU share."""

import math

import pytest
import torch

import ptattn
from tests.support.tolerance import redrawn_once

DEVICE = "cuda"

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA GPU, and torch finds none"
    ),
]

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32


def on_gpu(draw, *args, **sizes):
    """A case of `checks` whose tensors are drawn on the GPU, in the layout asked for."""
    with torch.device(DEVICE):
        return draw(*args, **sizes)


@redrawn_once
def hold(draw, *args, wanted=None, **sizes):
    """Hold the compiled kernels to the rule of tests.support.tolerance."""
    on_gpu(draw, *args, **sizes).check("triton", wanted)


def normal(*shape, dtype=bf16):
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def integers(*shape, most=2, dtype=torch.float64):
    return torch.randint(-most, most + 1, shape, device=DEVICE).to(dtype)


def same_bits(ours, theirs):
    """Whether all tensors of two sequences are equal; NaN counts as different."""
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def attention(q, k, v, **options):
    return ptattn.ops.attention(q, k, v, backend="triton", **options)


def window_attention(q, k, v, *geometry, **options):
    return ptattn.ops.window_attention(q, k, v, *geometry, backend="triton", **options)


def with_gradients(function, tensors, grad_out, *args, **options):
    """The output and the gradients of all tensors."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves, *args, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


# Inputs whose exact results are known: weights of one key, and equal weights.


def sharp_scale():
    """A scale that the kernels turn into exactly 128, so that integer scores stay integers.

    Scores that differ by 2 then differ by 256 in base 2, and all weights are exactly 0 or 1.
    """
    one = torch.tensor(math.log2(math.e), dtype=fp32)
    scale = torch.tensor(128 * math.log(2), dtype=fp32)
    for neighbour in (scale, *(scale.nextafter(torch.tensor(x)) for x in (0.0, 1e3))):
        if neighbour * one == 128:
            return neighbour.item()
    raise AssertionError("no float32 times log2(e) is 128")


def codes(batch, keys, heads, head_dim):
    """(B, M, H, D) of ±1, different for every key: its number in binary, and random signs."""
    bits = torch.arange(keys, device=DEVICE)[:, None] >> torch.arange(14, device=DEVICE) & 1
    signs = torch.randint(0, 2, (batch, keys, heads, head_dim), device=DEVICE)
    signs[..., :14] = bits[:, None]
    return (2 * signs - 1).double()


def opposite_pairs(batch, keys, heads, head_dim):
    """Values w ± u whose mean over any two neighbours is w."""
    w = integers(batch, 1, heads, head_dim)
    u = integers(batch, keys // 2, heads, head_dim, most=1)
    return w + torch.stack([u, -u], dim=2).flatten(1, 2)


def orthogonal(batch, queries, keys, heads, head_dim):
    """q on the even channels and k on the odd ones: all scores are 0."""
    q, k = (integers(batch, length, heads, head_dim) for length in (queries, keys))
    q[..., 1::2] = 0
    k[..., ::2] = 0
    return q, k
