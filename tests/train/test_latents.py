"""Training in latent space: a folder encoded once, latents as data, pictures decoded."""

import json

import pytest
import torch
from PIL import Image

pytest.importorskip("accelerate")
# First, as they skip this module where something is missing.
from tests.support.components import image_vae  # isort: skip
from tests.support.data import picture  # isort: skip

from ptattn import files
from ptattn.cli import main
from ptattn.pipelines import CausalVAE, encode
from ptattn.train import config as configs
from ptattn.train import data
from ptattn.train.data.stream import LATENT, generator
from ptattn.train.encode import encode as encode_folder
from ptattn.train.encode import load_vae

COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.fixture
def pictures(tmp_path):
    """By class, three of two colours; the VAE halves their sides."""
    for i, (name, color) in enumerate([*COLORS.items(), ("red", (200, 0, 0))]):
        picture(tmp_path / "pictures" / name / f"{i}.png", color=color)
    (tmp_path / "pictures" / "red" / "broken.png").write_bytes(b"no picture")
    image_vae().save_pretrained(tmp_path / "vae")
    return tmp_path


def run_config(path, conditions, size=(4, 6), frames=1, **changes):
    fields = dict(depth=1, dim=16, num_heads=1, in_channels=4, out_channels=4)
    content = {
        "data": dict(source="latents", folder="latents", size=list(size), frames=frames),
        "model": fields | conditions,
        **dict(steps=2, batch_size=2, save_every=2, sample_every=2),
        "samples": dict(count=2, steps=2),
    }
    path.write_text(json.dumps(content | changes))
    return content | changes


CLASSES = dict(num_classes=2, caption_channels=None)


