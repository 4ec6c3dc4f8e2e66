"""What holds on every grid; hypothesis looks for one where it does not."""

import functools
import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ptattn
from ptattn.geometry import WindowGrid

# The interpreted kernels are held on many grids in tests/kernels too.
BACKENDS = ("reference", "sdpa", pytest.param("triton", marks=pytest.mark.long))
OPS = ("window_mean", "attention", "window_attention")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_op = pytest.mark.parametrize("op", OPS)
# Of so many examples one is left to the interpreted kernels, which take 20 ms per program, but two
# at least: the first is the smallest.
FEWER = 200


def for_all(**strategies):
    """Hypothesis's `given`, for tests of a backend: as many examples as that one has time for."""

    def decorate(check):
        @functools.wraps(check)
        def test(**fixed):
            examples = settings.default.max_examples
            if fixed["backend"] == "triton":
                examples = max(2, examples // FEWER)
            settings(max_examples=examples)(given(**strategies)(check))(**fixed)

        signature = inspect.signature(check)
        fixed = [p for name, p in signature.parameters.items() if name not in strategies]
        test.__signature__ = signature.replace(parameters=fixed)  # what pytest is to pass
        return test

    return decorate


@st.composite
def axes(draw, shifted=True, divisible=False):
    """(length, window, shift) of an axis; windows may be longer than it."""
    window = draw(st.integers(1, 6))
    length = draw(st.integers(1, 3)) * window if divisible else draw(st.integers(1, 8))
    return length, window, draw(st.integers(0, window - 1)) if shifted else 0


def grids(**options):
    triples = st.tuples(*[axes(**options)] * 3).filter(lambda t: math.prod(a[0] for a in t) <= 100)
    return triples.map(lambda t: WindowGrid(*zip(*t, strict=True)))


batches = st.integers(1, 3)
seeds = st.integers(0, 2**32 - 1)


def qkv(windows, seed, *, batch=2, heads=2, dtype=torch.float32):
    torch.manual_seed(seed)
    shape = (3, batch, windows.num_tokens, heads, 8)
    return list(torch.randn(shape, dtype=dtype).unbind())


def attend(tensors, windows, backend):
    return ptattn.window_attention(
        *tensors, windows.grid, windows.window, windows.shift, backend=backend
    )


def run(op, tensors, windows, backend, key_mask=None):
    """Any operation on q, k, v of the grid; the mean takes q."""
    if op == "window_mean":
        return ptattn.window_mean(
            tensors[0].flatten(2), windows.grid, windows.window, backend=backend
        )
    if op == "attention":
        return ptattn.attention(*tensors, key_mask=key_mask, backend=backend)
    return attend(tensors, windows, backend)


def run_backward(op, tensors, windows, backend, grad_out=None, key_mask=None):
    """The output and the gradients of q, k, v, or of q for the mean."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = run(op, leaves, windows, backend, key_mask)
    grad_out = torch.randn_like(out) if grad_out is None else grad_out
    wanted = leaves[:1] if op == "window_mean" else leaves
    return [out.detach(), *torch.autograd.grad(out, wanted, grad_out)], grad_out


# The reference uses batched products, and MKL rounds a matrix by its place in the batch: as item 0
# and as item 1 it differs in its last bits. Flash attention multiplies one matrix after the other.
# A triton program multiplies one head's matrices.
BITWISE = {"reference": torch.float64, "sdpa": torch.float32, "triton": torch.float32}


def assert_unaffected(got, expected):
    """Bit for bit in float32, up to rounding in float64: see BITWISE."""
    if got.dtype == torch.float32:
        assert torch.equal(got, expected)
    else:
        assert_same_math(got, expected)


def assert_same_math(got, expected):
    """Two formulas of one function in float64: they differ by rounding."""
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@every_backend
@every_op
@for_all(windows=grids(), batch=st.integers(2, 4), seed=seeds)
def test_sample_alone_is_sample_in_batch(op, backend, windows, batch, seed):
    tensors = qkv(windows, seed, batch=batch, dtype=BITWISE[backend])
    mask = torch.rand(batch, windows.num_tokens) < 0.5
    together, grad_out = run_backward(op, tensors, windows, backend, key_mask=mask)
    for i in range(batch):
        one = slice(i, i + 1)
        item = [t[one] for t in tensors]
        alone, _ = run_backward(op, item, windows, backend, grad_out[one], mask[one])
        for a, b in zip(alone, together, strict=True):
            assert_unaffected(a, b[one])


@every_backend
@pytest.mark.parametrize("op", ["attention", "window_attention"])
@for_all(windows=grids(), order=st.permutations(range(3)), seed=seeds)
def test_heads_are_independent(op, backend, windows, order, seed):
    tensors = qkv(windows, seed, heads=3, dtype=BITWISE[backend])
    results, grad_out = run_backward(op, tensors, windows, backend)
    permuted = [t[:, :, order] for t in tensors]
    again, _ = run_backward(op, permuted, windows, backend, grad_out[:, :, order])
    for a, b in zip(again, results, strict=True):
        assert_unaffected(a, b[:, :, order])


@every_backend
@for_all(windows=grids(shifted=False, divisible=True), steps=st.tuples(*[batches] * 3), seed=seeds)
def test_rolling_by_whole_windows(backend, windows, steps, seed):
    # A window's place in a tile of several changes, and BLAS rounds a row by its place.
    tensors = qkv(windows, seed, dtype=BITWISE[backend] if backend == "sdpa" else torch.float64)
    shifts = [n * p for n, p in zip(steps, windows.window, strict=True)]

    def roll(t):
        return t.unflatten(1, windows.grid).roll(shifts, (1, 2, 3)).flatten(1, 3)

    rolled = attend([roll(t) for t in tensors], windows, backend)
    assert_unaffected(rolled, roll(attend(tensors, windows, backend)))


@every_backend
@for_all(windows=grids(divisible=True), seed=seeds)
def test_shifted_is_roll_mask_unroll(backend, windows, seed):
    """Swin's shifted windows, on (B, N, N) scores of the rolled tokens."""
    tensors = qkv(windows, seed, dtype=torch.float64)
    back = [-s for s in windows.shift]
    q, k, v = (t.unflatten(1, windows.grid).roll(back, (1, 2, 3)).flatten(1, 3) for t in tensors)
    # A window of rolled tokens holds regions that did not meet before the roll.
    group = torch.zeros(windows.grid, dtype=torch.int64)
    for axis, (n, p, s) in enumerate(zip(windows.grid, windows.window, windows.shift, strict=True)):
        place = torch.arange(n)
        own = place // p * 2 + (place >= n - s)
        group = group * 2 * n + own.view([-1 if i == axis else 1 for i in range(3)])
    group = group.flatten()
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * 8**-0.5
    scores = scores.masked_fill(group[:, None] != group, -math.inf)
    out = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)
    out = out.unflatten(1, windows.grid).roll(windows.shift, (1, 2, 3)).flatten(1, 3)
    assert_same_math(attend(tensors, windows, backend), out)


