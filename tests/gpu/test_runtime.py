"""The compiled kernels within CUDA and torch: repeats, sizes, streams, graphs, compilation, memory.

Results are compared bit for bit with those of a plain call.
"""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import ptattn
from ptattn import backends
from ptattn.bench import op_gate, op_workloads
from tests.models.test_models import small
from tests.support import gpu as gpu_support
from tests.support.gpu import attention, bf16, needs_gpu, normal, same_bits, with_gradients

pytestmark = needs_gpu

MIB = 2**20
H, D = 16, 72  # PT-DiT/XL


def windows(n, *geometry, batch=1, heads=H):
    """A call of window attention with gradients, and what it is called with."""
    tensors = normal(batch, n, 3, heads, D).unbind(2)
    return gpu_support.window_attention, tensors, normal(batch, n, heads, D), geometry


def dense(n, m, batch=1, heads=H):
    tensors = (normal(batch, n, heads, D), *normal(batch, m, 2, heads, D).unbind(2))
    return attention, tensors, normal(batch, n, heads, D), ()


def layer_norm(x, *geometry):
    return ptattn.ops.layer_norm_window_mean(x, *geometry, backend="triton")[0]


def means(x, *geometry):
    """Of the second output only, and so of a normed gradient of zeros."""
    return ptattn.ops.layer_norm_window_mean(x, *geometry, backend="triton")[1]


def window_mean(x, *geometry):
    return ptattn.ops.window_mean(x, *geometry, backend="triton")


IMAGE = ((64, 64), (8, 8))
CALLS = {
    "window": lambda: windows(4096, *IMAGE),
    "shifted": lambda: windows(4096, *IMAGE, (4, 4)),
    "window-loop": lambda: windows(4096, (64, 64), (16, 16), (8, 8)),
    "few-keys": lambda: dense(4096, 64),
    "loop": lambda: dense(4096, 300),
    "layer-norm": lambda: (layer_norm, (normal(1, 4096, H * D),), normal(1, 4096, H * D), IMAGE),
    "means": lambda: (means, (normal(1, 4096, H * D),), normal(1, 64, H * D), IMAGE),
    "window-mean": lambda: (window_mean, (normal(1, 4096, H * D),), normal(1, 64, H * D), IMAGE),
}
each_call = pytest.mark.parametrize("name", CALLS)


def run(call):
    function, tensors, grad_out, args = call
    return with_gradients(function, tensors, grad_out, *args)


@each_call
def test_250_runs_have_the_same_bits(name):
    call = CALLS[name]()
    first, differs = run(call), torch.zeros((), dtype=torch.bool, device=gpu_support.DEVICE)
    for _ in range(249):
        for a, b in zip(first, run(call), strict=True):
            differs |= (a != b).any()
    assert not differs


# Sizes. 30 frames of 256 x 256 tokens of 1152 channels: already the output passes 2**31 elements.

FRAMES, FRAME = 30, (256, 256)
LAST = slice(-FRAME[0] * FRAME[1], None)


@pytest.fixture
def long_video():
    """Packed (1, N, 3, H, D)."""
    torch.cuda.empty_cache()
    free, needed = torch.cuda.mem_get_info()[0], 60e9
    if free < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of GPU memory; {free / 1e9:.0f} are free")
    packed = torch.empty(1, FRAMES * FRAME[0] * FRAME[1], 3, H, D, device="cuda", dtype=bf16)
    assert packed.numel() // 3 > 2**31
    yield packed.normal_()
    torch.cuda.empty_cache()


def test_windows_past_2_31_elements(long_video):
    grad_out = torch.randn_like(long_video[:, :, 0])
    geometry = ((1, 8, 8), (0, 4, 4))
    whole = with_gradients(
        gpu_support.window_attention, long_video.unbind(2), grad_out, (FRAMES, *FRAME), *geometry
    )
    tensors, grad_out = long_video[:, LAST].unbind(2), grad_out[:, LAST]
    frame = with_gradients(gpu_support.window_attention, tensors, grad_out, (1, *FRAME), *geometry)
    assert same_bits([t[:, LAST] for t in whole], frame)


def test_packed_gradients_past_2_31_elements(long_video):
    """Of one sample's slices, the strides of a packed gradient pass what one of a slice does."""
    grad_out = torch.randn_like(long_video[:, :, 0])

    def attend(qkv, grid):
        return ptattn.ops.packed_window_attention(qkv, grid, (1, 8, 8), (0, 4, 4), backend="triton")

    whole = with_gradients(attend, (long_video,), grad_out, (FRAMES, *FRAME))
    frame = with_gradients(attend, (long_video[:, LAST],), grad_out[:, LAST], (1, *FRAME))
    assert same_bits([t[:, LAST] for t in whole], frame)


