"""Captions of a call: texts or embeddings, guided away from negative ones or not."""

import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback

from ptattn.pipelines import PTDiTPipeline

# First, as it skips this module where diffusers is missing.
from tests.support.components import WIDTH, pipeline, seeded  # isort: skip

IMAGE = dict(height=16, width=24, num_inference_steps=2, output_type="pt", max_sequence_length=8)
NAMES = (
    "prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_embeds",
    "negative_prompt_attention_mask",
)
MASK = torch.ones(1, 3, dtype=torch.int64)
EMBEDS = dict(zip(NAMES, (torch.zeros(1, 3, WIDTH), MASK) * 2, strict=True))


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(0)
    return pipeline()


@pytest.fixture(scope="module")
def wordless(images):
    """The same without what reads texts."""
    return PTDiTPipeline(**images.components | dict(tokenizer=None, text_encoder=None))


def draw(pipe, *texts, **changes):
    pipe.set_progress_bar_config(disable=True)
    return pipe(*texts, generator=seeded(), **IMAGE | changes).images


def embedded(pipe, *texts, length=8, guided=True):
    with torch.no_grad():
        made = pipe.encode_prompt(texts[0], guided, *texts[1:], max_sequence_length=length)
    return dict(zip(NAMES, made, strict=True))


@pytest.mark.parametrize("negative", [None, "blue", ["blue", "dusk"]])
def test_embeddings_stand_in_for_texts(images, wordless, negative):
    prompts = ["a red cat", "the green dog"]
    given = embedded(images, prompts, negative)
    drawn = draw(wordless, num_images_per_prompt=2, **given)
    assert torch.equal(drawn, draw(images, prompts, negative, num_images_per_prompt=2))
    drawn = draw(wordless, guidance_scale=1, **embedded(images, prompts, guided=False))
    assert torch.equal(drawn, draw(images, prompts, guidance_scale=1))


def test_negative_texts_beside_embeddings_take_their_length(images):
    given = embedded(images, "a red cat", "blue", length=6)
    drawn = draw(images, None, "blue", **dict(list(given.items())[:2]))
    assert torch.equal(drawn, draw(images, **given))


def test_no_negative_text_is_the_empty_one(images):
    plain = draw(images, "a red cat")
    assert torch.equal(draw(images, "a red cat", ""), plain)
    assert torch.equal(draw(images, "a red cat", None), plain)
    assert not torch.equal(draw(images, "a red cat", "blue"), plain)


def test_guidance_of_one_or_less_is_none(images, monkeypatch):
    """As in diffusers' pipelines; 0 drew the negative prompt."""
    read, encoder = [], images.text_encoder.forward
    monkeypatch.setattr(
        images.text_encoder, "forward", lambda ids, **k: read.append(len(ids)) or encoder(ids, **k)
    )
    drawn = [draw(images, "a red cat", "blue", guidance_scale=scale) for scale in (1, 0, 0.5)]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert read == [1] * 3  # nothing negative among it
    assert not images.do_classifier_free_guidance
    draw(images, "a red cat", "blue", guidance_scale=1.5)
    assert images.do_classifier_free_guidance


def test_callbacks_change_captions(images):
    seen = []

    def swap(pipe, step, timestep, tensors):
        seen.append(sorted(tensors))
        return {name: tensors[name].flip(0) for name in tensors}

    given = embedded(images, ["a red cat", "the green dog"], ["blue", "dusk"])
    names = ["prompt_embeds", "negative_prompt_embeds"]
    options = dict(callback_on_step_end=swap, callback_on_step_end_tensor_inputs=names)
    plain, swapped = draw(images, **given), draw(images, **given, **options)
    assert seen == [sorted(names)] * 2
    assert not torch.equal(swapped, plain)
    seen.clear()
    assert torch.equal(
        draw(images, num_inference_steps=1, **given, **options)[0],
        draw(images, num_inference_steps=1, **given)[0],
    )


def test_a_callback_of_diffusers_ends_guidance(images):
    def stop(pipe, step, timestep, tensors):
        pipe._guidance_scale = 1

    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=0.0)
    drawn = draw(images, "a red cat", "blue", callback_on_step_end=cutoff)
    expected = draw(images, "a red cat", "blue", callback_on_step_end=stop)
    assert torch.equal(drawn, expected)
    assert not torch.equal(drawn, draw(images, "a red cat", "blue"))


def test_guidance_that_a_callback_begins_needs_negative_prompts(images):
    def begin(pipe, step, timestep, tensors):
        pipe._guidance_scale = 4

    with pytest.raises(ValueError, match="a callback set guidance_scale to 4, but the call began"):
        draw(images, "a red cat", guidance_scale=1, callback_on_step_end=begin)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(prompt=None), "give prompt or prompt_embeds; got neither"),
        (EMBEDS | dict(prompt="a cat"), "give prompt or prompt_embeds; got both"),
        (EMBEDS | dict(negative_prompt="a cat"), "negative_prompt_embeds; got both"),
        (EMBEDS | dict(prompt_attention_mask=None), "prompt_attention_mask go together"),
        (dict(prompt="a cat", prompt_attention_mask=MASK), "go together; got one"),
        (EMBEDS | dict(prompt_embeds=torch.zeros(1, 3, 5)), r"\(B, T, 16\); got \(1, 3, 5\)"),
        (EMBEDS | dict(prompt_attention_mask=MASK[0]), r"\(1, 3\); got \(3,\)"),
        (
            EMBEDS | dict(zip(NAMES, (torch.zeros(1, 2, WIDTH), MASK[:, :2]), strict=False)),
            r"shape of prompt_embeds; got \(1, 3, 16\) and \(1, 2, 16\)",
        ),
        (
            dict(list(EMBEDS.items())[2:]) | dict(prompt="a cat"),
            r"shape of prompt_embeds; got \(1, 3, 16\) and no prompt_embeds",
        ),
    ],
)  # fmt: skip
def test_captions_that_do_not_fit_are_named(images, given, message):
    with pytest.raises(ValueError, match=message):
        draw(images, **given)


@pytest.mark.parametrize("name", NAMES[1::2])
def test_an_additive_mask_is_no_mask(images, name):
    """0 at real tokens and -10000 elsewhere was once taken for its opposite."""
    with pytest.raises(TypeError, match=f"^{name} must be bool, or integers .*; got torch.float32"):
        draw(images, **EMBEDS | {name: (1 - MASK.float()) * -10_000})


def test_texts_need_what_reads_them(wordless):
    with pytest.raises(ValueError, match=r"prompt needs the tokenizer .* give prompt_embeds$"):
        draw(wordless, "a cat")
    given = dict(list(EMBEDS.items())[:2])
    with pytest.raises(ValueError, match="negative_prompt_embeds, or guidance_scale=1"):
        draw(wordless, **given)
    draw(wordless, guidance_scale=1, **given)


def test_a_folder_without_what_reads_texts(wordless, tmp_path):
    wordless.save_pretrained(tmp_path)
    back = PTDiTPipeline.from_pretrained(tmp_path)
    assert back.text_encoder is back.tokenizer is None
    assert torch.equal(draw(back, **EMBEDS), draw(wordless, **EMBEDS))
