"""Text to image, video and views through diffusers, offline, on tiny components."""

import logging

import pytest
import torch

from ptattn import checkpoint
from ptattn.flow import FLOW, V, resolution_shift, sample
from ptattn.pipelines import PTDiTPipeline, decode

# First, as it skips this module where diffusers is missing.
from tests.support.components import (
    diffusers,
    image_vae,
    pipeline,
    seeded,
    transformer,
    video_vae,
)  # isort: skip

IMAGE = dict(height=16, width=24, num_inference_steps=2, output_type="np", max_sequence_length=8)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    def connect(*args):
        raise AssertionError(f"a pipeline of local files opened a connection: {args}")

    monkeypatch.setattr("socket.socket.connect", connect)


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(0)
    return pipeline()


def encoded(pipe, texts, length):
    """As the transformer takes captions."""
    with torch.no_grad():
        embeds, mask, *_ = pipe.encode_prompt(texts, False, max_sequence_length=length)
    return dict(caption=embeds, caption_mask=mask)


def test_one_seed_makes_one_picture(images):
    prompts = ["a red cat", "the green dog at dusk"]
    first, again, other = (
        images(prompts, generator=seeded(seed), **IMAGE).images for seed in (0, 0, 1)
    )
    assert first.shape == (2, 16, 24, 3)
    assert (first == again).all()
    assert (first != other).any()
    alone = images(prompts[1], generator=[seeded(7)], **IMAGE).images
    pair = images(prompts, generator=[seeded(3), seeded(7)], **IMAGE).images
    torch.testing.assert_close(torch.tensor(alone[0]), torch.tensor(pair[1]))


def test_it_is_the_sampler_of_training(images):
    noise = torch.randn(4, 4, 1, 8, 12)
    prompts, negatives = ["a red cat", "the green dog"], ["blue", "dusk"]
    calls = dict(height=16, width=24, latents=noise, max_sequence_length=8, output_type="latent")
    ours = images(prompts, negatives, num_images_per_prompt=2, **calls)
    condition, null = (  # the images of one prompt follow one another
        encoded(images, [texts[0], texts[0], texts[1], texts[1]], 8)
        for texts in (prompts, negatives)
    )
    theirs = sample(images.transformer, noise, condition, null, shift=resolution_shift(64, 96))
    torch.testing.assert_close(ours.images, theirs[:, :, 0])
    again = images(
        prompts, negatives, num_images_per_prompt=2, **calls | dict(latents=noise[:, :, 0])
    )
    assert torch.equal(again.images, ours.images)  # noise of the shape that "latent" returns
    assert len(images.scheduler.timesteps) == FLOW.steps == 30
    assert images.guidance_scale == FLOW.guidance == 4


def test_prompts_guidance_and_negatives_matter(images):
    def draw(*texts, **changes):
        return images(*texts, generator=seeded(), **IMAGE | changes).images

    plain = draw("a red cat")
    assert (plain != draw("a blue cat")).any()
    assert (plain != draw("a red cat", "blue")).any()
    assert (plain != draw("a red cat", guidance_scale=2)).any()
    alone = draw("a red cat", guidance_scale=1)
    assert (alone == draw("a red cat", "blue", guidance_scale=1)).all()


def test_captions_are_padded_masked_and_cut(images, caplog):
    short, long = (encoded(images, "a red cat", length) for length in (4, 9))
    assert short["caption_mask"].tolist() == [[True] * 4]
    assert long["caption_mask"].tolist() == [[True] * 4 + [False] * 5]
    torch.testing.assert_close(short["caption"], long["caption"][:, :4])
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    encoded(images, "a red cat on the table", 4)
    logger.removeHandler(caplog.handler)
    assert "cut to 4 tokens of 7: 'a red cat on the table'" in caplog.text


def test_the_padding_of_a_caption_does_not_matter(images):
    first, second = (
        images("a red cat", generator=seeded(), **IMAGE | dict(max_sequence_length=length)).images
        for length in (5, 20)
    )
    torch.testing.assert_close(torch.tensor(first), torch.tensor(second))


