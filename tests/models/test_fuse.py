"""`fuse_for_inference`: the same function by fewer products, and what it refuses."""

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.test_models import condition_for, small
from tests.support.tolerance import FORWARD, assert_within_rule

NAMES = ("pt-dit-xl", "pt-dit-s-class")
# Sides of latents whose tokens are fewer and more than twice the channels.
SIDES = {"few tokens": (16, 12), "many tokens": (18, 26)}
each_name = pytest.mark.parametrize("name", NAMES)


def model_and_inputs(name, latents=(16, 12), dtype=torch.float32, **overrides):
    model = small(name, **overrides).to(dtype).eval()
    condition = condition_for(model, 2)
    if "caption" in condition:
        condition["caption"] = condition["caption"].to(dtype)
    return model, (torch.randn(2, 4, *latents, dtype=dtype), torch.tensor([3.0, 800.0])), condition


@each_name
@pytest.mark.parametrize("latents", SIDES.values(), ids=SIDES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_same_output(name, latents, dtype, batch):
    """No further from the exact output than the model that is not fused."""
    model, inputs, condition = model_and_inputs(name, latents, dtype)
    inputs, condition = [t[:batch] for t in inputs], {k: t[:batch] for k, t in condition.items()}
    with torch.no_grad():
        eager = model(*inputs, **condition)
        exact = copy.deepcopy(model).double()
        doubled = {k: v.double() if v.is_floating_point() else v for k, v in condition.items()}
        gold = exact(*(t.double() for t in inputs), **doubled)
        ours = model.fuse_for_inference()(*inputs, **condition)
    assert not torch.equal(ours, eager)
    if dtype == torch.bfloat16:
        assert_within_rule("out", ours, gold, [eager], FORWARD)
    else:
        # One evaluation's error is luck here: the rule, with the largest that it may be.
        error = (eager.double() - gold).abs().max() + 16 * torch.finfo(dtype).eps * gold.abs().max()
        assert (ours.double() - gold).abs().max() <= error


class Products(TorchDispatchMode):
    """Counts multiply-adds of products of (tokens, channels) by (channels, channels)."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens, self.count = tokens, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket._qualified_op_name in ("aten::addmm", "aten::mm", "aten::baddbmm"):
            a, b = args[-2:]
            rows = a.shape[0] * a.shape[1] if a.ndim == 3 else a.shape[0]
            if rows == self.tokens:
                self.count += b.shape[-2] * b.shape[-1]
        return out


def products(model, inputs, condition):
    tokens = 2 * inputs[0].shape[-1] * inputs[0].shape[-2] // 4
    with torch.no_grad(), Products(tokens) as counter:
        model(*inputs, **condition)
    return counter.count / (model.config.dim**2 * model.config.depth)


@each_name
@pytest.mark.parametrize(("side", "saved"), [("few tokens", 1), ("many tokens", 2)])
def test_products_saved(name, side, saved):
    case = model_and_inputs(name, SIDES[side])
    before = products(*case)
    case[0].fuse_for_inference()
    assert before - products(*case) == saved


@each_name
def test_undone(name):
    model, inputs, condition = model_and_inputs(name)
    keys = list(model.state_dict())
    with torch.no_grad():
        before = model(*inputs, **condition)
        model.fuse_for_inference()
        assert list(model.state_dict()) == keys
        fused = model(*inputs, **condition)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(*inputs, **condition), fused)
        model.unfuse()
        assert torch.equal(model(*inputs, **condition), before)
    assert dict(model.named_buffers()) == {}


def test_moves_with_the_model():
    model, inputs, condition = model_and_inputs("pt-dit-s-class")
    model.fuse_for_inference().double()
    with torch.no_grad():
        assert model(inputs[0].double(), inputs[1], **condition).dtype == torch.float64


def test_refusals():
    """Each leaves everything as it was."""
    model, inputs, condition = model_and_inputs("pt-dit-s-class")
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="not fused"):
        model.unfuse()
    with pytest.raises(RuntimeError, match=r"call model.eval\(\) first"):
        model.train().fuse_for_inference()
    assert not model.fused
    model.eval().fuse_for_inference()
    with torch.no_grad():
        fused = model(*inputs, **condition)
    with pytest.raises(RuntimeError, match="fused already"):
        model.fuse_for_inference()
    with pytest.raises(RuntimeError, match=r"call unfuse\(\) first"):
        model.train()
    others = {name: t + 1 for name, t in weights.items()}
    with pytest.raises(RuntimeError, match=r"takes no weights: call unfuse\(\) first"):
        model.load_state_dict(others)
    with torch.no_grad():
        assert torch.equal(model(*inputs, **condition), fused)
    for name, t in model.state_dict().items():
        assert torch.equal(t, weights[name]), name
    model.unfuse().load_state_dict(others)


class Adapted(torch.nn.Linear):
    """As LoRA's layers, adds something of its own to what its weight says."""

    def forward(self, x):
        return super().forward(x) + x.flip(-1)


class Quantized(torch.nn.Parameter):
    """As torchao's weights, knows linear layers and no arithmetic."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        assert func is not torch.Tensor.mul, "a quantized weight cannot be scaled"
        return super().__torch_function__(func, types, args, kwargs or {})


def adapt(layer):
    adapted = Adapted(layer.in_features, layer.out_features)
    adapted.weight, adapted.bias = layer.weight, layer.bias
    return adapted


def quantize(layer):
    layer.weight = Quantized(layer.weight.detach())
    return layer


def hook(layer):
    layer.register_forward_hook(lambda module, inputs, out: out + inputs[0].flip(-1))
    return layer


@each_name
@pytest.mark.parametrize("change", [adapt, quantize, hook])
def test_layers_that_are_more_than_their_weights(name, change):
    """Their own forward counts: whatever the batch, unfused, or put in after fusing."""
    model, inputs, condition = model_and_inputs(name, SIDES["many tokens"])
    one, first = [t[:1] for t in inputs], {k: t[:1] for k, t in condition.items()}
    fused = copy.deepcopy(model).fuse_for_inference()
    with torch.no_grad():
        before = model(*one, **first)
        for each in (model, fused):
            for block in each.blocks:
                for half in (block.global_interaction, block.texture_complement):
                    half.zero = change(half.zero)
        expected = model(*inputs, **condition)[:1]
        for each in (model, fused):
            torch.testing.assert_close(each(*one, **first), expected, rtol=1e-4, atol=1e-4)
        changed = (expected - before).abs().max() > 0.1
    assert changed == (change is not quantize)
    with pytest.raises(RuntimeError, match=r"blocks.0.global_interaction cannot be fused: .*LoRA"):
        model.fuse_for_inference()
    assert not model.fused
