"""Every wrong input raises and says which argument, what it got and what was expected."""

from contextlib import contextmanager

import pytest
import torch

import ptattn
from ptattn import ProxyAttention, WindowGrid

OPS = ("window_mean", "attention", "window_attention")
GRID, WINDOW = (3, 4), (2, 2)
every_op = pytest.mark.parametrize("op", OPS)
on_a_grid = pytest.mark.parametrize("op", ["window_mean", "window_attention"])


def names(op):
    return ("x",) if op == "window_mean" else ("q", "k", "v")


def good_tensors(op):
    shape = (2, 12, 8) if op == "window_mean" else (2, 12, 2, 4)
    return {name: torch.randn(shape) for name in names(op)}


def call(op, **given):
    """The operation on good inputs, except for those given."""
    good = good_tensors(op)
    if op != "attention":
        good |= dict(grid=GRID, window=WINDOW)
    return getattr(ptattn, op)(**(good | given))


def layer(**options):
    return ProxyAttention(**(dict(dim=8, num_heads=2, window=WINDOW) | options))


@contextmanager
def raises(error, *parts):
    """The error, with every part in its message."""
    with pytest.raises(error) as caught:
        yield
    for part in parts:
        assert str(part) in str(caught.value)


@every_op
@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa"])
def test_good_inputs_run(op, backend):
    assert call(op, backend=backend).shape[0] == 2


# Grids, windows, shifts.

BAD_TRIPLES = {
    "one": (12,),
    "four": (1, 1, 3, 4),
    "empty": (),
    "float": (3.0, 4),
    "bool": (True, 12),
    "string": "34",
    "strings": ("3", "4"),
    "nones": (None, None),
    "number": 12,
    "tensor": torch.tensor([3, 4]),
    "set": {3, 4},
}
# Where None does not stand for a default.
BAD_OR_NONE = BAD_TRIPLES | {"none": None}
bad_triples = pytest.mark.parametrize("value", BAD_TRIPLES.values(), ids=BAD_TRIPLES)
bad_or_none = pytest.mark.parametrize("value", BAD_OR_NONE.values(), ids=BAD_OR_NONE)
EXPECTED = "2 or 3 integers, (h, w) or (f, h, w)"


@on_a_grid
@pytest.mark.parametrize("name", ["grid", "window"])
@bad_or_none
def test_not_two_or_three_integers(op, name, value):
    with raises(ValueError, name, EXPECTED, repr(value)):
        call(op, **{name: value})


@bad_or_none
def test_shift_is_not_two_or_three_integers(value):
    with raises(ValueError, "shift", EXPECTED, repr(value)):
        call("window_attention", shift=value)


@pytest.mark.parametrize("name", ["window", "proxy_window", "grid"])
@bad_triples
def test_layer_takes_two_or_three_integers(name, value):
    with raises(ValueError, name.removeprefix("proxy_"), EXPECTED, repr(value)):
        layer(**{name: value})


@on_a_grid
@pytest.mark.parametrize("name", ["grid", "window"])
@pytest.mark.parametrize("value", [(0, 12), (-3, -4), (1, 3, 0)], ids=str)
def test_not_positive(op, name, value):
    with raises(ValueError, name, ">= 1", value):
        call(op, **{name: value})


@pytest.mark.parametrize("name", ["window", "proxy_window", "grid"])
def test_layer_wants_positive(name):
    with raises(ValueError, name.removeprefix("proxy_"), ">= 1", (0, 4)):
        layer(**{name: (0, 4)})


def test_negative_shift():
    with raises(ValueError, "shift", ">= 0", (-1, 0)):
        call("window_attention", shift=(-1, 0))


@pytest.mark.parametrize("shift", [(0, 2, 0), (0, 0, 2), (0, 0, 7), (1, 0, 0)], ids=str)
def test_shift_not_below_window(shift):
    with raises(ValueError, "shift", "[0, window)", shift, "window (1, 2, 2)"):
        call("window_attention", shift=shift)


def test_window_grid_itself():
    with raises(ValueError, "grid", EXPECTED):
        WindowGrid((3, True), WINDOW)
    with raises(ValueError, "shift", "[0, window)"):
        WindowGrid(GRID, WINDOW, (0, 2))
    with raises(ValueError, "grid", EXPECTED):
        ptattn.geometry.default_window((16.0, 16))


@on_a_grid
def test_grid_does_not_hold_the_tokens(op):
    with raises(ValueError, names(op)[0], "12 tokens", "(1, 3, 5)", "15"):
        call(op, grid=(3, 5))


# Tensors: type, dtype, shape, agreement.


