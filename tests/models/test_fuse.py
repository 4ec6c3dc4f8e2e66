"""`ptattn.fuse`: the same function by fewer products, however the weights change afterwards."""

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ptattn
from tests.models.test_models import condition_for, small
from tests.support.tolerance import FORWARD, assert_within_rule

NAMES = ("pt-dit-xl", "pt-dit-s-class")
# Sides of latents whose tokens are fewer and more than twice the channels.
SIDES = {"few tokens": (16, 12), "many tokens": (18, 26)}
each_name = pytest.mark.parametrize("name", NAMES)


def model_and_inputs(name, latents=SIDES["many tokens"], dtype=torch.float32, **overrides):
    model = small(name, **overrides).to(dtype).eval()
    condition = condition_for(model, 2)
    if "caption" in condition:
        condition["caption"] = condition["caption"].to(dtype)
    return model, (torch.randn(2, 4, *latents, dtype=dtype), torch.tensor([3.0, 800.0])), condition


@each_name
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_same_output(name, dtype, batch):
    """No further from the exact output than the model that is not fused."""
    model, inputs, condition = model_and_inputs(name, dtype=dtype)
    inputs, condition = [t[:batch] for t in inputs], {k: t[:batch] for k, t in condition.items()}
    with torch.no_grad():
        eager = model(*inputs, **condition)
        exact = copy.deepcopy(model).double()
        doubled = {k: v.double() if v.is_floating_point() else v for k, v in condition.items()}
        gold = exact(*(t.double() for t in inputs), **doubled)
        ours = ptattn.fuse(model)(*inputs, **condition)
    assert not torch.equal(ours, eager)
    if dtype == torch.bfloat16:
        assert_within_rule("out", ours, gold, [eager], FORWARD)
    else:
        # One evaluation's error is luck here: the rule, with the largest that it may be.
        error = (eager.double() - gold).abs().max() + 16 * torch.finfo(dtype).eps * gold.abs().max()
        assert (ours.double() - gold).abs().max() <= error


def test_same_output_without_modulation():
    """ProxyAttention has no gate: one matrix for all samples."""
    attn = ptattn.ProxyAttention(24, 3, (2, 3), dtype=torch.float64)
    for parameter in attn.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 5, 7, 24, dtype=torch.float64)
    expected = attn(x)
    fused = ptattn.fuse(attn)(x)
    assert not torch.equal(fused, expected)
    torch.testing.assert_close(fused, expected, rtol=1e-11, atol=1e-11)


