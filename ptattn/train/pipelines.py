"""Drawing with a text-to-image pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..graphs import graphed
from ..parallel import split_tokens
from ..pipelines import PTDiTPipeline
from .data.stream import PICTURE, generator


def draw(
    folder: Path,
    prompts: Sequence[str],
    size: tuple[int, int],
    graph: bool,
    mesh: DeviceMesh | None = None,
    *,
    seed: int,
    steps: int | None = None,
    guidance: float | None = None,
) -> Tensor:
    """Images by the pipeline in a folder, on the GPU where there is one.

    Args:
        prompts: one for each image.
        size: height and width in pixels.
        graph: whether to replay the transformer as a CUDA graph.
        mesh: of processes that share the tokens of each image; each has the whole pipeline on its
            device, where one process alone has one component at a time there.
        seed: image i depends on the seed and i, not on the others.
        steps, guidance: by default the pipeline's.

    Returns:
        uint8 (n, 3, H, W), on the CPU.

    Raises:
        OSError, ValueError, ImportError: as the pipeline's loading and its call.
    """
    # T5 in float32 as in the release; a CPU multiplies bfloat16 slowly.
    fast = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    dtypes = {"default": fast, "text_encoder": torch.float32}
    pipeline = PTDiTPipeline.from_pretrained(folder, dtype=dtypes)
    if mesh is not None:
        split_tokens(pipeline.to(mesh.device_type).transformer, mesh)
    elif torch.cuda.is_available():
        pipeline.enable_model_cpu_offload()
    if graph:
        pipeline.transformer = graphed(pipeline.transformer)
    height, width = size
    images = [
        pipeline(
            prompt,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generator(seed, PICTURE, i),
            output_type="pt",
        ).images
        for i, prompt in enumerate(prompts)
    ]
    return torch.cat(images).mul(255).round().byte().cpu()
