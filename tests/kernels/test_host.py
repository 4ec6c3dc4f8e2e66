"""The host side of the kernels: tiles, configurations, what is launched, and what errors say."""

import os
import subprocess
import sys

import pytest
import torch

import ptattn
from ptattn.geometry import WindowGrid
from tests.support.cases import LAYOUTS

triton = pytest.importorskip("triton")
from ptattn.kernels import attention, configs, host, pool, window  # noqa: E402

WINDOWS = WindowGrid((4, 20, 30), (2, 4, 4), (1, 2, 2))
LARGE = WindowGrid((4, 20, 30), (4, 8, 8), (2, 4, 4))


def qkv(batch, tokens, heads=2, head_dim=72, keys=None):
    def draw(n):
        return torch.empty(batch, n, heads, head_dim, dtype=torch.bfloat16, device="meta")

    return draw(tokens), draw(keys or tokens), draw(keys or tokens)


def forward_and_backward(batch, which, arch="sm90"):
    """What one attention launches, forward and backward."""
    windows = which if isinstance(which, WindowGrid) else None
    q, k, v = qkv(batch, 2400, keys=None if windows else which)
    with host.record(arch) as launches:
        if windows:
            out, lse = attention.windowed(q, k, v, windows, 0.1)
            attention.windowed_backward(q, k, v, windows, 0.1, out, lse, out, (True,) * 3)
        else:
            out, lse = attention.dense(q, k, v, None, 0.1)
            attention.dense_backward(q, k, v, None, 0.1, out, lse, out, (True,) * 3)
    return launches


@pytest.mark.parametrize("channels", range(8, 129, 8))
def test_split_of_channels(channels):
    first, second = host.split_channels(channels)
    for width in (first, second):
        assert width == 0 or (width >= 16 and width & (width - 1) == 0)
    assert channels <= first + second <= triton.next_power_of_2(max(channels, 16))


def test_split_of_channels_wastes_little():
    expected = {48: (32, 16), 64: (64, 0), 72: (64, 16), 80: (64, 16), 96: (64, 32), 120: (128, 0)}
    assert {channels: host.split_channels(channels) for channels in expected} == expected
    assert host.split_channels(1152) == (1024, 128)


@pytest.mark.parametrize(
    ("layout", "align"),
    # "transposed" has strides of 9 rows, "step-2" of twice the channels.
    [("contiguous", 8), ("transposed", 8), ("packed", 8), ("step-2", 16), ("expanded", 8)],
)
def test_alignment_divides_every_stride(layout, align):
    t = LAYOUTS[layout](torch.empty, (3, 9, 5, 24))
    assert host.alignment(*host.facts(t)) == align
    assert all(stride % align == 0 for stride in t.stride()[:-1])


def test_alignment_of_odd_strides():
    t = torch.empty(2, 3, 2, 25)[..., :24]
    assert host.alignment(*host.facts(t)) == 1
    assert host.alignment(*host.facts(t, torch.empty(2, 3, 2, 24))) == 1
    alone = torch.empty(7, 24).as_strided((1, 3, 2, 24), (7, 48, 24, 1))
    # A stride that only index 0 uses does not matter.
    assert host.alignment(*host.facts(alone)) == 8


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        (WINDOWS, ["window_forward", "window_backward"]),
        (LARGE, ["flash_forward", "flash_backward_q", "flash_backward_kv"]),
        (64, ["few_keys_forward", "few_keys_backward", "sum_splits", "sum_splits"]),
        (
            200,
            ["flash_forward", "flash_backward_q", "flash_backward_kv", "sum_splits", "sum_splits"],
        ),
    ],
    ids=["small windows", "large windows", "few keys", "many keys"],
)
def test_what_is_launched(which, expected):
    assert [one.kernel.__name__ for one in forward_and_backward(2, which)] == expected


@pytest.mark.parametrize("which", [WINDOWS, LARGE, 64, 200], ids=str)
def test_work_is_cut_alike_in_every_batch(which):
    """A sample's bits must not depend on the batch it comes in."""
    one, eight = (forward_and_backward(batch, which) for batch in (1, 8))
    for a, b in zip(one, eight, strict=True):
        assert b.programs == 8 * a.programs
        assert (a.constants, a.config) == (b.constants, b.config)
        numbers = [[x for x in launch.args if not torch.is_tensor(x)] for launch in (a, b)]
        assert numbers[0] == numbers[1]


