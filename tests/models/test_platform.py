"""The models within torch: compile, autocast, checkpointing, copies, LoRA, int8, sharding."""

import copy
import io
import pickle
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss
from torch.utils._python_dispatch import TorchDispatchMode

import ptattn
from ptattn.bench.memory import LiveBytes
from tests.models.test_models import NAMES, condition_for, small

# What takes long to trace, by one model at every change, and by the others in the long tests.
BY_ONE = [
    "pt-dit-xl",
    *(pytest.param(name, marks=pytest.mark.long) for name in NAMES if name != "pt-dit-xl"),
]
TINY = dict(dim=32, num_heads=2, window=(1, 2, 3))


def tiny(name, *, backend="sdpa", **overrides):
    """Two blocks of 32 channels; the window of a PT-DiT is fixed."""
    sizes = {k: v for k, v in TINY.items() if k != "window" or name.startswith("pt-dit")}
    return small(name, **(sizes | overrides), backend=backend)


def batch_for(model, *shape, batch=2):
    latents = torch.randn(batch, 4, *shape)
    return dict(latents=latents, timestep=torch.linspace(3, 700, batch)) | condition_for(
        model, batch
    )


def gradients(model, inputs, run=None):
    """The output and every parameter's gradient of one training step."""
    model.zero_grad()
    out = (model if run is None else run)(**inputs)
    mse_loss(out.float(), torch.ones_like(out, dtype=torch.float32)).backward()
    return [out.detach(), *(p.grad for p in model.parameters())]