@pytest.mark.parametrize("keys", [64, 300])
def test_queries_past_2_31_elements(long_video, keys):
    q, (k, v) = long_video[:, :, 1], normal(1, keys, 2, H, D).unbind(2)
    grad_out = torch.randn_like(q)
    whole = with_gradients(attention, (q, k, v), grad_out)
    frame = with_gradients(attention, (q[:, LAST], k, v), grad_out[:, LAST])
    assert same_bits([t[:, LAST] for t in whole[:2]], frame[:2])
    assert all(t.isfinite().all() for t in whole[2:])


@pytest.mark.parametrize("function", [layer_norm, window_mean])
def test_means_past_2_31_elements(long_video, function):
    x = long_video.flatten(3)[:, :, 1]
    last = LAST if function is layer_norm else slice(-(FRAME[0] // 8) * (FRAME[1] // 8), None)
    grad_out = normal(1, FRAMES * -last.start, H * D)
    whole = with_gradients(function, (x,), grad_out, (FRAMES, *FRAME), (1, 8, 8))
    frame = with_gradients(function, (x[:, LAST],), grad_out[:, last], (1, *FRAME), (1, 8, 8))
    assert same_bits([whole[0][:, last], whole[1][:, LAST]], frame)


@pytest.mark.parametrize(
    ("op", "grid", "window"),
    [
        ("window", (1, 4, 4), (1, 2, 2)),
        ("window", (1, 9, 9), (1, 9, 9)),
        ("cross", (1, 4, 4), (1, 2, 2)),
        ("cross", (1, 12, 12), (1, 1, 1)),
    ],
)
def test_70000_batches_and_heads(op, grid, window):
    case = op_workloads.Operation(
        op, "many", "samples", grid, window, heads=16, head_dim=16, batch=4375
    )
    op_gate.check(case, case.inputs("cuda"))


# Streams, graphs, devices.


@each_call
def test_cuda_graph(name):
    call = CALLS[name]()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, which no capture allows
        for _ in range(3):
            run(call)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(call)
    for t in (*call[1], call[2]):
        t.copy_(torch.randn_like(t))
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(captured, run(call))


@each_call
def test_side_stream(name):
    call = CALLS[name]()
    expected = run(call)
    inputs = (*call[1], call[2])
    values = [t.clone() for t in inputs]
    for t in inputs:
        t.zero_()
    busy = normal(8192, 8192)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(20):  # a kernel on another stream would be done before the inputs come
            busy @ busy
        for t, value in zip(inputs, values, strict=True):
            t.copy_(value)
        results = run(call)
    torch.cuda.synchronize()
    assert same_bits(results, expected)


def test_current_device_stays():
    before = torch.cuda.current_device()
    for name in CALLS:
        run(CALLS[name]())
        assert torch.cuda.current_device() == before


@each_call
def test_second_device(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    function, tensors, grad_out, args = CALLS[name]()
    expected = run((function, tensors, grad_out, args))
    moved = [t.to("cuda:1") for t in tensors]
    results = run((function, moved, grad_out.to("cuda:1"), args))
    assert torch.cuda.current_device() == 0
    assert all(t.device.index == 1 for t in results)
    assert same_bits([t.to("cuda:0") for t in results], expected)


# Compilation.


@each_call
def test_torch_compile(name):
    function, tensors, grad_out, args = CALLS[name]()
    torch.compiler.reset()
    compiled = torch.compile(lambda *leaves: function(*leaves, *args), fullgraph=True)
    results = with_gradients(compiled, tensors, grad_out)
    assert same_bits(results, run((function, tensors, grad_out, args)))


def compiled_kernels():
    """How many variants each kernel has been compiled to, in this process."""
    from ptattn.kernels import few_keys, flash, flash_backward, norm, pool, reduce, window

    device = torch.cuda.current_device()
    return {
        name: len(kernel.device_caches[device][0])
        for module in (few_keys, flash, flash_backward, norm, pool, reduce, window)
        for name, kernel in vars(module).items()
        if hasattr(kernel, "device_caches")
    }


def test_a_new_resolution_compiles_nothing():
    def everything(side, batch, heads):
        n, grid = side**2, (side, side)
        for window in ((8, 8), (16, 16)):
            run(windows(n, grid, window, (3, 5), batch=batch, heads=heads))
        for m in (64, 300):
            run(dense(n, m, batch, heads))
        for function, window in ((window_mean, (8, 8)), (layer_norm, (12, 12))):
            x = normal(batch, n, 144)
            grad_out = torch.randn_like(function(x, grid, window))
            run((function, (x,), grad_out, (grid, window)))

    everything(24, 1, 2)
    before = compiled_kernels()
    assert sum(before.values()) >= 8
    # Below 2048 queries, all: more are another class of sizes, with a tile of their own.
    for side, batch, heads in ((32, 1, 2), (35, 2, 3), (45, 3, 1), (17, 1, 5)):
        everything(side, batch, heads)
    assert compiled_kernels() == before


# Whole models.


def training_step(model, inputs):
    """The output and all gradients, which stay where they are from one step to the next."""

    def step():
        for parameter in model.parameters():
            parameter.grad.zero_()
        out = model(*inputs)
        out.float().square().mean().backward()
        return out

    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return step


def model_and_inputs():
    """Two blocks in bf16 with no layer left at zero, and a batch of ragged images with captions."""
    model = small("pt-dit-xl", dim=144, num_heads=2, window=(1, 8, 8), backend="triton")
    model = model.to(gpu_support.DEVICE, bf16)
    timestep = torch.tensor([3.0, 700.0], device=gpu_support.DEVICE)
    return model, (normal(2, 4, 40, 56), timestep, normal(2, 6, 24))


@pytest.mark.parametrize("train", [False, True], ids=["forward", "training"])
def test_a_model_in_a_graph(train):
    """A replay reads what the inputs hold then, and has the bits of a plain call."""
    model, inputs = model_and_inputs()
    step = training_step(model, inputs) if train else torch.no_grad()(lambda: model(*inputs))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    inputs[0].copy_(normal(*inputs[0].shape))
    graph.replay()
    torch.cuda.synchronize()
    results = [captured.clone(), *(p.grad.clone() for p in model.parameters() if train)]
    expected = [step(), *(p.grad for p in model.parameters() if train)]
    assert same_bits(results, expected)


def test_reduced_overhead():
    """torch.compile's own CUDA graphs; inductor rounds in other places than eager torch."""
    model, inputs = model_and_inputs()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for _ in range(3):  # to warm up, to record, to replay
            out = compiled(*inputs).clone()
        exact = model.float()(*(t.float() for t in inputs))
        eager = model.to(bf16)(*inputs)
    assert (out - exact).norm() <= 1.1 * (eager - exact).norm()


# Choice and memory.


def test_auto_takes_the_kernels():
    for name in ("window", "few-keys"):
        function, tensors, _, args = CALLS[name]()
        op = "attention" if function is attention else "window_attention"
        assert ptattn.explain(op, *tensors, *args).backend == "triton"
        out = getattr(ptattn.ops, op)(*tensors, *args)
        assert torch.equal(out, function(*tensors, *args))


def test_auto_takes_cudnn_where_it_was_measured_to_be_faster():
    """And only while torch would take it by itself, and need not repeat bits."""
    qkv = [torch.randn(1, 1024, 16, 72, device="cuda", dtype=bf16) for _ in range(3)]

    def taken():
        found = ptattn.explain("attention", *qkv)
        named = ptattn.attention(*qkv, backend=found.backend)
        assert torch.equal(ptattn.attention(*qkv), named)
        return found.backend

    if torch.cuda.get_device_capability() != (9, 0):
        assert taken() == "triton"
        return
    cudnn = backends._kernel_of_torch(qkv[0].device, bf16, 72) == "CUDNN_ATTENTION"
    assert taken() == ("sdpa" if cudnn else "triton")
    for settings in (sdpa_kernel(SDPBackend.FLASH_ATTENTION), deterministic()):
        with settings:
            assert taken() == "triton"


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def peak(function):
    """Bytes that a call takes at most beyond what there was before, and what it returns."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = function()
    return torch.cuda.max_memory_allocated() - before, results


@pytest.mark.parametrize("window", [(8, 8), (16, 16)])
def test_window_attention_copies_nothing(window):
    """Of views of one packed projection, shifted, on a grid that the window does not divide."""
    geometry = (100, 130), window, (window[0] // 2,) * 2
    function, tensors, grad_out, _ = windows(100 * 130, batch=2)
    leaves = [t.detach().requires_grad_() for t in tensors]
    run((function, tensors, grad_out, geometry))  # what the driver and the launcher keep
    slack = 8 * MIB  # log-sum-exp, row sums, and the allocator's rounding
    taken, out = peak(lambda: function(*leaves, *geometry))
    assert out.nbytes <= taken <= out.nbytes + slack
    taken, grads = peak(lambda: torch.autograd.grad(out, leaves, grad_out))
    assert taken <= sum(t.nbytes for t in grads) + slack


# Memory errors and races.


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    root = Path(__file__).resolve().parents[2]
    program = root / "tests" / "support" / "sanitized.py"
    command = [sanitizer, "--tool", tool, "--error-exitcode", "99", sys.executable, str(program)]
    # Without the allocator's cache every tensor has bounds of its own.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    environment["PYTHONPATH"] = path
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    report = done.stdout + done.stderr
    if "Device not supported" in report:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0, report[-4000:]
    assert "all kernels ran" in report