@every_op
@pytest.mark.parametrize("value", [None, 1.0, [[1.0]]], ids=["none", "number", "list"])
def test_not_a_tensor(op, value):
    for name in names(op):
        with raises(TypeError, name, "tensor", type(value).__name__):
            call(op, **{name: value})


UNSUPPORTED = (torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64)


@every_op
@pytest.mark.parametrize("dtype", UNSUPPORTED, ids=str)
def test_unsupported_dtype(op, dtype):
    good = good_tensors(op)
    for name in names(op):
        with raises(TypeError, name, "float16, bfloat16, float32 or float64", dtype):
            call(op, **{name: good[name].to(dtype)})
    with raises(TypeError, "float16, bfloat16, float32 or float64", dtype):
        call(op, **{name: t.to(dtype) for name, t in good.items()})


@pytest.mark.parametrize("op", ["attention", "window_attention"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_mixed_dtypes(op, name):
    with raises(ValueError, "q, k, v", "one dtype", f"{name} torch.float64", "torch.float32"):
        call(op, **{name: good_tensors(op)[name].double()})


@pytest.mark.parametrize("op", ["attention", "window_attention"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_mixed_devices(op, name):
    with raises(ValueError, "q, k, v", "one device", f"{name} meta", "cpu"):
        call(op, **{name: good_tensors(op)[name].to("meta")})


@every_op
def test_wrong_number_of_axes(op):
    shape = "(B, N, C)" if op == "window_mean" else "(B, N, H, D)"
    for name in names(op):
        with raises(ValueError, name, shape, (2, 96)):
            call(op, **{name: torch.randn(2, 96)})


@every_op
def test_empty_but_for_the_batch(op):
    shape = (2, 12, 0) if op == "window_mean" else (2, 12, 2, 0)
    with raises(ValueError, names(op)[0], "empty in its batch only", shape):
        call(op, **dict.fromkeys(names(op), torch.randn(shape)))


def test_keys_and_values_differ():
    with raises(ValueError, "k and v", (2, 11, 2, 4), (2, 12, 2, 4)):
        call("attention", k=torch.randn(2, 11, 2, 4))


@pytest.mark.parametrize("shape", [(1, 7, 2, 4), (2, 7, 1, 4), (2, 7, 2, 8)], ids=str)
def test_queries_and_keys_differ(shape):
    with raises(ValueError, "q (B, N, H, D)", "B, H and D", (2, 12, 2, 4), shape):
        call("attention", k=torch.randn(shape), v=torch.randn(shape))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_window_attention_is_of_one_shape(name):
    with raises(ValueError, "q, k and v", "one shape", (2, 12, 2, 4), (2, 11, 2, 4)):
        call("window_attention", **{name: torch.randn(2, 11, 2, 4)})


@pytest.mark.parametrize("op", ["attention", "window_attention"])
@pytest.mark.parametrize("scale", ["1", True, torch.tensor(1.0)], ids=["string", "bool", "tensor"])
def test_scale_is_no_number(op, scale):
    with raises(TypeError, "scale", "number", repr(scale)):
        call(op, scale=scale)


# Key mask.


@pytest.mark.parametrize("shape", [(12,), (2, 11), (1, 12), (12, 2), (2, 12, 1)], ids=str)
def test_key_mask_of_another_shape(shape):
    with raises(ValueError, "key_mask", "(B, M) = (2, 12)", shape):
        call("attention", key_mask=torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8], ids=str)
def test_key_mask_of_another_dtype(dtype):
    with raises(TypeError, "key_mask", "bool", dtype):
        call("attention", key_mask=torch.ones(2, 12, dtype=dtype))


@pytest.mark.parametrize("value", [True, [[True] * 12] * 2], ids=["bool", "list"])
def test_key_mask_is_no_tensor(value):
    with raises(TypeError, "key_mask", "bool tensor", type(value).__name__):
        call("attention", key_mask=value)


def test_key_mask_on_another_device():
    with raises(ValueError, "key_mask", "cpu", "meta"):
        call("attention", key_mask=torch.ones(2, 12, dtype=torch.bool, device="meta"))


# Backends.


@every_op
@pytest.mark.parametrize("backend", ["cuda", "", "SDPA", None])
def test_unknown_backend(op, backend):
    with raises(ValueError, "backend", "reference, sdpa, triton, auto", repr(backend)):
        call(op, backend=backend)


def test_layer_with_unknown_backend():
    with raises(ValueError, "backend", "reference, sdpa, triton, auto", "'cuda'"):
        layer(backend="cuda")


@every_op
def test_backend_that_cannot_run_gives_every_reason(op, monkeypatch):
    """It never falls back to another one."""
    monkeypatch.setattr("ptattn.backends.triton.INTERPRETED", False)
    inputs = {name: t.double() for name, t in good_tensors(op).items()}
    reasons = ["on the CPU", "TRITON_INTERPRET=1", "float64"]
    if op != "window_mean":
        reasons.append("multiple of 8 up to 128; got 4")
    with raises(RuntimeError, "'triton'", *reasons):
        call(op, backend="triton", **inputs)


def test_triton_limits(monkeypatch):
    monkeypatch.setattr("ptattn.backends.triton.INTERPRETED", True)
    x = torch.randn(1, 1, 2**14 + 8)
    with raises(RuntimeError, "at most 16384 channels; got 16392"):
        ptattn.window_mean(x, (1, 1), (1, 1), backend="triton")
    with raises(RuntimeError, "at most 1048576 tokens; got (1, 2048, 1024)"):
        ptattn.window_mean(x[..., :8], (1, 1), (2048, 1024), backend="triton")
    for width in (4, 12, 136):
        q = torch.randn(1, 2, 1, width)
        with raises(RuntimeError, f"multiple of 8 up to 128; got {width}"):
            ptattn.attention(q, q, q, backend="triton")


def test_broken_triton_is_a_reason(monkeypatch):
    def broken(name):
        raise ImportError("no triton here")

    monkeypatch.setattr("ptattn.backends.load", broken)
    x = torch.randn(1, 4, 8)
    assert ptattn.explain("window_mean", x).reasons["triton"] == (
        "triton cannot be imported: no triton here",
    )


@every_op
def test_explain(op):
    inputs = [t.double() for t in good_tensors(op).values()]
    found = ptattn.explain(op, *inputs)
    assert (found.op, found.backend) == (op, "sdpa")
    assert list(found.reasons) == ["reference", "sdpa", "triton"]
    assert found.reasons["reference"] == found.reasons["sdpa"] == ()
    lines = str(found).splitlines()
    assert lines[:3] == [f"{op}: auto takes sdpa", "  reference: can run", "  sdpa: can run"]
    assert lines[3] == "  triton: " + ("; ".join(found.reasons["triton"]) or "can run")
    by_name = dict(zip(names(op), inputs, strict=True))
    assert ptattn.explain(op, **by_name) == found


def test_explain_unknown_operation():
    names = "window_mean, layer_norm, residual_layer_norm, layer_norm_window_mean, "
    names += "residual_layer_norm_window_mean, attention, window_attention"
    with raises(ValueError, "op", names, "'softmax'"):
        ptattn.explain("softmax")


# ProxyAttention.


@pytest.mark.parametrize(("dim", "heads"), [(10, 4), (8, 3), (0, 1), (8, 0), (-8, 2)], ids=str)
def test_dim_not_a_multiple_of_heads(dim, heads):
    with raises(ValueError, "dim", "multiple of num_heads", dim, heads):
        layer(dim=dim, num_heads=heads)


@pytest.mark.parametrize(
    "shape", [(8,), (12, 8), (2, 12, 7), (2, 3, 4, 16), (1, 2, 1, 3, 4, 8)], ids=str
)
def test_layer_input_of_another_shape(shape):
    with raises(ValueError, "x", "(B, N, 8), (B, h, w, 8) or (B, f, h, w, 8)", shape):
        layer(grid=GRID)(torch.randn(shape))


def test_layer_without_a_grid():
    with raises(ValueError, "grid", "(f, h, w) or (h, w)"):
        layer()(torch.randn(2, 12, 8))


def test_layer_grid_does_not_hold_the_tokens():
    for attn, grid in ((layer(), (3, 5)), (layer(grid=(3, 5)), None)):
        with raises(ValueError, "12 tokens", "(1, 3, 5)", "15"):
            attn(torch.randn(2, 12, 8), grid=grid)


@pytest.mark.parametrize("grid", [(4, 3), (12, 1), (3, 1, 4)], ids=str)
def test_layer_grid_contradicts_the_shape(grid):
    with raises(ValueError, "(3, 4)", grid):
        layer()(torch.randn(2, 3, 4, 8), grid=grid)


@pytest.mark.parametrize("shape", [(2, 12, 8), (2, 3, 4, 8), (2, 1, 3, 4, 8)], ids=str)
@bad_triples
def test_layer_call_takes_two_or_three_integers(shape, value):
    with raises(ValueError, "grid"):
        layer()(torch.randn(shape), grid=value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_layer_input_of_another_dtype(dtype):
    with raises(
        ValueError, "x must be torch.float32, as the weights are", "autocast", f"got {dtype}"
    ):
        layer()(torch.randn(2, 3, 4, 8, dtype=dtype))
