"""Backend names, what each can run, and the choice that `auto` makes.

An explicit name runs that backend or raises with every reason why it cannot; it never falls back.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import _disable_current_modes

from ..context import autocast_dtype
from ..geometry import WindowGrid
from ..packed import unpacked
from . import reference, sdpa

BACKENDS = ("reference", "sdpa", "triton")
CHOICES = (*BACKENDS, "auto")


class Backend(Protocol):
    """What a backend is: differentiable operations on inputs that `ops` has checked.

    Shapes are those of `ops`. Inputs have any strides; what attends returns contiguous tensors.
    What a backend cannot take, `reasons_against` names; all else it must.
    """

    def window_mean(self, x: Tensor, windows: WindowGrid) -> Tensor:
        """(B, N, C) to (B, M, C); windows without a shift."""

    def norm(
        self, x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None,
        scale: Tensor | None, windows: WindowGrid | None, eps: float,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """The residual x + gate · y (x without y), its modulated norm, and its window means.

        shift and scale come together, and never with windows. Under autocast dtypes may differ.
        """

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float
    ) -> Tensor:
        """A sample without a key that may be attended to gives zeros, and zero gradients."""

    def window_attention(
        self, q: Tensor, k: Tensor, v: Tensor, windows: WindowGrid, scale: float
    ) -> Tensor: ...

    def packed_attention(
        self, q: Tensor, kv: Tensor | None, key_mask: Tensor | None, scale: float
    ) -> Tensor:
        """`attention` of q and packed kv (B, M, 2, H, D), or of packed qkv (B, N, 3, H, D)."""

    def packed_window_attention(self, qkv: Tensor, windows: WindowGrid, scale: float) -> Tensor: ...


def load(backend: str) -> Backend:
    """The module that runs a backend; that of triton is imported when first asked for."""
    if backend == "triton":
        from . import triton

        return cast(Backend, triton)
    return cast(Backend, {"reference": reference, "sdpa": sdpa}[backend])


def reasons_against(backend: str, *tensors: Tensor, windows: WindowGrid | None = None) -> list[str]:
    """Every reason why `backend` cannot run on these tensors; empty if it can.

    Tensors of four axes are queries, keys and values, those of three are tokens. Reasons depend on
    the tensors' shapes, dtypes and devices, and on the tensors themselves under transforms alone.
    """
    if backend != "triton":
        return []
    try:
        triton: Any = load("triton")
    except ImportError as error:
        return [f"triton cannot be imported: {error}"]
    reasons = _against_transforms(tensors)
    if triton.TRITON < (3, 3):  # 3.2 does not compile all kernels
        reasons.append("triton 3.3 or newer is needed; got {}.{}".format(*triton.TRITON))
    for device in dict.fromkeys(t.device for t in tensors):
        reasons += _against_device(device.type, device.index, triton.INTERPRETED)
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        if dtype == torch.float64 and not triton.INTERPRETED:
            reasons.append("float64 runs under Triton's interpreter only")
    widths = dict.fromkeys((t.ndim, t.shape[-1]) for t in tensors)
    for ndim, width in widths:
        if ndim == 4 and (width % 8 or width > 128):
            reasons.append(f"the head dim must be a multiple of 8 up to 128; got {width}")
        if ndim == 3 and width > 2**14:
            reasons.append(f"tokens have at most {2**14} channels; got {width}")
    if windows is not None and math.prod(windows.window) > triton.MAX_WINDOW:
        reasons.append(f"a window holds at most {triton.MAX_WINDOW} tokens; got {windows.window}")
    return reasons


def _against_transforms(tensors: tuple[Tensor, ...]) -> list[str]:
    """Transforms that the operators would pass in silence, as if nothing depended on the inputs."""
    if torch.compiler.is_compiling():
        return []
    reasons = []
    if any(torch._C._functorch.is_gradtrackingtensor(t) for t in tensors):
        reasons.append("torch.func's grad, vjp and jvp do not reach the kernels")
    if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        reasons.append("the kernels have no forward-mode derivative")
    return reasons


@torch.compiler.assume_constant_result
def _against_device(kind: str, index: int | None, interpreted: bool) -> list[str]:
    if kind == "meta":
        return []  # shapes only
    if kind == "cpu" and not interpreted:
        return ["on the CPU the kernels run under TRITON_INTERPRET=1 only"]
    if kind == "cuda" and interpreted:
        return ["TRITON_INTERPRET=1 is set, and the interpreter does not take CUDA tensors"]
    if kind not in ("cpu", "cuda"):
        return [f"tensors are on {kind}, which is no CUDA or ROCm device"]
    if kind == "cuda" and not torch.version.hip:
        major, minor = torch.cuda.get_device_capability(index)
        if major < 8:
            return [f"the GPU needs compute capability 8.0 or more; got {major}.{minor}"]
    return []


def check(backend: str) -> None:
    """Raise ValueError unless `backend` is a known name."""
    if backend not in CHOICES:
        raise ValueError(f"backend must be one of {', '.join(CHOICES)}; got {backend!r}")


def resolve(backend: str, *tensors: Tensor, windows: WindowGrid | None = None) -> str:
    """The backend that runs: the one named, or for `auto` triton on a GPU where it can, else sdpa.

    Of dense attention `auto` leaves to sdpa what `against_sdpa` has no reason against.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the named backend cannot run here; the message lists every reason.
    """
    check(backend)
    if backend == "auto":
        on_gpu = any(t.is_cuda for t in tensors)
        return (
            "sdpa"
            if not on_gpu or reasons_against("triton", *tensors, windows=windows)
            else "triton"
        )
    if reasons := reasons_against(backend, *tensors, windows=windows):
        raise RuntimeError(f"backend {backend!r} cannot run here: " + "; ".join(reasons))
    return backend


# Dense attention under `auto`: torch's SDPA where the triton backend knows that it is faster.


class AutoDense:
    """The part of `auto` that is decided anew at each call, compiled or exported ones when they are
    traced: between torch's SDPA and the kernels, for a dense attention that `unmeasured` has
    nothing against. Whether gradients are needed may change, and so may torch's settings."""

    @staticmethod
    def attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
        backend = "triton" if _kept(q, k, v, scale) else "sdpa"
        return load(backend).attention(q, k, v, key_mask, scale)

    @staticmethod
    def packed_attention(
        q: Tensor, kv: Tensor | None, key_mask: Tensor | None, scale: float
    ) -> Tensor:
        backend = "triton" if _kept(*unpacked(q, kv), scale) else "sdpa"
        return load(backend).packed_attention(q, kv, key_mask, scale)


