"""Latents of diffusers' autoencoders: images frame by frame, videos whole, in each one's scale."""

import pytest
import torch

# First, as it skips this module where diffusers is missing.
from tests.support.components import diffusers, image_vae, seeded, video_vae  # isort: skip

from ptattn.pipelines import compression, decode, encode


def test_images_are_coded_frame_by_frame():
    vae = image_vae()
    assert compression(vae) == (1, 2)
    pixels = torch.rand(2, 3, 3, 8, 12) * 2 - 1
    with torch.no_grad():
        latents = encode(vae, pixels, seeded())
        first = vae.encode(pixels[:, :, 0]).latent_dist.sample(seeded())
        video = decode(vae, latents)
        assert latents.shape == (2, 4, 3, 4, 6)
        assert video.shape == pixels.shape
        torch.testing.assert_close(latents[:, :, 0], first * 0.5)
        torch.testing.assert_close(video[:, :, 0], vae.decode(first).sample)


@pytest.mark.parametrize(
    "make",
    [
        lambda: diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
        lambda: diffusers.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
        ),
    ],
    ids=["tiny", "dc"],
)
def test_autoencoders_without_a_distribution(make):
    vae = make().eval()
    pixels = torch.rand(2, 3, 2, 8, 12)
    with torch.no_grad():
        latents = encode(vae, pixels)
        assert latents.shape == (2, 4, 2, 4, 6)
        assert decode(vae, latents).shape == pixels.shape


def test_an_autoencoder_that_does_not_say_is_named():
    with torch.device("meta"):
        vae = diffusers.AutoencoderKLTemporalDecoder()  # wants num_frames, too
    with pytest.raises(ValueError, match="AutoencoderKLTemporalDecoder does not say how much"):
        compression(vae)


def test_videos_are_coded_whole():
    vae = video_vae()
    assert compression(vae) == (4, 4)
    pixels = torch.rand(2, 3, 5, 8, 12) * 2 - 1
    mean, std = (
        torch.tensor(vae.config[f"latents_{name}"])[:, None, None, None] for name in ("mean", "std")
    )
    with torch.no_grad():
        latents = encode(vae, pixels, seeded())
        raw = vae.encode(pixels).latent_dist.sample(seeded())
        video = decode(vae, latents)
        assert latents.shape == (2, 4, 2, 2, 3)
        assert video.shape == pixels.shape
        torch.testing.assert_close(latents, (raw - mean) / std)
        torch.testing.assert_close(video, vae.decode(raw).sample)


@pytest.mark.parametrize(
    ("changes", "scale", "shift"),
    [
        (dict(scaling_factor=0.5, shift_factor=0.25), 2, 0.25),
        (dict(latents_mean=(1, 2, 3, 4), latents_std=(2, 2, 2, 2), scaling_factor=0.5), 4, None),
    ],
    ids=["shift", "mean"],
)
def test_every_name_of_the_normalisation_is_known(changes, scale, shift):
    vae = image_vae(**changes)
    latents = torch.randn(1, 4, 1, 2, 3)
    mean = torch.tensor([1.0, 2, 3, 4])[:, None, None] if shift is None else shift
    with torch.no_grad():
        expected = vae.decode(latents[:, :, 0] * scale + mean).sample
        torch.testing.assert_close(decode(vae, latents)[:, :, 0], expected)


@pytest.mark.parametrize(
    ("make", "factors"),
    [
        (lambda: diffusers.AutoencoderKL(block_out_channels=(32,) * 1), (1, 1)),
        (lambda: diffusers.AutoencoderKL.from_config(dict(block_out_channels=(32,) * 4)), (1, 8)),
        (diffusers.AutoencoderKLCogVideoX, (4, 8)),
        (diffusers.AutoencoderKLWan, (4, 8)),
        (diffusers.AutoencoderKLLTXVideo, (8, 32)),
        (diffusers.AutoencoderTiny, (1, 8)),
    ],
    ids=["kl-1", "kl-8", "cogvideox", "wan", "ltx", "tiny"],
)
def test_the_compression_of_known_autoencoders(make, factors):
    with torch.device("meta"):
        assert compression(make()) == factors
