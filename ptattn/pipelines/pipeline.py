"""Text to image, video and views: T5, PT-DiT and an autoencoder (arXiv 2409.04005)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from ..flops import VAE_FACTOR
from ..flow import FLOW, OBJECTIVES, Guided, Objective, resolution_shift
from .autoencoder import compression, decode
from .transformer import PTDiTTransformer

logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class VideoPipelineOutput(BaseOutput):
    """Videos or views.

    Args:
        frames: a list of images for each video, or an array or tensor of all.
    """

    frames: Any


class PTDiTPipeline(DiffusionPipeline):
    """Text to image, video and views with PT-DiT.

    Args:
        tokenizer, text_encoder: T5's, as transformers has them.
        transformer: text-conditional; its caption_channels are the width of the text encoder and
            its in_channels the latent channels of `vae`.
        vae: an autoencoder of diffusers, of images (then frames are decoded one by one) or videos.
        scheduler: as `ptattn.flow.FLOW.scheduler()` makes it, or `V.scheduler()` for a transformer
            trained on v-prediction.

    Raises:
        ValueError: components that do not fit each other.

    Example:
        >>> pipeline = PTDiTPipeline.from_pretrained("folder", torch_dtype=torch.bfloat16)
        >>> pipeline.enable_model_cpu_offload()
        >>> pipeline("a lighthouse at dusk", height=512, width=768).images[0].save("out.png")
        >>> views = pipeline("a teapot", height=512, width=512, num_frames=24).frames[0]
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        transformer: PTDiTTransformer,
        vae: Any,
        scheduler: Any,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            transformer=transformer,
            vae=vae,
            scheduler=scheduler,
        )
        self._check_components()

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] = "",
        *,
        height: int = 1024,
        width: int = 1024,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        max_sequence_length: int = 200,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | VideoPipelineOutput | tuple[Any]:
        """Draw what the prompts say.

        Args:
            prompt: one or several.
            negative_prompt: what guidance leads away from; one for all, or one for each prompt.
            height, width: in pixels, multiples of what the autoencoder compresses a side by times
                the patch size, 16 for the released model.
            num_frames: of each video, 1 + k times the autoencoder's temporal compression; the
                number of views for a multi-view model; None draws images.
            num_inference_steps: by default 30, or 50 for v-prediction.
            guidance_scale: null + guidance_scale · (conditional − null); 1 is no guidance, at half
                the cost. By default 4, or 6 for v-prediction.
            num_images_per_prompt: images or videos for each prompt.
            generator: for the same noise again; or one for each image or video.
            latents: the noise itself, (B, C, f, h, w) with f = 1 for images.
            max_sequence_length: tokens that a caption is cut or padded to.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False returns a tuple.
            callback_on_step_end: called with this pipeline, the step, the timestep and a
                dictionary of tensors after each step; tensors that it returns are taken over.
                It may set `_guidance_scale` for the steps to come and `_interrupt` to stop.
            callback_on_step_end_tensor_inputs: the tensors that it is given; there are the latents.

        Returns:
            The images (`.images`), or for a number of frames the videos (`.frames`).

        Raises:
            ValueError, TypeError: an argument that does not fit.
        """
        self._check_components()
        objective = self.objective
        steps = objective.steps if num_inference_steps is None else num_inference_steps
        self._guidance_scale = objective.guidance if guidance_scale is None else guidance_scale
        self._interrupt = False
        prompts, negatives = _prompts(prompt, negative_prompt)
        _check_numbers(
            num_inference_steps=steps,
            num_images_per_prompt=num_images_per_prompt,
            max_sequence_length=max_sequence_length,
        )
        names = callback_on_step_end_tensor_inputs
        _check_known("output_type", [output_type], OUTPUT_TYPES)
        _check_known("callback_on_step_end_tensor_inputs", names, self._callback_tensor_inputs)
        shape = self._latent_shape(height, width, num_frames)
        latents = self._noise((len(prompts) * num_images_per_prompt, *shape), generator, latents)

        encoding = max_sequence_length, num_images_per_prompt
        condition = self.encode_prompt(prompts, *encoding)
        null = self.encode_prompt(negatives, *encoding)
        shift = 1.0
        if objective is FLOW:
            _, frames, h, w = shape
            shift = resolution_shift(VAE_FACTOR * h, VAE_FACTOR * w, frames)
        objective.set_timesteps(self.scheduler, steps, shift, latents.device)
        latents = self._denoise(latents, condition, null, objective, callback_on_step_end, names)
        result = self._finished(latents, output_type, num_frames)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (result,)
        if num_frames is None:
            return ImagePipelineOutput(images=result)
        return VideoPipelineOutput(frames=result)

    @property
    def objective(self) -> Objective:
        """What the scheduler says that the transformer predicts."""
        for objective in OBJECTIVES.values():
            if _settings(self.scheduler) == _settings(objective.scheduler()):
                return objective
        raise ValueError(
            "scheduler must be set as ptattn.flow.FLOW.scheduler() or V.scheduler() is; "
            f"got {self.scheduler}"
        )

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def encode_prompt(
        self, prompts: list[str], max_sequence_length: int = 200, num_images_per_prompt: int = 1
    ) -> dict[str, Tensor]:
        """Captions as the transformer takes them: `caption` (B, T, C), `caption_mask` (B, T)."""
        for prompt, ids in zip(prompts, self.tokenizer(prompts).input_ids, strict=True):
            if len(ids) > max_sequence_length:
                logger.warning(f"cut to {max_sequence_length} tokens of {len(ids)}: {prompt!r}")
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=max_sequence_length,
            return_tensors="pt",
        ).to(self._execution_device)
        mask = tokens.attention_mask
        caption = self.text_encoder(tokens.input_ids, attention_mask=mask).last_hidden_state
        condition = {"caption": caption.to(self.transformer.dtype), "caption_mask": mask.bool()}
        return {k: v.repeat_interleave(num_images_per_prompt, 0) for k, v in condition.items()}

    def _denoise(
        self,
        latents: Tensor,
        condition: dict[str, Tensor],
        null: dict[str, Tensor],
        objective: Objective,
        callback: Callable[..., dict[str, Tensor] | None] | None,
        names: Sequence[str],
    ) -> Tensor:
        """Noise to latents, which stay float32 whatever the transformer's dtype."""
        timesteps = self.scheduler.timesteps
        predict = Guided(self.transformer, condition, null)
        with self.progress_bar(total=len(timesteps)) as bar:
            for i, timestep in enumerate(timesteps):
                if self._interrupt:
                    break
                noisy, times = latents.to(self.transformer.dtype), timestep.expand(len(latents))
                predicted = predict(noisy, times, self._guidance_scale)
                output = objective.model_output(predicted.float())
                latents = self.scheduler.step(output, timestep, latents).prev_sample
                if callback is not None:
                    given = {name: latents for name in names}
                    latents = (callback(self, i, timestep, given) or {}).get("latents", latents)
                bar.update()
        return latents

    def _finished(self, latents: Tensor, output_type: str, num_frames: int | None) -> Any:
        if output_type == "latent":
            return latents if num_frames is not None else latents[:, :, 0]
        video = decode(self.vae, latents).float()
        processor = VideoProcessor()
        if num_frames is None:
            return processor.postprocess(video[:, :, 0], output_type)
        if video.shape[2] != num_frames:
            logger.warning(f"the autoencoder made {video.shape[2]} frames, not {num_frames}")
        return processor.postprocess_video(video, output_type)

    def _latent_shape(self, height: int, width: int, num_frames: int | None) -> tuple[int, ...]:
        temporal, spatial = compression(self.vae)
        config, frames = self.transformer.config, 1 if num_frames is None else num_frames
        _check_numbers(height=height, width=width, num_frames=frames)
        side = spatial * config.patch_size
        if height % side or width % side:
            raise ValueError(f"height and width must be multiples of {side}; got {height}, {width}")
        if (frames - 1) % temporal:
            raise ValueError(
                f"num_frames must be 1 more than a multiple of {temporal}; got {frames}"
            )
        latent_frames = 1 + (frames - 1) // temporal
        return config.in_channels, latent_frames, height // spatial, width // spatial

    def _noise(self, shape: tuple[int, ...], generator: Any, latents: Tensor | None) -> Tensor:
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"generator must be one or {shape[0]}; got {len(generator)}")
        device = self._execution_device
        if latents is None:
            return randn_tensor(shape, generator, device, torch.float32)
        if latents.shape != shape:
            raise ValueError(f"latents must have shape {shape}; got {tuple(latents.shape)}")
        return latents.to(device, torch.float32)

    def _check_components(self) -> None:
        missing = [name for name, component in self.components.items() if component is None]
        if missing:
            raise ValueError(f"this pipeline needs all its components; missing: {missing}")
        config, width = self.transformer.config, self.text_encoder.config.d_model
        if config.caption_channels != width:
            raise ValueError(
                f"transformer has caption_channels {config.caption_channels}, but text_encoder "
                f"has width {width}"
            )
        compression(self.vae)
        channels = self.vae.config.get("latent_channels", self.vae.config.get("z_dim"))
        if channels is not None and config.in_channels != channels:
            raise ValueError(
                f"transformer has in_channels {config.in_channels}, but vae has {channels} "
                "latent channels"
            )
        _ = self.objective


def _settings(scheduler: Any) -> tuple[type, dict[str, Any]]:
    """Its class, and its configuration without what diffusers notes about the file."""
    return type(scheduler), {k: v for k, v in scheduler.config.items() if not k.startswith("_")}


def _prompts(prompt: Any, negative: Any) -> tuple[list[str], list[str]]:
    """Both as lists of one length."""
    prompts = _texts("prompt", prompt)
    negatives = _texts("negative_prompt", negative)
    if isinstance(negative, str):
        negatives = negatives * len(prompts)
    if not prompts or len(negatives) != len(prompts):
        raise ValueError(
            "prompt must hold at least one text and negative_prompt one for each; "
            f"got {len(prompts)} and {len(negatives)}"
        )
    return prompts, negatives


def _texts(name: str, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be a string or a list of strings; got {value!r}")
    return texts


def _check_numbers(**numbers: Any) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be a positive integer; got {number!r}")


def _check_known(name: str, values: Sequence[str], known: Sequence[str]) -> None:
    if unknown := [value for value in values if value not in known]:
        raise ValueError(f"{name}: {', '.join(map(repr, unknown))} not in {', '.join(known)}")
