"""Tiny components of a pipeline, made offline. What imports it is skipped without diffusers."""

import pytest
import torch

from ptattn.flow import FLOW

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from ptattn.pipelines import PTDiTPipeline, PTDiTTransformer  # noqa: E402

WORDS = ["a", "red", "green", "blue", "cat", "dog", "teapot", "on", "the", "table", "at", "dusk"]
WIDTH = 16  # of the text encoder


def tokenizer():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -1.0) for word in WORDS] + [(c, -9.0) for c in "abcdefghijklmnopqrstu"]
    model = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def text_encoder():
    config = transformers.T5Config(
        vocab_size=64, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    return transformers.T5EncoderModel(config).eval()


def transformer(**sizes):
    sizes = dict(dim=32, num_heads=2, depth=1, caption_channels=WIDTH, window=(2, 3)) | sizes
    model = PTDiTTransformer(**sizes)
    for name, parameter in model.named_parameters():  # what starts at zero would hide all else
        if "zero" in name or "proj" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def image_vae(**changes):
    """Halves the sides."""
    settings = dict(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=4,
        scaling_factor=0.5,
    )
    return diffusers.AutoencoderKL(**settings | changes).eval()


def video_vae():
    """A quarter of each side, and one latent frame for every four after the first."""
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[2.0, 1.0, 0.5, 1.5],
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    ).eval()


def pipeline(clean_caption=False, **components):
    made = dict(tokenizer=tokenizer, text_encoder=text_encoder, transformer=transformer)
    made |= dict(vae=image_vae, scheduler=FLOW.scheduler)
    parts = {name: components.get(name) or make() for name, make in made.items()}
    pipe = PTDiTPipeline(**parts, clean_caption=clean_caption)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)
