"""The compiled kernels on a GPU: every result against the rule of the tolerance rule, or exact."""

from functools import partial

import pytest
import torch

import ptattn
from ptattn.bench import op_gate, op_workloads
from ptattn.packed import unpacked
from tests.support.cases import GRIDS, HEAD_DIMS, LAYOUTS
from tests.support.checks import dense, each, means, tokens_of, windows
from tests.support.gpu import (
    DEVICE,
    attention,
    bf16,
    codes,
    fp16,
    fp32,
    hold,
    integers,
    needs_gpu,
    normal,
    opposite_pairs,
    orthogonal,
    sharp_scale,
    window_attention,
    with_gradients,
)

pytestmark = needs_gpu

DTYPES = (bf16, fp16, fp32)
# Tokens of a window: a grid that it does not divide, the window, a shift of half of it.
WINDOWS = {
    1: ((1, 7, 9), (1, 1, 1), (0, 0, 0)),
    4: ((1, 7, 9), (1, 2, 2), (0, 1, 1)),
    16: ((1, 11, 13), (1, 4, 4), (0, 2, 2)),
    64: ((1, 19, 21), (1, 8, 8), (0, 4, 4)),
    256: ((1, 19, 35), (1, 16, 16), (0, 8, 8)),
    1024: ((5, 19, 35), (4, 16, 16), (2, 8, 8)),
    # Of blocks without an empty slot, of lines longer than a block, of several frames in a block.
    "whole": ((1, 40, 56), (1, 16, 16), (0, 8, 8)),
    "long-lines": ((2, 3, 210), (2, 2, 200), (1, 0, 70)),
    "frames": ((40, 3, 4), (32, 3, 4), (16, 1, 2)),
    "video": ((7, 9, 11), (4, 4, 4), (2, 2, 2)),
}
KEYS = (7, 64, 65, 128, 129, 300, 768)
# Of the kernel for few keys, whose backward has larger tiles from 65 on, and of the one that loops.
LENGTHS = ((100, 50), (100, 70), (100, 200))
MEANS = {
    "image": ((16, 16), (4, 4)),
    "ragged": ((7, 9), (4, 3)),
    "video": ((5, 7, 9), (4, 2, 4)),
    "one-window": ((40, 40), (40, 40)),
}


@pytest.fixture(autouse=True)
def _exact_products():
    """What eager is held to in fp32."""
    assert not torch.backends.cuda.matmul.allow_tf32


@each("dtype", DTYPES)
@each("head_dim", HEAD_DIMS)
def test_window_head_dims(head_dim, dtype):
    hold(windows, dtype=dtype, head_dim=head_dim)


