"""Starting a kernel without Triton's binder: what Triton itself would pass, in every version.

No GPU: Triton finds a kernel that only writes down how it is run. In a process of its own, as this
one has the kernels interpreted.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PREPARED = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from ptattn.kernels import host, window
from ptattn.geometry import WindowGrid


class Driver:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 7)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))


class Kernel(CompiledKernel):
    function, packed_metadata, runs = "function", "metadata", []
    def __init__(self): pass
    def __del__(self): pass
    def __getattribute__(self, name):  # Triton 3.3 loads the module where `run` is asked for
        return self.runs.append if name == "append" else object.__getattribute__(self, name)
    run = property(lambda self: lambda *args: self.runs.append(args))
    def launch_metadata(self, *args): return None


class Found(dict):
    def get(self, key, default=None): return KERNEL


def planned(kernel):
    "A plan, with tensors that it takes."
    global KERNEL
    KERNEL = Kernel()
    triton.runtime.driver.set_active(Driver())
    cache = kernel.device_caches[0]
    kernel.device_caches[0] = (Found(), *cache[1:])
    torch._C._cuda_getCurrentRawStream = lambda index: 7
    torch._C._cuda_getDevice = lambda: None  # the index of "cpu"
    torch.cuda.device = lambda device: __import__("contextlib").nullcontext()
    q, k, v = torch.randn(1, 12, 3, 1, 16).unbind(2)
    windows = WindowGrid((3, 4), (2, 2))
    plan = window._forward_plan(*host.facts(q, k, v), windows, 0.25, ("sm90", "ieee"))
    return plan, (q, k, v, torch.empty(1, 12, 1, 16))
"""


def run(code):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PREPARED + code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_second_start_passes_what_triton_passes():
    run("""
plan, tensors = planned(window.window_forward)
plan.start(*tensors)
assert plan._started is not None
plan.start(*tensors)
bound, ours = KERNEL.runs
assert ours[:6] == bound[:6] == (plan.programs, 1, 1, 7, "function", "metadata"), (bound, ours)
assert bound[6] is None and ours[6:9] == (None,) * 3  # launch metadata; nobody listens
bound, ours = bound[9:], ours[9:]
assert len(bound) == len(ours) == len(window.window_forward.params)
pointers, numbers = len(tensors), len(plan.numbers)
assert ours[:pointers] == tuple(t.data_ptr() for t in bound[:pointers])
assert ours[pointers : pointers + numbers] == bound[pointers : pointers + numbers]
constants = window.window_forward.params[pointers + numbers :]
assert all(p.is_constexpr for p in constants) and len(constants) == len(plan.constants)
""")


def test_the_binder_is_asked_where_it_must_be():
    """For pointers that 16 does not divide, as the kernel was compiled for others; where a hook
    wants to know of launches; and on another device."""
    run("""
plan, tensors = planned(window.window_forward)
started = []
def counted(*tensors):
    before = len(started)
    plan.start(*tensors)
    return len(started) - before

shifted = (torch.empty(len(tensors[0].flatten()) * 3 + 1)[1:].view(1, 12, 3, 1, 16)[:, :, 0],)
shifted += tensors[1:]
plan.start(*shifted)
assert plan._started is None, "kept a kernel compiled for pointers out of line"
plan.start(*tensors)
plan._started = started.append
assert counted(*tensors) == 1
assert counted(*shifted) == 0

def hook(*args): pass
if host.TRITON >= (3, 5): host._hooks.launch_enter_hook.add(hook)
else: host._hooks.launch_enter_hook = hook
assert counted(*tensors) == 0
if host.TRITON >= (3, 5): host._hooks.launch_enter_hook.remove(hook)
else: host._hooks.launch_enter_hook = None
assert counted(*tensors) == 1
torch._C._cuda_getDevice = lambda: 1
assert counted(*tensors) == 0
""")
