"""LayerNorm with residual, gate, modulation and window means: the kernels, by the rule of
tests/support/tolerance.py."""

import math
from functools import partial
from itertools import product

import pytest
import torch

import ptattn
from ptattn.kernels import norm
from tests.support.cases import DTYPES, LAYOUTS
from tests.support.checks import each, hold, norms

check = partial(hold, "triton", norms)
OPTIONS = ("residual", "gated", "modulated")
# (grid, window): ragged edges, in parts of several programs, longer than the axis, frames.
GRIDS = {
    "ragged": ((5, 7), (2, 3)),
    "parts": ((7, 13), (7, 10)),
    "over-axis": ((3, 4), (8, 8)),
    "video": ((2, 3, 5), (2, 2, 2)),
}


@each("dtype", DTYPES)
@pytest.mark.parametrize("given", list(product([False, True], repeat=3)), ids=str)
def test_what_is_given(given, dtype):
    check(dtype=dtype, **dict(zip(OPTIONS, given, strict=True)))


@each("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_with_window_means(residual, dtype):
    check((2, (5, 7)), dtype, window=(2, 3), residual=residual)


@each("grid", GRIDS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_window_means_of_grids(gated, grid):
    tokens, window = GRIDS[grid]
    check((2, tokens), window=window, gated=gated)


# One tile and two, odd ones, and more than a program holds twice of.
@pytest.mark.parametrize("channels", [8, 65, 72, 96, 136, 1152, 2056])
def test_channels(channels):
    check((1, 5), torch.float16, channels=channels)
    check((1, (2, 3)), torch.float16, channels=channels, window=(2, 2))


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_batches(batch):
    check((batch, 7), channels=16)
    check((batch, (2, 4)), channels=16, window=(2, 3))


def test_programs_that_sum_several_tiles(monkeypatch):
    """Two tiles of tokens each, the third one, and the last none."""
    monkeypatch.setattr(norm, "MOST_PARTS", 4)
    check((2, 70), torch.float16, channels=8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["layout", "upstream"])
def test_layouts(which, layout):
    check((2, 9), torch.bfloat16, channels=16, **{which: layout})
    check((2, (3, 5)), torch.float16, channels=16, window=(2, 2), **{which: layout})


def test_every_input_of_another_layout():
    case = norms((2, 9), torch.float64, channels=16)
    x, y, gate, shift, scale = case.tensors
    wide = torch.cat((y, y), -1)[..., :16]
    packed = torch.stack((scale, scale), 1)[:, 1]
    case.tensors = [x, wide, gate[:1].expand(2, -1), shift.contiguous(), packed]
    assert len({t.stride(0) for t in case.tensors}) == 5
    case.check("triton")
    case = norms((2, (3, 5)), torch.float64, channels=16, window=(2, 2))
    case.tensors[1] = torch.cat((case.tensors[1],) * 2, -1)[..., :16]
    case.check("triton")


def test_vectors_with_a_step():
    case = norms((2, 9), torch.float64, channels=16)
    for i in (2, 3, 4):
        case.tensors[i] = torch.stack((case.tensors[i],) * 2, -1)[..., 0]
    case.check("triton")


SUBSETS = [
    (),
    ("x",),
    ("y",),
    ("gate",),
    ("shift",),
    ("scale",),
    ("x", "y"),
    ("y", "gate"),
    ("shift", "scale"),
]


@pytest.mark.parametrize("wanted", SUBSETS, ids="-".join)
def test_subsets_of_gradients(wanted):
    check((2, 9), torch.float64, channels=16, wanted=wanted)
    with_means = [name for name in wanted if name in ("x", "y", "gate")]
    check((2, (3, 3)), torch.float64, channels=16, window=(2, 2), wanted=with_means)


@pytest.mark.parametrize("used", [0, 1, 2])
def test_outputs_that_nothing_depends_on(used):
    """Each output alone gives the gradients that it gives beside others with none upstream."""
    case = norms((2, (3, 5)), torch.float64, window=(2, 2))
    for i, g in enumerate(case.grad_out):
        if i != used:
            g.zero_()
    gold = case.run("reference")
    leaves = [t.detach().requires_grad_() for t in case.tensors]
    outs = getattr(ptattn.ops, case.op)(*leaves, backend="triton", **case.options)
    grads = torch.autograd.grad(outs[used], leaves, case.grad_out[used])
    for name, grad in zip(("dx", "dy", "dgate"), grads, strict=True):
        torch.testing.assert_close(grad, gold[name])


def test_little_variance():
    """Where eps decides."""
    check(dtype=torch.float64, size=1e-3, residual=False, eps=1e-4)
    check((1, (3, 5)), torch.float64, size=1e-3, residual=False, window=(2, 2), eps=1e-4)


def test_sum_and_norm_agree():
    """The norm is that of the sum as it was rounded."""
    case = norms((2, 9), torch.float16)
    total, normed = ptattn.ops.residual_layer_norm(*case.tensors, backend="triton")
    again = ptattn.ops.layer_norm(total, *case.tensors[3:], backend="triton")
    assert torch.equal(normed, again)


@pytest.mark.parametrize("window", [None, (2, 2)], ids=["modulated", "means"])
def test_sample_alone_has_the_same_bits(window):
    tokens = 70 if window is None else (7, 10)
    case = norms((3, tokens), torch.float16, window=window)
    whole, alone = case.run("triton"), case.item(1).run("triton")
    for name, t in alone.items():
        assert torch.equal(t[0], whole[name][1]), name


@pytest.mark.parametrize("which", range(5), ids=["x", "y", "gate", "shift", "scale"])
def test_bad_number_stays_where_it_belongs(which):
    """In its token, if it is of a token; the vectors' gradients are sums over a sample's tokens."""
    case = norms((2, 9), torch.float32)
    clean = case.run("triton")
    case.tensors = [t.clone() for t in case.tensors]
    case.tensors[which][(1, 4, 5) if which < 2 else (1, 5)] = math.nan
    dirty = case.run("triton")
    for name, t in dirty.items():
        assert torch.equal(t[0], clean[name][0]), f"{name}: left its sample"
        if which < 2 and t.ndim == 3:
            others = torch.arange(9) != 4
            assert torch.equal(t[1, others], clean[name][1, others]), f"{name}: left its token"
    assert dirty["normed"][1, 4].isnan().any()


@pytest.mark.parametrize("window", [None, (2, 2)], ids=["modulated", "means"])
def test_gradcheck(window):
    case = norms((2, 6 if window is None else (2, 3)), torch.float64, channels=8, window=window)
    run = partial(getattr(ptattn.ops, case.op), backend="triton", **case.options)
    inputs = tuple(t.detach().clone().requires_grad_() for t in case.tensors)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.long
@each("dtype", DTYPES)
@pytest.mark.parametrize("channels", [64, 100, 288, 384, 640, 864, 1440])
@pytest.mark.parametrize("given", list(product([False, True], repeat=3)), ids=str)
def test_everything(given, channels, dtype):
    options = dict(zip(OPTIONS, given, strict=True))
    check((2, 11), dtype, channels=channels, **options)
    for tokens, window in GRIDS.values():
        check((1, tokens), dtype, channels=channels, window=window, **options)
