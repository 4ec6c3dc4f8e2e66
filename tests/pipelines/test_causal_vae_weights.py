"""`ptattn convert --vae`: Open-Sora-Plan's checkpoint in every form to a folder and back."""

import argparse
import json

import pytest
import torch
from safetensors.torch import save_file

# First, as it skips this module where diffusers is missing.
from tests.support.components import diffusers  # isort: skip

from ptattn import convert, files
from ptattn.command_line import UsageError
from ptattn.pipelines import CausalVAE
from ptattn.pipelines import causal_vae_weights as vae_weights

SMALL = dict(hidden_size=32, hidden_size_mult=[1, 1, 1, 1], num_res_blocks=1)


def run(*arguments):
    parser = argparse.ArgumentParser()
    convert.add_parser(parser.add_subparsers(dest="command"))
    options = parser.parse_args(["convert", "--vae", *map(str, arguments)])
    return options.run(options, "ptattn convert")


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    model = CausalVAE(block_out_channels=(32,) * 4, layers_per_block=1).bfloat16()
    return model.state_dict()


@pytest.fixture
def original(weights, tmp_path):
    """Open-Sora-Plan's folder, but for the checkpoint."""
    folder = tmp_path / "original"
    folder.mkdir()
    config = {"_class_name": "CausalVAEModel", "lr": 1e-5, "resolution": 256, **SMALL}
    config |= {"encoder_attention": "AttnBlock3DFix", "norm_type": "groupnorm"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def prefixed(weights):
    return {f"module.{name}": tensor for name, tensor in weights.items()}


def forms(weights):
    """What a published file may hold, each with other weights where the right ones are not."""
    other = {name: tensor + 1 for name, tensor in weights.items()}
    critic = {"dics_model": {"main.0.weight": torch.ones(2)}}
    return {
        "flat": weights,
        "wrapped": prefixed(weights),
        "model": {"model": weights, "epoch": 1},
        "state_dict": {"state_dict": weights, "optimizer_state": {"state": {}}},
        "gen_model": {"epoch": 3, "state_dict": {"gen_model": weights, **critic}},
        "no averages": {"state_dict": {"gen_model": prefixed(weights)}, "ema_state_dict": {}},
        "ema": {"state_dict": {"gen_model": other, **critic}, "ema_state_dict": prefixed(weights)},
    }


@pytest.mark.parametrize("form", forms({}))
def test_a_checkpoint_of_every_form_is_read(original, weights, form, tmp_path, capsys):
    torch.save(forms(weights)[form], original / "checkpoint.ckpt")
    assert run(original, tmp_path / "vae") == 0
    assert "CausalVAE of widths (32, 32, 32, 32): " in capsys.readouterr().out
    for read in (vae_weights.load, CausalVAE.from_pretrained):
        same = read(tmp_path / "vae").state_dict()
        assert same.keys() == weights.keys()
        assert all(torch.equal(same[name], tensor) for name, tensor in weights.items()), read


def test_a_key_picks_the_weights(original, weights, tmp_path):
    other = {name: tensor + 1 for name, tensor in weights.items()}
    torch.save(
        {"state_dict": {"gen_model": weights}, "ema_state_dict": other},
        original / "checkpoint.ckpt",
    )
    run(original / "checkpoint.ckpt", tmp_path / "vae", "--key", "state_dict.gen_model")
    found = vae_weights.load(tmp_path / "vae").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("ending", ["safetensors", "ckpt", "pt"])
def test_there_and_back(original, weights, ending, tmp_path):
    save_file(weights, original / "diffusion_pytorch_model.safetensors")
    run(original, tmp_path / "vae")
    back = tmp_path / "deep" / "back" / f"checkpoint.{ending}"
    assert run(tmp_path / "vae", back) == 0
    content = files.read(back)
    found = content if ending == "safetensors" else content["state_dict"]
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    written = json.loads(back.with_name("config.json").read_text())
    assert written["hidden_size"] == 32
    assert written["hidden_size_mult"] == [1, 1, 1, 1]
    assert written["decoder_attention"] == "AttnBlock3DFix"
    run(back.parent, tmp_path / "again")
    assert vae_weights.load(tmp_path / "again").config == vae_weights.load(tmp_path / "vae").config


def test_the_release_s_inference_configuration_is_taken(original, weights, tmp_path):
    path = tmp_path / "inference_model_image.json"
    ae = {"model_id": "casualvae", "encoder_attention": "AttnBlock3D", **SMALL}
    path.write_text(json.dumps({"ae": ae, "predictor": {}}))
    torch.save(weights, original / "checkpoint.ckpt")
    assert run(original / "checkpoint.ckpt", tmp_path / "vae", "--config", path) == 0


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A file of the published shapes: 957 MB of nothing, which take no space."""
    with torch.device("meta"):
        weights = CausalVAE().state_dict()
    header, end = {}, 0
    for name, tensor in weights.items():
        begin, end = end, end + 4 * tensor.numel()
        header[name] = dict(dtype="F32", shape=[*tensor.shape], data_offsets=[begin, end])
    text = json.dumps(header).encode()
    path = tmp_path_factory.mktemp("full") / "checkpoint.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    assert path.stat().st_size > 956e6
    return path


def test_every_tensor_of_the_full_size_finds_its_place(full):
    vae = vae_weights.load_original(full)  # without a configuration: the published sizes
    assert sum(parameter.numel() for parameter in vae.parameters()) == 239_189_991
    assert vae.config.scaling_factor == 0.18215


def test_what_does_not_fit_is_listed_once(full):
    tensors = files.read_tensors(full)
    del tensors["quant_conv.conv.bias"]
    tensors["encoder.conv_in.weight"] = torch.empty(9, 1)
    tensors["decoder.extra"] = torch.empty(1)
    with pytest.raises(ValueError, match="does not fit") as error:
        vae_weights._built({}, tensors, "config", "file")
    assert str(error.value) == (
        "file does not fit the autoencoder's configuration: unknown: decoder.extra; "
        "missing: quant_conv.conv.bias; misshapen: encoder.conv_in.weight "
        "(got (9, 1), expected (128, 3, 3, 3))"
    )


def test_misuse_is_named_and_nothing_is_written(original, weights, tmp_path):
    config = json.loads((original / "config.json").read_text())

    def beside(name, **changes):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(config | changes))
        return path

    ckpt = original / "checkpoint.ckpt"
    torch.save(weights, ckpt)
    mixed = beside("mixed", decoder_attention="AttnBlock3D")
    dropout = beside("dropout", dropout=0.1, embed_dim=8)
    wider = beside("wider", hidden_size=64)
    no_list = beside("no_list", hidden_size_mult=2)
    odd, text = beside("odd", hidden_size=100), beside("text", num_res_blocks="2")
    diffusers.AutoencoderKL(block_out_channels=(32,)).save_pretrained(tmp_path / "kl")
    torch.save({"state_dict": weights, "hyper": object}, tmp_path / "unsafe.ckpt")
    torch.save({"epoch": 1}, tmp_path / "empty.ckpt")
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out"
    for arguments, message in (
        ((ckpt, out, "--config", mixed), "another autoencoder: .*decoder_attention .got 'AttnB"),
        ((ckpt, out, "--config", dropout), r"dropout \(got 0.1, .*embed_dim \(got 8, expected z_"),
        ((ckpt, out, "--config", wider), r"does not fit .* misshapen: decoder.conv_in.conv.bias"),
        (
            (ckpt, out, "--config", no_list),
            "no_list.json: hidden_size_mult must be a list of 4; got 2",
        ),
        ((ckpt, out, "--config", odd), "odd.json: hidden_size times .* of 32, .* got 100 times"),
        (
            (ckpt, out, "--config", text),
            "text.json: num_res_blocks must be a positive int.* got '2'",
        ),
        ((ckpt, out, "--key", "ema"), "no weights at key 'ema'; it holds encoder.conv_in"),
        ((tmp_path, out), "must hold one checkpoint: .* got empty.ckpt, unsafe.ckpt"),
        ((tmp_path / "kl", out), "does not fit the autoencoder's configuration: unknown"),
        ((tmp_path / "unsafe.ckpt", out), "not loaded, as that can run code"),
        ((tmp_path / "empty.ckpt", out), "must hold a dictionary of tensors; got a dictionary of"),
        ((tmp_path / "no.ckpt", out), "no checkpoint file at .*no.ckpt"),
        ((ckpt, original), "argument DST: .*original exists already"),
    ):
        with pytest.raises(UsageError, match=message):
            run(*arguments)
    assert sorted(tmp_path.rglob("*")) == before


def test_misuse_on_the_way_back(weights, tmp_path):
    vae_weights.save(CausalVAE((8, 8, 8, 8), 1, norm_num_groups=8), tmp_path / "narrow")
    vae = tmp_path / "vae"
    vae_weights.save(CausalVAE((32,) * 4, 1), vae)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    for arguments, message in (
        ((tmp_path / "narrow", tmp_path / "a.ckpt"), "norms of 32 groups.* got norm_num_groups 8"),
        ((vae, tmp_path / "taken" / "a.ckpt"), "config.json exists already"),
        ((vae, tmp_path / "a.onnx"), r"path must end in \.safetensors, \.pt"),
        ((vae, tmp_path / "a.pt", "--key", "ema"), "argument --key: .*has its own"),
    ):
        with pytest.raises(UsageError, match=message):
            run(*arguments)
