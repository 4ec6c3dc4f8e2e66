"""Text to image, video and views: T5, PT-DiT and an autoencoder (arXiv 2409.04005)."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.loaders import CogVideoXLoraLoaderMixin
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from huggingface_hub import snapshot_download
from torch import Tensor

from ..flops import VAE_FACTOR
from ..flow import FLOW, Guided, Objective, resolution_shift
from .autoencoder import decode, tiling
from .components import check_fit, check_known, check_numbers, latent_shape, objective_of
from .prompts import as_negatives, as_texts, check_cleaning, check_prompts, clean, encode_texts
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


class PTDiTPipeline(DiffusionPipeline, CogVideoXLoraLoaderMixin):  # LoRA of the transformer alone
    """Text to image, video and views with PT-DiT.

    `load_lora_weights`, `set_adapters`, `fuse_lora` and so on are diffusers' own. A pipeline makes
    one call at a time; `from_pipe` makes others of the same models, for other threads.

    Args:
        tokenizer, text_encoder: T5's, as transformers has them; None where calls bring embeddings.
        transformer: text-conditional; its caption_channels are the width of the text encoder and
            its in_channels the latent channels of `vae`.
        vae: an autoencoder of diffusers, of images (then frames are decoded one by one) or videos.
        scheduler: as `ptattn.flow.FLOW.scheduler()` makes it, or `V.scheduler()` for a transformer
            trained on v-prediction.
        clean_caption: texts are cleaned as PixArt-α's and the released model's are: lower case,
            without links, markup and more.
        tile_vae: decodes in tiles; else as `vae` is set, by its `enable_tiling()`.

    Raises:
        TypeError: another transformer.
        ValueError: components that do not fit each other.
        ImportError: no ftfy or BeautifulSoup, which clean captions.

    Examples:
        >>> pipeline = PTDiTPipeline.from_pretrained("folder", dtype=torch.bfloat16)
        >>> pipeline.enable_model_cpu_offload()
        >>> pipeline("a lighthouse at dusk", height=512, width=768).images[0].save("out.png")
        >>> views = pipeline("a teapot", height=512, width=512, num_frames=24).frames[0]
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components: ClassVar[list[str]] = ["tokenizer", "text_encoder"]
    _callback_tensor_inputs = ("latents", "prompt_embeds", "negative_prompt_embeds")

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        transformer: PTDiTTransformer,
        vae: Any,
        scheduler: Any,
        clean_caption: bool = False,
        tile_vae: bool = False,
    ) -> None:
        super().__init__()
        if clean_caption:
            check_cleaning()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            transformer=transformer,
            vae=vae,
            scheduler=scheduler,
        )
        self.register_to_config(clean_caption=clean_caption, tile_vae=tile_vae)
        self._check_components()

    @classmethod
    def from_pipe(
        cls, pipeline: DiffusionPipeline, dtype: torch.dtype | None = None, **components: Any
    ) -> PTDiTPipeline:
        """A pipeline of another one's models, which are not copied, with a scheduler and a
        tokenizer of its own.

        Args:
            pipeline: this kind, or one that shares components with it.
            dtype: converts the models, the other pipeline's too; None leaves them as they are.
            **components: to take in place of the other pipeline's.
        """
        wanted = inspect.signature(cls).parameters
        shared = {name: c for name, c in pipeline.components.items() if name in wanted}
        # Both have a state: concurrent calls would take each other's.
        own = {n: copy.deepcopy(shared[n]) for n in ("scheduler", "tokenizer") if n in shared}
        settings = {n: pipeline.config.get(n, False) for n in ("clean_caption", "tile_vae")}
        made = cls(**settings | shared | own | components)
        return made if dtype is None else made.to(dtype=dtype)

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """The folder of a pipeline on the Hub, whole but for the components that are given.

        diffusers' own refuses an index that names a class of another package than its own.
        """
        known = ("cache_dir", "force_download", "local_files_only", "revision", "token")
        given = [name for name in inspect.signature(cls).parameters if name in kwargs]
        return snapshot_download(
            pretrained_model_name,
            ignore_patterns=[f"{name}/*" for name in given],
            **{name: kwargs[name] for name in known if kwargs.get(name) is not None},
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        *,
        height: int = 1024,
        width: int = 1024,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
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
                None is the empty text.
            height, width: in pixels, multiples of what the autoencoder compresses a side by times
                the patch size, 16 for the released model.
            num_frames: of each video, 1 + k times the autoencoder's temporal compression; the
                number of views for a multi-view model; None draws images.
            num_inference_steps: by default 30, or 50 for v-prediction.
            guidance_scale: null + guidance_scale · (conditional − null); 1 or less is no guidance,
                at half the cost. By default 4, or 6 for v-prediction.
            num_images_per_prompt: images or videos for each prompt.
            generator: for the same noise again; or one for each image or video.
            latents: the noise itself, (B, C, f, h, w), or (B, C, h, w) for images.
            prompt_embeds, negative_prompt_embeds: (B, T, caption_channels), as `encode_prompt`
                makes them of one image per prompt; in place of the texts.
            prompt_attention_mask, negative_prompt_attention_mask: theirs, (B, T), bool or
                integer, true or 1 at real tokens.
            max_sequence_length: tokens that a caption is cut or padded to.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False returns a tuple.
            callback_on_step_end: called with this pipeline, the step, the timestep and a
                dictionary of tensors after each step; tensors that it returns are taken over.
                It may set `_guidance_scale` for the steps to come and `_interrupt` to stop, and
                change the transformer's weights. Or one of `diffusers.callbacks`.
            callback_on_step_end_tensor_inputs: the tensors that it is given, of "latents",
                "prompt_embeds" and "negative_prompt_embeds".

        Returns:
            The images (`.images`), or for a number of frames the videos (`.frames`).

        Raises:
            ValueError, TypeError: an argument that does not fit.
            RuntimeError: a call within another one, of a callback or of another thread.
        """
        with self._alone():
            self._check_components()
            objective = self.objective
            steps = objective.steps if num_inference_steps is None else num_inference_steps
            self._guidance_scale = objective.guidance if guidance_scale is None else guidance_scale
            self._interrupt = False
            check_numbers(
                num_inference_steps=steps,
                num_images_per_prompt=num_images_per_prompt,
                max_sequence_length=max_sequence_length,
            )
            callback, names = callback_on_step_end, callback_on_step_end_tensor_inputs
            if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
                names = callback.tensor_inputs
            check_known("output_type", [output_type], OUTPUT_TYPES)
            check_known("callback_on_step_end_tensor_inputs", names, self._callback_tensor_inputs)
            shape = latent_shape(self.transformer, self.vae, height, width, num_frames)
            given: dict[str, Any] = dict(
                prompt_embeds=prompt_embeds,
                prompt_attention_mask=prompt_attention_mask,
                negative_prompt_embeds=negative_prompt_embeds,
                negative_prompt_attention_mask=negative_prompt_attention_mask,
            )
            channels = self.transformer.config.caption_channels
            count = check_prompts(channels, prompt, negative_prompt, *given.values())
            latents = self._noise((count * num_images_per_prompt, *shape), generator, latents)

            encoded = self.encode_prompt(
                prompt,
                self.do_classifier_free_guidance,
                negative_prompt,
                num_images_per_prompt,
                max_sequence_length=max_sequence_length,
                **given,
            )
            shift = 1.0
            if objective is FLOW:
                _, frames, h, w = shape
                shift = resolution_shift(VAE_FACTOR * h, VAE_FACTOR * w, frames)
            objective.set_timesteps(self.scheduler, steps, shift, latents.device)
            state = dict(zip(given, encoded, strict=True), latents=latents)
            latents = self._denoise(state, objective, callback, names)
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
        return objective_of(self.scheduler)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        return len(self.scheduler.timesteps)

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        max_sequence_length: int = 200,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Captions as the transformer takes them, in the order of diffusers' PixArt pipelines.

        Args:
            do_classifier_free_guidance: whether to make the negative ones.
            device: of the result; by default the one that the models run on.
            prompt and the rest: as in a call.

        Returns:
            prompt_embeds (B, T, C), prompt_attention_mask (B, T) bool, and both of the negative
            prompts, or None; those of one prompt's images follow one another.
        """
        given: Any = prompt_embeds, prompt_attention_mask
        negatives: Any = negative_prompt_embeds, negative_prompt_attention_mask
        channels = self.transformer.config.caption_channels
        count = check_prompts(channels, prompt, negative_prompt, *given, *negatives)
        running = self._execution_device
        encode = partial(encode_texts, self.tokenizer, self.text_encoder, running)
        place = device or running

        def ready(embeds: Tensor, mask: Tensor) -> Any:
            both = embeds.to(place, self.transformer.dtype), mask.to(place, torch.bool)
            return [t.repeat_interleave(num_images_per_prompt, 0) for t in both]

        cleaned = clean if self.config.clean_caption else list
        if prompt_embeds is None:
            texts = cleaned(as_texts("prompt", prompt))
            given = encode("prompt", texts, max_sequence_length)
        if not do_classifier_free_guidance:
            return *ready(*given), None, None
        if negative_prompt_embeds is None:
            texts, length = cleaned(as_negatives(negative_prompt, count)), given[0].shape[1]
            negatives = encode("negative_prompt", texts, length)
        return *ready(*given), *ready(*negatives)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """A call's scheduler, guidance and interruption are the pipeline's, so it has one call."""
        call = object()
        if self.__dict__.setdefault("_call", call) is not call:
            raise RuntimeError(
                "this pipeline is in another call, of another thread or around a callback; "
                "PTDiTPipeline.from_pipe(pipeline) makes another one of the same models"
            )
        try:
            yield
        finally:
            del self.__dict__["_call"]

    def _denoise(
        self,
        state: dict[str, Any],
        objective: Objective,
        callback: Callable[..., dict[str, Tensor] | None] | None,
        names: Sequence[str],
    ) -> Tensor:
        """Noise to latents, which stay float32 whatever the transformer's dtype."""
        timesteps = self.scheduler.timesteps
        predict = self._guided(state)
        with self.progress_bar(total=len(timesteps)) as bar:
            for i, timestep in enumerate(timesteps):
                if self._interrupt:
                    break
                latents = state["latents"]
                noisy, times = latents.to(self.transformer.dtype), timestep.expand(len(latents))
                scale = self._guidance_scale if self.do_classifier_free_guidance else 1
                output = objective.model_output(predict(noisy, times, scale).float())
                state["latents"] = self.scheduler.step(output, timestep, latents).prev_sample
                if callback is not None:
                    made = callback(self, i, timestep, {name: state[name] for name in names}) or {}
                    state |= {k: v for k, v in made.items() if k in self._callback_tensor_inputs}
                    predict = self._guided(state)  # of the captions and weights that it has left
                bar.update()
        return state["latents"]

    def _guided(self, state: dict[str, Any]) -> Guided:
        condition, null = (
            dict(caption=state[f"{name}_embeds"], caption_mask=state[f"{name}_attention_mask"])
            for name in ("prompt", "negative_prompt")
        )
        if self.do_classifier_free_guidance and null["caption"] is None:
            raise ValueError(
                f"a callback set guidance_scale to {self._guidance_scale}, but the call began with "
                "1 or less, without negative prompts: begin with more than 1"
            )
        return Guided(self.transformer, condition, null)

    def _finished(self, latents: Tensor, output_type: str, num_frames: int | None) -> Any:
        if output_type == "latent":
            return latents if num_frames is not None else latents[:, :, 0]
        with tiling(self.vae, self.config.tile_vae):
            video = decode(self.vae, latents).float()
        processor = VideoProcessor()
        if num_frames is None:
            return processor.postprocess(video[:, :, 0], output_type)
        if video.shape[2] != num_frames:
            logger.warning(f"the autoencoder made {video.shape[2]} frames, not {num_frames}")
        return processor.postprocess_video(video, output_type)

    def _noise(self, shape: tuple[int, ...], generator: Any, latents: Tensor | None) -> Tensor:
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"generator must be one or {shape[0]}; got {len(generator)}")
        device = self._execution_device
        if latents is None:
            return randn_tensor(shape, generator, device, torch.float32)
        if latents.ndim == 4 and shape[2] == 1:
            latents = latents.unsqueeze(2)
        if latents.shape != shape:
            raise ValueError(f"latents must have shape {shape}; got {tuple(latents.shape)}")
        return latents.to(device, torch.float32)

    def _check_components(self) -> None:
        missing = [
            name
            for name, component in self.components.items()
            if component is None and name not in self._optional_components
        ]
        if missing:
            raise ValueError(f"this pipeline needs its components; missing: {missing}")
        check_fit(self.transformer, self.text_encoder, self.vae, self.config.tile_vae)
        _ = self.objective
