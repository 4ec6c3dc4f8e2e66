"""What defines a run: one JSON file, each key checked."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..flow import OBJECTIVES, Objective, resolution_shift
from ..models import DiT, ModelConfig, PTDiT
from ..parallel import find_cut

T = TypeVar("T")
ARCHITECTURES: dict[str, type[PTDiT | DiT]] = {"pt-dit": PTDiT, "dit": DiT}
PRECISIONS = ("fp32", "bf16")
PIXELS_PER_LATENT = 8  # a side; a model of pixels sees them as others see latents
SHIPPED = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class DataConfig:
    """Where examples come from.

    Args:
        source: "mnist", "emoji", "clips", "views", your own "images" and "videos", what
            `ptattn encode` makes of them, "latents", or a function of yours as "module:function"
            (`data.load`).
        size: height and width in pixels; pictures are scaled and cropped to it. Of latents, theirs.
        frames: of a video or views around an object; 1 for images. Of latents, theirs.
        folder: of your own images, videos or latents.
        captions: your own captions, JSON lines {"file_name": ..., "text": ...}, one or several
            for a file; by default metadata.jsonl in the folder. Without captions, subfolders are
            classes.
        text_tokens: captions are cut to this many tokens.
        workers: processes that read files ahead; 0 reads between steps.
    """

    source: str
    size: tuple[int, int]
    frames: int = 1
    folder: str | None = None
    captions: str | None = None
    text_tokens: int = 16
    workers: int = 0

    def __post_init__(self) -> None:
        _positive(self, "frames", "text_tokens")
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size must be two positive integers; got {list(self.size)}")
        if self.workers < 0:
            raise ValueError(f"workers must not be negative; got {self.workers}")


@dataclass(frozen=True)
class SampleConfig:
    """The pictures that show how a run is doing.

    Args:
        count: how many to draw.
        steps, guidance: by default the objective's own.
    """

    count: int = 20
    steps: int | None = None
    guidance: float | None = None

    def __post_init__(self) -> None:
        _positive(self, "count", "steps")


@dataclass(frozen=True)
class Config:
    """A run.

    Args:
        data: where examples come from.
        model: its sizes; in_channels 1 or 3 for pixels in grey or colour, or those of latents.
        architecture: "pt-dit", or "dit" to compare with.
        objective: "flow", or "v" as in the paper.
        shift: of noise levels; by default that of the resolution, where a pixel of the data counts
            as a latent pixel (`flow.resolution_shift`).
        steps: of the optimizer.
        batch_size: examples per step, over all processes and accumulated parts.
        accumulation: parts of a batch whose gradients are added up, to save memory.
        token_ranks: processes that share the tokens of every example (`parallel.split_tokens`); a
            divisor of the number of processes, the rest of which share the batch.
        precision: "fp32", or "bf16" by autocast.
        learning_rate, weight_decay: of AdamW; the rate rises linearly for the first `warmup` steps.
        clip: gradients are scaled down to this norm.
        ema: decay of the averaged weights that samples are drawn with; it rises to this value.
        drop_condition: share of examples without label or caption, for guidance.
        seed: of weights, order of data, noise and samples.
        save_every, sample_every: steps between checkpoints, and between pictures.
        samples: the pictures.
    """

    data: DataConfig
    model: ModelConfig
    steps: int
    batch_size: int
    architecture: str = "pt-dit"
    objective: str = "flow"
    shift: float | None = None
    accumulation: int = 1
    token_ranks: int = 1
    precision: str = "fp32"
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    warmup: int = 0
    clip: float = 1.0
    ema: float = 0.9999
    drop_condition: float = 0.1
    seed: int = 0
    save_every: int = 500
    sample_every: int = 500
    samples: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        _positive(
            self, "steps", "batch_size", "accumulation", "token_ranks", "save_every",
            "sample_every", "clip", "learning_rate", "shift",
        )  # fmt: skip
        _one_of(self, architecture=ARCHITECTURES, objective=OBJECTIVES, precision=PRECISIONS)
        for name in ("ema", "drop_condition"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be within 0 and 1; got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "seed"):
            if not getattr(self, name) >= 0:  # nor NaN
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)}")
        if self.data.source != "latents" and self.model.in_channels not in (1, 3):
            raise ValueError(
                f"model.in_channels must be 1 (grey) or 3 (colour); got {self.model.in_channels}"
            )
        if self.model.out_channels < self.model.in_channels:
            raise ValueError(
                f"model.out_channels must be at least model.in_channels, {self.model.in_channels}; "
                f"got {self.model.out_channels}"
            )
        if self.objective == "v" and self.shift not in (None, 1):
            raise ValueError(f"shift must be null or 1 with objective v; got {self.shift}")
        if self.architecture == "dit" and self.model.num_classes is None:
            raise ValueError("architecture dit takes classes: give model.num_classes")
        if any(side % self.model.patch_size for side in self.data.size):
            raise ValueError(
                f"data.size must be multiples of model.patch_size, {self.model.patch_size}; "
                f"got {list(self.data.size)}"
            )

        self._check_token_ranks()

    def _check_token_ranks(self) -> None:
        if self.token_ranks == 1:
            return
        if self.architecture != "pt-dit":
            raise ValueError(f"token_ranks must be 1 for {self.architecture}, which has no windows")
        height, width = (side // self.model.patch_size for side in self.data.size)
        proxies, windows = self.model.window_grids((self.data.frames, height, width))
        try:
            find_cut(windows, proxies, self.token_ranks)
        except ValueError as error:
            raise ValueError(f"token_ranks: {error}") from None

    def create_model(self) -> PTDiT | DiT:
        return ARCHITECTURES[self.architecture](self.model)

    @property
    def flow(self) -> Objective:
        return OBJECTIVES[self.objective]

    @property
    def noise_shift(self) -> float:
        if self.shift is not None or self.objective == "v":
            return 1.0 if self.shift is None else self.shift
        height, width = (PIXELS_PER_LATENT * side for side in self.data.size)
        return resolution_shift(height, width, self.data.frames)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example: (C, H, W), or (C, F, H, W) where it has frames."""
        frames = (self.data.frames,) if self.data.frames > 1 else ()
        return (self.model.in_channels, *frames, *self.data.size)


