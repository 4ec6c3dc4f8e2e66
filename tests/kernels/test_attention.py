"""The kernels, in Triton's interpreter, by the rule of tests/support/tolerance.py.

A program costs about 30 ms here, so the quick tier varies one dimension of the matrix at a time
around small cases that between them take every path of the kernels; the long tests cover products.
"""

import math
from functools import partial
from itertools import product

import pytest
import torch

import ptattn
from ptattn.kernels import host, window
from tests.support.cases import DTYPES, EXACT, GRIDS, HALF, HEAD_DIMS, LAYOUTS, normal
from tests.support.checks import (
    SUBSETS,
    check_masked_keys,
    dense,
    each,
    hold,
    key_mask,
    means,
    windows,
)

check_windows = partial(hold, "triton", windows)
check_dense = partial(hold, "triton", dense)
check_means = partial(hold, "triton", means)

# (grid, window, shift). Of more than 64 tokens, so looped over: 7 x 9 in windows of 72 is edges
# only; 8 x 24 has blocks without an empty slot alone, cut windows included; a block is several
# lines, a line of several blocks, or several frames.
LARGE = {
    "edges": ((7, 9), (9, 8), (4, 3)),
    "blocks": ((12, 13), (12, 11), (0, 5)),
    "whole": ((8, 24), (8, 16), (0, 8)),
    "long-lines": ((2, 75), (1, 70), (0, 9)),
    "video": ((3, 6, 7), (2, 6, 6), (1, 3, 2)),
    "frames": ((7, 3, 4), (6, 3, 4), (2, 0, 0)),
    "over-axis": ((5, 6), (8, 16), (4, 8)),
}
LONG = [pytest.param(dtype, marks=pytest.mark.long) for dtype in (torch.float32, torch.bfloat16)]
HALF_AND_LONG = [torch.float16, LONG[0]]
TINY = ((3, 5), (2, 2), (1, 1))
TINY_LARGE = ((3, 5), (9, 8), (4, 4))
SMALL = [name for name, (_, window, _) in GRIDS.items() if math.prod(window) <= 64]
# Queries and keys: few keys in every width of tile, in shares of several tiles; many keys; both
# with several parts in the backward.
FEW = {"16": (5, 7), "64": (63, 40), "128": (63, 111), "tiles": (300, 5), "parts": (600, 20)}
MANY = {"blocks": (33, 130), "rest": (70, 200), "parts": (300, 140)}
one_head = dict(batch=2, heads=1)


@each("case", SMALL)
def test_small_windows(case):
    check_windows(case, **one_head, head_dim=16)


@each("dtype", DTYPES)
def test_small_windows_in_every_type(dtype):
    check_windows(dtype=dtype, **one_head, head_dim=72)


@each("dtype", HALF_AND_LONG)
@pytest.mark.parametrize("grid", [(8, 30), (9, 17)], ids=["four and one", "four and two"])
def test_small_windows_of_several_tiles_a_program(grid, dtype, monkeypatch):
    """The last program walks over what is left."""
    monkeypatch.setattr(window, "FEW_TILES", 1)
    host.forget_plans()
    check_windows((grid, (7, 8), (3, 4)), dtype, batch=2, heads=2, head_dim=24)
    host.forget_plans()


@each("dtype", HALF_AND_LONG)
@each("case", LARGE)
def test_large_windows(case, dtype):
    check_windows(LARGE[case], dtype, batch=1, heads=2, head_dim=24)


@each("dtype", [torch.bfloat16, torch.float64])
def test_large_windows_in_every_type(dtype):
    check_windows(LARGE["edges"], dtype, **one_head, head_dim=72)


@each("head_dim", HEAD_DIMS)
def test_head_dims(head_dim):
    check_windows("image-shifted", torch.float16, batch=1, heads=1, head_dim=head_dim)
    check_dense((17, 9), torch.float32, batch=1, heads=2, head_dim=head_dim)
    check_dense((9, 131), torch.float16, batch=1, heads=1, head_dim=head_dim)


