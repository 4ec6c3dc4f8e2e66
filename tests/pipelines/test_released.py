"""The released model's settings: cleaned captions, tiles, dtypes; kept in a folder, and sampled."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ptattn.cli import main
from ptattn.pipelines import CausalVAE, PTDiTPipeline, prompts, qihoo_t2i

# First, as it skips this module where diffusers is missing.
from tests.support.components import (
    pipeline,
    seeded,
    text_encoder,
    tokenizer,
    transformer,
)  # isort: skip

CLEANABLE = all(map(prompts.importlib.util.find_spec, ("ftfy", "bs4")))
cleans = pytest.mark.skipif(not CLEANABLE, reason="needs ftfy and beautifulsoup4")
SMALL = dict(height=64, width=64, num_inference_steps=2, output_type="pt", max_sequence_length=8)


def vae():
    torch.manual_seed(0)
    return CausalVAE((8, 8, 8, 8), 1, norm_num_groups=4).eval()


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of the components, as the public files and `ptattn convert` have them."""
    folder = tmp_path_factory.mktemp("parts")
    tokenizer().save_pretrained(folder / "t5" / "tokenizer")
    text_encoder().half().save_pretrained(folder / "t5" / "text_encoder")  # as published
    transformer().save_pretrained(folder / "qihoo-t2i")
    vae().save_pretrained(folder / "vae")
    return folder


@pytest.fixture
def cleaning(monkeypatch):
    """Stands for ftfy and BeautifulSoup, which may be missing."""
    monkeypatch.setattr(prompts, "check_cleaning", lambda: None)
    monkeypatch.setattr("ptattn.pipelines.pipeline.check_cleaning", lambda: None)
    monkeypatch.setattr("ptattn.pipelines.pipeline.clean", lambda texts: [t.lower() for t in texts])


def made(parts, **settings):
    pipe = qihoo_t2i(parts / "t5", parts / "qihoo-t2i", parts / "vae", **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.usefixtures("cleaning")
def test_the_settings_are_the_release_s(parts):
    pipe = made(parts)
    assert pipe.text_encoder.dtype == torch.float32
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.bfloat16
    assert pipe.config.clean_caption
    assert pipe.config.tile_vae
    assert pipe.vae.tile_sample_min_size == 512
    embeds, mask, *_ = pipe.encode_prompt("a red cat")
    assert embeds.shape[1] == mask.shape[1] == 200
    assert mask.sum() == 4  # the end token, too


@pytest.mark.usefixtures("cleaning")
def test_the_settings_are_kept(parts, tmp_path):
    pipe = made(parts, dtype=torch.float32)
    pipe.save_pretrained(tmp_path)
    dtypes = {"default": torch.bfloat16, "text_encoder": torch.float32}
    same = PTDiTPipeline.from_pretrained(tmp_path, dtype=dtypes)
    assert (same.text_encoder.dtype, same.vae.dtype) == (torch.float32, torch.bfloat16)
    for other in (same, PTDiTPipeline.from_pipe(pipe)):
        assert other.config.clean_caption
        assert other.config.tile_vae
    plain = PTDiTPipeline.from_pipe(pipe, clean_caption=False)
    assert not plain.config.clean_caption


@pytest.mark.usefixtures("cleaning")
def test_captions_are_cleaned_negative_ones_too(parts):
    pipe = made(parts, dtype=torch.float32)
    drawn = pipe("A Red CAT", "BLUE", generator=seeded(), **SMALL).images
    assert torch.equal(drawn, pipe("a red cat", "blue", generator=seeded(), **SMALL).images)
    plain = PTDiTPipeline.from_pipe(pipe, clean_caption=False)
    plain.set_progress_bar_config(disable=True)
    assert not torch.equal(drawn, plain("A Red CAT", "BLUE", generator=seeded(), **SMALL).images)
    assert torch.equal(drawn, plain("a red cat", "blue", generator=seeded(), **SMALL).images)


@cleans
@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("A Red <b>Cat</b> https://example.com/cats", "a red cat"),
        ("Mac`s  @user cat", 'mac"s cat'),
        ("猫 a cat #12345", "a cat"),
        ("", ""),
    ],
)
def test_cleaning_is_pixart_s(text, cleaned):
    assert prompts.clean([text]) == [cleaned]


@pytest.mark.parametrize(("module", "package"), [("ftfy", "ftfy"), ("bs4", "beautifulsoup4")])
def test_what_cleaning_needs_is_named(module, package, monkeypatch):
    find = prompts.importlib.util.find_spec
    there = {"ftfy": sys.__spec__, "bs4": sys.__spec__} | {module: None}
    monkeypatch.setattr(prompts.importlib.util, "find_spec", lambda n: there.get(n, find))
    with pytest.raises(ImportError, match=f"clean_caption needs {package}: pip install ptattn.t2x"):
        pipeline(vae=vae(), clean_caption=True)


@pytest.mark.usefixtures("cleaning")
def test_sample_draws_with_a_pipeline_s_folder(parts, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made(parts, dtype=torch.float32).save_pretrained("pipeline")
    command = ["sample", "pipeline", "a red cat", "the dog", "--size", "32x48", "--steps", "2"]
    assert main([*command, "--count", "2", "--seed", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "sample.png"
    first = Image.open("sample.png").tobytes()
    assert main([*command, "--count", "2", "--seed", "2", "--out", "other"]) == 0
    assert Image.open("other.png").tobytes() != first
    assert main([*command[:3], *command[4:], "--seed", "1", "--out", "alone"]) == 0
    alone = torch.tensor(np.asarray(Image.open("alone.png")))
    several = torch.tensor(np.asarray(Image.open("sample.png")))
    assert torch.equal(alone[:100, :140], several[:100, :140])  # whatever is drawn beside it


@pytest.mark.usefixtures("cleaning")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "60x64"], "height and width must be multiples of 16; got 60, 64"),
        (["--size", "64"], None),
        (["--size", "0x64"], "--size: expected positive integers"),
        (["--graph"], "argument --graph: needs a CUDA GPU"),
    ],
)
def test_misuse_of_sample_is_named(parts, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    made(parts, dtype=torch.float32).save_pretrained("pipeline")
    try:
        code = main(["sample", "pipeline", "a cat", "--steps", "1", *arguments])
    except SystemExit as error:
        code = error.code
    assert code == (0 if message is None else 2)
    assert (message or "") in capsys.readouterr().err


def test_a_size_is_for_pipelines(tmp_path, capsys):
    assert main(["sample", str(tmp_path), "a cat", "--size", "64x64"]) == 2
    assert "argument --size: " in capsys.readouterr().err
