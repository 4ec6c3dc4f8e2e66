"""The baselines of the benchmarks compute what ptattn computes: else their times mean nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ptattn import ops
from ptattn.bench import baselines
from ptattn.geometry import WindowGrid
from ptattn.layers import Residual
from ptattn.models.condition import Condition
from ptattn.models.configs import ModelConfig
from ptattn.models.pixart import PixArtBlock
from ptattn.models.pt_dit import PTDiTBlock

DIM, HEADS, TEXT = 48, 3, 5

WINDOWS = [
    pytest.param(((1, 8, 12), (1, 4, 4)), id="image"),
    pytest.param(((1, 4, 4), (1, 4, 4)), id="one-window"),
    pytest.param(((8, 4, 8), (4, 2, 4)), id="video"),
    pytest.param(((4, 4, 6), (4, 1, 3)), id="odd-and-unit-window"),
]


def _randomized(module: nn.Module) -> nn.Module:
    """Every parameter random: layers that start at zero would hide what stands before them."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.2)
    return module.double()


def _condition(batch: int) -> Condition:
    mask = torch.ones(batch, TEXT, dtype=torch.bool)
    mask[-1, 3:] = False
    vector = torch.randn(batch, 6 * DIM, dtype=torch.float64, requires_grad=True)
    text = torch.randn(batch, TEXT, DIM, dtype=torch.float64)
    return Condition(torch.zeros(batch, DIM), vector, text, mask)


def _close(ours: Tensor, theirs: Tensor, name: str) -> None:
    """Equal up to float64 rounding: the two differ in the order of sums alone."""
    error = (ours - theirs).norm() / theirs.norm().clamp_min(1e-30)
    assert error < 1e-12, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("sizes", WINDOWS)
def test_partition_and_roll_round_trip(sizes: tuple) -> None:
    windows = WindowGrid(*sizes).shifted()
    x = torch.randn(2, windows.num_tokens, 3)
    assert torch.equal(baselines.reverse(baselines.partition(x, windows), windows), x)
    assert torch.equal(baselines.roll(baselines.roll(x, windows), windows, back=True), x)


@pytest.mark.parametrize("shift", [False, True], ids=["plain", "shifted"])
@pytest.mark.parametrize("sizes", WINDOWS)
def test_roll_mask_attention_is_window_attention(sizes: tuple, shift: bool) -> None:
    windows = WindowGrid(*sizes)
    windows = windows.shifted() if shift else windows
    q, k, v = torch.randn(3, 2, windows.num_tokens, 2, 8, dtype=torch.float64).unbind()
    mask = baselines.region_mask(windows, q.dtype) if shift else None
    theirs = baselines.roll_mask_attention(q, k, v, windows, mask)
    ours = ops.window_attention(
        q, k, v, windows.grid, windows.window, windows.shift, backend="reference"
    )
    _close(ours, theirs, "output")


@pytest.mark.parametrize("sizes", WINDOWS)
def test_roll_mask_block_is_our_block(sizes: tuple) -> None:
    torch.manual_seed(0)
    windows = WindowGrid(*sizes)
    ours = _randomized(PTDiTBlock(ModelConfig(1, DIM, HEADS)))
    theirs = baselines.RollMaskBlock(ours)
    condition = _condition(batch=2)
    x = torch.randn(2, windows.num_tokens, DIM, dtype=torch.float64, requires_grad=True)
    up = torch.randn_like(x)

    out = ours(Residual(x), windows, windows, condition).total()
    shifted = windows.shifted()
    rows = theirs(
        baselines.partition(x, windows),
        shifted,
        *condition[1:],
        baselines.region_mask(shifted, x.dtype),
    )
    expected = baselines.reverse(rows, windows)
    _close(out, expected, "output")

    wanted = dict(x=x, vector=condition.modulation)
    grads = torch.autograd.grad(out, [*wanted.values(), ours.mlp[2].weight], up)
    peers = torch.autograd.grad(expected, [*wanted.values(), theirs.mlp[2].weight], up)
    for name, own, peer in zip((*wanted, "mlp"), grads, peers, strict=True):
        _close(own, peer, f"d{name}")


def test_roll_mask_refuses_a_grid_that_the_window_does_not_divide() -> None:
    windows = WindowGrid((1, 6, 8), (1, 4, 4))
    with pytest.raises(ValueError, match=r"divide \(1, 6, 8\)"):
        baselines.partition(torch.randn(1, 48, 2), windows)


def test_diffusers_pixart_block_is_our_pixart_block() -> None:
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    ours = _randomized(PixArtBlock(ModelConfig(1, DIM, HEADS)))
    theirs = baselines.DiffusersPixArtBlock(ours)
    condition = _condition(batch=2)
    x = torch.randn(2, 24, DIM, dtype=torch.float64)
    _close(ours(Residual(x), condition).total(), theirs(x, condition), "output")


def test_diffusers_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "diffusers.models.attention", None)
    with pytest.raises(ImportError, match=r"pip install ptattn\[t2x\]"):
        baselines.DiffusersPixArtBlock(PixArtBlock(ModelConfig(1, DIM, HEADS)))


def test_gemms_21_multiplies_all_tokens() -> None:
    assert baselines.gemms_21(torch.randn(2, 6, 8, dtype=torch.bfloat16))().shape == (2, 6, 8)
