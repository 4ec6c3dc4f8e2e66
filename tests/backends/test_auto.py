"""What `auto` takes for dense attention on a GPU, with neither a GPU nor torch's choice of a kernel
there: both are played."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import ptattn
from ptattn import backends, ops

pytest.importorskip("triton")
from ptattn.backends import sdpa, triton
from ptattn.kernels import configs, host

CUDNN, FLASH = "CUDNN_ATTENTION", "FLASH_ATTENTION"


@pytest.fixture
def gpu(monkeypatch):
    """An H200 where torch takes cuDNN's kernel; what is set on it changes that."""

    class GPU:
        kernel = CUDNN
        capability = (9, 0)

    monkeypatch.setattr(backends, "_against_device", lambda *_: [])
    monkeypatch.setattr(backends, "_kernel_of_torch", lambda *_: GPU.kernel)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: GPU.capability)
    for name, module in (("sdpa", sdpa), ("triton", triton)):
        monkeypatch.setattr(module, "attention", lambda *_, name=name: name)
    host.arch_of.cache_clear()
    ops._known.clear()
    with FakeTensorMode():
        yield GPU
    host.arch_of.cache_clear()
    ops._known.clear()


def draw(batch=1, queries=1024, heads=16, head_dim=72, dtype=torch.bfloat16):
    return torch.empty(batch, queries, heads, head_dim, dtype=dtype, device="cuda")


def taken(q, k, key_mask=None):
    """The backend that runs, which `explain` has to know, and what it says of torch's SDPA."""
    name = ops.attention(q, k, k, key_mask=key_mask)
    found = ptattn.explain("attention", q, k, k, key_mask=key_mask)
    assert name == found.backend
    return name, found.kept


def test_torch_runs_what_it_was_measured_to_do_faster(gpu):
    """cuDNN's forward took 0.68 to 0.92 of the time of our kernels for 768 keys and more."""
    for queries, keys in ((16384, 1024), (49152, 768), (196_608, 3072), (768, 768), (4096, 4096)):
        assert taken(draw(queries=queries), draw(queries=keys)) == ("sdpa", ())
    text = str(ptattn.explain("attention", *(draw(),) * 3))
    assert text.splitlines() == [
        "attention: auto takes sdpa",
        "  reference: can run",
        "  sdpa: can run",
        "  triton: can run",
    ]


def test_with_gradients_fewer_keys_stay_with_the_kernels(gpu):
    """At 768 keys cuDNN's forward was faster, its forward and backward together slower."""
    q, few, many = draw(queries=16384), draw(queries=768), draw()
    few.requires_grad_()
    many.requires_grad_()
    reason = "measured from 1024 keys on where gradients are needed; got 768"
    assert taken(q, few) == ("triton", (reason,))
    assert taken(q, many) == ("sdpa", ())
    assert taken(q, few.detach()) == ("sdpa", ())
    with torch.no_grad():
        assert taken(q, few) == ("sdpa", ())


def test_a_named_backend_runs(gpu):
    q = draw()
    for name in ("triton", "sdpa"):
        assert ops.attention(q, q, q, backend=name) == name


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(head_dim=64), "not measured to be faster on this GPU for bfloat16 and head dim 64"),
        (dict(dtype=torch.float16), "on this GPU for float16 and head dim 72"),
        (dict(dtype=torch.float32), "on this GPU for float32 and head dim 72"),
        (dict(heads=8), "measured from 16 heads on; got 8"),
        (dict(queries=256), "measured from 768 queries on; got 256"),
        (dict(batch=64, queries=16384), "not measured for tensors of 2**31 / 3 elements and more"),
    ],
    ids=["head dim", "fp16", "fp32", "heads", "queries", "elements"],
)
def test_what_was_not_measured_stays_with_the_kernels(gpu, changes, reason):
    shape = dict(batch=1, heads=16, head_dim=72, dtype=torch.bfloat16) | changes
    keys = {name: value for name, value in shape.items() if name != "queries"}
    name, kept = taken(draw(**shape), draw(**keys))
    assert (name, len(kept)) == ("triton", 1)
    assert reason in kept[0]