@each("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=["few", "turned", "loop"])
@each("head_dim", HEAD_DIMS)
def test_dense_head_dims(head_dim, lengths, dtype):
    hold(dense, lengths, dtype, head_dim=head_dim)


@each("dtype", DTYPES)
@pytest.mark.parametrize("tokens", WINDOWS)
def test_window_sizes(tokens, dtype):
    hold(windows, WINDOWS[tokens], dtype, batch=1, heads=2, head_dim=72)


@pytest.mark.parametrize("case", GRIDS)
def test_window_grids(case):
    hold(windows, case, bf16, head_dim=72)


@each("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True], ids=["all-keys", "masked"])
@pytest.mark.parametrize("keys", KEYS)
def test_dense_keys(keys, masked, dtype):
    hold(dense, (200, keys), dtype, heads=2, head_dim=72, masked=masked)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lengths", [None, *LENGTHS], ids=["window", "few", "turned", "loop"])
def test_layouts(lengths, layout):
    sizes = dict(dtype=bf16, head_dim=72, layout=layout, upstream=layout)
    hold(windows, **sizes) if lengths is None else hold(dense, lengths, **sizes)


# Queries and keys of a grid's tokens, of one input, and of two.
PACKED = {
    "windows": ((19, 21), (8, 8), (4, 4)),
    "windows that share tiles": ((7, 9), (2, 2), (1, 1)),
    "windows that loop": ((19, 35), (16, 16), (8, 8)),
    "few keys of one input": 100,
    "many keys of one input": 400,
    "few keys": (1000, 70),
    "many keys": (1000, 200),
}


@each("dtype", DTYPES)
@pytest.mark.parametrize("name", PACKED)
def test_packed_gradients(name, dtype):
    """The gradient of a packed projection has the bits of its slices' stacked, and no stack."""
    sizes, shape = PACKED[name], (2, 72)
    if name.startswith("windows"):
        given = (normal(2, tokens_of(sizes[0]), 3, *shape, dtype=dtype),)
        functions = ptattn.ops.window_attention, ptattn.ops.packed_window_attention
        options = dict(zip(("grid", "window", "shift"), sizes, strict=True))
    else:
        functions, options = (ptattn.ops.attention, ptattn.ops.packed_attention), {}
        lengths = [(sizes, 3)] if isinstance(sizes, int) else [(sizes[0], 1), (sizes[1], 2)]
        given = [normal(2, n, count, *shape, dtype=dtype).squeeze(2) for n, count in lengths]
    of_slices, of_packed = (partial(f, **options, backend="triton") for f in functions)
    g = normal(2, given[0].shape[1], *shape, dtype=dtype)
    expected = with_gradients(lambda *packed: of_slices(*unpacked(*packed)), given, g)
    with torch.profiler.profile() as profile:
        found = with_gradients(of_packed, given, g)
    for got, exact in zip(found, expected, strict=True):
        assert torch.equal(got, exact)
    assert not {"aten::stack", "aten::cat"} & {event.name for event in profile.events()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ["window_mean", "layer_norm_window_mean"])
def test_mean_layouts(op, layout):
    hold(means, dtype=bf16, op=op, channels=72, layout=layout, upstream=layout)


@each("dtype", (bf16, fp32))
def test_negative_scale(dtype):
    hold(windows, dtype=dtype, head_dim=72, scale=-0.3)
    hold(windows, WINDOWS[256], dtype, batch=1, heads=2, head_dim=72, scale=-0.3)
    for lengths in LENGTHS:
        hold(dense, lengths, dtype, head_dim=72, scale=-0.3)


@each("dtype", (bf16, fp16))
@pytest.mark.parametrize("size", [1.0, 5.0, 30.0])
def test_large_scores(size, dtype):
    hold(windows, dtype=dtype, head_dim=72, size=size)
    for lengths in LENGTHS:
        hold(dense, lengths, dtype, head_dim=72, size=size)


@pytest.mark.parametrize("wanted", ["", "q", "v", "kv"])
def test_subsets_of_gradients(wanted):
    hold(windows, dtype=bf16, head_dim=72, wanted=wanted)
    for lengths in LENGTHS:
        hold(dense, lengths, bf16, head_dim=72, wanted=wanted)


@pytest.mark.parametrize(("batch", "heads"), [(0, 1), (0, 3), (1, 1), (1, 3), (2, 1), (3, 3)])
def test_batches(batch, heads):
    sizes = dict(dtype=bf16, batch=batch, head_dim=72)
    hold(windows, heads=heads, **sizes)
    for lengths in LENGTHS:
        hold(dense, lengths, heads=heads, **sizes)
    for op in ("window_mean", "layer_norm_window_mean"):
        hold(means, dtype=bf16, op=op, batch=batch)


@each("dtype", DTYPES)
@pytest.mark.parametrize("channels", [24, 1152])
@pytest.mark.parametrize("case", MEANS)
@pytest.mark.parametrize("op", ["window_mean", "layer_norm_window_mean"])
def test_means(op, case, channels, dtype):
    hold(means, (*MEANS[case], None), dtype, op=op, channels=channels)


# The paper's shapes.


@pytest.mark.parametrize("grid", [(1, 64, 64), (12, 32, 32)], ids=["1024px", "video"])
@pytest.mark.parametrize("op", op_workloads.OPS)
def test_paper_shapes(op, grid):
    """PT-DiT/XL, against the formula in float64, of which the benchmark's gate is made."""
    window = ptattn.geometry.default_window(grid)
    case = op_workloads.Operation(op, "XL", "paper", grid, window, heads=16, head_dim=72, batch=2)
    op_gate.check(case, case.inputs(DEVICE))


@each("window", [(1, 16, 16), (4, 16, 16)])
def test_windows_of_large_images(window):
    grid = (window[0], 128, 128)
    case = op_workloads.Operation("shifted", "XL", "paper", grid, window, heads=4, head_dim=72)
    op_gate.check(case, case.inputs(DEVICE))


# Exact products. Wrong machine code for one tile size shows here, as no rounding hides it.


EXACT_DIMS = (16, 32, 64, 72, 128)


def one_key_each(q, k, v, g, choice, run):
    """With all the weight of a query on one key: out is its value, dv sums over its queries, and
    the scores have no gradient."""
    dtype = v.dtype
    out, dq, dk, dv = with_gradients(run, (q, k, v), g, scale=sharp_scale())
    assert torch.equal(out, v[:, choice])
    assert torch.equal(dv, torch.zeros_like(v).double().index_add(1, choice, g.double()).to(dtype))
    assert not dq.any()
    assert not dk.any()


@each("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(200, 7), (130, 65), (300, 128), (333, 129), (1100, 768)])
@each("head_dim", EXACT_DIMS)
def test_exact_dense(head_dim, lengths, dtype):
    n, m = lengths
    k, v = codes(2, m, 2, head_dim).to(dtype), integers(2, m, 2, head_dim, most=8, dtype=dtype)
    choice = torch.randint(0, m, (n,), device=DEVICE)
    g = integers(2, n, 2, head_dim, most=3, dtype=dtype)
    one_key_each(k[:, choice], k, v, g, choice, attention)


@each("dtype", DTYPES)
@pytest.mark.parametrize("tokens", WINDOWS)
@each("head_dim", EXACT_DIMS)
def test_exact_windows(head_dim, tokens, dtype):
    grid, window, shift = WINDOWS[tokens]
    ids = ptattn.WindowGrid(grid, window, shift).window_ids(DEVICE)
    # Of each window, its tokens in order and the same ones shuffled.
    order, shuffled = (
        ids.argsort(stable=True),
        (ids + torch.rand(len(ids), device=DEVICE)).argsort(),
    )
    choice = torch.empty_like(ids)
    choice[order] = shuffled
    k = codes(2, len(ids), 2, head_dim).to(dtype)
    v = integers(2, len(ids), 2, head_dim, most=8, dtype=dtype)
    g = integers(2, len(ids), 2, head_dim, most=3, dtype=dtype)

    def run(q, k, v, **options):
        return window_attention(q, k, v, grid, window, shift, **options)

    one_key_each(k[:, choice], k, v, g, choice, run)


def equal_weights(op, tensors, g, dtype, **options):
    """With all scores 0: every product is a multiple of a power of two, and exact."""
    run = getattr(ptattn.ops, op)
    options |= dict(scale=0.25)
    gold = with_gradients(run, tensors, g, backend="reference", **options)
    rounded = [t.to(dtype) for t in tensors]
    ours = with_gradients(run, rounded, g.to(dtype), backend="triton", **options)
    for name, mine, exact in zip(("out", "dq", "dk", "dv"), ours, gold, strict=True):
        assert torch.equal(mine, exact.to(dtype)), name
        assert mine.any(), f"{name}: tests nothing"


@each("dtype", (bf16, fp16))
@pytest.mark.parametrize("keys", [16, 64, 128, 256, 1024])
@each("head_dim", EXACT_DIMS)
def test_equal_weights_of_keys(head_dim, keys, dtype):
    q, k = orthogonal(2, 300, keys, 2, head_dim)
    v, g = opposite_pairs(2, keys, 2, head_dim), integers(2, 300, 2, head_dim, most=1)
    equal_weights("attention", (q, k, v), g, dtype)


@each("dtype", (bf16, fp16))
@pytest.mark.parametrize("window", [(1, 2, 2), (1, 4, 4), (1, 8, 8), (1, 16, 16), (4, 16, 16)])
@each("head_dim", EXACT_DIMS)
def test_equal_weights_of_windows(head_dim, window, dtype):
    grid = (window[0], 2 * window[1], 3 * window[2])
    ids = ptattn.WindowGrid(grid, window).window_ids(DEVICE)
    n = len(ids)
    q, k = orthogonal(2, n, n, 2, head_dim)
    v, g = torch.empty_like(q), integers(2, n, 2, head_dim, most=1)
    v[:, ids.argsort(stable=True)] = opposite_pairs(2, n, 2, head_dim)
    equal_weights("window_attention", (q, k, v), g, dtype, grid=grid, window=window)


# TF32.


@pytest.mark.parametrize("keys", [64, 300])
def test_tf32_where_torch_is_allowed_it(keys, monkeypatch):
    q, k, v = (normal(2, n, 2, 72, dtype=fp32) for n in (200, keys, keys))
    exact = attention(q, k, v)
    gold = ptattn.ops.attention(*(t.double() for t in (q, k, v)), backend="reference")
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    rough = attention(q, k, v)

    def error(out):
        return ((out - gold).norm() / gold.norm()).item()

    assert error(exact) < 1e-6
    assert error(exact) < error(rough) < 2e-3
