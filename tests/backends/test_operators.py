"""The kernels as torch operators: registration, torch.compile, autocast, transforms, memory."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import ptattn
from ptattn.backends import triton  # noqa: F401  registers the operators
from tests.support.checks import dense, key_mask, means, norms, windows

TINY = ((3, 5), (2, 2), (1, 1))
TINY_LARGE = ((3, 5), (9, 8), (4, 4))
attend = partial(ptattn.window_attention, grid=(3, 5), window=(2, 2), shift=(1, 1))
OPS = torch.ops.ptattn


def tokens(batch, n, layout="contiguous", requires_grad=True, head_dim=8):
    """(B, N, 1, D), with layout="step-2" of every other channel."""
    wide = torch.randn(batch, n, 1, head_dim * (2 if layout == "step-2" else 1))
    x = wide[..., ::2] if layout == "step-2" else wide
    return x.detach().requires_grad_(requires_grad)


@pytest.mark.parametrize("keys", [7, 130])
@pytest.mark.parametrize(("batch", "layout"), [(2, "contiguous"), (1, "step-2"), (0, "contiguous")])
def test_opcheck_attention(batch, layout, keys):
    mask = key_mask(batch, keys) if keys == 7 else None
    q, k, v = (tokens(batch, n, layout) for n in (3, keys, keys))
    opcheck(OPS.attention.default, (q, k, v, mask, 0.3))
    if batch:
        q, k, v = (t.detach() for t in (q, k, v))
        out, lse = OPS.attention(q, k, v, mask, 0.3)
        kept = out if lse.ndim == 3 else None
        arguments = (q, k, v, mask, kept, lse, torch.randn_like(out), 0.3, [True, False, True])
        opcheck(OPS.attention_backward.default, arguments)


@pytest.mark.parametrize("window", [(1, 2, 2), (1, 9, 8)], ids=str)
@pytest.mark.parametrize("batch", [0, 1])
def test_opcheck_window_attention(batch, window):
    q, k, v = (tokens(batch, 15) for _ in "qkv")
    geometry = ([1, 3, 5], list(window), [0, 1, 1], 0.3)
    opcheck(OPS.window_attention.default, (q, k, v, *geometry))
    q, k, v = (t.detach() for t in (q, k, v))
    out, lse = OPS.window_attention(q, k, v, *geometry)
    kept = out if lse.ndim == 3 else None
    grad, (scale,) = torch.randn_like(out), geometry[3:]
    arguments = (q, k, v, kept, lse, grad, *geometry[:3], scale, [False, True, True])
    opcheck(OPS.window_attention_backward.default, arguments)


@pytest.mark.parametrize(("batch", "layout"), [(1, "contiguous"), (1, "step-2"), (0, "contiguous")])
def test_opcheck_means(batch, layout):
    x = tokens(batch, 15, layout)[:, :, 0].detach().requires_grad_()
    geometry = ([1, 3, 5], [1, 2, 2])
    opcheck(OPS.window_mean.default, (x, *geometry))
    opcheck(OPS.window_mean_backward.default, (torch.randn(batch, 6, 8), *geometry))


@pytest.mark.parametrize("with_means", [False, True], ids=["modulated", "means"])
@pytest.mark.parametrize(("batch", "layout"), [(2, "contiguous"), (1, "step-2"), (0, "contiguous")])
def test_opcheck_norm(batch, layout, with_means):
    x, y = (tokens(batch, 15, layout)[:, :, 0].detach().requires_grad_() for _ in "xy")
    gate, shift, scale = torch.randn(3, batch, 8, requires_grad=True).unbind()
    geometry = ([1, 3, 5], [1, 2, 2]) if with_means else (None, None)
    vectors = (None, None) if with_means else (shift, scale)
    opcheck(OPS.norm.default, (x, y, gate, *vectors, *geometry, 1e-6, x.dtype))
    x, y, gate, scale = (t.detach() for t in (x, y, gate, scale))
    upstream = torch.randn_like(x), torch.randn_like(x)
    if with_means:
        upstream, scale = (*upstream, torch.randn(batch, 6, 8)), None
    else:
        upstream = (*upstream, None)
    need = [True, True, not with_means]
    opcheck(OPS.norm_backward.default, (x, y, gate, scale, *upstream, *geometry, 1e-6, need))


@pytest.mark.long
def test_one_graph_for_every_grid():
    """With gradients, dense and windowed, means and norms: nothing depends on one resolution."""

    def block(x, h, w):
        x = x.flatten(1, 2)
        normed, proxies = ptattn.ops.layer_norm_window_mean(
            x, (h, w), (2, 3), eps=1e-6, backend="triton"
        )
        gate, shift, scale = x[:, :3].unbind(1)
        _, normed = ptattn.ops.residual_layer_norm(x, normed, gate, shift, scale, backend="triton")
        proxies = proxies + ptattn.window_mean(normed, (h, w), (2, 3), backend="triton")
        q, k = normed.unflatten(-1, (1, 8)), proxies.unflatten(-1, (1, 8))
        y = ptattn.attention(q, k, k, backend="triton")
        return ptattn.window_attention(y, y, q, (h, w), (2, 3), (1, 1), backend="triton")

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for h, w in ((4, 6), (5, 7), (2, 9), (3, 8), (7, 3)):
        x = torch.randn(2, h, w, 8, requires_grad=True)
        grad_out = torch.randn(2, h * w, 1, 8)
        outs = [f(x, h, w) for f in (compiled, block)]
        (got,), (expected,) = (torch.autograd.grad(out, x, grad_out) for out in outs)
        assert torch.equal(*outs), (h, w)
        torch.testing.assert_close(got, expected)
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1, counts


CASES = {
    "window_mean": partial(means, TINY, channels=8, batch=1),
    "layer_norm_window_mean": partial(
        means, TINY, channels=8, batch=1, op="layer_norm_window_mean"
    ),
    "residual_layer_norm": partial(norms, (1, 15), channels=8),
    "attention": partial(dense, (5, 7), batch=1, heads=1, head_dim=8),
    "attention-many-keys": partial(dense, (5, 130), batch=1, heads=1, head_dim=8),
    "window_attention": partial(windows, TINY, batch=1, heads=1, head_dim=8),
    "window_attention-large": partial(windows, TINY_LARGE, batch=1, heads=1, head_dim=8),
}
each_case = pytest.mark.parametrize("name", CASES)


def call(case, *tensors):
    outs = getattr(ptattn.ops, case.op)(*tensors, backend="triton", **case.options)
    return outs if isinstance(outs, tuple) else (outs,)


@each_case
def test_what_is_kept_for_the_backward(name):
    """Inputs only, and where keys are looped over the output and its log-sum-exp; of a residual the
    sum in place of its first part."""
    case = CASES[name]()
    tensors = [t.requires_grad_() for t in case.tensors]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        outs = call(case, *tensors)
    sizes = [t.numel() for t in kept if t.numel()]
    expected = {
        "window_mean": [],
        "layer_norm_window_mean": [tensors[0].numel()],
        "residual_layer_norm": [t.numel() for i, t in enumerate(tensors) if i != 3],
        "attention": [t.numel() for t in tensors],
        "window_attention": [t.numel() for t in tensors],
    }[case.op]
    if name.endswith(("many-keys", "large")):
        expected += [outs[0].numel(), outs[0].numel() // 8]
    assert sizes == expected
    pointers = {t.data_ptr() for t in (*tensors, *outs)}
    copies = [t.shape for t in kept if t.numel() > outs[0].numel() // 8]
    assert all(t.data_ptr() in pointers for t in kept if t.shape in copies), "a copy is kept"


@each_case
def test_double_backward_is_refused(name):
    case = CASES[name]()
    tensors = [t.requires_grad_() for t in case.tensors]
    outs = call(case, *tensors)
    grads = torch.autograd.grad([o.square().sum() for o in outs], tensors, create_graph=True)
    with pytest.raises(RuntimeError, match=r"ptattn\.\w+ has no double backward"):
        torch.autograd.grad(grads[0].square().sum(), tensors[0])


def test_transforms():
    """torch.func.vmap works; what would be wrong in silence is refused, and auto avoids it."""
    q = torch.randn(2, 1, 15, 1, 8)
    run = partial(attend, backend="triton")
    out = torch.func.vmap(lambda q: run(q, q, q))(q)
    assert torch.equal(out, torch.stack([run(t, t, t) for t in q]))
    with pytest.raises(RuntimeError, match=r"torch.func's grad, vjp and jvp do not reach"):
        torch.func.grad(lambda q: run(q, q, q).sum())(q[0])
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda q: run(q, q, q), (q[0],), (q[0],))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q[0], q[0])
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            run(dual, dual, dual)
    assert torch.func.grad(lambda q: attend(q, q, q).sum())(q[0]).shape == q[0].shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_autocast(dtype):
    q = torch.randn(1, 15, 1, 8, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(q, q, q, backend="triton")
        mean = ptattn.window_mean(q.flatten(2), (3, 5), (2, 2), backend="triton")
    assert out.dtype == (torch.bfloat16 if dtype == torch.float32 else dtype)
    assert mean.dtype == dtype
    (grad,) = torch.autograd.grad(out.float().square().sum(), q)
    assert grad.dtype == dtype
    assert grad.ne(0).any()


def test_layer_checkpoints_copies_and_pickles():
    attn = ptattn.ProxyAttention(16, 2, (2, 3), backend="triton")
    for zero in (attn.global_interaction.zero, attn.texture_complement.zero):
        torch.nn.init.normal_(zero.weight)
    x = torch.randn(1, 3, 4, 16, requires_grad=True)
    others = [copy.deepcopy(attn), pickle.loads(pickle.dumps(attn))]
    outs = [f(x) for f in (attn, *others)]
    outs.append(checkpoint(attn, x, use_reentrant=False))
    grad_out = torch.randn_like(outs[0])
    grads = [torch.autograd.grad(out, x, grad_out)[0] for out in outs]
    for out, grad in zip(outs[1:], grads[1:], strict=True):
        assert torch.equal(out, outs[0])
        assert torch.equal(grad, grads[0])
    reference = ptattn.ProxyAttention(16, 2, (2, 3), backend="reference")
    reference.load_state_dict(attn.state_dict())
    torch.testing.assert_close(reference(x), outs[0], rtol=1e-5, atol=1e-5)


def test_flops():
    """Two per multiply-add; the backward has five products to the forward's two."""
    q, k = torch.randn(2, 15, 1, 8, requires_grad=True), torch.randn(2, 9, 1, 8)
    with FlopCounterMode(display=False) as counter:
        out = attend(q, q, q, backend="triton")
    pairs = ptattn.WindowGrid((3, 5), (2, 2), (1, 1)).num_pairs
    assert counter.get_total_flops() == 4 * 2 * 8 * pairs
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 10 * 2 * 8 * pairs
    with FlopCounterMode(display=False) as counter:
        ptattn.attention(q, k, k, backend="triton").sum().backward()
    # Of q alone: scores, dP and dQ.
    assert counter.get_total_flops() == (4 + 6) * 2 * 15 * 9 * 8


