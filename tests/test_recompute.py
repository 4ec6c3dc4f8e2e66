"""What a backward makes again: the same bits, and torch's own rules for what is saved."""

import gc
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from ptattn import recompute
from ptattn.layers import Residual
from ptattn.models.blocks import Mlp
from ptattn.recompute import feed, recomputed
from tests.models.test_models import condition_for, small

gelu = partial(F.gelu, approximate="tanh")


def keeping():
    """With hooks of somebody else, all is kept as torch keeps it."""
    return saved_tensors_hooks(lambda t: t, lambda t: t)


@pytest.fixture
def made(monkeypatch):
    """How often something was made again."""
    count, make = [], recompute._Recipe._make
    monkeypatch.setattr(recompute._Recipe, "_make", lambda self: count.append(1) or make(self))
    return count


def hidden_layer(x):
    """Of an MLP: the hidden layer, the linear layer that is fed its GELU, and what that gives."""
    hidden, layer = x * 2, nn.Linear(8, 3)
    return hidden, layer, feed(layer, recomputed(gelu(hidden), gelu, hidden))


def tokens():
    return torch.randn(2, 5, 8, requires_grad=True)


@pytest.mark.parametrize(
    ("name", "backend", "batch", "autocast", "times"),
    [
        ("pt-dit-xl", "triton", 2, None, 5),
        ("pt-dit-xl", "sdpa", 1, torch.bfloat16, 5),
        ("pt-dit-s-class", "reference", 2, None, 5),
        ("dit-s", "sdpa", 1, None, 3),
        ("pixart-alpha", "sdpa", 2, torch.bfloat16, 3),
    ],
)
def test_gradients_have_the_bits_of_what_was_kept(name, backend, batch, autocast, times, made):
    """One sample once took another branch of the norm where gradients were off, as they are in a
    backward."""
    model = small(name, dim=32, num_heads=2, depth=1, backend=backend)
    latents, condition = torch.randn(batch, 4, 8, 12), condition_for(model, batch)
    probe = torch.randn(batch, 8, 8, 12)

    def gradients():
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            out = model(latents, torch.full((batch,), 3.0), **condition)
        return torch.autograd.grad((out * probe).sum(), list(model.parameters()))

    with keeping():
        expected = gradients()
    assert not made
    found = gradients()
    # The norms of window attention, shifted attention and MLP, the gated tokens, and the GELU.
    assert len(made) == times
    names = [name for name, _ in model.named_parameters()]
    assert [n for n, a, b in zip(names, expected, found, strict=True) if not a.equal(b)] == []


def test_a_second_derivative_goes_through_what_was_made_again():
    mlp = Mlp(4).double()
    norm = partial(Residual.norm, modulation=torch.randn(2, 1, 4).double(), backend="reference")

    def block(x):
        return mlp(norm(Residual(x))[1])

    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, x)
    assert torch.autograd.gradgradcheck(block, x)


def test_a_graph_that_is_retained_gives_its_gradients_twice(made):
    x = tokens()
    _, layer, out = hidden_layer(x)
    once = torch.autograd.grad(out.sum(), [x, layer.weight], retain_graph=True)
    twice = torch.autograd.grad(out.sum(), [x, layer.weight])
    assert all(map(torch.equal, once, twice))
    assert len(made) == 2


@pytest.mark.parametrize("changed", ["hidden", "weight"])
def test_a_change_in_place_before_the_backward_is_refused(changed):
    """As without us: hooks for saved tensors turn torch's own check off."""
    hidden, layer, out = hidden_layer(tokens())
    with torch.no_grad():
        (hidden if changed == "hidden" else layer.weight).mul_(2)
    with pytest.raises(RuntimeError, match=r"modified by an inplace .* is at version \d; expected"):
        torch.autograd.grad(out.sum(), [layer.weight, hidden])


def test_what_a_layer_changes_before_it_saves_it_is_kept(made):
    def double(module, inputs):
        inputs[0].detach().mul_(2)

    layer = nn.Linear(8, 3)
    layer.register_forward_pre_hook(double)
    hidden = torch.randn(5, 8, requires_grad=True) * 2
    out = feed(layer, recomputed(torch.sin(hidden), torch.sin, hidden))
    (found,) = torch.autograd.grad(out.sum(), layer.weight)
    torch.testing.assert_close(found, 2 * torch.sin(hidden).sum(0).expand(3, 8))
    assert not made