@each("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True], ids=["all-keys", "masked"])
def test_few_keys(masked, dtype):
    check_dense(FEW["128"], dtype, **one_head, head_dim=72, masked=masked)


@pytest.mark.parametrize("lengths", FEW.values(), ids=FEW)
def test_few_keys_sizes(lengths):
    check_dense(lengths, **one_head, head_dim=16, masked=True)


@each("dtype", [torch.float64, torch.float16, *LONG])
@pytest.mark.parametrize("masked", [False, True], ids=["all-keys", "masked"])
def test_many_keys(masked, dtype):
    check_dense(MANY["rest"], dtype, **one_head, head_dim=24, masked=masked)


@pytest.mark.parametrize("lengths", MANY.values(), ids=MANY)
def test_many_keys_sizes(lengths):
    """In half precision, whose larger blocks of keys leave work for several parts."""
    check_dense(lengths, torch.float16, batch=2, heads=1, head_dim=16)


@pytest.mark.parametrize(("batch", "heads"), [(0, 1), (0, 3), (1, 3), (3, 1)])
def test_batches(batch, heads):
    sizes = dict(batch=batch, heads=heads, head_dim=8)
    check_windows(TINY, **sizes)
    check_windows(TINY_LARGE, torch.float16, **sizes)
    check_dense((5, 7), torch.float16, **sizes)
    check_dense((3, 130), torch.float16, **sizes)
    check_means(TINY, torch.float16, batch=batch, channels=8)
    check_means(TINY, torch.float16, batch=batch, channels=8, op="layer_norm_window_mean")


@pytest.mark.parametrize("wanted", SUBSETS)
def test_subsets_of_gradients(wanted):
    check_windows(TINY, **one_head, head_dim=8, wanted=wanted)
    check_windows(TINY_LARGE, batch=1, heads=1, head_dim=8, wanted=wanted)
    check_dense((5, 7), **one_head, head_dim=8, wanted=wanted)
    check_dense((3, 130), batch=1, heads=1, head_dim=8, wanted=wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["inputs", "upstream"])
def test_layouts(which, layout):
    """bfloat16 too: the interpreter is given its strides as they are."""
    layouts = {"layout" if which == "inputs" else "upstream": layout}
    sizes = dict(head_dim=8, **layouts)
    check_windows(TINY, torch.bfloat16, batch=2, heads=2, **sizes)
    check_windows(TINY_LARGE, torch.float16, batch=1, heads=2, **sizes)
    check_dense((5, 7), torch.float16, batch=2, heads=1, masked=True, **sizes)
    check_dense((3, 130), torch.float16, batch=1, heads=2, **sizes)
    check_means(TINY, torch.float16, op="layer_norm_window_mean", channels=24, **layouts)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_means(layout):
    check_means(TINY, torch.float16, channels=24, layout=layout, upstream=layout)


@each("dtype", HALF)
def test_mixed_layouts(dtype):
    layouts = ("packed", "transposed", "expanded")
    check_windows(dtype=dtype, **one_head, head_dim=16, layout=layouts, upstream="step-2")
    check_windows(TINY_LARGE, dtype, **one_head, head_dim=16, layout=layouts)


@each("dtype", DTYPES)
@pytest.mark.parametrize("op", ["window_mean", "layer_norm_window_mean"])
def test_means(op, dtype):
    check_means("ragged", dtype, op=op, batch=1, channels=72)


@each("case", ["video-ragged", "window-is-grid", "window-over-axis", "column", "frames"])
@pytest.mark.parametrize("op", ["window_mean", "layer_norm_window_mean"])
def test_means_of_grids(op, case):
    check_means(case, op=op, batch=1, channels=24)


@pytest.mark.parametrize("op", ["window_mean", "layer_norm_window_mean"])
def test_means_in_parts(op):
    """Windows of more than 32 tokens are shared by several programs."""
    check_means(((7, 13), (7, 10), (0, 0)), op=op, batch=2, channels=16)


def test_norm_of_little_variance():
    """Where eps decides."""
    check_means(TINY, torch.float64, op="layer_norm_window_mean", size=1e-3, channels=40, batch=1)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 2.0])
def test_scales(scale):
    check_windows(TINY, **one_head, head_dim=8, scale=scale)
    check_windows(TINY_LARGE, batch=1, heads=1, head_dim=8, scale=scale)
    check_dense((5, 7), **one_head, head_dim=8, scale=scale)
    check_dense((3, 140), **one_head, head_dim=8, scale=scale, masked=True)