@pytest.mark.parametrize(
    ("vae", "frames", "latent"),
    [(image_vae, 3, (3, 8, 12)), (video_vae, 5, (2, 4, 6)), (video_vae, 1, (1, 4, 6))],
    ids=["views", "video", "one frame"],
)
def test_videos_and_views(vae, frames, latent):
    pipe = pipeline(vae=vae(), transformer=transformer(window=(2, 2, 3)))
    calls = IMAGE | dict(num_frames=frames, num_images_per_prompt=2)
    video = pipe("a teapot", generator=seeded(), **calls).frames
    assert video.shape == (2, frames, 16, 24, 3)
    again = pipe("a teapot", generator=seeded(), **calls).frames
    assert (video == again).all()
    latents = pipe("a teapot", generator=seeded(), **calls | dict(output_type="latent")).frames
    assert latents.shape == (2, 4, *latent)
    with torch.no_grad():
        decoded = decode(pipe.vae, latents) / 2 + 0.5
    torch.testing.assert_close(torch.tensor(video), decoded.clamp(0, 1).permute(0, 2, 3, 4, 1))
    shown = pipe("a teapot", **calls | dict(output_type="pil")).frames
    assert [len(one) for one in shown] == [frames] * 2
    assert shown[0][0].size == (24, 16)


def test_an_image_of_a_video_autoencoder():
    pipe = pipeline(vae=video_vae())
    (image,) = pipe("a cat", **IMAGE | dict(output_type="pil")).images
    assert image.size == (24, 16)


def test_a_folder_holds_all(tmp_path, images):
    images.save_pretrained(tmp_path)
    assert (tmp_path / "transformer" / checkpoint.WEIGHTS_FILE).is_file()
    assert type(checkpoint.load_model(tmp_path / "transformer")).__name__ == "PTDiT"
    pipe = PTDiTPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    first, second = (p(["a red cat"], generator=seeded(5), **IMAGE).images for p in (images, pipe))
    assert (first == second).all()


def test_a_whole_pipeline_in_bfloat16(tmp_path, images):
    images.save_pretrained(tmp_path)
    pipe = PTDiTPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    assert {pipe.transformer.dtype, pipe.text_encoder.dtype, pipe.vae.dtype} == {torch.bfloat16}
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append(tensors["latents"].dtype)

    image = pipe("a cat", generator=seeded(), callback_on_step_end=callback, **IMAGE).images
    assert seen == [torch.float32] * 2
    full = images("a cat", generator=seeded(), **IMAGE).images
    assert 0 < abs(image - full).max() < 0.1


def test_v_prediction_is_told_by_the_scheduler():
    pipe = pipeline(scheduler=V.scheduler())
    assert pipe.objective is V
    noise = torch.randn(1, 4, 1, 8, 12)
    options = IMAGE | dict(latents=noise, output_type="latent")
    ours = pipe("a red cat", **options).images
    condition, null = (encoded(pipe, text, 8) for text in ("a red cat", ""))
    theirs = sample(pipe.transformer, noise, condition, null, objective=V, steps=2)
    torch.testing.assert_close(ours, theirs[:, :, 0])
    assert pipe.guidance_scale == V.guidance


def test_callbacks_see_change_and_stop(images):
    seen = []

    def watch(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), sorted(tensors), pipe.guidance_scale))
        pipe._guidance_scale = 1
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else None

    options = IMAGE | dict(output_type="latent", num_inference_steps=3)
    result = images("a cat", callback_on_step_end=watch, **options).images
    assert [step for step, *_ in seen] == [0, 1, 2]
    assert [guidance for *_, guidance in seen] == [4, 1, 1]
    assert seen[0][1:3] == (1000, ["latents"])
    assert not result.any()

    def stop(pipe, step, timestep, tensors):
        seen.append(step)
        pipe._interrupt = step == 1

    seen.clear()
    images("a cat", callback_on_step_end=stop, **options)
    assert seen == [0, 1]
    assert images.interrupt


def test_progress_is_shown(images, capsys):
    images.set_progress_bar_config()
    images("a cat", **IMAGE)
    images.set_progress_bar_config(disable=True)
    assert "2/2" in capsys.readouterr().err


def test_results_come_as_asked(images):
    (tensor,) = images("a cat", return_dict=False, **IMAGE | dict(output_type="pt"))
    assert tensor.shape == (1, 3, 16, 24)
    assert 0 <= tensor.min() < tensor.max() <= 1


