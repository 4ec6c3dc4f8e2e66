"""Attention of packed projections: the gradient of one is written as one, with the same bits.

torch's backward of a projection's slices stacks three gradients: a copy of all, and a launch.
"""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from ptattn import layers, ops
from ptattn.geometry import WindowGrid
from ptattn.kernels import configs, host
from ptattn.packed import unpacked
from tests.support.cases import normal
from tests.support.checks import key_mask, tokens_of

# Grid, window, shift; or queries and keys: those of one input, and of two.
WINDOWS = {
    "windows that share tiles": ((3, 5), (2, 2), (1, 1)),
    "windows alone in tiles": ((7, 9), (6, 9), (3, 4)),
    "windows that loop": ((3, 5), (9, 8), (4, 4)),
}
SELF = {"few keys": (9, 9), "many keys": (130, 130)}
CROSS = {
    "to few keys": (9, 5),
    "to few keys in parts": (260, 5),
    "to many keys": (5, 130),
    "to many keys in parts": (260, 130),
}
CASES = [*WINDOWS, *SELF, *CROSS]
LAYOUTS = {
    "contiguous": lambda draw, shape: draw(*shape),
    "transposed": lambda draw, shape: draw(shape[0], *shape[:0:-1]).permute(0, 4, 3, 2, 1),
    "tokens last": lambda draw, shape: draw(shape[2], shape[1], shape[0], *shape[3:]).transpose(
        0, 2
    ),
    "samples between": lambda draw, shape: draw(2 * shape[0], *shape[1:])[::2],
    "part of a row": lambda draw, shape: draw(*shape[:2], shape[2] + 1, *shape[3:])[:, :, 1:],
    "step 2": lambda draw, shape: draw(*shape[:-1], 2 * shape[-1])[..., ::2],
    "expanded": lambda draw, shape: draw(1, shape[1], shape[2], 1, shape[4]).expand(shape),
}


def drawn(name, dtype=torch.float16, batch=2, layout="contiguous", heads=1, head_dim=16, mask=True):
    """The call of slices, that of packed tensors, these, and an upstream gradient."""

    def packed(length, count):
        shape = (batch, length, count, heads, head_dim)
        return LAYOUTS[layout](lambda *s: normal(s, dtype), shape)

    if name in WINDOWS:
        given = (packed(tokens_of(WINDOWS[name][0]), 3),)
        functions = ops.window_attention, ops.packed_window_attention
        rest = dict(zip(("grid", "window", "shift"), WINDOWS[name], strict=True))
    else:
        n, m = SELF.get(name) or CROSS[name]
        given = (packed(n, 3),) if name in SELF else (packed(n, 1)[:, :, 0], packed(m, 2))
        functions = ops.attention, ops.packed_attention
        rest = dict(key_mask=key_mask(batch, m) if mask and batch else None)
    grad_out = normal((batch, given[0].shape[1], heads, head_dim), dtype)
    return *(partial(f, **rest, backend="triton") for f in functions), given, grad_out


def both(of_slices, of_packed, given, grad_out, wanted=None):
    """Outputs and gradients of what is packed: by its slices, which torch stacks, and as one."""
    found = []
    for function in (lambda *packed: of_slices(*unpacked(*packed)), of_packed):
        leaves = [t.detach().requires_grad_(wanted is None or i in wanted)
                  for i, t in enumerate(given)]  # fmt: skip
        out = function(*leaves)
        sources = [t for t in leaves if t.requires_grad]
        found.append((out.detach(), *torch.autograd.grad(out, sources, grad_out)))
    return found


def same(of_slices, of_packed):
    assert len(of_slices) == len(of_packed)
    for expected, got in zip(of_slices, of_packed, strict=True):
        assert torch.equal(got, expected)
        assert got.isfinite().all()