class Products(TorchDispatchMode):
    """Counts multiply-adds of products by (channels, channels): of the tokens, and of matrices."""

    def __init__(self, tokens, channels):
        super().__init__()
        self.counts = {tokens: 0, channels: 0, 2 * channels: 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket._qualified_op_name in ("aten::addmm", "aten::mm", "aten::baddbmm"):
            a, b = args[-2:]
            rows = a.shape[0] * a.shape[1] if a.ndim == 3 else a.shape[0]
            if rows in self.counts:
                self.counts[rows] += b.shape[-2] * b.shape[-1]
        return out


def products(model, inputs, condition):
    """Per block, in units of D²: of the tokens of the batch, of one matrix, of one per sample."""
    dim, tokens = model.config.dim, 2 * inputs[0].shape[-1] * inputs[0].shape[-2] // 4
    with torch.no_grad(), Products(tokens, dim) as counter:
        model(*inputs, **condition)
    return [count / (dim**2 * model.config.depth) for count in counter.counts.values()]


@each_name
def test_products_saved(name):
    """Two of the tokens' products, for one of a matrix by a matrix and one of that per sample."""
    case = model_and_inputs(name)
    before = products(*case)
    ptattn.fuse(case[0])
    after = products(*case)
    assert [a - b for a, b in zip(after, before, strict=True)] == [-2, 1, 1]


@each_name
def test_nothing_is_made_where_it_would_not_pay(name):
    model, inputs, condition = model_and_inputs(name, SIDES["few tokens"])
    with torch.no_grad():
        expected = model(*inputs, **condition)
        assert torch.equal(ptattn.fuse(model)(*inputs, **condition), expected)


@each_name
def test_undone(name):
    model, inputs, condition = model_and_inputs(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        before = model(*inputs, **condition)
        assert ptattn.fuse(model) is model
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
        fused = model(*inputs, **condition)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(*inputs, **condition), fused)
        assert ptattn.unfuse(model) is model
        assert torch.equal(model(*inputs, **condition), before)


def test_moves_with_the_model():
    model, inputs, condition = model_and_inputs("pt-dit-s-class")
    ptattn.fuse(model).double()
    with torch.no_grad():
        assert model(inputs[0].double(), inputs[1], **condition).dtype == torch.float64


@pytest.mark.parametrize("name", [pytest.param(NAMES[0], marks=pytest.mark.long), NAMES[1]])
def test_compiles_to_one_graph(name):
    model, inputs, condition = model_and_inputs(name, depth=1)
    ptattn.fuse(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(*inputs, **condition), model(*inputs, **condition))


# Weights that change once the model is fused.


def loaded(model, others):
    model.load_state_dict(others)


def loaded_block_by_block(model, others):
    for i, block in enumerate(model.blocks):
        prefix = f"blocks.{i}."
        own = {k.removeprefix(prefix): v for k, v in others.items() if k.startswith(prefix)}
        block.load_state_dict(own)


def copied(model, others):
    """As averaged weights are taken over."""
    for name, parameter in model.named_parameters():
        parameter.data.copy_(others[name])


def assigned(model, others):
    for name, parameter in model.named_parameters():
        parameter.data = others[name].clone()


def stepped(model, others):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(others[name] - parameter)


def stepped_in_inference_mode(model, others):
    with torch.inference_mode():
        for name, parameter in model.named_parameters():
            parameter.copy_(others[name])


def replaced(model, others):
    """As merging an adapter puts a layer back."""
    for block in model.blocks:
        for half in (block.global_interaction, block.texture_complement):
            half.zero = copy.deepcopy(half.zero)
    loaded(model, others)


CHANGES = [
    loaded,
    loaded_block_by_block,
    copied,
    assigned,
    stepped,
    stepped_in_inference_mode,
    replaced,
]


@each_name
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("inference", [False, True], ids=["", "made in inference mode"])
def test_weights_that_change_later_count(name, change, inference):
    """A fused model once kept the product of the weights that it was fused with."""
    if inference and change is stepped:
        pytest.skip("weights made in inference mode change in it alone")
    with torch.inference_mode(inference), torch.no_grad():
        model, inputs, condition = model_and_inputs(name)
        other = copy.deepcopy(model)
        for block in other.blocks:
            for half in (block.global_interaction, block.texture_complement):
                for parameter in half.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
    with torch.inference_mode():
        ptattn.fuse(model)
        before = model(*inputs, **condition)
    with torch.inference_mode(inference):
        change(model, other.state_dict())
    with torch.inference_mode():
        ours, expected = model(*inputs, **condition), other(*inputs, **condition)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert (ours - before).abs().max() > 0.01


@each_name
def test_an_adapter_of_a_fused_model(name):
    """Added, trained and merged: layers are folded again once they are plain."""
    peft = pytest.importorskip("peft")
    model, inputs, condition = model_and_inputs(name, dtype=torch.float64)
    twin, config = copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["proj", "zero"])
    made = []
    for one in (ptattn.fuse(model), twin):
        adapted = peft.get_peft_model(one, config)
        torch.manual_seed(0)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        with torch.no_grad():
            made.append([adapted(*inputs, **condition)])
            merged = adapted.merge_and_unload()
            made[-1].append(merged(*inputs, **condition))
    torch.testing.assert_close(made[0], made[1], rtol=1e-9, atol=1e-9)
    assert torch.equal(made[0][0], made[1][0])  # nothing folded beside an adapter
    assert not torch.equal(made[0][1], made[1][1])  # and again without


@each_name
@pytest.mark.parametrize("batch", [1, 2])
def test_trains(name, batch):
    """Gradients are those of the model that is not fused: to both layers that are made one, too."""
    model, inputs, condition = model_and_inputs(name, dtype=torch.float64)
    inputs, condition = [t[:batch] for t in inputs], {k: t[:batch] for k, t in condition.items()}
    gradients = []
    for one in (model, ptattn.fuse(copy.deepcopy(model)).train()):
        one(*inputs, **condition).square().mean().backward()
        gradients.append([p.grad for p in one.parameters()])
    for ours, expected in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


# Refusals.


def test_refusals():
    model, _, _ = model_and_inputs("pt-dit-s-class")
    with pytest.raises(RuntimeError, match="the model is not fused"):
        ptattn.unfuse(model)
    ptattn.fuse(model)
    with pytest.raises(RuntimeError, match="the model is fused already"):
        ptattn.fuse(model)
    with pytest.raises(ValueError, match="nothing to fuse: no PT-DiT block"):
        ptattn.fuse(small("dit-s"))


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
    model, inputs, condition = model_and_inputs(name)
    one, first = [t[:1] for t in inputs], {k: t[:1] for k, t in condition.items()}
    fused = ptattn.fuse(copy.deepcopy(model))
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
    classes = [type(module) for module in model.modules()]
    with pytest.raises(RuntimeError, match=r"blocks.0.global_interaction cannot be fused: .*LoRA"):
        ptattn.fuse(model)
    assert [type(module) for module in model.modules()] == classes


def test_a_projection_without_a_bias_is_not_fused():
    half = ptattn.GlobalInteraction(16, 2)
    half.cross_attn.proj = torch.nn.Linear(16, 16, bias=False)
    with pytest.raises(RuntimeError, match="cannot be fused"):
        ptattn.fuse(half)