def same_bits(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture(autouse=True)
def _nothing_is_compiled():
    """What another test compiled counts as a first resolution."""
    torch.compiler.reset()


# torch.compile.


@pytest.mark.parametrize("name", BY_ONE)
def test_each_model_is_one_graph(name):
    model = tiny(name, depth=1)
    inputs = batch_for(model, 4, 8)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    assert same_bits(gradients(model, inputs, compiled), gradients(model, inputs))
    assert counter.frame_count == 1


@pytest.mark.long
def test_inductor_runs_a_whole_model():
    model = tiny("pt-dit-xl", depth=1)
    inputs = batch_for(model, 8, 10)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    close(gradients(model, inputs, compiled), gradients(model, inputs))


@pytest.mark.long
def test_no_resolution_past_the_second_compiles():
    """The window is the configuration's; one that follows the resolution is a graph per window."""
    model = tiny("pt-dit-s-class", depth=1, backend="triton")
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    counts = []
    for shape in ((6, 8), (4, 10), (8, 6)):
        with torch.no_grad():
            inputs = batch_for(model, *shape)
            assert torch.equal(compiled(**inputs), model(**inputs)), shape
        counts.append(counter.frame_count)
    assert counts == [1, 2, 2]


@pytest.mark.parametrize("name", BY_ONE)
def test_exports_with_any_batch(name):
    model = tiny(name).eval()
    inputs = batch_for(model, 6, 10)
    sizes = {key: {0: torch.export.Dim("batch", min=2)} for key in inputs}
    for key in inputs.keys() & {"caption", "caption_mask"}:
        sizes[key][1] = torch.export.Dim("tokens", min=2)
    exported = torch.export.export(model, (), inputs, dynamic_shapes=sizes).module()
    more = batch_for(model, 6, 10, batch=3)
    for key in inputs.keys() & {"caption", "caption_mask"}:
        more[key] = torch.cat([more[key], more[key][:, :2]], dim=1)
    torch.testing.assert_close(exported(**more), model(**more))


def test_tracing_says_what_to_use():
    model = tiny("pt-dit-xl")
    with pytest.raises(ValueError, match=r"torch\.jit\.trace makes of sizes: use"):
        torch.jit.trace(model, tuple(batch_for(model, 6, 10).values()))


# Autocast.


@pytest.mark.parametrize(
    ("name", "backend", "depth"),
    [("pt-dit-xl", "sdpa", 2), ("pt-dit-s-class", "sdpa", 2), ("pt-dit-s-class", "triton", 1)],
)
def test_autocast_keeps_the_stream_in_float32(name, backend, depth):
    model = tiny(name, backend=backend, depth=depth)
    inputs = batch_for(model, 4, 8)
    exact, streams = gradients(model, inputs), []
    for block in model.blocks:
        block.register_forward_hook(lambda _, given, out: streams.extend([given[0].x, out.x]))
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients(model, inputs)
    assert [x.dtype for x in streams] == [torch.float32] * len(streams)
    assert ours[0].dtype == torch.bfloat16
    for a, b in zip(ours, exact, strict=True):
        assert (a.float() - b).norm() <= 0.03 * b.norm()


# Activation checkpointing.


class Calls(TorchDispatchMode):
    """Counts the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.name()] += 1
        return func(*args, **(kwargs or {}))

    def attentions(self):
        forward = (n for n in self.names if "attention" in n and not n.endswith("backward"))
        return sum(self.names[n] for n in forward)


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_no_gradient(name):
    model = tiny(name)
    inputs = batch_for(model, 6, 10)
    gradients(model, inputs)  # what is kept from then on, such as the axes of positions
    with Calls() as plain:
        expected = gradients(model, inputs)
    for keep_attention, times in ((False, 2), (True, 1)):
        model.blocks.checkpoint(keep_attention=keep_attention)
        with Calls() as calls:
            assert same_bits(gradients(model, inputs), expected)
        assert calls.attentions() == times * plain.attentions()
    model.blocks.checkpoint(False)
    with Calls() as calls:
        gradients(model, inputs)
    assert calls.names == plain.names


def test_checkpointing_on_the_kernels():
    model = tiny("pt-dit-xl", depth=1, backend="triton")
    inputs = batch_for(model, 4, 6, batch=1)
    expected = gradients(model, inputs)
    model.blocks.checkpoint(keep_attention=True)
    with Calls() as calls:
        close(gradients(model, inputs), expected)
    assert calls.attentions() == 5


def test_a_checkpointed_block_keeps_one_tensor_of_tokens():
    """A block hands on a stream and a branch not added yet: both were kept. Besides, there is its
    modulation, nine vectors per sample."""
    kept = []
    for depth in (2, 3):
        model = tiny("pt-dit-xl", depth=depth)
        model.blocks.checkpoint()
        inputs = batch_for(model, 12, 20)
        with LiveBytes([*model.parameters(), *inputs.values()]) as live:
            out = model(**inputs)
        assert out.requires_grad
        kept.append(live.now)
    assert kept[1] - kept[0] == 2 * (60 + 9) * 32 * 4


@pytest.mark.parametrize("keep_attention", [False, pytest.param(True, marks=pytest.mark.long)])
def test_checkpointed_models_compile(keep_attention):
    model = tiny("dit-s", depth=1)
    inputs = batch_for(model, 6, 10)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = gradients(model, inputs, compiled)
    model.blocks.checkpoint(keep_attention=keep_attention)
    assert same_bits(gradients(model, inputs, compiled), expected)


# Copies.


@pytest.mark.parametrize("name", NAMES)
def test_copies_compute_the_same(name):
    model = tiny(name)
    model.blocks.checkpoint(keep_attention=True)
    inputs = batch_for(model, 6, 10)
    expected, file = gradients(model, inputs), io.BytesIO()
    torch.save(model.state_dict(), file)
    loaded = tiny(name)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert same_bits(gradients(other, inputs), expected)


# LoRA and quantized weights.


@pytest.mark.parametrize("name", ["pt-dit-xl", "pt-dit-s-class"])
def test_lora_on_every_linear_layer(name):
    """One sample, whose gates may scale weights, has what it has in a batch; merging changes it
    no more, and what is merged can be fused."""
    peft = pytest.importorskip("peft")
    model = tiny(name).eval()
    layers = [n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    lora = peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False)
    inputs = batch_for(model, 18, 26)
    adapted = peft.get_peft_model(model, lora).eval()
    with torch.no_grad():
        expected = adapted(**inputs)
        single = adapted(**{key: value[:1] for key, value in inputs.items()})
        torch.testing.assert_close(single, expected[:1], rtol=1e-4, atol=1e-5)
        with adapted.disable_adapter():
            assert not torch.allclose(adapted(**inputs), expected, rtol=1e-2)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(**inputs), expected, rtol=1e-4, atol=1e-5)
        ptattn.fuse(merged)
        torch.testing.assert_close(merged(**inputs), expected, rtol=1e-4, atol=1e-5)


def test_checkpointing_repeats_the_dropout_of_adapters():
    peft = pytest.importorskip("peft")
    model = tiny("pt-dit-xl")
    lora = peft.LoraConfig(
        r=2, lora_dropout=0.5, target_modules=["qkv", "kv", "proj"], init_lora_weights=False
    )
    adapted, inputs = peft.get_peft_model(model, lora).train(), batch_for(model, 6, 10)

    def step():
        torch.manual_seed(3)
        out = adapted(**inputs)
        weights = [p for p in adapted.parameters() if p.requires_grad]
        return torch.autograd.grad(out.square().mean(), weights)

    plain = step()
    model.blocks.checkpoint()
    close(step(), plain)


@pytest.mark.parametrize("name", NAMES)
def test_one_sample_under_autocast(name):
    model = tiny(name).eval()
    inputs = batch_for(model, 6, 10, batch=1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(**inputs)
    with torch.no_grad():
        expected = model(**inputs)
    assert (out - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", NAMES)
def test_quantized_weights(name):
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny(name).eval()
    inputs = batch_for(model, 18, 26)
    with torch.no_grad():
        expected = model(**inputs)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        out = model(**inputs)
        single = model(**{key: value[:1] for key, value in inputs.items()})
    assert 0 < (out - expected).norm() < 0.1 * expected.norm()
    torch.testing.assert_close(single, out[:1], rtol=1e-4, atol=1e-5)


# Sharding.


def whole_batch():
    """A model and a batch that every process draws alike."""
    torch.manual_seed(1)
    model = tiny("pt-dit-xl")
    return model, batch_for(model, 6, 10, batch=4)


def sharded_steps(rank, folder):
    """One of two processes: half of the batch on blocks sharded between both, then once more with
    activation checkpointing."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model, inputs = whole_batch()
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert not model.prepares_captions
    half = slice(2 * rank, 2 * rank + 2)
    inputs = {name: value[half] for name, value in inputs.items()}
    steps = []
    for checkpointed in (False, True):
        model.blocks.checkpoint(checkpointed)
        out, *grads = gradients(model, inputs)
        assert all(g.to_local().numel() < g.numel() for g in grads if g.shape[0] > 1)
        steps.append([out, *(g.full_tensor() for g in grads)])
    torch.save(steps, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_sharded_processes_have_the_gradients_of_one(tmp_path):
    torch.multiprocessing.spawn(sharded_steps, (str(tmp_path),), nprocs=2)
    expected = gradients(*whole_batch())
    processes = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for halves in zip(*processes, strict=True):  # plain, then checkpointed
        close([torch.cat([half[0] for half in halves])], expected[:1])
        for half in halves:
            close(half[1:], expected[1:])