# What may differ when a run goes on: none of it changes what a step computes.
_FREE = {"steps", "token_ranks", "save_every", "sample_every", "samples", "data.workers"}


def differences(old: Config, new: Config) -> list[str]:
    """The keys, with both values, in which a run cannot go on from another's checkpoint."""
    before, after = (_flat(dataclasses.asdict(config)) for config in (old, new))
    return [
        f"{key}: {json.dumps(before[key])} there, {json.dumps(after[key])} here"
        for key in after
        if before[key] != after[key] and key not in _FREE and key.split(".")[0] not in _FREE
    ]


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in nested.items():
        found |= _flat(value, f"{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def shipped() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def read(name: str | Path) -> Config:
    """A configuration from a JSON file, or one of `shipped` by its name.

    Raises:
        ValueError: neither of the two, no valid JSON, an unknown or missing key, or a value that
            the run cannot have; the message names the file and the key.
    """
    path = SHIPPED / f"{name}.json" if str(name) in shipped() else Path(name)
    if not path.is_file():
        raise ValueError(f"{name} is neither a file nor one of {', '.join(shipped())}")
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:  # also what json and unicode raise
        raise ValueError(f"{path}: {error}") from None


def parse(raw: Any) -> Config:
    """`Config` from what its JSON holds; raises ValueError as `read` does."""
    return _build(Config, raw, "")


def _build(cls: type[T], raw: Any, where: str) -> T:
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where or 'the configuration'} must be an object; got {raw!r}")
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    inside = f"{where}." if where else ""
    if unknown := sorted(set(raw) - set(fields)):
        names = ", ".join(inside + name for name in unknown)
        raise ValueError(f"unknown key {names}; known here: {', '.join(fields)}")
    required = [
        name
        for name, item in fields.items()
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    ]
    if missing := [inside + name for name in required if name not in raw]:
        raise ValueError(f"missing key {', '.join(missing)}")
    hints = typing.get_type_hints(cls)
    values = {name: _value(raw[name], hints[name], inside + name) for name in raw}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{inside}{error}" if where else str(error)) from None


def _value(raw: Any, hint: Any, where: str) -> Any:
    """`raw` as the annotated type, or ValueError."""
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), raw, where)
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for choice in choices:
        origin = typing.get_origin(choice)
        if origin is not None and issubclass(origin, Sequence):
            if isinstance(raw, list) and all(type(item) is int for item in raw):
                return tuple(raw)
        elif raw != raw:
            raise ValueError(f"{where} must be a number; got NaN")
        elif type(raw) is choice or (choice is float and type(raw) is int):
            return raw
    names = (
        "null" if choice is type(None) else "a list of integers" if typing.get_origin(choice)
        else choice.__name__
        for choice in choices
    )  # fmt: skip
    raise ValueError(f"{where} must be {' or '.join(names)}; got {json.dumps(raw)}")


def _positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive; got {value}")


def _one_of(config: Any, **choices: Any) -> None:
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise ValueError(
                f"{name} must be one of {', '.join(known)}; got {getattr(config, name)!r}"
            )
