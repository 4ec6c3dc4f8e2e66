"""What a model learns and how it is sampled: rectified flow, and the paper's v-prediction.

Noise has level 1 and data level 0; a timestep, as the models take it, is the level · 1000.
diffusers is imported when it is first needed.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIMESTEPS = 1000


def resolution_shift(height: int, width: int, frames: int = 1) -> float:
    """How far a resolution shifts noise levels towards noise: √(H·W / 512²) · √frames.

    Args:
        height, width: of the image in pixels (8 times those of its latents).
        frames: latent frames.

    Raises:
        ValueError: a size that is not positive.
    """
    if min(height, width, frames) < 1:
        raise ValueError(
            f"height, width and frames must be positive; got {height}, {width}, {frames}"
        )
    return math.sqrt(height * width / 512**2 * frames)


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """Noise levels shifted towards noise (shift > 1) or data: s·σ / (1 + (s − 1)·σ)."""
    if not 0 < shift < math.inf:
        raise ValueError(f"shift must be a positive number; got {shift}")
    return shift * sigma / (1 + (shift - 1) * sigma)


def sigmas(steps: int, shift: float = 1.0) -> Tensor:
    """The noise levels of the release's sampler, float64 (steps,): 1 − i / steps, shifted.

    They start at 1; the level after the last one is 0.

    Raises:
        ValueError: steps or shift not positive.
    """
    if steps < 1:
        raise ValueError(f"steps must be a positive integer; got {steps}")
    return shifted(1 - torch.arange(steps, dtype=torch.float64) / steps, shift)


class Objective(ABC):
    """What the network predicts, with the settings that sample it best: `FLOW` or `V`."""

    name: ClassVar[str]
    steps: ClassVar[int]
    guidance: ClassVar[float]

    @abstractmethod
    def timesteps(self, count: int, shift: float, generator: torch.Generator) -> Tensor:
        """Random timesteps to train on, float32 (count,), on the generator's device."""

    @abstractmethod
    def corrupt(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents and what to predict from them, each like `clean`; timestep is (B,)."""

    @abstractmethod
    def scheduler(self) -> Any:
        """A diffusers scheduler for this objective."""

    @abstractmethod
    def set_timesteps(
        self, scheduler: Any, steps: int, shift: float = 1.0, device: torch.device | str = "cpu"
    ) -> None:
        """Prepare a scheduler for `steps` steps from noise to data."""

    @abstractmethod
    def model_output(self, prediction: Tensor) -> Tensor:
        """The prediction as the scheduler's `step` takes it."""


@dataclass(frozen=True)
class RectifiedFlow(Objective):
    """Straight paths x_t = (1 − σ)·x0 + σ·noise; the network predicts x0 − noise, as the release.

    Trained on logit-normal levels (arXiv 2403.03206, section 3.1), shifted by the resolution.
    """

    name: ClassVar[str] = "flow"
    steps: ClassVar[int] = 30
    guidance: ClassVar[float] = 4.0

    def timesteps(self, count: int, shift: float, generator: torch.Generator) -> Tensor:
        normal = torch.randn(count, generator=generator, device=generator.device)
        return shifted(normal.sigmoid(), shift) * TIMESTEPS

    def corrupt(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        sigma = (timestep / TIMESTEPS).view(-1, *(1,) * (clean.ndim - 1))
        return (1 - sigma) * clean + sigma * noise, clean - noise

    def scheduler(self) -> Any:
        """Unshifted: `set_timesteps` gives it the levels of one resolution."""
        return _diffusers().FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMESTEPS)

    def set_timesteps(
        self, scheduler: Any, steps: int, shift: float = 1.0, device: torch.device | str = "cpu"
    ) -> None:
        scheduler.set_timesteps(sigmas=sigmas(steps, shift).tolist(), device=device)

    def model_output(self, prediction: Tensor) -> Tensor:
        """diffusers' velocity points from data to noise, ours from noise to data."""
        return -prediction


@dataclass(frozen=True)
class VPrediction(Objective):
    """The paper's training: x_t = α·x0 + σ·noise with α² + σ² = 1, and v = α·noise − σ·x0.

    The paper names neither noise levels nor sampler: these are DDIM with linear betas rescaled to
    end in pure noise (arXiv 2305.08891), and a shift is not defined for it.
    """

    name: ClassVar[str] = "v"
    steps: ClassVar[int] = 50
    guidance: ClassVar[float] = 6.0

    def timesteps(self, count: int, shift: float, generator: torch.Generator) -> Tensor:
        _check_unshifted(shift)
        drawn = torch.randint(TIMESTEPS, (count,), generator=generator, device=generator.device)
        return drawn.float()

    def corrupt(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        levels = _v_scheduler()
        index = timestep.long()
        return levels.add_noise(clean, noise, index), levels.get_velocity(clean, noise, index)

    def scheduler(self) -> Any:
        return _diffusers().DDIMScheduler(
            num_train_timesteps=TIMESTEPS,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            clip_sample=False,
        )

    def set_timesteps(
        self, scheduler: Any, steps: int, shift: float = 1.0, device: torch.device | str = "cpu"
    ) -> None:
        _check_unshifted(shift)
        scheduler.set_timesteps(steps, device=device)

    def model_output(self, prediction: Tensor) -> Tensor:
        return prediction


FLOW = RectifiedFlow()
V = VPrediction()
OBJECTIVES: dict[str, Objective] = {objective.name: objective for objective in (FLOW, V)}


def loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error in float32; channels beyond the target's, a learned sigma, are ignored."""
    return F.mse_loss(prediction[:, : target.shape[1]].float(), target.float())


def guided(
    model: nn.Module,
    latents: Tensor,
    timestep: Tensor,
    condition: Mapping[str, Tensor],
    null: Mapping[str, Tensor],
    guidance: float,
) -> Tensor:
    """A prediction with classifier-free guidance: null + guidance · (conditional − null).

    Args:
        model: takes (latents, timestep, **condition); channels beyond the latents' are dropped.
        latents: (B, C, H, W) or (B, C, F, H, W).
        timestep: (B,), 0 to 1000.
        condition: the model's arguments, each of batch B: labels, or caption and caption_mask.
        null: the same of the null class or of the empty or negative caption, of the same shapes.
        guidance: 1 is the conditional prediction alone, at half the cost.

    Returns:
        Like `latents`.

    Raises:
        ValueError: conditions of other names or shapes.
    """
    return Guided(model, condition, null)(latents, timestep, guidance)


class Guided:
    """`guided` for the steps of one sampling run: what they share of the condition is made once.

    The weights, and the autocast, must be those of the first call in all calls.

    Args:
        model, condition, null: as `guided` takes them.
    """

    def __init__(
        self, model: nn.Module, condition: Mapping[str, Tensor], null: Mapping[str, Tensor]
    ) -> None:
        self.model, self.condition, self.null = model, condition, null

    def __call__(self, latents: Tensor, timestep: Tensor, guidance: float) -> Tensor:
        """As `guided`."""
        channels = latents.shape[1]
        if guidance == 1:
            return self.model(latents, timestep, **self._conditional)[:, :channels]
        twice = latents.repeat(2, *(1,) * (latents.ndim - 1))
        out = self.model(twice, timestep.repeat(2), **self._both)
        without, conditional = out[:, :channels].chunk(2)
        return torch.lerp(without, conditional, guidance)

    @functools.cached_property
    def _conditional(self) -> Mapping[str, Any]:
        return self._prepared(self.condition)

    @functools.cached_property
    def _both(self) -> Mapping[str, Any]:
        shapes, null_shapes = (
            {name: tuple(value.shape) for name, value in known.items()}
            for known in (self.condition, self.null)
        )
        if shapes != null_shapes:
            raise ValueError(f"null must be like condition, {shapes}; got {null_shapes}")
        return self._prepared(
            {name: torch.cat([self.null[name], value]) for name, value in self.condition.items()}
        )

    def _prepared(self, condition: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """With the keys and values of a caption, where the model can have them ahead."""
        own: Any = getattr(self.model, "_orig_mod", self.model)  # what torch.compile has wrapped
        # A wrapper that passes attributes on may hold the weights; a graphed model is of its class.
        able = hasattr(own.__class__, "prepare_caption") and own.prepares_captions
        if not isinstance(condition.get("caption"), Tensor) or not able:
            return condition
        return {"caption": own.prepare_caption(**condition)}


@torch.no_grad()
def sample(
    model: nn.Module,
    noise: Tensor,
    condition: Mapping[str, Tensor],
    null: Mapping[str, Tensor],
    *,
    objective: Objective = FLOW,
    steps: int | None = None,
    guidance: float | None = None,
    shift: float = 1.0,
) -> Tensor:
    """Latents from noise, by `steps` predictions.

    Args:
        model, condition, null: as `guided` takes them.
        noise: standard normal, (B, C, H, W) or (B, C, F, H, W).
        objective: what the model was trained on.
        steps, guidance: by default the objective's.
        shift: as in training; see `resolution_shift`.

    Returns:
        Like `noise`.

    Raises:
        ImportError: no diffusers.
        ValueError: steps or shift not positive; conditions of other shapes.
    """
    scheduler = objective.scheduler()
    steps = objective.steps if steps is None else steps
    guidance = objective.guidance if guidance is None else guidance
    objective.set_timesteps(scheduler, steps, shift, noise.device)
    predict = Guided(model, condition, null)
    x = noise
    for timestep in scheduler.timesteps:
        batch = timestep.float().expand(len(x))
        prediction = predict(x, batch, guidance).to(x.dtype)
        x = scheduler.step(objective.model_output(prediction), timestep, x).prev_sample
    return x


def _check_unshifted(shift: float) -> None:
    if shift != 1:
        raise ValueError(f"shift must be 1 for v-prediction; got {shift}")


@functools.cache
def _v_scheduler() -> Any:
    return V.scheduler()


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(f"{error}; it comes with: pip install ptattn[train]") from error
    return diffusers
