"""Linear layers that follow each other, made one: Z and the output projection before it.

A fused half folds its two matrices anew in every call, so it computes what its weights say at that
moment, however they have changed: loaded, merged, averaged or trained. It is the same module with
the same parameters, of a class that closes in another way.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import GlobalInteraction, TextureComplement, is_plain

Model = TypeVar("Model", bound=nn.Module)


class FusedGlobalInteraction(GlobalInteraction):
    """GlobalInteraction whose Z and output projection are one product."""

    def _inject(self, normed: Tensor, p: Tensor) -> Tensor:
        attn, zero = self.cross_attn, self.zero
        rows, channels = normed.shape[0] * normed.shape[1], normed.shape[2]
        if not _pays(rows, channels) or not _foldable(attn.proj, zero):
            return super()._inject(normed, p)
        return F.linear(attn.attend(normed, p), *_folded(attn.proj, zero.weight, zero.bias))


class FusedTextureComplement(TextureComplement):
    """TextureComplement whose Z, gate and output projection are one product."""

    def _close(self, attended: Tensor, gate: Tensor | None) -> Tensor:
        proj, zero = self.shifted_attn.proj, self.zero
        batch, tokens, channels = attended.shape
        rows = batch * tokens if gate is None else tokens  # of each matrix
        if not _pays(rows, channels) or not _foldable(proj, zero):
            return super()._close(attended, gate)
        if gate is None:
            return F.linear(attended, *_folded(proj, zero.weight, zero.bias))
        if batch == 1:  # the batched product copies its bias to every token first
            return F.linear(attended, *_folded(proj, zero.weight * gate, zero.bias))
        weight, bias = _folded(proj, zero.weight * gate[:, None], zero.bias)
        return torch.baddbmm(bias[:, None], attended, weight.mT)


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    GlobalInteraction: FusedGlobalInteraction,
    TextureComplement: FusedTextureComplement,
}
_PLAIN = {fused: plain for plain, fused in _FUSED.items()}


def fuse(model: Model) -> Model:
    """Make one matrix product of two where linear layers follow each other, exactly.

    Z times the output projection of the cross-attention, and Z times the gate times that of the
    shifted-window attention, in every PT-DiT block and ProxyAttention of the model. Making a matrix
    of C channels takes C³ multiply-adds, so it is done in calls of more than 2·C tokens: 20·D² of
    22·D² per token and PT-DiT block are left of them. Parameters, their names and the state dict
    stay as they are; weights that change later count, and gradients reach them.

    Args:
        model: a PTDiT, or any module that holds ProxyAttention, GlobalInteraction or
            TextureComplement.

    Returns:
        The model, changed in place.

    Raises:
        ValueError: nothing in the model can be fused.
        RuntimeError: fused already, or with layers that do more than their weights say, such as
            LoRA's, or whose weights are quantized. Nothing is changed then.

    Examples:
        >>> model = ptattn.fuse(ptattn.models.create_model("pt-dit-xl"))
    """
    if any(type(module) in _PLAIN for module in model.modules()):
        raise RuntimeError("the model is fused already")
    halves = {name: m for name, m in model.named_modules() if type(m) in _FUSED}
    if not halves:
        raise ValueError("there is nothing to fuse: no PT-DiT block and no ProxyAttention")
    for name, half in halves.items():
        attn = half.cross_attn if isinstance(half, GlobalInteraction) else half.shifted_attn
        if not _foldable(attn.proj, half.zero):
            raise RuntimeError(
                f"{name} cannot be fused: its last layers are not plain nn.Linear with plain "
                "weights. Merge what LoRA adds; quantized weights cannot be fused"
            )
    for half in halves.values():
        half.__class__ = _FUSED[type(half)]
    return model


def unfuse(model: Model) -> Model:
    """Undo `fuse`.

    Returns:
        The model, changed in place.

    Raises:
        RuntimeError: not fused.
    """
    halves = [module for module in model.modules() if type(module) in _PLAIN]
    if not halves:
        raise RuntimeError("the model is not fused")
    for half in halves:
        half.__class__ = _PLAIN[type(half)]
    return model


def _pays(rows: int, channels: int) -> bool:
    """Whether a matrix that costs channels³ saves half as much again on so many rows: those past
    `channels` would do, but its own product is small and slow."""
    return rows > 2 * channels


def _foldable(*layers: nn.Module) -> bool:
    return all(is_plain(layer) and layer.bias is not None for layer in layers)


def _folded(inner: nn.Linear, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of one layer that does what `inner` and then (weight, bias) do; the weight is
    one matrix (C, C) or one per sample (B, C, C)."""
    return weight @ inner.weight, weight @ inner.bias + bias