def test_shapes_on_meta():
    q = torch.empty(2, 15, 3, 8, device="meta")
    out = attend(q, q, q, backend="triton")
    assert (out.shape, out.device.type) == (q.shape, "meta")
    assert math.prod(out.stride()) == math.prod(q.stride())


@pytest.mark.parametrize("op", ["layer_norm", "layer_norm_window_mean"])
def test_autocast_on_and_off(op):
    """The same tokens, normed in another dtype: another kernel (`_one_plan_has_one_kernel`)."""
    x, geometry = torch.randn(1, 15, 8), ((3, 5), (2, 2)) if "mean" in op else ()

    def normed():
        out = getattr(ptattn.ops, op)(x, *geometry, backend="triton")
        return out[0] if geometry else out

    wide = normed()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = normed()
    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(narrow.float(), wide, rtol=1e-2, atol=1e-2)


@each_case
def test_batches_of_gradients(name):
    """As jacobians take them: tensors of several gradients, whose memory no kernel may read."""
    case = CASES[name]()
    tensors = [t.requires_grad_() for t in case.tensors]
    out = call(case, *tensors)[-1]
    grads = torch.randn(3, *out.shape)
    together = torch.autograd.grad(
        out, tensors[0], grads, retain_graph=True, is_grads_batched=True
    )[0]
    alone = [torch.autograd.grad(out, tensors[0], g, retain_graph=True)[0] for g in grads]
    torch.testing.assert_close(together, torch.stack(alone))


def test_a_view_not_yet_negated():
    x = torch.randn(1, 5, 8)
    negative = ptattn.ops.layer_norm(torch._neg_view(x), backend="triton")
    torch.testing.assert_close(negative, -ptattn.ops.layer_norm(x, backend="triton"))


def test_eps_of_numpy_leaves_nothing_behind():
    """A float32 of numpy is equal to a float of Python, and was kept in its place."""
    numpy, x = pytest.importorskip("numpy"), torch.randn(1, 5, 8)
    eps = numpy.float32(1e-3)
    outs = [ptattn.ops.layer_norm(x, eps=e, backend="triton") for e in (eps, float(eps))]
    assert torch.equal(*outs)


def test_either_setting_of_tf32():
    """torch raises where one of its two settings is read after the other was set."""
    from ptattn.kernels import host

    x = torch.ones(1)
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        settings.fp32_precision = "tf32"
        assert host.target(x)[1] == "tf32"
        settings.fp32_precision = "ieee"
        assert host.target(x)[1] == "ieee"
    finally:
        settings.fp32_precision = before
    assert host.target(x.double())[1] == "ieee"