def test_few_or_masked_keys_stay_with_the_kernels(gpu):
    q, few = draw(), draw(queries=120)
    assert taken(q, few) == ("triton", ("measured from 768 keys on; got 120",))
    mask = torch.ones(1, 1024, dtype=torch.bool, device="cuda")
    assert taken(q, q, mask) == ("triton", ("not measured with a key mask",))
    _, kept = taken(q, few, torch.ones(1, 120, dtype=torch.bool, device="cuda"))
    assert kept == ("not measured with a key mask", "measured from 768 keys on; got 120")
    text = str(ptattn.explain("attention", q, few, few))
    assert "\n  sdpa: can run, but is not taken: measured from 768 keys on; got 120\n" in text


def test_a_negative_scale_stays_with_the_kernels(gpu):
    """Where the largest product has the smallest score."""
    q = draw()
    assert ops.attention(q, q, q, scale=-0.1) == "triton"
    found = ptattn.explain("attention", q, q, q, scale=-0.1)
    assert (found.backend, found.kept) == ("triton", ("not measured with a negative scale",))


def test_another_gpu_keeps_the_kernels(gpu):
    gpu.capability = (10, 0)
    assert taken(draw(), draw())[0] == "triton"


def test_what_a_program_sets_holds_from_the_next_call_on(gpu):
    """The choice was once kept by shapes alone; settings may change between two calls."""
    q = draw()
    assert taken(q, q)[0] == "sdpa"
    gpu.kernel = FLASH
    assert taken(q, q) == ("triton", (f"torch takes {FLASH} here; {CUDNN} was measured",))
    gpu.kernel = CUDNN
    torch.use_deterministic_algorithms(True)
    try:
        assert taken(q, q) == ("triton", ("deterministic algorithms are asked for",))
    finally:
        torch.use_deterministic_algorithms(False)
    assert taken(q, q)[0] == "sdpa"


def test_rows_that_cudnn_cannot_load_stay_with_the_kernels(gpu):
    packed = draw(heads=48).narrow(2, 16, 16)
    assert taken(packed, packed) == ("sdpa", ())
    reason = ("rows of channels do not begin at multiples of 16 bytes",)
    narrow, shifted = draw(head_dim=76).narrow(3, 0, 72), draw(head_dim=80).narrow(3, 4, 72)
    for odd in (narrow, shifted, draw(heads=72, head_dim=16).mT):
        assert taken(odd, draw()) == ("triton", reason)


def test_autocast_decides_by_its_dtype(gpu):
    q = draw(dtype=torch.float32)
    assert taken(q, q)[0] == "triton"
    torch.set_autocast_enabled("cuda", True)  # torch.autocast does not where there is no GPU
    before = torch.get_autocast_dtype("cuda")
    try:
        for dtype, name in ((torch.bfloat16, "sdpa"), (torch.float16, "triton")):
            torch.set_autocast_dtype("cuda", dtype)
            assert taken(q, q)[0] == name
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)


def test_windows_and_other_operations_stay_with_the_kernels(gpu):
    q = draw()
    assert ptattn.explain("window_attention", q, q, q, (32, 32), (32, 32)).backend == "triton"
    assert ptattn.explain("layer_norm", q.flatten(2)).backend == "triton"


def test_every_entry_of_the_table_names_a_kernel_and_a_run(request):
    folder = request.config.rootpath
    entries = [e for arch in configs.table().values() for e in arch.get("dense_by_torch", ())]
    assert entries
    for entry in entries:
        found = configs.Faster(**entry)
        assert hasattr(torch.nn.attention.SDPBackend, found.kernel)
        assert isinstance(getattr(torch, found.dtype), torch.dtype)
        assert (folder / found.run / "README.md").is_file()


def test_the_kernel_that_torch_takes_follows_its_settings():
    """By torch itself, on a CPU."""
    bfloat16, cpu = torch.bfloat16, torch.device("cpu")
    assert backends._kernel_of_torch(cpu, bfloat16, 72) == FLASH
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert backends._kernel_of_torch(cpu, bfloat16, 72) == "MATH"
