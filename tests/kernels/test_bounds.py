"""Where the kernels read and write: no element out of bounds, none unwritten, none out of reach.

Under the interpreter, which passes addresses on as they are and leaves masked ones alone. What may
die, or needs much address space, runs in a process of its own: a function of this file, by name.
"""

import contextlib
import ctypes
import faulthandler
import functools
import math
import mmap
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from ptattn import WindowGrid
from tests import conftest
from tests.support.checks import Case, dense, means, norms, windows

pytest.importorskip("triton")
from ptattn.kernels import host, pool

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's memory protection"),
    pytest.mark.skipif(not host.INTERPRETED, reason="needs TRITON_INTERPRET=1"),
]

ROOT = Path(__file__).resolve().parents[2]
PAGE = mmap.PAGESIZE
MARGIN = 4096
NORESERVE = 0x4000  # MAP_NORESERVE: untouched pages cost no memory, nor count as if they did

NORM = "layer_norm_window_mean"

# (grid, window, shift): 10 windows in tiles of 4, the last tile half empty; 2 windows of 20 and 35
# tokens, in blocks of 32; 6 windows in a tile of 8; 1 window.
SMALL, LARGE = ((7, 11), (4, 3), (3, 1)), ((5, 11), (8, 9), (0, 4))
SMALL_FAR, LARGE_FAR = ((5, 7), (2, 4), (1, 3)), ((5, 7), (9, 8), (0, 0))


def masked(*args, **sizes):
    """`dense`, with random keys left out, but not the last."""
    case = dense(*args, **sizes)
    mask = torch.rand(case.tensors[1].shape[:2]) < 0.5
    mask[:, -1] = True
    case.options["key_mask"] = mask
    return case


# Every kernel, with rows of one tile (24) and of two (72). Gradients of the keys of 300 queries,
# and means of windows of more than 32 tokens, are sums over two programs.
CASES = {
    "small windows, 24": lambda: windows(SMALL, batch=1, heads=1, head_dim=24),
    "small windows, 72": lambda: windows(SMALL, batch=1, heads=1, head_dim=72),
    "large windows, 24": lambda: windows(LARGE, batch=1, heads=1, head_dim=24),
    "7 keys, 24": lambda: dense((300, 7), batch=1, heads=2, head_dim=24),
    "111 keys, 72": lambda: masked((77, 111), batch=1, heads=2, head_dim=72),
    "150 keys, 24": lambda: masked((33, 150), batch=1, heads=1, head_dim=24),
    "150 keys, 72": lambda: dense((33, 150), batch=1, heads=1, head_dim=72),
    "means, 24": lambda: means(SMALL, batch=1, channels=24),
    "means, 72": lambda: means(LARGE, batch=1, channels=72),
    "norm and means, 24": lambda: means(LARGE, op=NORM, batch=1, channels=24),
    "norm and means, 72": lambda: norms((1, SMALL_FAR[0]), channels=72, window=SMALL_FAR[1]),
    "norm, 24": lambda: norms((1, 77), channels=24),
    "norm, 72": lambda: norms((1, 35), channels=72, gated=False),
}


def moved(case, place):
    """The case with each tensor where `place` puts a copy."""
    tensors, grad_out = (
        [t if t is None else place(t) for t in ts] for ts in (case.tensors, case.grad_out)
    )
    options = {k: place(o) if isinstance(o, torch.Tensor) else o for k, o in case.options.items()}
    return Case(case.op, tensors, tuple(grad_out), options)


def all_tensors(case):
    options = [o for o in case.options.values() if isinstance(o, torch.Tensor)]
    return [t for t in (*case.tensors, *case.grad_out, *options) if t is not None]


def assert_equal(results, expected):
    for name, result in results.items():
        assert result.isfinite().all(), name
        assert torch.equal(result, expected[name]), name


def run_where_it_lies(case):
    """The results, of kernels that read every tensor of the case itself, not a copy."""
    run, addresses = host.Launch.run, set()

    def spy(self):
        addresses.update(a.data_ptr() for a in self.args if isinstance(a, torch.Tensor))
        run(self)

    with mock.patch.object(host.Launch, "run", spy):
        results = case.run("triton")
    assert addresses >= {t.data_ptr() for t in all_tensors(case)}
    return results


def run_within(case, allocate):
    """The case's inputs, outputs and gradients within what allocate(numel, dtype) returns."""

    def empty(x, *shape, dtype=None):
        return allocate(math.prod(shape), dtype or x.dtype).view(shape)

    case = moved(case, lambda t: empty(t, *t.shape).copy_(t))
    with mock.patch.object(host, "empty", empty):
        return case, run_where_it_lies(case)