def test_a_folder_is_encoded_trained_on_and_drawn(pictures, capsys):
    command = ["encode", "pictures", "latents", "--vae", "vae", "--size", "8x12"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "skipped pictures/red/broken.png: cannot identify" in shown
    assert shown.splitlines()[-1] == "latents: 3 examples of latents (4, 4, 6)"

    found = data.load(configs.parse(run_config(pictures / "run.json", CLASSES)))
    assert (len(found), list(found.classes), found.conditions) == (3, ["blue", "red"], [0, 1, 1])
    vae = image_vae()
    vae.load_state_dict(files.read_tensors(pictures / "vae/diffusion_pytorch_model.safetensors"))
    pixels = (
        torch.tensor([0.0, 0.0, 255.0]).view(1, 3, 1, 1, 1).expand(-1, -1, 1, 8, 12) / 127.5 - 1
    )
    with torch.no_grad():
        expected = encode(vae, pixels, generator(0, LATENT, 0))[0, :, 0]
    torch.testing.assert_close(found.pixels(0), expected)

    assert main(["train", "run.json", "--out", "run"]) == 0
    assert Image.open("run/samples/step-0000002.png").width > 2 * 96
    assert main(["sample", "run", "blue", "red"]) == 0
    assert main([*command[:2], "again", *command[3:]]) == 0
    for name in ("blue/0000000", "red/0000002"):
        first, again = (
            files.read_tensors(pictures / folder / f"{name}.safetensors")["latents"]
            for folder in ("latents", "again")
        )
        assert torch.equal(first, again)


def test_captions_stay_with_their_latents(pictures):
    lines = [("red/0.png", "a red square"), ("red/0.png", "red"), ("blue/1.png", "ein Blauß")]
    listing = "\n".join(json.dumps(dict(file_name=n, text=t)) for n, t in lines)
    (pictures / "captions.jsonl").write_text(listing)
    command = ["encode", "pictures", "latents", "--vae", "vae", "--size", "8x12"]
    assert main([*command, "--captions", "captions.jsonl"]) == 0
    config = configs.parse(run_config(pictures / "run.json", dict(caption_channels=256)))
    assert data.load(config).conditions == ["ein Blauß", ["a red square", "red"]]


def test_videos_become_latents_of_videos(tmp_path, capsys):
    pytest.importorskip("av")
    frames = [Image.new("RGB", (16, 16), (40 * i, 0, 0)) for i in range(7)]
    (tmp_path / "clips" / "fading").mkdir(parents=True)
    frames[0].save("clips/fading/a.gif", save_all=True, append_images=frames[1:])
    CausalVAE((8, 8, 8, 8), 1, norm_num_groups=4).save_pretrained("vae")
    command = ["encode", "clips", "latents", "--vae", "vae", "--size", "16", "--frames"]
    assert main([*command, "5"]) == 0
    assert "2 examples of latents (4, 2, 2, 2)" in capsys.readouterr().out
    run_config(tmp_path / "run.json", CLASSES | dict(num_classes=1), size=(2, 2), frames=2)
    assert main(["train", "run.json", "--out", "run"]) == 0
    with Image.open("run/samples/step-0000002.gif") as drawn:
        assert drawn.n_frames == 5
    assert main([*command[:2], "other", *command[3:], "4"]) == 2
    assert "frames must be 1 more than a multiple of 4; got 4" in capsys.readouterr().err


def test_latents_that_do_not_fit_are_named(pictures, capsys):
    assert main(["encode", "pictures", "latents", "--vae", "vae", "--size", "8x12"]) == 0
    files.write_tensors({"latents": torch.zeros(4, 3, 6)}, pictures / "latents/red/odd.safetensors")
    files.write_tensors({"other": torch.zeros(1)}, pictures / "latents/red/other.safetensors")
    config = configs.parse(run_config(pictures / "run.json", CLASSES))
    reasons = {path.name: reason for path, reason in data.load(config).skipped}
    assert reasons["odd.safetensors"].startswith(
        "must hold latents (4, 4, 6); got torch.float32 (4"
    )
    assert "got torch.float32 (0,)" in reasons["other.safetensors"]
    run_config(pictures / "run.json", CLASSES, size=(8, 8))
    assert main(["train", "run.json", "--out", "run"]) == 2
    assert "none of 5 files can be used" in capsys.readouterr().err


def test_latents_whose_pictures_could_not_be_decoded_are_named_before_a_step(pictures, capsys):
    """Such a run trained, saved and stopped at its first picture."""
    assert main(["encode", "pictures", "latents", "--vae", "vae", "--size", "8x12"]) == 0
    run_config(pictures / "run.json", CLASSES)
    about = pictures / "latents/.encoding.json"
    weights = pictures / "vae/diffusion_pytorch_model.safetensors"
    for break_it, message in (
        (weights.unlink, "Error no file named diffusion_pytorch_model"),
        (lambda: (pictures / "vae/config.json").unlink(), "holds no autoencoder: there is no con"),
        (lambda: about.write_text("{}"), "encoding.json: vae must be the folder of an autoencoder"),
        (about.unlink, "latents was not written by `ptattn encode`"),
    ):
        break_it()
        assert main(["train", "run.json", "--out", "run"]) == 2
        assert message in capsys.readouterr().err
        assert not (pictures / "run/model").exists()


@pytest.mark.parametrize("ours", [False, True])
def test_an_autoencoder_saved_in_bf16_runs_in_float32(tmp_path, ours):
    vae = CausalVAE((8, 8, 8, 8), 1, norm_num_groups=4) if ours else image_vae()
    vae.bfloat16().save_pretrained(tmp_path)
    assert {p.dtype for p in load_vae(tmp_path).parameters()} == {torch.float32}


def test_misuse_is_named_by_the_call_and_a_negative_seed_before_anything_is_read(pictures, capsys):
    with pytest.raises(ValueError, match="no holds no autoencoder"):
        encode_folder(pictures / "pictures", pictures / "out", pictures / "no", (8, 12))
    with pytest.raises(ValueError, match="seed must be 0 or more; got -1"):
        encode_folder(pictures / "no", pictures / "out", pictures / "no", (8, 12), seed=-1)
    command = ["encode", "no", "out", "--vae", "no", "--size", "8x12"]
    for arguments in (command, ["sample", "no", "red"]):
        with pytest.raises(SystemExit):
            main([*arguments, "--seed", "-1"])
        assert "argument --seed: expected 0 or a positive integer" in capsys.readouterr().err


def test_misuse_of_encode_is_named_and_nothing_is_written(pictures, capsys):
    (pictures / "empty").mkdir()
    before = sorted(pictures.rglob("*"))
    for folder, out, vae, size, message in (
        ("pictures", "vae", "vae", "8x12", "vae exists already"),
        ("pictures", "out", "no", "8x12", "no holds no autoencoder: there is no config.json"),
        (
            "pictures",
            "out",
            "vae",
            "8x11",
            r"size must be multiples of 2, as vae has it; got (8, 11)",
        ),
        ("empty", "out", "vae", "8x12", "data.folder empty holds no images"),
        ("nothing", "out", "vae", "8x12", "data.folder is no folder: nothing"),
    ):
        assert main(["encode", folder, out, "--vae", vae, "--size", size]) == 2
        assert message in capsys.readouterr().err
    (pictures / "odd").mkdir()
    (pictures / "odd" / "config.json").write_text('{"_class_name": "Linear"}')
    assert main(["encode", "pictures", "out", "--vae", "odd", "--size", "8x12"]) == 2
    assert "_class_name must be of an autoencoder; got 'Linear'" in capsys.readouterr().err
    assert set(pictures.rglob("*")) - set(before) == {
        pictures / "odd",
        pictures / "odd/config.json",
    }


def test_pixels_still_have_one_or_three_channels():
    fields = dict(depth=1, dim=16, num_heads=1, in_channels=4, out_channels=4, **CLASSES)
    with pytest.raises(ValueError, match=r"model.in_channels must be 1 .*; got 4"):
        configs.parse(
            dict(data=dict(source="images", size=[4, 4]), model=fields, steps=1, batch_size=1)
        )