@each("dtype", HALF)
@pytest.mark.parametrize("size", [5, 30])
def test_large_scores(size, dtype):
    """Softmax close to one key, forward and backward."""
    sizes = dict(batch=1, heads=1, head_dim=72, size=size)
    check_windows("image-shifted", dtype, **sizes)
    check_dense((20, 30), dtype, **sizes)
    check_dense((20, 140), dtype, **sizes, wanted=False)
    check_windows(LARGE["edges"], dtype, **sizes, wanted=False)


def test_scores_far_below_zero():
    """Absent keys must not count as score 0."""
    q = torch.full((1, 6, 1, 8), 30.0)
    k = -q + torch.randn(1, 6, 1, 8)
    v = torch.randn(1, 6, 1, 8)
    for run in (
        partial(ptattn.attention, q, k, v),
        partial(ptattn.window_attention, q, k, v, (2, 3), (1, 2)),
        partial(ptattn.window_attention, q, k, v, (2, 3), (9, 9)),
    ):
        torch.testing.assert_close(run(backend="triton"), run(backend="reference"))


def test_first_block_of_keys_absent():
    """The online softmax starts with blocks that hold no key."""
    case = dense((9, 200), **one_head, head_dim=16)
    mask = torch.zeros(2, 200, dtype=torch.bool)
    mask[0, 150], mask[1, 190:] = True, True
    case.options["key_mask"] = mask
    case.check("triton")


@each("dtype", DTYPES)
@pytest.mark.parametrize("keys", [7, 140])
def test_no_key_at_all(keys, dtype):
    """A sample without a key gives zeros and takes no gradient, whatever its k and v hold."""
    q, k, v = (normal((2, n, 1, 16), dtype) for n in (5, keys, keys))
    k[0], v[0] = math.inf, math.nan
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    mask = torch.tensor([[False] * keys, [True] * keys])
    out = ptattn.attention(q, k, v, key_mask=mask, backend="triton")
    grads = torch.autograd.grad(out, (q, k, v), normal(out.shape, dtype))
    for name, t in zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True):
        assert t[0].eq(0).all(), name
        assert t[1].isfinite().all(), name
        assert t[1].ne(0).any(), name


@each("dtype", [torch.float64, torch.float16, *LONG])
@pytest.mark.parametrize("keys", [9, 140])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_masked_keys_may_hold_anything(bad, keys, dtype):
    check_masked_keys("triton", keys, dtype, bad)


@each("dtype", DTYPES)
def test_window_of_one_token(dtype):
    """The output is v, the gradient of v is that of the output, and q and k take none."""
    tensors = [normal((2, 6, 1, 24), dtype).requires_grad_() for _ in "qkv"]
    out = ptattn.window_attention(*tensors, (2, 3), (1, 1), backend="triton")
    grad_out = normal(out.shape, dtype)
    dq, dk, dv = torch.autograd.grad(out, tensors, grad_out)
    assert torch.equal(out, tensors[2]), "out"
    assert torch.equal(dv, grad_out), "dv"
    assert dq.eq(0).all(), "dq"
    assert dk.eq(0).all(), "dk"


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["q", "k", "v", "upstream"])
@each("case", ["image-shifted", "edges", "one-token"])
def test_bad_number_stays_in_its_window(case, which, bad):
    """It shows in outputs and gradients where the formula has it, and nowhere else: also where
    several windows share a tile."""
    known = {**GRIDS, **LARGE, "one-token": ((2, 3), (1, 1), (0, 0))}
    case = windows(known[case], batch=1, heads=1, head_dim=16)
    grid, window, shift = (case.options[name] for name in ("grid", "window", "shift"))
    ids = ptattn.WindowGrid(grid, window, shift).window_ids()
    [*case.tensors, *case.grad_out][which][0, 3, 0, 5] = bad
    ours, gold = case.run("triton"), case.run("reference")
    elsewhere = ids != ids[3]
    for name, t in ours.items():
        assert t[0, elsewhere].isfinite().all(), f"{name}: left its window"
    assert torch.equal(ours["out"].isfinite(), gold["out"].isfinite()), "out"
    for name in ("dq", "dk", "dv"):
        lost = ours[name].isfinite() & ~gold[name].isfinite()
        assert not lost.any(), f"{name}: lost"


