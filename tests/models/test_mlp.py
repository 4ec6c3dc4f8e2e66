"""The MLP in inference: the GELU in the product's epilogue, where that is the same."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ptattn.models.blocks import Mlp

C = 16
half = dict(dtype=torch.bfloat16)


class Adapter(nn.Linear):
    """A layer that does more than its weight says, such as LoRA's."""


def changed(mlp, **parts):
    for name, part in parts.items():
        mlp._modules[name] = part
    return mlp


def with_hook(mlp, index):
    mlp[index].register_forward_hook(lambda module, inputs, output: output)
    return mlp


@pytest.fixture
def fused(monkeypatch):
    """How often it was taken, on a machine that says its tensors lie on a GPU."""
    calls, product = [], torch._addmm_activation

    def counted(*args, **kwargs):
        calls.append(1)
        return product(*args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda t: True), raising=False)
    monkeypatch.setattr(torch, "_addmm_activation", counted)
    return calls


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 5, C), (0, 5, C), (3, C)], ids=str)
def test_the_product_has_its_weight_bias_and_activation(fused, shape):
    """On a CPU torch's product takes the exact GELU."""
    mlp, x = Mlp(C).to(**half), torch.randn(shape).to(**half)
    expected = mlp[2](F.gelu(mlp[0](x)))
    torch.testing.assert_close(mlp(x), expected, rtol=0.02, atol=0.01)
    assert len(fused) == 1


def flops():
    return FlopCounterMode(display=False)


@pytest.mark.parametrize(
    ("make", "around", "dtype"),
    [
        pytest.param(lambda: Mlp(C), torch.no_grad, torch.float32, id="fp32"),
        pytest.param(lambda: Mlp(C), nullcontext, torch.bfloat16, id="gradients"),
        pytest.param(lambda: with_hook(Mlp(C), 0), torch.no_grad, torch.bfloat16, id="hook"),
        pytest.param(lambda: with_hook(Mlp(C), 1), torch.no_grad, torch.bfloat16, id="gelu hook"),
        pytest.param(
            lambda: changed(Mlp(C), **{"0": Adapter(C, 4 * C)}),
            torch.no_grad, torch.bfloat16, id="adapter",
        ),
        pytest.param(
            lambda: changed(Mlp(C), **{"0": nn.Linear(C, 4 * C, bias=False)}),
            torch.no_grad, torch.bfloat16, id="no bias",
        ),
        pytest.param(
            lambda: changed(Mlp(C), **{"1": nn.GELU()}),
            torch.no_grad, torch.bfloat16, id="exact gelu",
        ),
        pytest.param(
            lambda: Mlp(C).requires_grad_(False), flops, torch.bfloat16, id="FLOP counter"
        ),
    ],
)  # fmt: skip
def test_the_layers_run_one_by_one_where_it_is_not_the_same(fused, make, around, dtype):
    mlp, x = make().to(dtype), torch.randn(2, 5, C).to(dtype)
    with around():
        out = mlp(x)
    assert not fused
    assert torch.equal(out, mlp[2](mlp[1](mlp[0](x))))


@torch.no_grad()
def test_autocast_of_wide_weights_is_left_to_torch(fused):
    mlp, x = Mlp(C), torch.randn(2, 5, C)
    with torch.autocast("cpu", torch.bfloat16):
        assert mlp(x).dtype == torch.bfloat16
        assert not fused
        mlp.to(**half)(x.to(**half))
    assert fused


@torch.no_grad()
def test_transforms_and_rocm_are_left_to_torch(fused, monkeypatch):
    mlp, x = Mlp(C).to(**half), torch.randn(2, 5, C).to(**half)
    torch.testing.assert_close(torch.vmap(mlp)(x), mlp(x), rtol=0.02, atol=0.01)
    assert len(fused) == 1
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert torch.equal(mlp(x), mlp[2](mlp[1](mlp[0](x))))
    assert len(fused) == 1
