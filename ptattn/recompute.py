"""Tensors that a backward makes again, where a layer would keep them.

A linear layer keeps its input for the gradient of its weight. Where that follows from tensors which
are kept anyway, as a norm's result does from its input, those are remembered in its place. The
layer may be plain, sharded, quantized or LoRA's; within it torch.func takes no gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .context import autocast_dtype, has_hooks, saves_as_usual

_version = attrgetter("_version")


def recomputed(made: Tensor, function: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """`made`, which is function(*sources), as a linear layer takes it; marked so for `feed`.

    Args:
        function: gives a tensor of its own, with the same bits each time.
        sources: what is kept in place of `made`; it should be kept by others anyway.
    """
    if not made.requires_grad or not saves_as_usual() or type(made) is not Tensor:
        return made
    for t in sources:  # without a gradient nobody keeps a large one, and its owner may refill it
        if t.is_inference() or (not t.requires_grad and t.numel() >= made.numel()):
            return made
    autocast = autocast_dtype(made)
    if autocast is not None and made.dtype != torch.float64:
        made = made.to(autocast)
    made._recipe = _Recipe(made, function, sources, autocast)  # type: ignore[attr-defined]
    return made


def feed(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """layer(x), for whose backward an x that is marked as `recomputed` is made again.

    It is kept where others decide about that (checkpointing, offloading, torch.compile, torch.func)
    and where the layer has hooks, which may change it.
    """
    if not saves_as_usual():
        return layer(x)
    recipe = vars(x).pop("_recipe", None)
    if recipe is None or (isinstance(layer, nn.Module) and has_hooks(layer)):
        return layer(x)
    # torch holds on to the hooks as long as to anything that the layer saves, a frozen weight too:
    # only what is made again may hold the sources.
    packing = [recipe]
    try:
        with saved_tensors_hooks(partial(_pack, packing), _unpack):
            return layer(x)
    finally:
        packing.clear()


_Packed = tuple["_Recipe | None", Tensor | None, Any]


def _pack(packing: list[_Recipe], t: Tensor) -> _Packed:
    """Of a view of what was made its geometry alone; else the tensor and its version."""
    (recipe,) = packing
    if (
        type(t) is Tensor
        and (t.dtype, t.layout, t._version) == (recipe.dtype, torch.strided, recipe.version)
        and t.untyped_storage()._cdata == recipe.storage
    ):
        return recipe, None, (t.shape, t.stride(), t.storage_offset())
    # Detached, as an output that holds its own graph would never be freed.
    return None, t if t.is_leaf else t.detach(), t._version


def _unpack(packed: _Packed) -> Tensor:
    """Torch ties the result to the graph as it tied what was packed."""
    recipe, t, known = packed
    if recipe is not None:
        return recipe.make(*known)
    kept = cast(Tensor, t)
    _check_unchanged((kept,), [known])
    return kept


class _Recipe:
    """How a tensor was made, and what is kept of what a layer saves.

    It lives as long as what is saved, so it must not hold the tensor itself.
    """

    def __init__(
        self, made: Tensor, function: Callable[..., Tensor], sources: tuple[Tensor, ...],
        autocast: torch.dtype | None,
    ) -> None:  # fmt: skip
        self.function, self.sources, self.autocast = function, sources, autocast
        self.versions = list(map(_version, sources))
        self.storage, self.dtype = made.untyped_storage()._cdata, made.dtype
        self.version = made._version

    def make(self, *geometry: Any) -> Tensor:
        _check_unchanged(self.sources, self.versions)
        with torch.no_grad():
            return self._make().as_strided(*geometry)

    def _make(self) -> Tensor:
        first = self.sources[0]
        if autocast_dtype(first) == self.autocast:
            return self.function(*self.sources).to(self.dtype)
        on = self.autocast is not None
        with torch.autocast(first.device.type, dtype=self.autocast, enabled=on):
            return self.function(*self.sources).to(self.dtype)


def _check_unchanged(tensors: tuple[Tensor, ...], versions: list[int]) -> None:
    """As torch checks what it saves itself."""
    if list(map(_version, tensors)) == versions:
        return
    for t, version in zip(tensors, versions, strict=True):
        if t._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: {t.dtype} {tuple(t.shape)} is at version {t._version}; "
                f"expected version {version} instead"
            )
