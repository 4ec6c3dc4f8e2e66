"""A case of the matrix: its inputs drawn, for any backend, and held to the rule of tolerance.py."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import ptattn
from tests.support.cases import GRIDS, normal
from tests.support.tolerance import NAMES, check, evaluate, redrawn_once

SUBSETS = ("", "q", "k", "v", "qk", "qv", "kv", "qkv")


def dtype_id(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def each(name, values):
    return pytest.mark.parametrize(name, values, ids=dtype_id)


def tokens_of(grid):
    return torch.Size(grid).numel()


@dataclass
class Case:
    """An operation, its tensors, an upstream gradient for each output, and its other options."""

    op: str
    tensors: list[torch.Tensor]
    grad_out: tuple[torch.Tensor, ...]
    options: dict[str, Any]

    def check(self, backend, wanted=None):
        """`wanted`: the inputs that require grad, all by default; False checks the forward only."""
        gradients = dict(grad_out=None if wanted is False else self.grad_out, wanted=wanted)
        check(self.op, *self.tensors, backend=backend, **gradients, **self.options)

    def run(self, backend, wanted=None):
        """Outputs and gradients by name."""
        run, dtype = getattr(ptattn.ops, self.op), self.tensors[0].dtype
        gradients = dict(grad_out=self.grad_out, wanted=wanted)
        options = dict(backend=backend, **self.options)
        return evaluate(self.op, run, self.tensors, dtype, **gradients, **options)

    def item(self, i):
        """One sample of the batch, a view."""
        one = slice(i, i + 1)
        options = dict(self.options)
        if options.get("key_mask") is not None:
            options["key_mask"] = options["key_mask"][one]
        tensors, grad_out = (
            [t if t is None else t[one] for t in ts] for ts in (self.tensors, self.grad_out)
        )
        return Case(self.op, tensors, tuple(grad_out), options)

    def copy(self):
        """The same numbers in tensors of their own."""
        tensors, grad_out = ([t.clone() for t in ts] for ts in (self.tensors, self.grad_out))
        return Case(self.op, tensors, tuple(grad_out), self.options)


def windows(
    case="ragged-shifted",
    dtype=torch.float32,
    *,
    batch=2,
    heads=3,
    head_dim=24,
    layout="contiguous",
    upstream="contiguous",
    size=1.0,
    **options,
):
    """Window attention on a grid of GRIDS, or on (grid, window, shift).

    `layout` is that of q, k and v, or a tuple of three; `size` the deviation of their numbers.
    """
    grid, window, shift = GRIDS[case] if isinstance(case, str) else case
    shape = (batch, tokens_of(grid), heads, head_dim)
    layouts = (layout,) * 3 if isinstance(layout, str) else layout
    tensors = [normal(shape, dtype, name, size) for name in layouts]
    options |= dict(grid=grid, window=window, shift=shift)
    return Case("window_attention", tensors, (normal(shape, dtype, upstream),), options)


def dense(
    lengths=(63, 111),
    dtype=torch.float32,
    *,
    batch=2,
    heads=3,
    head_dim=24,
    layout="contiguous",
    upstream="contiguous",
    size=1.0,
    masked=False,
    **options,
):
    """Dense attention of (queries, keys); as `windows`."""
    n, m = lengths
    tensors = [normal((batch, t, heads, head_dim), dtype, layout, size) for t in (n, m, m)]
    grad_out = normal((batch, n, heads, head_dim), dtype, upstream)
    options["key_mask"] = key_mask(batch, m) if masked else None
    return Case("attention", tensors, (grad_out,), options)


def key_mask(batch, keys):
    """Random, but the first sample has no key and the last, if another, has all."""
    mask = torch.rand(batch, keys) < 0.5
    mask[-1:], mask[:1] = True, False
    return mask


def check_masked_keys(backend, keys, dtype, bad):
    """What masked keys and values hold changes no bit of output and gradients, and theirs are 0."""
    q, k, v = (normal((3, n, 2, 16), dtype) for n in (5, keys, keys))
    mask, grad_out = key_mask(3, keys), normal(q.shape, dtype)

    def run(fill):
        held = [t.masked_fill(~mask[..., None, None], fill) for t in (k, v)]
        inputs = [t.requires_grad_() for t in (q.clone(), *held)]
        out = ptattn.attention(*inputs, key_mask=mask, backend=backend)
        grads = torch.autograd.grad(out, inputs, grad_out)
        return dict(zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True))

    clean, held = run(0.0), run(bad)
    for name, t in held.items():
        assert torch.equal(t, clean[name]), name
    for name in ("dk", "dv"):
        assert held[name][~mask].eq(0).all(), name
        assert held[name][mask].ne(0).any(), name


def means(
    case="ragged-shifted",
    dtype=torch.float32,
    *,
    op="window_mean",
    batch=2,
    channels=24,
    layout="contiguous",
    upstream="contiguous",
    size=1.0,
    **options,
):
    """Window means, with op="layer_norm_window_mean" and the LayerNorm; as `windows`, unshifted."""
    grid, window, _ = GRIDS[case] if isinstance(case, str) else case
    x = normal((batch, tokens_of(grid), channels), dtype, layout, size)
    proxies = ptattn.WindowGrid(grid, window).num_windows
    lengths = dict(normed=x.shape[1], means=proxies, out=proxies)
    shapes = [(batch, lengths[name], channels) for name in NAMES[op][1]]
    grad_out = tuple(normal(shape, dtype, upstream) for shape in shapes)
    return Case(op, [x], grad_out, dict(grid=grid, window=window, **options))


def norms(
    lengths=(2, 35),
    dtype=torch.float32,
    *,
    channels=24,
    residual=True,
    gated=True,
    modulated=True,
    window=None,
    layout="contiguous",
    upstream="contiguous",
    size=1.0,
    **options,
):
    """LayerNorm of (batch, tokens) with what stands around it; with `window`, tokens are a grid,
    and their means take the place of the modulation. The vectors are views of one tensor."""
    batch, tokens = lengths
    shape = (batch, tokens if window is None else tokens_of(tokens), channels)
    x, y = (normal(shape, dtype, layout, size) for _ in "xy")
    gate, shift, scale = normal((batch, 6, channels), dtype).unbind(1)[1:4]
    gate = gate if gated else None
    shift, scale = (shift, scale) if modulated else (None, None)
    op = "residual_layer_norm" if residual else "layer_norm"
    tensors = [x, y, gate] if residual else [x]
    if window is None:
        tensors += [shift, scale]
    else:
        op += "_window_mean"
        options |= dict(grid=tokens, window=window)
    proxies = 0 if window is None else ptattn.WindowGrid(tokens, window).num_windows
    counts = dict(total=shape[1], normed=shape[1], means=proxies)
    shapes = [(batch, counts[name], channels) for name in NAMES[op][1]]
    return Case(op, tensors, tuple(normal(s, dtype, upstream) for s in shapes), options)


@redrawn_once
def hold(backend, draw, *args, wanted=None, **sizes):
    """Draw a case by `windows`, `dense`, `means` or `norms` and hold it to the rule."""
    draw(*args, **sizes).check(backend, wanted)
