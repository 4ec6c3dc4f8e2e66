"""What the models keep and fold, on a GPU: within CUDA graphs and on several streams."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

import ptattn
from ptattn.bench import parity
from ptattn.models import position
from ptattn.models.blocks import Mlp
from tests.models.test_models import small
from tests.support.gpu import DEVICE, bf16, fp16, needs_gpu, normal, same_bits

pytestmark = needs_gpu


def model_and_inputs():
    model = small("pt-dit-xl", dim=144, num_heads=2).to(DEVICE, bf16).eval()
    caption = normal(2, 6, 24)
    return model, dict(latents=normal(2, 4, 48, 32), timestep=normal(2).abs()), caption


def captured(run):
    """A graph of a call, and what its replays write."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles and allocates
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


@torch.no_grad()
def test_positions_of_a_capture_are_not_kept(monkeypatch):
    """They lie in the graph's memory, where there is nothing before its first replay."""
    model, inputs, caption = model_and_inputs()
    expected = model(**inputs, caption=caption)
    graph = torch.cuda.CUDAGraph()
    monkeypatch.setattr(position, "_kept", {})
    with torch.cuda.graph(graph):
        out = model(**inputs, caption=caption)
    assert not position._kept
    graph.replay()
    assert torch.equal(out, expected)


@torch.no_grad()
def test_kept_positions_serve_graphs_and_streams(monkeypatch):
    monkeypatch.setattr(position, "_kept", {})
    model, inputs, caption = model_and_inputs()
    graph, out = captured(lambda: model(**inputs, caption=caption))
    assert len(position._kept) == 3
    graph.replay()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        other = model(**inputs, caption=caption)
    stream.synchronize()
    assert torch.equal(out, other)
    assert torch.equal(out, model(**inputs, caption=caption))


@torch.no_grad()
def test_a_prepared_caption_in_a_graph():
    model, inputs, caption = model_and_inputs()
    text = model.prepare_caption(caption)
    graph, out = captured(lambda: model(**inputs, caption=text))
    graph.replay()
    assert torch.equal(out, model(**inputs, caption=caption))


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_a_fused_model_in_a_graph_sees_weights_that_change(batch):
    model, inputs, caption = model_and_inputs()
    inputs = {name: value[:batch] for name, value in inputs.items()}
    ptattn.fuse(model)
    graph, out = captured(lambda: model(**inputs, caption=caption[:batch]))
    before = model(**inputs, caption=caption[:batch])
    for block in model.blocks:
        for half in (block.global_interaction, block.texture_complement):
            half.zero.weight.mul_(3)
    graph.replay()
    assert torch.equal(out, model(**inputs, caption=caption[:batch]))
    assert not torch.equal(out, before)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_have_the_bits_of_what_was_kept(batch, autocast):
    """The norm that is made again has no residual to add: it must sum its rows in the same order.
    With hooks of somebody else, all is kept."""
    model = small("pt-dit-xl", dim=1152, num_heads=16, depth=1).to(DEVICE)
    latents, caption = normal(batch, 4, 48, 32, dtype=torch.float32), normal(batch, 6, 24).float()
    probe = normal(batch, 8, 48, 32, dtype=torch.float32)
    if not autocast:
        model, latents, caption = model.to(bf16), latents.to(bf16), caption.to(bf16)

    def gradients():
        with torch.autocast(DEVICE, bf16, enabled=autocast):
            out = model(latents, torch.ones(batch, device=DEVICE), caption)
        return torch.autograd.grad((out * probe).sum(), list(model.parameters()))

    with saved_tensors_hooks(lambda t: t, lambda t: t):
        expected = gradients()
    assert same_bits(gradients(), expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [bf16, fp16])
@pytest.mark.parametrize("tokens", [(4096,), (2, 111), (0, 7)], ids=str)
@pytest.mark.parametrize("scale", [1, 5, 30])
def test_gelu_in_the_epilogue(dtype, tokens, scale, monkeypatch):
    mlp, x = Mlp(1152).to(DEVICE, dtype), normal(*tokens, 1152, dtype=dtype) * scale
    calls, product = [], torch._addmm_activation

    def kept(*args, **kwargs):
        calls.append(product(*args, **kwargs))
        return calls[0]

    monkeypatch.setattr(torch, "_addmm_activation", kept)
    assert mlp(x).shape == x.shape
    up = mlp[0]
    exact = F.linear(x.double(), up.weight.double(), up.bias.double())
    gold, eager = F.gelu(exact, approximate="tanh"), mlp[1](up(x))
    ours = calls[0].view(gold.shape)
    assert ours.dtype == dtype
    if gold.numel():
        parity.assert_within_rule("epilogue", ours, gold, [eager], parity.FORWARD)
