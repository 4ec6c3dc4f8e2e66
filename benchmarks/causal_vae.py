"""Time and peak memory of one decode by the autoencoder, at full size, beside the plain way.

    python -m benchmarks.causal_vae 1024               # an image of 1024 x 1024 pixels
    python -m benchmarks.causal_vae 512 --frames 29    # a clip
    python -m benchmarks.causal_vae 1024 --way plain   # whole clips, three kernel frames, NCDHW

The plain way is the textbook's: every padded, normalised and enlarged copy whole, scores of the
attention written out. Both are compared on a small clip first. Memory is the most that the process
had on a CPU, weights included, and the most that torch had allocated on a GPU. Beside it stands the
most bytes of tensors that were alive at once beside the weights, counted on the meta device.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptattn.bench.memory import LiveBytes
from ptattn.pipelines import CausalVAE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}  # relative: rounding alone, of a random model


def plain_decode(vae: CausalVAE, z: Tensor) -> Tensor:
    """(B, 4, f, h, w) to pixels, whole at every step."""
    decoder = vae.decoder
    x = _conv(decoder.conv_in, _conv(vae.post_quant_conv, z))
    for step in decoder.mid.children():
        x = _step(step, x)
    for level in reversed(decoder.up):
        for step in (*level.block, *([level.upsample] if hasattr(level, "upsample") else [])):
            x = _step(step, x)
    return _conv(decoder.conv_out, F.silu(_norm(decoder.norm_out, x)))


def _step(module: Any, x: Tensor) -> Tensor:
    return {"ResnetBlock": _block, "AttnBlock": _attention, "Upsample": _upsample}[
        type(module).__name__
    ](module, x)


def _conv(layer: Any, x: Tensor) -> Tensor:
    conv = layer.conv
    x = torch.cat([x[:, :, :1]] * (conv.kernel_size[0] - 1) + [x], 2)
    padding = (0, conv.kernel_size[1] // 2, conv.kernel_size[2] // 2)
    return F.conv3d(x, conv.weight, conv.bias, padding=padding)


def _norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def _block(block: Any, x: Tensor) -> Tensor:
    h = _conv(block.conv1, F.silu(_norm(block.norm1, x)))
    h = _conv(block.conv2, F.silu(_norm(block.norm2, h)))
    return h + (x if block.nin_shortcut is None else _conv(block.nin_shortcut, x))


def _attention(block: Any, x: Tensor) -> Tensor:
    h = _norm(block.norm, x)
    q, k, v = (
        _conv(layer, h).transpose(1, 2).flatten(3) for layer in (block.q, block.k, block.v)
    )  # (B, F, C, H·W)
    scores = torch.softmax(q.transpose(2, 3) @ k * q.shape[2] ** -0.5, -1)
    h = (v @ scores.transpose(2, 3)).transpose(1, 2).view_as(x)
    return x + _conv(block.proj_out, h)


def _upsample(block: Any, x: Tensor) -> Tensor:
    if not block.time:
        return _conv(block.conv, F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest"))
    first = F.interpolate(x[:, :, :1], scale_factor=(1, 2, 2), mode="trilinear")
    if x.shape[2] > 1:
        rest = F.interpolate(x[:, :, 1:], scale_factor=(2, 2, 2), mode="trilinear")
        first = torch.cat([first, rest], 2)
    return _conv(block.conv, first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("side", type=int, help="of the pixels")
    parser.add_argument("--frames", type=int, default=1, help="1 + 4k")
    parser.add_argument("--way", choices=("lean", "tiled", "plain"), default="lean")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), DTYPES[options.dtype]

    frames, side = 1 + (options.frames - 1) // 4, options.side // 8
    shape = 1, 4, frames, side, side
    live = _live_bytes(options.way, shape, dtype)
    torch.manual_seed(0)
    with torch.device(device), torch.no_grad():
        vae = CausalVAE().to(dtype).eval()
        small = torch.randn(1, 4, 2, 6, 8).to(dtype)
        expected, got = plain_decode(vae, small), vae.decode(small).sample
        error = float((got - expected).float().norm() / expected.float().norm())
        if error > TOLERANCE[options.dtype]:
            raise SystemExit(f"both ways differ by {error:.1e}")
        z = torch.randn(shape).to(dtype)
        decode = _way(vae, options.way)
        times = [_timed(decode, z) for _ in range(1 if device.type == "cpu" else 3)]
    seconds, busy = min(times)
    if device.type == "cuda":
        where, peak = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()
    else:
        where = f"{torch.get_num_threads()} threads, {busy:.0f} s of cores"
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{options.way}, {options.frames} x {options.side}², {options.dtype}, torch "
        f"{torch.__version__}: {seconds:.2f} s ({where}), peak {peak / 1e9:.2f} GB, of tensors "
        f"{live / 1e9:.2f} GB; both ways differ by {error:.1e} on a small clip"
    )


def _way(vae: CausalVAE, way: str) -> Callable[[Tensor], Tensor]:
    if way == "plain":
        return lambda z: plain_decode(vae, z)
    if way == "tiled":
        vae.enable_tiling()
    return lambda z: vae.decode(z).sample


def _live_bytes(way: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    with torch.device("meta"), torch.no_grad():
        vae = CausalVAE().to(dtype)
        z = torch.empty(shape, dtype=dtype)
        # The kernels that take 512 channels hold no scores; the meta device would.
        attention = mock.patch.object(F, "scaled_dot_product_attention", _no_scores)
        with attention, LiveBytes([*vae.parameters(), z]) as live:
            _way(vae, way)(z)
    return live.peak


def _no_scores(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(query)


def _timed(decode: Callable[[Tensor], Tensor], z: Tensor) -> tuple[float, float]:
    """Seconds, and those of the cores."""
    if z.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begin, busy = time.perf_counter(), time.process_time()
    decode(z)
    if z.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin, time.process_time() - busy


if __name__ == "__main__":
    main()
