"""Tiny models of diffusers and timm, in float64, whose attention is replaced."""

import importlib.util
import sys
from unittest import mock

import pytest
import torch
from torch import nn

from ptattn.layers import ZeroLinear

DIM, HEADS = 24, 3


def import_timm():
    """timm's vision transformers. timm imports torchvision for its data and for a norm of
    convolutional networks; where torchvision is missing, nothing in these tests needs it."""
    names = ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets")
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("torchvision") is None:
            for name in names:
                patch.setitem(sys.modules, f"torchvision{name}", mock.MagicMock())
        return pytest.importorskip("timm.models.vision_transformer")


def wake(model):
    """Give the layers that start at zero weights."""
    for layer in model.modules():
        if isinstance(layer, ZeroLinear):
            nn.init.normal_(layer.weight, std=0.2)
    return model


class PixArt:
    """A tiny PixArt-α of diffusers; images of 6 x 10 tokens."""

    grid = (6, 10)
    found = ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")

    @staticmethod
    def make(library, layers=2):
        model = library.PixArtTransformer2DModel(
            num_attention_heads=HEADS,
            attention_head_dim=DIM // HEADS,
            num_layers=layers,
            cross_attention_dim=DIM,
            caption_channels=10,
            sample_size=16,
            norm_num_groups=1,
        )
        # Positions, as the model is made, are hardly seen; the modulation must be seen too.
        for block in model.transformer_blocks:
            nn.init.normal_(block.scale_shift_table)
        return model.double()

    @staticmethod
    def run(model, grid=grid):
        generator = torch.Generator().manual_seed(1)
        latents, text = (
            torch.randn(*shape, dtype=torch.float64, generator=generator)
            for shape in ((2, 4, 2 * grid[0], 2 * grid[1]), (2, 5, 10))
        )
        times = torch.tensor([3, 700])
        return model(latents, encoder_hidden_states=text, timestep=times, return_dict=False)[0]


class DiT:
    """A tiny DiT of diffusers, which takes square images only."""

    grid = (6, 6)
    found = ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")

    @staticmethod
    def make(library):
        model = library.DiTTransformer2DModel(
            num_attention_heads=HEADS,
            attention_head_dim=DIM // HEADS,
            num_layers=2,
            sample_size=16,
            norm_num_groups=1,
        )
        return model.double()

    @staticmethod
    def run(model, grid=grid):
        generator = torch.Generator().manual_seed(1)
        latents = torch.randn(2, 4, *(2 * n for n in grid), generator=generator).double()
        labels, times = torch.tensor([5, 6]), torch.tensor([3, 700])
        model.eval()  # else labels are dropped at random
        return model(latents, times, labels, return_dict=False)[0]


class ViT:
    """A tiny vision transformer of timm; images of 4 x 6 patches."""

    grid = (4, 6)
    found = ("blocks.0.attn", "blocks.1.attn")

    @staticmethod
    def make(library, **options):
        options = dict(class_token=False, global_pool="avg", qkv_bias=True) | options
        model = library.VisionTransformer(
            img_size=(32, 48),
            patch_size=8,
            embed_dim=DIM,
            depth=2,
            num_heads=HEADS,
            num_classes=5,
            dynamic_img_size=True,
            **options,
        )
        for block in model.blocks:
            nn.init.normal_(block.norm1.weight)
            nn.init.normal_(block.norm1.bias)
        return model.double()

    @staticmethod
    def run(model, grid=grid):
        generator = torch.Generator().manual_seed(1)
        return model(torch.randn(2, 3, *(8 * n for n in grid), generator=generator).double())


def train(model, run):
    """The losses of a few steps towards an output of ones."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = (run(model) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