def in_a_process(function):
    """Run a function of this file; a fault's traceback is on stderr."""
    code = f"from tests.kernels import test_bounds as t; t.prepare(); t.{function}()"
    environment = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    command = [sys.executable, "-X", "faulthandler", "-c", code]
    options = dict(cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr[-5000:]


def prepare():
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.manual_seed(0)
    conftest.pytest_configure()


# Every element of the outputs and of what is kept between kernels is written, and no other.


@pytest.mark.parametrize("name", CASES)
def test_all_outputs_are_written_and_nothing_else(name):
    buffers = []

    def allocate(numel, dtype):
        buffers.append(torch.full((numel + 2 * MARGIN,), float("nan")).to(dtype))
        return buffers[-1][MARGIN : MARGIN + numel]

    case = CASES[name]()
    expected = case.run("triton")
    inside, results = run_within(case, allocate)
    assert_equal(results, expected)
    assert all(map(torch.equal, all_tensors(inside), all_tensors(case)))
    for buffer in buffers:
        margins = torch.cat([buffer[:MARGIN], buffer[-MARGIN:]])
        assert (margins.isnan() if buffer.is_floating_point() else margins).all()


# Memory between two pages that may not be touched.


def guarded(numel, dtype, at_end):
    """A tensor whose last element ends, or whose first begins, at a forbidden page."""
    if numel == 0:
        return torch.empty(0, dtype=dtype)
    size = numel * dtype.itemsize
    end = PAGE + -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, end + PAGE)
    start = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for page in (start, start + end):
        assert mprotect(page, PAGE, 0) == 0, os.strerror(ctypes.get_errno())
    offset = end - size if at_end else PAGE
    return torch.frombuffer(memory, dtype=dtype, count=numel, offset=offset)


def run_between_guards():
    for name, draw in CASES.items():
        case = draw()
        expected = case.run("triton")
        # How far a tile passes the last channel does not matter before the first element.
        for at_end in (True, False) if name.endswith("24") else (True,):
            print(name, "at the end" if at_end else "at the start", file=sys.stderr, flush=True)
            allocate = functools.partial(guarded, at_end=at_end)
            assert_equal(run_within(case, allocate)[1], expected)
    for read in (lambda: read_beside(True), lambda: read_beside(False), read_one_token_too_many):
        assert status_of_fork(read) == -signal.SIGSEGV
    assert status_of_fork(lambda: None) == 0


def read_beside(at_end):
    x = guarded(5, torch.float32, at_end)
    ctypes.string_at(x.data_ptr() + (x.nbytes if at_end else -1), 1)


def read_one_token_too_many():
    tokens = guarded(76 * 24, torch.float32, at_end=True).view(1, 76, 24)
    pool.window_mean(tokens, WindowGrid(*SMALL[:2]))


def status_of_fork(function):
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()
        with contextlib.suppress(BaseException):
            function()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_nothing_out_of_bounds_is_touched():
    """Nor would it go unnoticed: reads past either end die, those of a kernel too."""
    in_a_process("run_between_guards")


# Offsets of 2**31 elements and more, of indices and strides that are each within int32.


def far(t, axis):
    """A copy whose last third along an axis lies that far away; what is between is not touched."""
    if t.dtype == torch.bool:
        return t  # key masks are contiguous
    strides = list(t.stride())
    strides[axis] = 3 * 2**30 // (t.shape[axis] - 1) // 8 * 8 + 8
    assert strides[axis] < 2**31 < strides[axis] * (t.shape[axis] - 1)
    size = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    memory = mmap.mmap(-1, size * t.element_size(), flags=flags)
    with contextlib.suppress(OSError):  # where the system has no huge pages at all
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=t.dtype).as_strided(t.shape, strides).copy_(t)


def run_far():
    """On the CPU the interpreter's "copies" of whole storages are the storages themselves."""
    for axis, name in enumerate(("samples", "tokens")):
        sizes = dict(dtype=torch.float16, batch=1 if axis else 3)
        for case in (
            windows(SMALL_FAR, heads=1, **sizes),
            windows(LARGE_FAR, heads=1, **sizes),
            dense((35, 40), heads=1, **sizes),
            masked((35, 150), heads=1, **sizes),
            means(SMALL_FAR, op=NORM, **sizes),  # in all that is strided, window_mean too
        ):
            print(case.op, name, file=sys.stderr, flush=True)
            apart = moved(case, lambda t, axis=axis: far(t, axis))
            assert_equal(run_where_it_lies(apart), case.run("triton"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2 * 2**20  # kB


def test_far_elements():
    in_a_process("run_far")
