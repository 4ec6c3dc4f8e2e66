"""What torch.compile makes of calls on a GPU, found out without one.

    python -m tests.support.traced

prints for each case the kernels' operators in its graphs, or the error, as JSON. The tensors are
fake CUDA tensors, which pass every query that real ones do. Their backward would need a CUDA
context, so gradients are traced on "meta"; and whole models need a torch that can index such
tensors: built for CUDA, and newer than 2.9. A program of its own, as Triton must not interpret.
"""

import json
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode

import ptattn
from ptattn import backends, ops
from ptattn.backends import sdpa
from tests.models.test_models import condition_for, small

GRID, WINDOW, SHIFT = (8, 24), (4, 4), (2, 2)
TOKENS, VECTOR, HEADS = (2, 192, 32), (2, 32), (2, 192, 2, 16)


def operation(function, shapes, **rest):
    """An operation and its inputs."""

    def call(**tensors):
        return function(**tensors, **rest, backend="triton")

    return call, {name: torch.randn(shape) for name, shape in shapes.items()}


def norm(function, names, **rest):
    shapes = {name: TOKENS if name in "xy" else VECTOR for name in names.split()}
    return operation(function, shapes, **rest)


def attention(keys, masked=False):
    call, inputs = operation(ops.attention, dict(q=HEADS, k=(2, keys, 2, 16), v=(2, keys, 2, 16)))
    mask = dict(key_mask=torch.ones(2, keys, dtype=torch.bool)) if masked else {}
    return call, inputs | mask


def window_attention(window):
    geometry = dict(grid=GRID, window=window, shift=SHIFT)
    return operation(ops.window_attention, dict.fromkeys("qkv", HEADS), **geometry)


def attention_by_auto():
    """In bfloat16 faster by torch's SDPA, on the GPU that is played here."""
    shape = (1, 1024, 16, 72)
    return ops.attention, dict.fromkeys("qkv", torch.randn(shape))


def layer():
    module = ptattn.ProxyAttention(32, 2, window=WINDOW, grid=GRID, backend="triton")
    return module, dict(x=torch.randn(TOKENS))


def model(name):
    window = dict(window=(1, 2, 3)) if name.startswith("pt-dit") else {}
    module = small(name, dim=32, num_heads=2, depth=1, backend="triton", **window)
    inputs = dict(latents=torch.randn(2, 4, 6, 10), timestep=torch.ones(2))
    return module, inputs | condition_for(module, 2)


MODELS = {
    "PTDiT": lambda: model("pt-dit-xl"),
    "DiT": lambda: model("dit-s"),
    "PixArt": lambda: model("pixart-alpha"),
}
MEANS = dict(grid=GRID, window=WINDOW)
CASES = {
    "window_mean": lambda: norm(ops.window_mean, "x", **MEANS),
    "layer_norm": lambda: norm(ops.layer_norm, "x shift scale"),
    "residual_layer_norm": lambda: norm(ops.residual_layer_norm, "x y gate shift scale"),
    "layer_norm_window_mean": lambda: norm(ops.layer_norm_window_mean, "x", **MEANS),
    "residual_layer_norm_window_mean": lambda: norm(
        ops.residual_layer_norm_window_mean, "x y gate", **MEANS
    ),
    "attention to few keys": lambda: attention(48),
    "attention to many keys": lambda: attention(256),
    "masked attention": lambda: attention(48, masked=True),
    "window_attention": lambda: window_attention(WINDOW),
    "window_attention in large windows": lambda: window_attention((8, 12)),
    "ProxyAttention": layer,
} | MODELS


def placed(make, device):
    """What a case calls and gives, on a device; torch without CUDA has no gradients there."""
    with torch.device("meta"):
        function, inputs = make()
    if isinstance(function, torch.nn.Module):
        function.requires_grad_(False).load_state_dict(
            on(device, function.state_dict()), assign=True
        )
    inputs = on(device, inputs)
    for x in inputs.values():
        x.requires_grad_(device == "meta" and x.is_floating_point())
    return function, inputs


def on(device, tensors):
    return {name: torch.empty_like(t, device=device) for name, t in tensors.items()}


def operators(make, device, dynamic):
    """Those of ptattn in the graph of a call, and on "meta" in that of its backward."""
    found = set()

    def keep(graph, _inputs):
        names = (str(node.target).split(".") for node in graph.graph.nodes)
        found.update(name[1] for name in names if name[0] == "ptattn")
        found.update("sdpa" for node in graph.graph.nodes if node.name == "sigmoid")
        return graph.forward

    on_meta = device == "meta"
    with nullcontext() if on_meta else FakeTensorMode(allow_non_fake_inputs=True):
        function, inputs = placed(make, device)
        backend = aot_autograd(fw_compiler=keep, bw_compiler=keep) if on_meta else keep
        out = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)(**inputs)
    if on_meta:
        parts = out if isinstance(out, tuple) else (out,)
        sum(part.float().sum() for part in parts).backward()
    return sorted(found)


@contextmanager
def autocast():
    """As torch.autocast("cuda", torch.bfloat16), which turns itself off where there is no GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", False)


def outcome(make, device="cuda", dynamic=None):
    torch.compiler.reset()
    try:
        return operators(make, device, dynamic)
    except Exception as error:  # whatever torch raises is this case's failure
        return f"{type(error).__name__}: {error}"


def indexable():
    """Whether this torch indexes a fake CUDA tensor where there is no GPU, as whole models do."""
    with FakeTensorMode():
        try:
            return torch.empty(2, device="cuda")[:, None].is_cuda
        except RuntimeError:
            return False


def main():
    outcomes = {}
    for name, make in CASES.items():
        outcomes[f"{name}, gradients"] = outcome(make, "meta")
        outcomes[f"{name} of any size, gradients"] = outcome(make, "meta", dynamic=True)
        if name in MODELS and not indexable():
            continue
        outcomes[name] = outcome(make)
        with autocast():
            outcomes[f"{name}, autocast"] = outcome(make)
    outcomes["auto"] = outcome(attention_by_auto)
    with autocast():
        outcomes["auto, autocast"] = outcome(attention_by_auto)
        outcomes["auto of any size, autocast"] = outcome(attention_by_auto, dynamic=True)
    return outcomes


if __name__ == "__main__":
    with (
        patch("torch.cuda.get_device_capability", return_value=(9, 0)),
        patch.object(backends, "_kernel_of_torch", lambda *_: "CUDNN_ATTENTION"),
        # Without CUDA torch has no attention of fake CUDA tensors.
        patch.object(sdpa, "_sdpa", lambda q, k, v, scale: q.sigmoid()),
    ):
        print(json.dumps(main(), indent=1))