@pytest.mark.parametrize(
    ("grid", "window", "programs"),
    [
        ((64, 64), (8, 8), 512),  # 128 once, on 132 multiprocessors
        ((128, 128), (16, 16), 1024),
        ((256, 256), (16, 16), 2048),
        ((64, 64), (4, 4), 256),  # a second launch would cost more
    ],
    ids=str,
)
def test_means_of_a_small_grid_are_cut_finer(grid, window, programs):
    """28 µs for what the norm alone takes 13 for, on an H200 with few programs at work."""
    windows = WindowGrid(grid, window)
    for batch in (1, 3):
        x = torch.empty(batch, windows.num_tokens, 1152, dtype=torch.bfloat16, device="meta")
        with host.record("sm90") as launches:
            pool.forward(x, None, None, windows, 1e-6, x.dtype)
        names = [one.kernel.__name__ for one in launches]
        cut = programs > windows.num_windows
        assert names == ["pool_forward", "sum_splits"][: 1 + cut]
        assert launches[0].programs == batch * programs


@pytest.mark.parametrize(
    ("queries", "keys", "parts"),
    [(100, 64, 1), (4096, 64, 16), (16384, 64, 32), (49152, 64, 96), (16384, 65, 16)],
)
def test_few_keys_are_summed_of_few_parts(queries, keys, parts):
    """Of parts for 256 queries each, those of 16,384 queries were half as many bytes as q and dq
    together, written and read again."""
    q, k, v = qkv(1, queries, heads=16, keys=keys)
    with host.record("sm90") as launches:
        attention.dense_backward(q, k, v, None, 0.1, None, None, q, (True,) * 3)
    assert launches[0].programs == 16 * parts


def test_no_work_for_an_empty_batch():
    assert all(one.programs == 0 for one in forward_and_backward(0, WINDOWS))


def test_configurations(monkeypatch):
    found = configs.find(
        "flash_forward", "sm90", bytes=2, channels=80, queries=10**6, windowed=0, masked=0
    )
    assert (found.rows, found.keys) == (128, 64)
    monkeypatch.setitem(configs.table(), "x", {"few_keys_forward": [{"max_bytes": 1, "warps": 4}]})
    with pytest.raises(LookupError, match=r"few_keys_forward on x with .*bytes"):
        configs.find("few_keys_forward", "x", bytes=2)


def test_sizes_do_not_specialise():
    """Triton compiles anew for an integer that is 1 or newly divisible by 16, unless told not to:
    a new resolution would compile new kernels."""
    code = """
import triton
from ptattn.kernels import few_keys, flash, flash_backward, norm, pool, reduce, window
modules = few_keys, flash, flash_backward, norm, pool, reduce, window
kernels = [k for m in modules for k in vars(m).values()
           if isinstance(k, triton.JITFunction) and k.__module__ == m.__name__
           and ("ward" in k.__name__ or k.__name__ == "sum_splits")]
assert len(kernels) == 11, kernels
pointers = {"x", "y", "q", "k", "v", "g", "m", "mask", "out", "lse", "delta", "dq", "dk", "dv",
            "dx", "dy", "gate", "shift", "scale", "total", "normed", "means", "dtotal", "dnormed",
            "dmeans", "parts", "sums"}
for kernel in kernels:
    sizes = [p.name for p in kernel.params
             if not p.is_constexpr and p.name not in pointers and not p.do_not_specialize]
    assert not sizes, (kernel.__name__, sizes)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


class Broken:
    """Stands for a kernel that fails."""

    __name__ = "window_forward"

    def __init__(self, error):
        self.error = error

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **kwargs):
        raise self.error


def test_a_kernel_that_does_not_fit_is_named(monkeypatch):
    error = triton.OutOfResources(300_000, 232_448, "shared memory")
    monkeypatch.setattr(window, "window_forward", Broken(error))
    q = torch.randn(2, 12, 1, 16)
    with pytest.raises(host.KernelError) as caught:
        ptattn.window_attention(q, q, q, (3, 4), (2, 2), backend="triton")
    message = str(caught.value)
    for part in ("ptattn.window_attention", "(2, 12, 1, 16)", "warps=8", "'D': 16", "300000"):
        assert part in message, message


def test_out_of_memory_is_named(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(host, "empty", full)
    q = torch.randn(2, 12, 1, 16)
    with pytest.raises(torch.OutOfMemoryError, match=r"ptattn.attention of \(2, 12, 1, 16\)"):
        ptattn.attention(q, q, q, backend="triton")