class Adapted(nn.Linear):
    """A layer with an adapter, as LoRA's: two that take the input, one whose output is saved."""

    def __init__(self):
        super().__init__(8, 3)
        self.adapter = nn.Sequential(nn.Linear(8, 2), nn.Tanh(), nn.Linear(2, 3))

    def forward(self, x):
        return super().forward(x) + self.adapter(x)


def test_any_layer_may_be_fed(made):
    layer, hidden = Adapted(), tokens() * 2

    def gradients():
        out = feed(layer, recomputed(gelu(hidden), gelu, hidden))
        return torch.autograd.grad(out.square().sum(), [hidden, *layer.parameters()])

    with keeping():
        expected = gradients()
    assert all(map(torch.equal, expected, gradients()))
    assert len(made) == 2


@pytest.mark.parametrize("backward", [True, False])
def test_nothing_outlives_the_graph(backward):
    """What is saved as it is within hooks, and is an output, holds its own graph."""
    gc.disable()
    try:
        hidden = tokens() * 2
        out = feed(Adapted(), recomputed(gelu(hidden), gelu, hidden))
        alive = weakref.ref(hidden)
        del hidden
        assert alive() is not None
        if backward:
            out.sum().backward()
        else:
            del out
        assert alive() is None
    finally:
        gc.enable()


def checkpointed(run):
    return checkpoint(run, use_reentrant=False)


def offloaded(run):
    with save_on_cpu():
        return run()


def forbidden(run):
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        return run()


@pytest.mark.parametrize("within", [checkpointed, offloaded, forbidden])
def test_others_decide_what_is_kept(within, monkeypatch):
    def refuse(packing, t):
        raise AssertionError("packed")

    monkeypatch.setattr(recompute, "_pack", refuse)
    x = tokens()
    within(lambda: hidden_layer(x)[-1].sum()).backward()
    assert x.grad.any()


def test_transforms_of_torch_func(made):
    x, layer = torch.randn(2, 5, 8), nn.Linear(8, 3)

    def loss(x):
        return feed(layer, recomputed(gelu(x), gelu, x)).square().sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    made.clear()
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(x), expected)
    assert not made


def test_an_activation_that_is_not_the_known_one_is_kept(made):
    """A hook may change what it gives, so nobody can make it again."""
    for change in (lambda m: m.__setitem__(1, nn.SiLU()), hooked):
        mlp, x = Mlp(8), tokens()
        change(mlp)
        found = torch.autograd.grad(mlp(x).sum(), [x, *mlp.parameters()])
        with keeping():
            expected = torch.autograd.grad(mlp(x).sum(), [x, *mlp.parameters()])
        assert all(map(torch.equal, expected, found))
        assert not made


def hooked(mlp):
    mlp[1].register_forward_hook(lambda module, inputs, output: output * 2)


def test_a_frozen_layer_keeps_nothing():
    """Torch kept the hooks, and so what the input follows from, with the frozen weight."""
    x = tokens()
    hidden = x * 2
    layer = nn.Linear(8, 3).requires_grad_(False)
    out = feed(layer, recomputed(gelu(hidden), gelu, hidden).clone())
    marked = recomputed(gelu(hidden * 3), gelu, kept := hidden * 3)
    out = out + feed(layer, marked)
    kept, marked = weakref.ref(kept), None
    gc.collect()
    assert kept() is None
    out.sum().backward()
    assert x.grad is not None


def test_what_nobody_else_keeps_is_not_kept():
    """A norm's input without a gradient: its owner may refill it, or it may be of inference."""
    weight = torch.randn(8, requires_grad=True)
    with torch.inference_mode():
        inference = torch.randn(2, 5, 8)
    for x in (torch.randn(2, 5, 8), inference):
        layer = nn.Linear(8, 3)
        made = x + weight
        out = feed(layer, recomputed(made, torch.add, x, weight))
        expected = made.detach().flatten(0, 1).sum(0)
        if not x.is_inference():
            x.zero_()
        out.sum().backward()
        torch.testing.assert_close(layer.weight.grad, expected.expand(3, 8))


def test_hooks_see_a_tensor_as_any_other(tmp_path):
    hidden, layer, seen = tokens() * 2, nn.Linear(8, 3), []

    def double(_, args):
        seen.append(args[0])
        args[0].data.mul_(2)

    layer.register_forward_pre_hook(double)
    out = feed(layer, recomputed(gelu(hidden), gelu, hidden))
    out.sum().backward()
    torch.testing.assert_close(layer.weight.grad[0], seen[0].detach().flatten(0, 1).sum(0))
    torch.save(seen[0].detach(), tmp_path / "x.pt")
    assert not vars(seen[0])
