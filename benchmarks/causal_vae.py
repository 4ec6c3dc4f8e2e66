"""Time and peak memory of one decode by the autoencoder, at full size.

    python -m benchmarks.causal_vae 1024                 # an image of 1024 x 1024 pixels
    python -m benchmarks.causal_vae 512 --frames 29      # a clip
    python -m benchmarks.causal_vae 1024 --tiled         # by tiles

Memory is the most that the process had on a CPU, weights included, and the most that torch had
allocated on a GPU. Beside it stands the most bytes of tensors that were alive at once beside the
weights, counted on the meta device.
"""

from __future__ import annotations

import argparse
import resource
import time
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from ptattn.bench.memory import LiveBytes
from ptattn.pipelines import CausalVAE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("side", type=int, help="of the pixels")
    parser.add_argument("--frames", type=int, default=1, help="1 + 4k")
    parser.add_argument("--tiled", action="store_true", help="512 pixels a side, 29 frames")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), DTYPES[options.dtype]

    frames, side = 1 + (options.frames - 1) // 4, options.side // 8
    shape = 1, 4, frames, side, side
    live = _live_bytes(options.tiled, shape, dtype)
    torch.manual_seed(0)
    with torch.device(device), torch.no_grad():
        vae = _vae(options.tiled, dtype)
        z = torch.randn(shape).to(dtype)
        times = [_timed(vae, z) for _ in range(1 if device.type == "cpu" else 3)]
    seconds, busy = min(times)
    if device.type == "cuda":
        where, peak = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()
    else:
        where = f"{torch.get_num_threads()} threads, {busy:.0f} s of cores"
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    what = f"{options.frames} x {options.side}²{', tiled' * options.tiled}, {options.dtype}"
    print(
        f"{what}, torch {torch.__version__}: {seconds:.2f} s ({where}), peak {peak / 1e9:.2f} GB, "
        f"of tensors {live / 1e9:.2f} GB"
    )


def _vae(tiled: bool, dtype: torch.dtype) -> CausalVAE:
    vae = CausalVAE().to(dtype).eval()
    if tiled:
        vae.enable_tiling()
    return vae


def _live_bytes(tiled: bool, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    with torch.device("meta"), torch.no_grad():
        vae, z = _vae(tiled, dtype), torch.empty(shape, dtype=dtype)
        # The kernels that take 512 channels hold no scores; the meta device would.
        attention = mock.patch.object(F, "scaled_dot_product_attention", _no_scores)
        with attention, LiveBytes([*vae.parameters(), z]) as live:
            vae.decode(z)
    return live.peak


def _no_scores(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(query)


def _timed(vae: CausalVAE, z: Tensor) -> tuple[float, float]:
    """Seconds, and those of the cores."""
    if z.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begin, busy = time.perf_counter(), time.process_time()
    vae.decode(z)
    if z.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin, time.process_time() - busy


if __name__ == "__main__":
    main()
