"""Triton's interpreter, hypothesis profiles, one thread, one seed per test."""

import importlib.util
import os

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("quick", max_examples=15, derandomize=True, deadline=None)
hypothesis.settings.register_profile("full", max_examples=2000, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

# Triton reads it when the kernels are first imported, for the whole process. The Makefile sets it
# for the CPU's tests on every machine, also where there is a GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _one_plan_has_one_kernel(monkeypatch):
    """On a GPU a plan starts the kernel compiled for its first tensors, whatever comes later. One
    kept without a dtype among its facts wrote float32 where bfloat16 was to be; the interpreter,
    which looks at what it gets, did not show it."""
    if importlib.util.find_spec("triton") is None:
        return
    from ptattn.kernels import host

    seen, start = {}, host.Plan.start

    def checked(self, *tensors):
        dtypes = [t.dtype for t in tensors]
        assert seen.setdefault(id(self), (dtypes, self))[0] == dtypes, self.kernel
        start(self, *tensors)

    monkeypatch.setattr(host.Plan, "start", checked)


def pytest_configure():
    # Tensors here are small, and workers fill the cores: threads would only wait for one another.
    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1":
        _patch_once()


def _patch_once():
    """Half the interpreter's time goes into patching `triton.language` anew at every call of a jit
    function by another; once per module and process is enough."""
    from triton.runtime import interpreter

    patched = set()

    def call(self, *args, **kwargs):
        module = self.fn.__module__
        if module not in patched:
            patched.add(module)
            if not module.startswith("ptattn"):  # the launch has patched what these see
                interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