@every_backend
@for_all(windows=grids(), seed=seeds)
def test_linear_in_v(backend, windows, seed):
    q, k, v = qkv(windows, seed, dtype=torch.float64)
    other = torch.randn_like(v)
    a, b = (attend((q, k, t), windows, backend) for t in (v, other))
    assert_same_math(attend((q, k, 2 * v - 3 * other), windows, backend), 2 * a - 3 * b)


@every_backend
@every_op
@for_all(windows=grids(), seed=seeds)
def test_constant_gives_constant(op, backend, windows, seed):
    q, k, v = qkv(windows, seed, dtype=torch.float64)
    v = v[:, :1].expand_as(v)
    out = run(op, (v if op == "window_mean" else q, k, v), windows, backend)
    expected = v[:, :1].flatten(2) if op == "window_mean" else v[:, :1]
    assert_same_math(out, expected.expand_as(out))


@every_backend
@for_all(windows=grids(shifted=False), seed=seeds)
def test_one_window_is_dense_attention(backend, windows, seed):
    # The two kernels sum over tiles of different widths.
    tensors = qkv(windows, seed, dtype=torch.float64 if backend == "triton" else torch.float32)
    whole = WindowGrid(windows.grid, [max(n, 2) for n in windows.grid])
    out, expected = attend(tensors, whole, backend), ptattn.attention(*tensors, backend=backend)
    if backend == "triton":
        assert_same_math(out, expected)
    else:
        assert torch.equal(out, expected)


