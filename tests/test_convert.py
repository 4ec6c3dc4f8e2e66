"""`ptattn convert`: the released weights to a folder and back, at full size and bit for bit."""

import argparse
import json

import pytest
import torch
from safetensors.torch import save_file

from ptattn import checkpoint, convert, files
from ptattn.command_line import UsageError
from ptattn.models import create_model
from tests.test_golden import FILES, read


def run(*arguments):
    parser = argparse.ArgumentParser()
    convert.add_parser(parser.add_subparsers(dest="command"))
    options = parser.parse_args(["convert", *map(str, arguments)])
    return options.run(options, "ptattn convert")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_there_and_back(path, suffix, tmp_path, capsys):
    golden, weights, config = read(path)
    first, folder = tmp_path / "first.safetensors", tmp_path / "folder"
    second = tmp_path / "deep" / f"second{suffix}"
    save_file(weights, first)
    first.with_suffix(".json").write_text(json.dumps(config))

    assert run(first, folder) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{folder}: PTDiT of {config['num_layers']} blocks, ")
    assert f"window {tuple(config['window'])}" in shown
    model = checkpoint.load_model(folder)
    output = model(
        golden["latents"],
        golden["timestep"],
        golden["caption"][:, 0],
        golden["caption_mask"].bool(),
    )
    error = (output - golden["output"]).norm() / golden["output"].norm()
    assert error <= 1e-5

    assert run(folder, second) == 0
    back = files.read_tensors(second)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())
    assert run(second, tmp_path / "again") == 0  # with the configuration that was written beside it
    assert checkpoint.load_model(tmp_path / "again").config == model.config


CONFIG = {  # of the release's inference configuration, its "predictor"
    **dict(model_id="ptdit", num_heads=16, head_dim=72, in_channels=4, out_channels=8),
    **dict(num_layers=28, sample_size=32, frame=1, patch_size=2, caption_channels=4096),
    **dict(compress_ratios=[1, 8, 8], proxy_compress_ratios=[1, 8, 8], shift_window=True),
}


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The tensors of a file of the released model's shapes, on the meta device.

    The file is 2.3 GB of nothing, which take no space on the disk and none in memory.
    """
    with torch.device("meta"):
        weights = checkpoint.to_official(create_model("qihoo-t2i"))
    header, end = {}, 0
    for name, tensor in weights.items():
        begin, end = end, end + 2 * tensor.numel()
        header[name] = dict(dtype="BF16", shape=[*tensor.shape], data_offsets=[begin, end])
    text = json.dumps(header).encode()
    path = tmp_path_factory.mktemp("released") / "released.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    assert path.stat().st_size > 2.2e9
    return {name: tensor.to("meta") for name, tensor in files.read_tensors(path).items()}


def test_every_tensor_of_the_full_size_finds_its_place(released):
    model = checkpoint.from_official(released, CONFIG)
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_131_629_216
    back = checkpoint.to_official(model)
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in released.items()}


def test_every_mismatch_of_the_full_size_is_listed(released):
    weights = dict(released)
    del weights["proj_out.bias"]
    for block in range(28):
        weights[f"transformer_blocks.{block}.attn1.to_q.weight"] = torch.empty(9, 1, device="meta")
        del weights[f"transformer_blocks.{block}.attn3.to_out.0.bias"]
    weights["ema_step"] = torch.empty(1, device="meta")
    with pytest.raises(ValueError, match="does not fit") as error:
        checkpoint.from_official(weights, CONFIG)
    assert str(error.value) == (
        "state_dict does not fit the configuration: unknown: ema_step; "
        "missing: proj_out.bias, transformer_blocks.[0-27].attn3.to_out.0.bias; "
        "misshapen: transformer_blocks.[0-27].attn1.to_q.weight (got (9, 1), expected (1152, 1152))"
    )


@pytest.fixture
def small(tmp_path):
    """A released file and its configuration, in a file of another name."""
    _, weights, config = read(FILES[0])
    torch.save(weights, tmp_path / "weights.pt")
    path = tmp_path / "inference.json"
    path.write_text(json.dumps({"ae": {"model_id": "vae"}, "predictor": config}))
    return tmp_path


def test_the_release_s_inference_configuration_is_taken_as_it_is(small):
    assert run(small / "weights.pt", small / "folder", "--config", small / "inference.json") == 0
    assert checkpoint.load_model(small / "folder").config.depth > 0


def test_averaged_weights_of_a_training_script(small):
    weights = torch.load(small / "weights.pt")
    other = {name: tensor + 1 for name, tensor in weights.items()}
    torch.save({"model": other, "ema": weights, "epoch": 3}, small / "both.pt")
    config = ("--config", small / "inference.json")
    assert run(small / "both.pt", small / "folder", *config, "--key", "ema") == 0
    back = checkpoint.to_official(checkpoint.load_model(small / "folder"))
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())


def test_without_a_configuration_it_is_the_released_model_s(small):
    with pytest.raises(
        UsageError, match=r"weights.pt does not fit .* transformer_blocks\.\[\d+-27\]\.attn1"
    ):
        run(small / "weights.pt", small / "folder")


def test_misuse_is_named_and_nothing_is_written(small):
    weights, config = small / "weights.pt", small / "inference.json"
    (small / "taken").mkdir()
    (small / "taken" / "mine").write_text("mine")
    (small / "list.json").write_text('{"predictor": [1]}')
    corrupt = small / "corrupt.pt"
    corrupt.write_bytes(weights.read_bytes().replace(b"ctorch._utils", b"\x07torch._utils"))
    checkpoint.save_model(create_model("dit-s", depth=1), small / "dit")
    checkpoint.save_model(create_model("pt-dit-s-class", depth=1), small / "class")
    before = sorted(small.rglob("*"))
    for arguments, message in (
        ((small / "nothing.pt", small / "out"), "no checkpoint file at .*nothing.pt"),
        ((weights, small / "taken", "--config", config), "argument DST: .*taken exists already"),
        ((weights, weights, "--config", config), "argument DST: .*weights.pt exists already"),
        ((weights, small / "out", "--config", small / "no.json"), "No such file.*no.json"),
        ((weights, small / "out", "--config", weights), "weights.pt is not JSON"),
        ((weights, small / "out", "--config", small / "list.json"), "predictor must be an object"),
        ((config, small / "out"), r"path must end in \.safetensors, \.pt"),
        ((small / "dit", small / "out.pt"), "dit holds a DiT; the released model is a PTDiT"),
        ((small / "class", small / "out.pt"), "released layout is for text models"),
        ((small / "class", small / "list.pt"), r"list\.json exists already"),
        ((small / "class", small / "out.onnx"), r"path must end in \.safetensors, \.pt"),
        ((small / "taken", small / "out.pt"), r"No such file.*taken/config\.json"),
        ((small / "dit", small / "out.pt", "--config", config), "argument --config: .*has its own"),
        ((small / "dit", small / "out.pt", "--key", "ema"), "argument --key: .*has its own"),
        (
            (corrupt, small / "out"),
            r"^\S+corrupt\.pt is not a whole file .*: Unsupported operand 7$",
        ),
        ((weights, small / "out", "--config", config, "--key", "ema"), "tensors at key 'ema'; got"),
    ):
        with pytest.raises(UsageError, match=message):
            run(*arguments)
    assert sorted(small.rglob("*")) == before