@pytest.mark.parametrize("keys", [9, 140])
def test_bad_number_stays_in_its_sample(keys):
    case = dense((5, keys), **one_head, head_dim=16)
    for t in (*case.tensors, *case.grad_out):
        t[0, 2, 0, 5] = math.nan
    for name, t in case.run("triton").items():
        assert t[1].isfinite().all(), name
        assert t[0].isnan().any(), name


@pytest.mark.parametrize("op", ["window_mean", "layer_norm_window_mean"])
def test_bad_number_stays_in_its_mean(op):
    case = means(((2, 6), (2, 3), (0, 0)), op=op, batch=1, channels=8)
    case.tensors[0][0, 4, 5] = math.nan
    found = case.run("triton")
    bad = {"out": (0, 1), "means": (0, 1), "normed": (0, 4)}
    for name in found.keys() & bad.keys():
        rows = found[name].isfinite().all(-1)
        assert not rows[bad[name]], name
        assert rows.sum() == rows.numel() - 1, name


@pytest.mark.parametrize(
    "draw",
    [
        partial(windows, "ragged-shifted"),
        partial(windows, LARGE["edges"]),
        partial(dense, (70, 20), masked=True),
        partial(dense, (20, 140)),
    ],
    ids=["small-windows", "large-windows", "few-keys", "many-keys"],
)
def test_sample_alone_has_the_same_bits(draw):
    case = draw(torch.float16, batch=2, heads=1, head_dim=24)
    whole, alone = case.run("triton"), case.item(1).run("triton")
    for name, t in alone.items():
        assert torch.equal(t[0], whole[name][1]), name


GRADCHECKS = {
    "small-windows": partial(windows, ((2, 3), (2, 2), (1, 1))),
    "large-windows": partial(windows, ((2, 5), (2, 40), (0, 3))),
    "few-keys": partial(dense, (3, 4), masked=True),
    "many-keys": partial(dense, (2, 130), masked=True),
}


@pytest.mark.parametrize("draw", GRADCHECKS.values(), ids=GRADCHECKS)
def test_gradcheck(draw):
    case = draw(torch.float64, batch=2, heads=1, head_dim=8)
    run = partial(getattr(ptattn, case.op), backend="triton", **case.options)
    inputs = tuple(t.requires_grad_() for t in case.tensors)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("op", ["window_mean", "layer_norm_window_mean"])
def test_gradcheck_means(op):
    case = means(((2, 3), (2, 2), (0, 0)), torch.float64, op=op, batch=1, channels=8)
    run = partial(getattr(ptattn.ops, op), backend="triton", **case.options)
    assert torch.autograd.gradcheck(run, case.tensors[0].requires_grad_(), fast_mode=True)


@pytest.mark.long
@each("dtype", DTYPES)
@each("case", GRIDS)
def test_every_grid(case, dtype):
    for head_dim in (8, 72):
        check_windows(case, dtype, batch=1, heads=1, head_dim=head_dim)


@pytest.mark.long
@each("dtype", DTYPES)
@each("head_dim", HEAD_DIMS)
def test_every_head_dim(head_dim, dtype):
    sizes = dict(batch=1, heads=1, head_dim=head_dim)
    check_windows("ragged-shifted", dtype, **sizes)
    check_windows(LARGE["edges"], dtype, **sizes)
    for lengths, masked in product((FEW["64"], FEW["128"], MANY["blocks"]), (False, True)):
        check_dense(lengths, dtype, masked=masked, **sizes)


@pytest.mark.long
@each("dtype", EXACT)
@pytest.mark.parametrize("upstream", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_pair_of_layouts(layout, upstream, dtype):
    options = dict(layout=layout, upstream=upstream, batch=2, heads=1, head_dim=8)
    check_windows(TINY, dtype, **options)
    check_dense((5, 7), dtype, masked=True, **options)
    check_dense((3, 130), dtype, **options)


@pytest.mark.long
@each("dtype", DTYPES)
@each("case", GRIDS)
def test_means_of_every_grid(case, dtype):
    for op, channels in product(("window_mean", "layer_norm_window_mean"), (8, 72)):
        check_means(case, dtype, op=op, batch=1, channels=channels)


def test_masks_are_read_as_given():
    """A mask that is not contiguous."""
    case = dense((5, 20), **one_head, head_dim=8)
    case.options["key_mask"] = key_mask(20, 2).T
    case.check("triton")