@every_backend
@for_all(queries=st.integers(1, 9), keys=st.integers(1, 140), seed=seeds)
def test_masked_keys_are_as_if_not_there(backend, queries, keys, seed):
    torch.manual_seed(seed)
    q, k, v = (torch.randn(1, n, 2, 8, dtype=torch.float64) for n in (queries, keys, keys))
    mask = torch.rand(1, keys) < 0.5
    mask[0, seed % keys] = True
    out = ptattn.attention(q, k, v, key_mask=mask, backend=backend)
    kept = [t[:, mask[0]] for t in (k, v)]
    assert_same_math(out, ptattn.attention(q, *kept, backend=backend))


@every_backend
@for_all(windows=grids(), seed=seeds)
def test_proxy_window_of_one_token_is_identity(backend, windows, seed):
    x = qkv(windows, seed)[0].flatten(2)
    assert torch.equal(ptattn.window_mean(x, windows.grid, (1, 1, 1), backend=backend), x)


@every_backend
@every_op
@for_all(windows=grids(), seed=seeds)
def test_inputs_and_surroundings_unchanged(op, backend, windows, seed):
    """The inputs are views into one tensor with other numbers between and around them."""
    torch.manual_seed(seed)
    base = torch.randn(2, windows.num_tokens + 2, 4, 3, 8)
    before = base.clone()
    tensors = base[:, 1:-1, :3].transpose(2, 3).unbind(3)
    grad_out = torch.randn_like(run(op, tensors, windows, backend))
    kept = grad_out.clone()
    run_backward(op, tensors, windows, backend, grad_out)
    assert torch.equal(base, before)
    assert torch.equal(grad_out, kept)


bad_numbers = st.sampled_from([math.nan, math.inf, -math.inf])


@every_backend
@for_all(windows=grids(), which=st.integers(0, 3), bad=bad_numbers, data=st.data(), seed=seeds)
def test_bad_number_stays_in_its_window(backend, windows, which, bad, data, seed):
    """Be it in q, k, v or the upstream gradient."""
    tensors = qkv(windows, seed)
    clean, grad_out = run_backward("window_attention", tensors, windows, backend)
    token = data.draw(st.integers(0, windows.num_tokens - 1), label="token")
    *tensors, grad_out = (t.clone() for t in (*tensors, grad_out))
    (*tensors, grad_out)[which][1, token, 0, 3] = bad
    dirty, _ = run_backward("window_attention", tensors, windows, backend, grad_out)
    ids = windows.window_ids()
    touched = torch.zeros(2, windows.num_tokens, 2, 1, dtype=torch.bool)
    touched[1, ids == ids[token], 0] = True
    for name, a, b in zip(("out", "dq", "dk", "dv"), dirty, clean, strict=True):
        assert torch.equal(a.masked_fill(touched, 0), b.masked_fill(touched, 0)), name


@every_backend
@pytest.mark.parametrize("op", ["window_mean", "attention"])
@for_all(windows=grids(), which=st.integers(0, 2), bad=bad_numbers, seed=seeds)
def test_bad_number_stays_in_its_sample(op, backend, windows, which, bad, seed):
    tensors = qkv(windows, seed)
    clean, grad_out = run_backward(op, tensors, windows, backend)
    tensors = [t.clone() for t in tensors]
    tensors[which][1, 0, 0, 3] = bad
    dirty, _ = run_backward(op, tensors, windows, backend, grad_out)
    for a, b in zip(dirty, clean, strict=True):
        assert torch.equal(a[0], b[0])


@every_backend
@every_op
@for_all(windows=grids(), seed=seeds)
def test_empty_batch(op, backend, windows, seed):
    tensors = qkv(windows, seed, batch=0)
    mask = torch.ones(0, windows.num_tokens, dtype=torch.bool)
    (out, *grads), _ = run_backward(op, tensors, windows, backend, key_mask=mask)
    if op == "window_mean":
        assert out.shape == (0, WindowGrid(windows.grid, windows.window).num_windows, 16)
    else:
        assert out.shape == tensors[0].shape
    for grad in grads:
        assert grad.shape == tensors[0].shape


@every_backend
@for_all(windows=grids(), seed=seeds)
def test_proxies_are_means_over_windows(backend, windows, seed):
    windows = WindowGrid(windows.grid, windows.window)
    x = qkv(windows, seed, dtype=torch.float64)[0].flatten(2)
    ids = windows.window_ids()
    means = [x[:, ids == i].mean(1) for i in range(windows.num_windows)]
    got = ptattn.window_mean(x, windows.grid, windows.window, backend=backend)
    assert_same_math(got, torch.stack(means, 1))