def against_sdpa(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float
) -> list[str]:
    """Every reason why `auto` takes the kernels for a dense attention, where they can run, and not
    torch's SDPA; empty where it takes the latter."""
    return unmeasured(q, k, v, key_mask) or _kept(q, k, v, scale)


def unmeasured(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> list[str]:
    """Where torch's SDPA was not measured to be faster; depends on shapes, dtype and device."""
    faster = _faster(q)
    if faster is None:
        dtype = _name(_dtype(q))
        return [f"not measured to be faster on this GPU for {dtype} and head dim {q.shape[-1]}"]
    reasons = [] if key_mask is None else ["not measured with a key mask"]
    for name, got in (
        ("heads", q.shape[0] * q.shape[2]), ("queries", q.shape[1]), ("keys", k.shape[1]),
    ):  # fmt: skip
        least = getattr(faster, name)
        if got < least:
            reasons.append(f"measured from {least} {name} on; got {got}")
    if any(3 * t.numel() >= 2**31 for t in (q, k, v)):  # as much as a packed projection spans
        reasons.append("not measured for tensors of 2**31 / 3 elements and more")
    return reasons


def _kept(q: Tensor, k: Tensor, v: Tensor, scale: float) -> list[str]:
    """What holds of this call, and may not of the next of such tensors, against torch's SDPA."""
    reasons, faster = [], _faster(q)
    least, keys = faster.training_keys, k.shape[1]
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if training and keys < least:
        reasons.append(f"measured from {least} keys on where gradients are needed; got {keys}")
    if scale < 0:
        reasons.append("not measured with a negative scale")
    if torch.are_deterministic_algorithms_enabled():
        reasons.append("deterministic algorithms are asked for")
    if not all(map(_aligned, (q, k, v))):
        reasons.append("rows of channels do not begin at multiples of 16 bytes")
    taken = _kernel_of_torch(q.device, _dtype(q), faster.head_dim)
    if taken != faster.kernel:
        reasons.append(f"torch takes {taken} here; {faster.kernel} was measured")
    return reasons


def _aligned(t: Tensor) -> bool:
    """torch.compile does not tell offsets."""
    offset = 0 if torch.compiler.is_compiling() else t.storage_offset()
    *strides, last = t.stride()
    return last == 1 and not any(number % 8 for number in (offset, *strides))


def _faster(q: Tensor) -> Any:
    """What was measured for this dtype and head dim, if anything."""
    triton: Any = load("triton")
    for found in triton.faster_dense(q.device):
        if (found.dtype, found.head_dim) == (_name(_dtype(q)), q.shape[-1]):
            return found
    return None


def _dtype(q: Tensor) -> torch.dtype:
    return autocast_dtype(q) or q.dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.compiler.assume_constant_result
def _kernel_of_torch(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The kernel that SDPA takes by itself, as its version has it and its settings are now."""
    with _disable_current_modes():  # tracers would take it for a part of the program
        x = torch.empty(head_dim, dtype=dtype, device=device).expand(1, 1, 1024, head_dim)
        return SDPBackend(torch._fused_sdp_choice(x, x, x)).name
