"""A model's wrong input is named as its caller named it, with what it got and what it wanted."""

import pytest
import torch

from ptattn.models import create_model

SMALL = dict(depth=1, dim=64, num_heads=4)
MODELS = {
    "PTDiT": create_model("pt-dit-b", **SMALL, caption_channels=24),
    "PixArt": create_model("pixart-alpha", **SMALL, caption_channels=24),
    "DiT": create_model("dit-s", **SMALL),
    "PTDiT of classes": create_model("pt-dit-s-class", **SMALL),
}
every_model = pytest.mark.parametrize("name", MODELS)
of_text = pytest.mark.parametrize("name", ["PTDiT", "PixArt"])
of_classes = pytest.mark.parametrize("name", ["DiT", "PTDiT of classes"])


def inputs(name, batch=2):
    latents, timestep = torch.randn(batch, 4, 8, 16), torch.full((batch,), 500.0)
    given = dict(latents=latents, timestep=timestep)
    if name in ("PTDiT", "PixArt"):
        mask = torch.arange(6)[None] < torch.tensor([[4], [6]])[:batch]
        return given | dict(caption=torch.randn(batch, 6, 24), caption_mask=mask)
    return given | dict(labels=torch.arange(batch))


def refuses(name, argument, value, error, text):
    with pytest.raises(error) as caught:
        MODELS[name](**(inputs(name) | {argument: value}))
    assert str(caught.value) == text


@every_model
def test_good_inputs_run(name):
    assert MODELS[name](**inputs(name)).shape == (2, 8, 8, 16)


@of_text
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_masks_of_tokenizers(name, dtype):
    """`attention_mask` of a tokenizer is 1 at real tokens, in int64."""
    given = inputs(name)
    whole = MODELS[name](**given)
    given["caption_mask"] = given["caption_mask"].to(dtype)
    assert torch.equal(MODELS[name](**given), whole)


def test_prepared_captions_take_masks_of_tokenizers():
    given = inputs("PTDiT")
    whole = MODELS["PTDiT"](**given)
    mask = given.pop("caption_mask").long()
    given["caption"] = MODELS["PTDiT"].prepare_caption(given["caption"], mask)
    torch.testing.assert_close(MODELS["PTDiT"](**given), whole)


@of_text
def test_masks_that_may_be_added_to_scores(name):
    text = "caption_mask must be bool, or integers that are 1 at real tokens and 0 elsewhere; got "
    refuses(name, "caption_mask", torch.zeros(2, 6), TypeError, text + "torch.float32")


@of_text
@pytest.mark.parametrize("shape", [(2, 5), (1, 6), (2, 1, 6), (6,)], ids=str)
def test_mask_of_another_shape(name, shape):
    text = f"caption_mask must have shape (B, T) = (2, 6); got {shape}"
    refuses(name, "caption_mask", torch.ones(shape, dtype=torch.bool), ValueError, text)


@of_text
@pytest.mark.parametrize("shape", [(2, 6, 25), (2, 1, 6, 24), (2, 24), (2, 0, 24)], ids=str)
def test_caption_of_another_shape(name, shape):
    text = f"caption must have shape (B, T, 24); got {shape}"
    refuses(name, "caption", torch.randn(shape), ValueError, text)


@of_text
@pytest.mark.parametrize("batch", [1, 3])
def test_caption_of_another_batch(name, batch):
    given = dict(caption=torch.randn(batch, 6, 24), caption_mask=None)
    text = rf"caption must have shape \(B, T, C\) = \(2, 6, 24\); got \({batch}, 6, 24\)"
    with pytest.raises(ValueError, match=text):
        MODELS[name](**(inputs(name) | given))


@every_model
@pytest.mark.parametrize("value", [500, 0.5, None, [500, 500]], ids=str)
def test_timestep_is_no_tensor(name, value):
    text = "timestep must be a tensor of shape (B,), one per sample; got "
    refuses(name, "timestep", value, TypeError, text + type(value).__name__)


@every_model
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1)], ids=str)
def test_timestep_of_another_shape(name, shape):
    text = f"timestep must have shape (B,) = (2,); got {shape}"
    refuses(name, "timestep", torch.ones(shape), ValueError, text)


@every_model
def test_timestep_of_no_real_dtype(name):
    text = "timestep must be of a real dtype; got torch.bool"
    refuses(name, "timestep", torch.ones(2, dtype=torch.bool), TypeError, text)


@every_model
def test_other_devices(name):
    for argument in inputs(name).keys() - {"latents"}:
        value = inputs(name)[argument].to("meta")
        if argument == "caption":  # what comes with it is looked at first
            refuses(name, argument, value, ValueError, "caption_mask must be on meta; got cpu")
        else:
            refuses(name, argument, value, ValueError, f"{argument} must be on cpu; got meta")


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.uint8], ids=str)
def test_latents_unlike_the_weights(name, dtype):
    value = torch.zeros(2, 4, 8, 16, dtype=dtype)
    text = f"latents must be torch.float32, as the weights are, or use torch.autocast; got {dtype}"
    refuses(name, "latents", value, ValueError, text)
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype):
            MODELS[name](**(inputs(name) | dict(latents=value)))


@of_text
def test_captions_unlike_the_weights(name):
    value = torch.zeros(2, 6, 24, dtype=torch.bfloat16)
    text = "caption must be torch.float32, as the weights are, or use torch.autocast; got "
    refuses(name, "caption", value, ValueError, text + "torch.bfloat16")


@every_model
def test_latents_are_no_tensor(name):
    text = "latents must be a tensor of shape (B, 4, F, H, W) or (B, 4, H, W); got ndarray"
    refuses(name, "latents", torch.zeros(2, 4, 8, 16).numpy(), TypeError, text)


@every_model
@pytest.mark.parametrize(
    "shape", [(4, 8, 16), (2, 3, 8, 16), (2, 4, 1, 1, 8, 16), (2, 4, 16)], ids=str
)
def test_latents_of_another_shape(name, shape):
    text = f"latents must have shape (B, 4, F, H, W) or (B, 4, H, W); got {shape}"
    refuses(name, "latents", torch.randn(shape), ValueError, text)


@every_model
def test_latents_that_patches_do_not_divide(name):
    text = "latents need H and W divisible by 2; got (2, 4, 8, 7)"
    refuses(name, "latents", torch.randn(2, 4, 8, 7), ValueError, text)


@every_model
def test_latents_of_no_pixels(name):
    text = "latents may be empty in their batch only; got (2, 4, 8, 0)"
    refuses(name, "latents", torch.randn(2, 4, 8, 0), ValueError, text)


@of_classes
def test_labels(name):
    refuses(
        name, "labels", [1, 2], TypeError, "labels must be a tensor of shape (B,), int64; got list"
    )
    refuses(
        name,
        "labels",
        torch.zeros(2),
        TypeError,
        "labels must be int64 or int32; got torch.float32",
    )
    text = "labels must have shape (B,) = (2,); got (1,)"
    refuses(name, "labels", torch.tensor([1]), ValueError, text)
    for bad in (-1, 1001):
        low, high = sorted((3, bad))
        text = f"labels must be in [0, 1000], the last for no class; got {low} to {high}"
        refuses(name, "labels", torch.tensor([3, bad]), ValueError, text)
