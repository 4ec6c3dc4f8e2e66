"""State dicts as they are found: in shards and variants, and under the names that wrappers give."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from . import files

WEIGHTS = "diffusion_pytorch_model"  # the name that diffusers looks for

# diffusers' files: of one variant whole, and the index of its shards; today's name, then one that
# it no longer writes.
_NAMES = (
    rf"{WEIGHTS}(\.(?P<variant>\w+))?\.(?P<kind>safetensors|bin)",
    rf"{WEIGHTS}\.(?P<kind>safetensors|bin)\.index(\.(?P<variant>\w+))?\.json",
    rf"{WEIGHTS}\.(?P<kind>safetensors|bin)\.(?P<variant>\w+)\.index\.json",
)
# What torch's wrappers put into the names of all that is below them.
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

_SHOWN = 4  # of what does not fit, in one message


def find(folder: Path) -> dict[str, Path]:
    """The file of weights, or the index of their shards, of every variant; "" is the plain one.

    Raises:
        ValueError: both for one variant.
    """
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        matches = (re.fullmatch(name, path.name) for name in _NAMES)
        if (match := next(filter(None, matches), None)) is None:
            continue
        key = match["kind"], match["variant"] or ""
        if key in found:
            raise ValueError(
                f"{folder} holds {found[key].name} and {path.name}: remove the one not meant"
            )
        found[key] = path
    # As in diffusers, safetensors come before pickles.
    return {variant: found[kind, variant] for kind, variant in sorted(found)}


def read_folder(folder: Path, variant: str | None = None) -> tuple[dict[str, Tensor], Path]:
    """The weights of a diffusers component, whole or in shards, and the file that names them.

    Args:
        variant: as in diffusers, such as "fp16"; None is the plain weights or, where there are
            none, the only variant.

    Raises:
        FileNotFoundError: no weights, not those of the variant, or not all of their shards.
        ValueError: several variants and no plain weights, a file that cannot be read, or an index
            that names anything but files beside it.
    """
    found = find(folder)
    if variant is None and "" not in found and found:
        if len(found) > 1:
            raise ValueError(f"{folder} holds variants: give variant, one of {', '.join(found)}")
        (variant,) = found
    path = found.get(variant or "")
    if path is None:
        name = ".".join(filter(None, (WEIGHTS, variant, "safetensors")))
        others = f"; there are {', '.join(p.name for p in found.values())}" if found else ""
        raise FileNotFoundError(f"no weights {folder / name}{others}")
    if path.suffix != ".json":
        return files.read_tensors(path), path
    shards = files.read_json(path).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{path} must have a weight_map; got {type(shards).__name__}")
    for entry, name in shards.items():
        if not isinstance(name, str) or name != Path(name).name:  # "../" leads out of the folder
            raise ValueError(f"{path}: {entry} must be in a file beside it; got {name!r}")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(shards.values())):
        tensors |= files.read_tensors(folder / name)
    return tensors, path


def plain_name(name: str) -> str:
    """A name without the parts that torch.compile, FSDP and activation checkpointing add."""
    return _WRAPPERS.sub("", name)


def unwrapped(given: Mapping[str, Tensor], wanted: Collection[str]) -> Mapping[str, Tensor]:
    """The tensors by the names that are wanted, without what wrappers have put before or into them.

    That is torch.compile's `_orig_mod.`, FSDP's and activation checkpointing's anywhere, and what
    all names begin with: `module.` of DDP, `model.` of a training framework. The number of averages
    that torch's AveragedModel keeps beside its weights is left out.
    """
    names = {name: plain_name(name) for name in given if name != "n_averaged"}
    parts = _shared_beginning(names.values())
    for i in range(len(parts) + 1):
        prefix = "".join(f"{part}." for part in parts[:i])
        found = {short.removeprefix(prefix): given[name] for name, short in names.items()}
        if len(found) == len(names) and not found.keys().isdisjoint(wanted):
            return found
    return given


def _shared_beginning(names: Iterable[str]) -> list[str]:
    shared = []
    for parts in zip(*(name.split(".") for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return shared


def check(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], why: str) -> None:
    """Raise ValueError unless both have the same names and shapes."""
    misshapen = {
        f"{name} (got {tuple(given[name].shape)}, expected {tuple(tensor.shape)})"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    }
    refuse(
        why,
        unknown=set(given) - set(wanted),
        missing=set(wanted) - set(given),
        misshapen=misshapen,
    )


def refuse(why: str, **groups: set[str]) -> None:
    """Raise ValueError with what is in the groups, if anything is."""
    found = "; ".join(f"{name}: {_listing(group)}" for name, group in groups.items() if group)
    if found:
        raise ValueError(f"{why}: {found}")


def _listing(names: set[str]) -> str:
    """The first few, sorted, the same tensor of several blocks as one, and the number of the rest:
    `blocks.[0-27].mlp.0.bias`."""
    number = re.compile(r"(?<=blocks\.)\d+")
    blocks: dict[str, list[int]] = {}
    for name in names:
        blocks.setdefault(number.sub("*", name), []).extend(map(int, number.findall(name)))
    entries = sorted(blocks.items())
    shown = [name.replace("*", _span(found)) for name, found in entries[:_SHOWN]]
    rest = sum(max(len(found), 1) for _, found in entries[_SHOWN:])
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def _span(numbers: list[int]) -> str:
    if len(numbers) < 2:
        return "".join(map(str, numbers))
    first, last = min(numbers), max(numbers)
    gapless = last - first + 1 == len(numbers)
    return f"[{first}-{last}]" if gapless else f"[{','.join(map(str, sorted(numbers)))}]"