def test_models_can_be_offloaded():
    """The hooks are there, in order, and every model is called through them; the CPU stands for the
    accelerator."""
    pytest.importorskip("accelerate")
    pipe = pipeline()
    plain = pipe("a cat", generator=seeded(), **IMAGE).images
    pipe.enable_model_cpu_offload(device="cpu")
    assert pipe.transformer.prepares_captions  # its weights are brought for that
    calls = []
    for hook, name in zip(pipe._all_hooks, ("text_encoder", "transformer", "vae"), strict=True):
        assert hook.model is getattr(pipe, name)
        before = hook.hook.pre_forward

        def pre_forward(*args, name=name, before=before, **kwargs):
            calls.append(name)
            return before(*args, **kwargs)

        hook.hook.pre_forward = pre_forward
    assert (pipe("a cat", generator=seeded(), **IMAGE).images == plain).all()
    assert list(dict.fromkeys(calls)) == ["text_encoder", "transformer", "vae"]


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(height=17), "height and width must be multiples of 4; got 17, 24"),
        (dict(width=0), "width must be a positive integer; got 0"),
        (dict(num_frames=True), "num_frames must be a positive integer; got True"),
        (dict(num_inference_steps=0), "num_inference_steps must be a positive integer; got 0"),
        (dict(num_images_per_prompt=1.5), "num_images_per_prompt must be a positive integer"),
        (dict(max_sequence_length=0), "max_sequence_length must be a positive integer"),
        (dict(output_type="gif"), "output_type: 'gif' not in pil, np, pt, latent"),
        (dict(callback_on_step_end_tensor_inputs=["noise"]), "'noise' not in latents"),
        (dict(latents=torch.zeros(4, 8, 12)), r"shape \(1, 4, 1, 8, 12\); got \(4, 8, 12\)"),
        (dict(generator=[seeded()] * 2), "generator must be one or 1; got 2"),
        (dict(negative_prompt=["a", "b"]), "must be one text, or one for each of 1 prompts; got 2"),
        (dict(prompt=[]), "prompt must hold at least one text"),
    ],
    ids=lambda part: "-".join(part) if isinstance(part, dict) else "",  # not by tensors' contents
)
def test_arguments_that_do_not_fit_are_named(images, changes, message):
    with pytest.raises(ValueError, match=message):
        images(**dict(prompt="a cat") | IMAGE | changes)


def test_prompts_are_texts(images):
    with pytest.raises(TypeError, match="prompt must be a string or a list of strings; got 3"):
        images(3, **IMAGE)
    with pytest.raises(TypeError, match=r"negative_prompt must be .*; got \[None\]"):
        images("a cat", [None], **IMAGE)


def test_frames_that_the_autoencoder_cannot_make():
    with pytest.raises(ValueError, match="num_frames must be 1 more than a multiple of 4; got 4"):
        pipeline(vae=video_vae())("a cat", num_frames=4, **IMAGE)


@pytest.mark.parametrize(
    ("components", "message"),
    [
        (lambda: dict(transformer=transformer(caption_channels=8)), "caption_channels 8, but text"),
        (lambda: dict(transformer=transformer(in_channels=3)), "in_channels 3, but vae has 4"),
        (
            lambda: dict(transformer=transformer(caption_channels=None, num_classes=3)),
            "transformer must be one for text; got one for classes",
        ),
        (lambda: dict(scheduler=diffusers.DDPMScheduler()), "scheduler must be set as ptattn.flow"),
        (
            lambda: dict(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)),
            "scheduler must be set as ptattn.flow",
        ),
    ],
    ids=["caption", "latent", "class", "ddpm", "shifted"],
)
def test_components_that_do_not_fit_are_named(components, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**components())


def test_missing_components_are_named(images):
    parts = dict(images.components) | dict(vae=None, transformer=None)
    with pytest.raises(ValueError, match=r"missing: \['transformer', 'vae'\]"):
        PTDiTPipeline(**parts)
    parts = dict(images.components) | dict(transformer=torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="transformer must be a PTDiTTransformer; got Linear"):
        PTDiTPipeline(**parts)


def test_exchanged_components_are_checked_too():
    pipe = pipeline()
    pipe.scheduler = diffusers.DDPMScheduler()
    with pytest.raises(ValueError, match="scheduler must be set as"):
        pipe("a cat", **IMAGE)
