"""ProxyAttention and its halves: against plain formulas, and as a part of other people's models."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ptattn import GlobalInteraction, ProxyAttention, TextureComplement, WindowGrid
from ptattn.layers import Modulation, ZeroLinear

DIM, HEADS = 24, 3


def wake(module):
    """Give the layers that start at zero weights, so that every path counts."""
    for layer in module.modules():
        if isinstance(layer, ZeroLinear):
            nn.init.normal_(layer.weight, std=0.2)
            nn.init.normal_(layer.bias, std=0.2)
    return module


def proxy_attention(window=(2, 3), *, dtype=torch.float64, **options):
    return wake(ProxyAttention(DIM, HEADS, window, dtype=dtype, **options))


def tokens(*shape, dtype=torch.float64):
    return torch.randn(*shape, DIM, dtype=dtype)


def assert_same_math(got, expected):
    """Two formulas of one function in float64: they differ by rounding."""
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


# The paper's formulas, with attention as a masked (N, M) matrix.


def norm(x, modulation=None):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    if modulation is None:
        return x
    return x * (1 + modulation.scale[:, None]) + modulation.shift[:, None]


def gated(y, modulation=None):
    return y if modulation is None else y * modulation.gate[:, None]


def attend(q, k, v, allowed=None):
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def self_attention(m, x, windows=None):
    ids = None if windows is None else windows.window_ids()
    allowed = None if ids is None else ids[:, None] == ids
    return m.proj(attend(*m.qkv(x).chunk(3, -1), allowed))


def global_interaction(m, x, windows, modulation=None, norm_first=norm):
    ids = windows.window_ids()
    p = torch.stack([x[:, ids == i].mean(1) for i in range(windows.num_windows)], 1)
    p = p + gated(self_attention(m.proxy_attn, norm(p, modulation)), modulation)
    m, zero = m.cross_attn, m.zero
    return zero(m.proj(attend(m.q(norm_first(x)), *m.kv(norm(p)).chunk(2, -1))))


def texture_complement(m, x, windows, modulation=(None, None), norm_first=norm):
    first, second = modulation
    y = gated(self_attention(m.window_attn, norm_first(x, first), windows), first)
    windows = windows.shifted() if m.shift else windows
    z = gated(self_attention(m.shifted_attn, norm(x + y, second), windows), second)
    return y + m.zero(z)


def plain(attn, x, grid):
    """All of ProxyAttention on (B, N, C)."""
    first = dict(norm_first=lambda x, _=None: x) if attn.prenormed else {}
    windows = WindowGrid(grid, attn.proxy_window)
    delta = global_interaction(attn.global_interaction, x, windows, **first)
    windows = WindowGrid(grid, attn.window)
    return delta + texture_complement(attn.texture_complement, x + delta, windows, **first)


GRIDS = {"image": (4, 6), "ragged": (5, 7), "video": (3, 4, 5), "one-window": (2, 3)}
each_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


@each_grid
@pytest.mark.parametrize("proxy_window", [None, (1, 2), (4, 3)], ids="proxy-window-{}".format)
@pytest.mark.parametrize("shift", [True, False], ids=["shifted", "unshifted"])
@pytest.mark.parametrize("prenormed", [False, True], ids=["", "prenormed"])
def test_formula(prenormed, shift, proxy_window, grid):
    options = dict(proxy_window=proxy_window, shift=shift, prenormed=prenormed)
    attn = proxy_attention(grid=grid, **options)
    x = tokens(2, torch.Size(grid).numel())
    assert_same_math(attn(x), plain(attn, x, grid))


def modulation(batch):
    """Another one for every sample."""
    return Modulation(*torch.randn(3, batch, DIM, dtype=torch.float64).unbind())


@each_grid
@pytest.mark.parametrize("batch", [1, 2])
def test_modulated_global_interaction(batch, grid):
    windows = WindowGrid(grid, (2, 3))
    half = wake(GlobalInteraction(DIM, HEADS, dtype=torch.float64))
    x, m = tokens(batch, windows.num_tokens), modulation(batch)
    assert_same_math(half(x, windows, m), x + global_interaction(half, x, windows, m))
    assert_same_math(half(x, windows), x + global_interaction(half, x, windows))


@each_grid
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("shift", [True, False], ids=["shifted", "unshifted"])
def test_modulated_texture_complement(shift, batch, grid):
    windows = WindowGrid(grid, (2, 3))
    half = wake(TextureComplement(DIM, HEADS, shift=shift, dtype=torch.float64))
    x, m = tokens(batch, windows.num_tokens), (modulation(batch), modulation(batch))
    assert_same_math(half(x, windows, m), x + texture_complement(half, x, windows, m))
    assert_same_math(half(x, windows), x + texture_complement(half, x, windows))


def test_halves_one_after_the_other_are_proxy_attention():
    attn, x, windows = proxy_attention(), tokens(2, 35), WindowGrid((5, 7), (2, 3))
    by_halves = attn.texture_complement(attn.global_interaction(x, windows), windows)
    assert_same_math(by_halves, x + attn(x, grid=(5, 7)))


@pytest.mark.parametrize("half", [GlobalInteraction, TextureComplement])
def test_halves_take_windows_without_a_shift(half):
    with pytest.raises(ValueError, match=r"shift.*; got (shift )?\(0, 1, 1\)"):
        half(DIM, HEADS)(tokens(1, 35, dtype=torch.float32), WindowGrid((5, 7), (2, 3)).shifted())


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_backends_agree(backend):
    attn = proxy_attention(backend=backend)
    x = tokens(2, 5, 7)
    assert_same_math(attn(x).flatten(1, 2), plain(attn, x.flatten(1, 2), (5, 7)))


# Shapes and construction.


def test_shapes_agree_bit_for_bit():
    attn = proxy_attention(dtype=torch.float32)
    x = tokens(2, 35, dtype=torch.float32)
    flat = attn(x, grid=(5, 7))
    assert torch.equal(attn(x, grid=(1, 5, 7)), flat)
    for shape in ((5, 7), (1, 5, 7)):
        out = attn(x.unflatten(1, shape))
        assert out.shape == (2, *shape, DIM)
        assert torch.equal(out.view(2, 35, DIM), flat)


def test_video_shapes_agree_bit_for_bit():
    attn = proxy_attention((2, 2, 3), dtype=torch.float32)
    x = tokens(2, 60, dtype=torch.float32)
    out = attn(x.unflatten(1, (3, 4, 5)))
    assert out.shape == (2, 3, 4, 5, DIM)
    assert torch.equal(out.flatten(1, 3), attn(x, grid=(3, 4, 5)))


def test_grid_of_constructor_and_call():
    x = tokens(1, 12)
    attn = proxy_attention()
    own = proxy_attention(grid=(3, 4))
    own.load_state_dict(attn.state_dict())
    assert torch.equal(own(x), attn(x, grid=(3, 4)))
    assert torch.equal(own(x, grid=(2, 6)), attn(x, grid=(2, 6)))
    # A grid that the shape shows is no contradiction.
    assert torch.equal(own(x.unflatten(1, (2, 6)), grid=(1, 2, 6)).flatten(1, 2), own(x, (2, 6)))


def test_channels_first_image():
    """What a convolution leaves, seen as channels last."""
    attn = proxy_attention()
    image = torch.randn(2, DIM, 5, 7, dtype=torch.float64).permute(0, 2, 3, 1)
    assert_same_math(attn(image), attn(image.contiguous()))


def test_empty_batch():
    attn = proxy_attention()
    x = tokens(0, 5, 7).requires_grad_()
    out = attn(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad.eq(0).all() for p in attn.parameters())


def test_defaults():
    attn = ProxyAttention(DIM, HEADS)
    assert attn.window == attn.proxy_window == (1, 8, 8)
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in attn.parameters())
    assert all(m.bias is not None for m in attn.modules() if isinstance(m, nn.Linear))
    unbiased = ProxyAttention(DIM, HEADS, qkv_bias=False)
    without = [
        n for n, m in unbiased.named_modules() if isinstance(m, nn.Linear) and m.bias is None
    ]
    assert sorted(name.rsplit(".")[-1] for name in without) == ["kv", "q", "qkv", "qkv", "qkv"]


def test_device_and_dtype_of_parameters():
    attn = ProxyAttention(DIM, HEADS, device="meta", dtype=torch.bfloat16)
    kinds = {(p.device.type, p.dtype) for p in attn.parameters()}
    assert kinds == {("meta", torch.bfloat16)}


# Training.


def test_starts_as_plain_window_attention():
    attn = ProxyAttention(DIM, HEADS, (2, 3), dtype=torch.float64)
    x = tokens(2, 35)
    half = attn.texture_complement
    assert_same_math(
        attn(x, grid=(5, 7)),
        self_attention(half.window_attn, norm(x), WindowGrid((5, 7), (2, 3))),
    )
    attn(x, grid=(5, 7)).square().sum().backward()
    for module in (attn.global_interaction, half):
        assert module.zero.weight.grad.ne(0).any()  # so that it can leave zero


def test_every_parameter_gets_a_gradient():
    attn = proxy_attention()
    attn(tokens(2, 5, 7)).square().sum().backward()
    for name, parameter in attn.named_parameters():
        assert parameter.grad.ne(0).any(), name


@pytest.mark.parametrize("copied", ["state_dict", "deepcopy", "pickle"])
def test_copies(copied):
    attn = proxy_attention(proxy_window=(4, 4), grid=(5, 7))
    x = tokens(2, 35)
    if copied == "state_dict":
        copy_ = ProxyAttention(DIM, HEADS, (2, 3), (4, 4), grid=(5, 7), dtype=torch.float64)
        copy_.load_state_dict(attn.state_dict())
    else:
        copy_ = copy.deepcopy(attn) if copied == "deepcopy" else pickle.loads(pickle.dumps(attn))
    assert torch.equal(copy_(x), attn(x))
    with torch.no_grad():
        next(copy_.parameters()).zero_()
    assert not torch.equal(copy_(x), attn(x))


def test_autocast():
    attn = proxy_attention(dtype=torch.float32)
    x = tokens(2, 5, 7, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attn(x)
    out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in attn.parameters())
    exact = attn(x)
    error = (out - exact).norm() / exact.norm()
    assert 0 < error < 4 * torch.finfo(torch.bfloat16).eps


def assert_compiles(backend):
    attn = proxy_attention(proxy_window=(1, 2))
    x = tokens(2, 5, 7).requires_grad_()
    compiled = torch.compile(attn, fullgraph=True, backend=backend)
    upstream = torch.randn_like(x)
    inputs = [x, *attn.parameters()]
    results = []
    for module in (attn, compiled):
        out = module(x)
        results.append([out, *torch.autograd.grad(out, inputs, upstream)])
    for got, expected in zip(*results, strict=True):
        assert_same_math(got, expected)


def test_compiles_to_one_graph():
    assert_compiles("aot_eager")


@pytest.mark.long
def test_compiles_with_inductor():
    assert_compiles("inductor")


class Block(nn.Module):
    """A vision transformer's block, as timm writes it."""

    def __init__(self, attn):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(DIM), attn, nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def test_trains_in_the_place_of_a_blocks_attention():
    """Every token learns the mean of all tokens, which lie in nine windows."""
    block = Block(ProxyAttention(DIM, HEADS, (2, 2), grid=(6, 6)))
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        mean = torch.randn(16, 1, DIM)
        loss = F.mse_loss(block(mean + torch.randn(16, 36, DIM)), mean.expand(16, 36, DIM))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_halves_name_what_they_do_not_take():
    x, windows = tokens(2, 16, dtype=torch.float32), WindowGrid((4, 4), (2, 2))
    for half in (GlobalInteraction(DIM, HEADS), TextureComplement(DIM, HEADS)):
        with pytest.raises(TypeError, match="windows must be a WindowGrid; got tuple"):
            half(x, (4, 4))
    vector = torch.zeros(2, DIM)
    right, wrong = Modulation(vector, vector, vector), Modulation(vector, vector, vector[0])
    for modulation in ((right,), (right, wrong)):
        with pytest.raises(ValueError, match=r"modulation must be two, with gates \(B, C\)"):
            half(x, windows, modulation)
