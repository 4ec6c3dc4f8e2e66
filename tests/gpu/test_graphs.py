"""CUDA graphs of whole models: the bits of eager calls, whatever comes between them; training."""

import copy
import functools

import pytest
import torch
from torch import nn

import ptattn
from ptattn.capture import CaptureError
from tests.models.test_models import NAMES, condition_for, small
from tests.support.gpu import DEVICE, bf16, needs_gpu, normal

pytestmark = needs_gpu


def on_gpu(name="pt-dit-xl", dtype=bf16, **sizes):
    """Two blocks with heads of 72 channels and no layer left at zero."""
    return small(name, dim=144, num_heads=2, **sizes).eval().to(DEVICE, dtype)


def batch_for(model, height=16, width=24, batch=2):
    """What a call takes, drawn anew."""
    dtype = model.output.proj.weight.dtype
    condition = condition_for(model, batch)
    if "caption" in condition:
        condition["caption"] = condition["caption"].to(dtype)
    timestep = 1000 * torch.rand(batch, device=DEVICE)
    latents = normal(batch, 4, height, width, dtype=dtype)
    return (latents, timestep), {name: value.to(DEVICE) for name, value in condition.items()}


def same(fast, model, batch):
    """Whether a graphed call has the bits of an eager one."""
    args, condition = batch
    return torch.equal(fast(*args, **condition), model(*args, **condition))


@pytest.fixture
def _no_grad():
    with torch.no_grad():
        yield


inference = pytest.mark.usefixtures("_no_grad")


@inference
@pytest.mark.parametrize("name", NAMES)
def test_the_bits_of_an_eager_call(name):
    model = on_gpu(name)
    fast = ptattn.graphed(model)
    kept = []
    for _ in range(4):
        args, condition = batch_for(model)
        kept.append((fast(*args, **condition), model(*args, **condition)))
    for ours, eager in kept:  # no call has overwritten an earlier one's
        assert torch.equal(ours, eager)


@inference
def test_the_transformer_of_a_pipeline():
    from tests.support.components import WIDTH, transformer

    model = transformer(depth=2).eval().to(DEVICE, bf16)
    fast = ptattn.graphed(model)
    for _ in range(3):
        timestep = torch.tensor(500.0, device=DEVICE).expand(2)
        inputs = normal(2, 4, 1, 16, 24), timestep, normal(2, 8, WIDTH)
        assert torch.equal(fast(*inputs), model(*inputs))


@inference
def test_weights_that_change():
    model = on_gpu()
    fast = ptattn.graphed(model)
    batch = batch_for(model)
    assert same(fast, model, batch)
    for weight in model.parameters():
        weight.mul_(0.9)
    assert same(fast, model, batch)
    model.load_state_dict(on_gpu().state_dict(), assign=True)
    assert same(fast, model, batch)
    model.blocks[0].mlp[1] = nn.ReLU()
    assert same(fast, model, batch)
    model.float()
    assert same(fast, model, batch_for(model))


@inference
def test_more_signatures_than_are_kept():
    model = on_gpu()
    fast = ptattn.graphed(model, max_graphs=2)
    for height in (16, 32, 16, 48, 32, 16, 16, 48):
        assert same(fast, model, batch_for(model, height))
    fast.reset()
    assert same(fast, model, batch_for(model))


@inference
def test_a_call_on_another_stream():
    """The input comes late on that stream, and the next call is on the first one again."""
    model = on_gpu()
    fast = ptattn.graphed(model)
    (latents, timestep), condition = batch_for(model)
    fast(latents, timestep, **condition)
    fresh, busy = torch.randn_like(latents), normal(8192, 8192)
    expected = model(fresh, timestep, **condition), model(2 * fresh, timestep, **condition)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(20):
            busy @ busy
        latents.copy_(fresh)
        first = fast(latents, timestep, **condition)
    second = fast(2 * fresh, timestep, **condition)
    torch.cuda.synchronize()
    assert torch.equal(first, expected[0])
    assert torch.equal(second, expected[1])


@inference
def test_autocast_on_and_off():
    """A graph must not read the copies of weights that an autocast context keeps and drops."""
    model = on_gpu(dtype=torch.float32)
    fast = ptattn.graphed(model)
    for _ in range(2):
        for dtype in (bf16, None, torch.float16):
            with torch.autocast("cuda", dtype or bf16, enabled=dtype is not None):
                batch = batch_for(model)
                args, condition = batch
                model(*args, **condition)
                assert same(fast, model, batch)
        for weight in model.parameters():
            weight.mul_(0.9)


@inference
def test_inference_mode_on_and_off():
    model = on_gpu()
    fast = ptattn.graphed(model)
    for mode in (True, False, True):
        with torch.inference_mode(mode), torch.no_grad():
            for _ in range(2):
                assert same(fast, model, batch_for(model))