@pytest.mark.parametrize("name", CASES)
def test_a_packed_gradient_is_that_of_the_slices(name):
    same(*both(*drawn(name)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_packed_projection(layout):
    for name in ("windows that share tiles", "to few keys"):
        case = drawn(name, torch.bfloat16, 2, layout, heads=2, head_dim=8)
        same(*both(*case))


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("name", ["windows that share tiles", "windows that loop", "to few keys"])
def test_batches_of_packed_projections(name, batch):
    same(*both(*drawn(name, torch.float32, batch)))


@pytest.mark.parametrize("wanted", [(0,), (1,)], ids=["queries", "keys and values"])
@pytest.mark.parametrize("name", ["to few keys in parts", "to many keys"])
def test_one_of_two_projections_takes_a_gradient(name, wanted):
    same(*both(*drawn(name, batch=1), wanted=wanted))


# That nothing is copied.


def written(function, given, grad_out):
    """The gradients, and by name every tensor that a backward kernel was to write; none is run."""
    leaves = [t.detach().requires_grad_() for t in given]
    with host.record("sm90") as launches:
        out = function(*leaves)
        launches.clear()
        gradients = torch.autograd.grad(out, leaves, grad_out)
    tensors = {}
    for launch in launches:
        names = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
        tensors |= {n: t for n, t in names.items() if n in ("dq", "dk", "dv")}
        if launch.kernel.__name__ == "sum_splits":
            tensors["sum"] = names["out"]
    return gradients, tensors, [launch.kernel.__name__ for launch in launches]


def places(t):
    return [s.data_ptr() for s in t.unbind(2)]


@pytest.mark.parametrize("name", [*WINDOWS, "few keys", "many keys"])
def test_kernels_write_the_gradient_of_one_projection(name):
    _, of_packed, given, grad_out = drawn(name)
    (gradient,), tensors, _ = written(of_packed, given, grad_out)
    assert [tensors[n].data_ptr() for n in ("dq", "dk", "dv")] == places(gradient)
    assert gradient.is_contiguous()


@pytest.mark.parametrize("name", ["to few keys", "to many keys"])
def test_kernels_write_the_gradient_of_keys_and_values(name):
    _, of_packed, given, grad_out = drawn(name)
    (dq, dkv), tensors, _ = written(of_packed, given, grad_out)
    assert [tensors[n].data_ptr() for n in ("dq", "dk", "dv")] == [dq.data_ptr(), *places(dkv)]


@pytest.mark.parametrize("name", ["to few keys in parts", "to many keys in parts"])
def test_parts_of_keys_and_values_are_summed_in_one_launch_to_where_they_go(name):
    of_slices, of_packed, given, grad_out = drawn(name)
    gradients, tensors, kernels = written(of_packed, given, grad_out)
    assert kernels.count("sum_splits") == 1
    assert tensors["sum"].data_ptr() == gradients[1].data_ptr()
    apart = written(lambda *packed: of_slices(*unpacked(*packed)), given, grad_out)[2]
    assert apart.count("sum_splits") == 2


def test_parts_of_one_projection_are_summed_to_where_they_go(monkeypatch):
    """Between others' rows; in blocks of 128 keys, as those of few queries are not shared else."""
    blocks = {"flash_backward_kv": [dict(warps=4, rows=64, keys=128)]}
    for arch in ("cpu", "sm90"):
        monkeypatch.setitem(configs.table(), arch, blocks)
    host.forget_plans()
    monkeypatch.setitem(SELF, "in parts", (260, 260))
    case = drawn("in parts", batch=1, mask=False)
    (gradient,), tensors, kernels = written(*case[1:])
    same(*both(*case))
    host.forget_plans()
    assert kernels.count("sum_splits") == 1
    assert tensors["sum"].data_ptr() == places(gradient)[1]


def test_no_layer_stacks_gradients():
    """A training step of a half of a block, as the profiler sees it, which changes nothing."""
    half = layers.TextureComplement(16, 2, backend="triton")
    context = layers.CrossAttention(16, 2, backend="triton")
    x = torch.randn(2, 15, 16, requires_grad=True)
    with host.record("sm90"), torch.profiler.profile() as profile:
        context(half(x, WindowGrid((3, 5), (2, 2))), x).sum().backward()
    names = [event.name for event in profile.events()]
    assert not {"aten::stack", "aten::cat", "UnbindBackward0"} & set(names)
    for operation in ("window_attention", "attention"):
        assert names.count(f"ptattn::{operation}_backward") == 1 + (operation != "attention")


# What autograd promises.


def test_gradients_accumulate():
    """Into a leaf's, twice, from a graph that is kept; and no two share memory."""
    _, of_packed, (qkv,), grad_out = drawn("windows that share tiles", torch.float32)
    leaf = qkv.requires_grad_()
    out = of_packed(leaf)
    once = [torch.autograd.grad(out, leaf, grad_out, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*once)
    assert once[0].data_ptr() != once[1].data_ptr()
    for _ in range(2):
        out.backward(grad_out, retain_graph=True)
    assert torch.equal(leaf.grad, 2 * once[0])
    assert torch.equal(*once)


def test_one_projection_for_two_attentions():
    of_slices, of_packed, given, grad_out = drawn("to few keys", torch.float32)
    twice = [lambda *g, f=f: f(*g) + f(*g).square() for f in (of_slices, of_packed)]
    same(*both(*twice, given, grad_out))


def test_a_projection_changed_after_the_forward_is_noticed():
    _, of_packed, (qkv,), grad_out = drawn("few keys")
    qkv = qkv.requires_grad_() * 1
    out = of_packed(qkv)
    qkv.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(grad_out)


@pytest.mark.parametrize("name", ["windows that share tiles", "few keys", "to many keys"])
def test_double_backward_is_refused(name):
    _, of_packed, given, grad_out = drawn(name, torch.float32)
    leaves = [t.requires_grad_() for t in given]
    grads = torch.autograd.grad(of_packed(*leaves), leaves, grad_out, create_graph=True)
    for grad in grads:
        with pytest.raises(RuntimeError, match=r"ptattn\.\w+ has no double backward"):
            torch.autograd.grad(grad.square().sum(), leaves[0], retain_graph=True)


@pytest.mark.parametrize("name", ["windows that share tiles", "few keys", "to few keys"])
def test_what_observes_sees_the_same(name):
    """Dispatch modes in the forward, the backward or both; batches of gradients."""
    _, of_packed, given, grad_out = drawn(name, torch.float32)
    leaves = [t.requires_grad_() for t in given]
    expected = torch.autograd.grad(of_packed(*leaves), leaves, grad_out)
    with FlopCounterMode(display=False) as counter:
        out = of_packed(*leaves)
    forward = counter.get_total_flops()
    grads = [torch.autograd.grad(out, leaves, grad_out, retain_graph=True)]
    with FlopCounterMode(display=False) as counter:
        grads.append(torch.autograd.grad(of_packed(*leaves), leaves, grad_out))
    assert counter.get_total_flops() == forward * 7 / 2
    upstream = torch.stack([grad_out, 2 * grad_out])
    batches = torch.autograd.grad(of_packed(*leaves), leaves, upstream, is_grads_batched=True)
    grads.append([t[0] for t in batches])
    for found in grads:
        for got, exact in zip(found, expected, strict=True):
            assert torch.equal(got, exact)


def test_packed_under_autocast_and_checkpointing():
    of_slices, of_packed, given, grad_out = drawn("to few keys", torch.float32)

    def cast(function):
        def run(*tensors):
            with torch.autocast("cpu", torch.bfloat16):
                return function(*tensors).float()

        return run

    same(*both(cast(of_slices), cast(of_packed), given, grad_out))
    same(*both(of_slices, partial(checkpoint, of_packed, use_reentrant=False), given, grad_out))
    leaves = [t.detach().requires_grad_() for t in given]
    checkpoint(of_packed, *leaves, use_reentrant=True).backward(grad_out)
    same(both(of_slices, of_packed, given, grad_out)[0][1:], [t.grad for t in leaves])


def test_gradcheck_of_packed_projections():
    for name in ("windows that share tiles", "few keys"):
        _, of_packed, given, _ = drawn(name, torch.float64, head_dim=8)
        given = tuple(t.requires_grad_() for t in given)
        assert torch.autograd.gradcheck(of_packed, given, fast_mode=True)


# On every backend, and what is refused.


@pytest.mark.parametrize("backend", ["reference", "sdpa", "triton"])
def test_packed_projections_on_every_backend(backend):
    for name in ("windows that share tiles", "few keys", "to few keys"):
        of_slices, of_packed, given, grad_out = drawn(name, torch.float32, mask=False)
        both_on = [partial(f, backend=backend) for f in (of_slices, of_packed)]
        same(*both(*both_on, given, grad_out))


def test_a_projection_that_is_not_packed_is_named():
    q, kv, qkv = torch.randn(1, 6, 2, 8), torch.randn(1, 6, 2, 2, 8), torch.randn(1, 6, 3, 2, 8)
    for call, message in (
        (
            lambda: ops.packed_attention(q),
            r"q must have shape \(B, N, 3, H, D\); got \(1, 6, 2, 8\)",
        ),
        (
            lambda: ops.packed_attention(kv),
            r"q must have shape \(B, N, 3, H, D\); got \(1, 6, 2, 2",
        ),
        (lambda: ops.packed_attention(qkv, kv), r"q must have shape \(B, N, H, D\); got"),
        (lambda: ops.packed_attention(q, qkv), r"kv must have shape \(B, N, 2, H, D\); got"),
        (lambda: ops.packed_attention(q, kv[..., :4]), "must agree in B, H and D"),
        (lambda: ops.packed_window_attention(kv, (2, 3), (2, 2)), r"qkv must have shape \(B, N, 3"),
        (lambda: ops.packed_window_attention(qkv, (2, 4), (2, 2)), "has 6 tokens, but grid"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="q must be a tensor"):
        ops.packed_attention(None)
    mean = qkv[:, :, 2].mean(1, keepdim=True).expand(1, 6, 2, 8)
    torch.testing.assert_close(ops.packed_attention(qkv, scale=0.0), mean)