@inference
def test_random_numbers_follow_the_seed():
    model = nn.Dropout(0.5)
    fast, x = ptattn.graphed(model), torch.ones(4096, device=DEVICE)
    fast(x)
    torch.manual_seed(1)
    first, second = fast(x), fast(x)
    torch.manual_seed(1)
    assert torch.equal(fast(x), first)
    assert not torch.equal(first, second)


@inference
def test_a_compiled_model():
    model = on_gpu()
    compiled = torch.compile(model)
    fast = ptattn.graphed(compiled)
    for _ in range(2):
        assert same(fast, compiled, batch_for(model))


@inference
def test_sampling():
    pytest.importorskip("diffusers")
    from ptattn.flow import sample

    model = on_gpu("pt-dit-s-class")
    noise = normal(2, 4, 16, 24)
    condition, null = (
        {"labels": torch.full((2,), i, device=DEVICE)} for i in (3, model.config.num_classes)
    )
    fast = ptattn.graphed(model)
    for guidance in (4.0, 1.0):
        options = dict(steps=4, guidance=guidance)
        ours, eager = (sample(m, noise, condition, null, **options) for m in (fast, model))
        assert torch.equal(ours, eager)


# What cannot be captured


class Reads(nn.Module):
    def forward(self, x):
        return x * x.sum().item()


class Waits(nn.Module):
    """By a call that torch does not see: the capture itself breaks."""

    def forward(self, x):
        torch.cuda.synchronize()
        return 2 * x


class Fills(nn.Module):
    def forward(self, x):
        if torch.cuda.is_current_stream_capturing():
            torch.empty(2**50, dtype=torch.uint8, device=x.device)
        return 2 * x


@inference
@pytest.mark.parametrize(
    ("module", "reason"),
    [(Reads, "synchroni"), (Waits, "captur|synchroni"), (Fills, "out of memory")],
    ids=["reads", "waits", "fills"],
)
def test_a_capture_that_fails_breaks_nothing(module, reason):
    model, good = module(), on_gpu()
    fast, stream = ptattn.graphed(good), torch.cuda.current_stream()
    batch = batch_for(good)
    assert same(fast, good, batch)
    x = torch.ones(2, device=DEVICE)
    with pytest.raises(CaptureError, match=rf"cannot capture {module.__name__} with argument 1"
                       rf" \(2,\).*(?i:{reason}).*all the model itself") as caught:  # fmt: skip
        ptattn.graphed(model)(x)
    assert caught.value.__cause__ is not None
    assert torch.cuda.current_stream() == stream
    assert torch.cuda.get_sync_debug_mode() == 0
    assert model(x).eq(2).all()
    assert torch.rand(4, device=DEVICE).isfinite().all()  # its generator waits for no capture
    assert same(fast, good, batch)
    assert same(fast, good, batch_for(good, 32))


@inference
def test_inputs_elsewhere_are_named():
    model = on_gpu()
    (latents, timestep), condition = batch_for(model)
    fast = ptattn.graphed(model)
    with pytest.raises(ValueError, match="argument 1 on cuda:0 and argument 2 on cpu"):
        fast(latents, timestep.cpu(), **condition)
    with pytest.raises(ValueError, match="needs a CUDA device; got inputs on cpu"):
        ptattn.graphed(nn.Identity())(torch.ones(1))
    assert same(fast, model, batch_for(model))


# Training


def gradients(run, model, args):
    model.zero_grad(set_to_none=True)
    run(*args).float().square().mean().backward()
    return [weight.grad.clone() for weight in model.parameters()]


class ByLabel(nn.Module):
    """As in docs/PLATFORM.md: make_graphed_callables takes tensors by position."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, latents, timestep, labels):
        return self.model(latents, timestep, labels=labels)


def training_batch(model):
    (latents, timestep), condition = batch_for(model)
    return latents, timestep, condition["caption" if "caption" in condition else "labels"]


@pytest.mark.parametrize("name", ["pt-dit-xl", "pt-dit-s-class"])
def test_a_training_step_by_make_graphed_callables(name):
    """The recipe of docs/PLATFORM.md; gradients have the bits of eager ones."""
    model = on_gpu(name).train()
    draw = functools.partial(training_batch, model)
    first, whole = draw(), ByLabel(model) if model.config.num_classes else model
    twin = copy.deepcopy(whole)
    graphed = torch.cuda.make_graphed_callables(whole, first)
    for _ in range(3):
        args = draw()
        ours, eager = gradients(graphed, whole, args), gradients(twin, twin, args)
        assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))


def test_a_training_step_by_reduced_overhead():
    """The same for torch.compile, which rounds in other places than eager torch."""
    model = on_gpu().train()
    args = training_batch(model)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):  # to warm up, to record, to replay
        torch.compiler.cudagraph_mark_step_begin()
        ours = gradients(compiled, model, args)
    eager = gradients(model, model, args)
    wide = copy.deepcopy(model).float()
    exact = gradients(wide, wide, [t.float() for t in args])
    errors = [
        torch.cat([(a.float() - b).flatten() for a, b in zip(found, exact, strict=True)]).norm()
        for found in (ours, eager)
    ]
    assert errors[0] <= 1.1 * errors[1]
