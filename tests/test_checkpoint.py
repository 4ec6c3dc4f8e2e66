"""Models on disk: what does not fit is refused, whole and by name; nothing is ever half written."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ptattn import checkpoint, files
from ptattn.models import create_model, get_config
from tests.test_golden import FILES, read


@pytest.fixture
def official():
    _, weights, config = read(FILES[0])
    return weights, config


def test_every_misfit_is_listed_in_one_error(official):
    weights, config = official
    del weights["proj_out.bias"]
    del weights["transformer_blocks.0.attn1.to_q.weight"]
    weights["surplus.weight"] = torch.zeros(1)
    weights["pos_embed.proj.bias"] = torch.zeros(7)
    with pytest.raises(ValueError, match="does not fit the configuration") as error:
        checkpoint.from_official(weights, config)
    message = str(error.value)
    assert "unknown: surplus.weight;" in message
    assert "missing: proj_out.bias, transformer_blocks.0.attn1.to_q.weight;" in message
    assert "misshapen: pos_embed.proj.bias (got (7,), expected (48,))" in message


def test_the_same_tensor_of_several_blocks_is_listed_once():
    with torch.device("meta"):
        weights = checkpoint.to_official(create_model("qihoo-t2i", depth=4))
    config = checkpoint.official_config(get_config("qihoo-t2i"))
    for block, size in ((0, 3), (2, 3), (3, 5)):
        weights[f"transformer_blocks.{block}.linear_2.bias"] = torch.empty(size, device="meta")
    with pytest.raises(ValueError, match="does not fit") as error:
        checkpoint.from_official(weights, {**config, "num_layers": 5})
    message = str(error.value)
    name, shapes = "linear_2.bias", "expected (1152,))"
    assert f"transformer_blocks.[0,2].{name} (got (3,), {shapes}" in message
    assert f"transformer_blocks.3.{name} (got (5,), {shapes}" in message
    assert "missing: transformer_blocks.4.attn1.to_k.bias, transformer_blocks.4.attn1" in message
    with pytest.raises(
        ValueError, match=r"unknown: transformer_blocks\.\[1-3\]\.attn1\.to_k\.bias"
    ):
        checkpoint.from_official(weights, {**config, "num_layers": 1})


def test_a_few_of_many_misfits_are_shown(official):
    """A file of another model once filled the screen."""
    weights, config = official
    weights = {f"other.{name}": tensor for name, tensor in list(weights.items())[:20]}
    weights["more"] = torch.zeros(1)
    with pytest.raises(
        ValueError, match=r"unknown: more, other\.\S+, \S+, \S+ and \d+ more; "
    ) as error:
        checkpoint.from_official(weights, config)
    assert len(str(error.value)) < 700


def test_config_keys_are_checked(official):
    weights, config = official
    config = {**config, "rope": True}
    del config["num_layers"]
    with pytest.raises(ValueError, match="config does not fit: unknown: rope; missing: num_layers"):
        checkpoint.from_official(weights, config)


def test_the_release_names_windows_otherwise_and_states_its_architecture(official):
    weights, config = official
    predictor = {"model_id": "ptdit", "norm_eps": 1e-06, "frame": 1, "dtype": "bf16", **config}
    for ours, theirs in (("window", "compress_ratios"), ("proxy_window", "proxy_compress_ratios")):
        predictor[theirs] = predictor.pop(ours)
    model = checkpoint.from_official(weights, predictor)
    assert tuple(model.config.window) == tuple(config["window"])
    with pytest.raises(ValueError, match=r"unsupported: norm_eps \(got 0.1, expected 1e-06\)$"):
        checkpoint.from_official(weights, {**predictor, "norm_eps": 0.1})


def test_mixed_dtypes_are_refused(official):
    weights, config = official
    weights["proj_out.bias"] = weights["proj_out.bias"].half()
    with pytest.raises(ValueError, match=r"one dtype and device; got torch.float16 on cpu, torch"):
        checkpoint.from_official(weights, config)


def test_the_model_owns_its_weights_in_their_dtype(official):
    weights, config = official
    weights = {name: tensor.bfloat16() for name, tensor in weights.items()}
    before = {name: tensor.clone() for name, tensor in weights.items()}
    model = checkpoint.from_official(weights, config)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(weights[name], before[name]) for name in weights)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_files_load(official, tmp_path, suffix):
    weights, config = official
    first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
    save_file(weights, first) if suffix == ".safetensors" else torch.save(weights, first)
    checkpoint.save_official(checkpoint.load_official(first, config), second)
    back = checkpoint.to_official(checkpoint.load_official(second, config))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


@pytest.mark.parametrize("keep", [0, 5, 100, 300_000], ids=lambda n: f"{n}bytes")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_truncated_files_are_refused_by_name(official, tmp_path, suffix, keep):
    weights, config = official
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    save_file(weights, whole) if suffix == ".safetensors" else torch.save(weights, whole)
    cut.write_bytes(whole.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cut\.\w+ is not a whole"):
        checkpoint.load_official(cut, config)


class Malicious:
    def __reduce__(self):
        return (print, ("code from a checkpoint ran",))


def test_a_pickle_cannot_run_code(official, tmp_path, capsys):
    path = tmp_path / "weights.pt"
    torch.save({"weight": Malicious()}, path)
    with pytest.raises(ValueError, match="not a whole file of plain tensors"):
        checkpoint.load_official(path, official[1])
    assert "ran" not in capsys.readouterr().out


def test_a_pickle_of_something_else_is_refused(official, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save([torch.zeros(1)], path)
    with pytest.raises(ValueError, match="must hold a dictionary of tensors; got list"):
        checkpoint.load_official(path, official[1])


def test_other_endings_and_missing_files(official, tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.safetensors, \.pt"):
        checkpoint.load_official(tmp_path / "weights.onnx", official[1])
    with pytest.raises(FileNotFoundError, match="no checkpoint file at"):
        checkpoint.load_official(tmp_path / "weights.pt", official[1])


def test_class_models_have_no_released_layout():
    with pytest.raises(ValueError, match="text models"):
        checkpoint.to_official(create_model("pt-dit-s-class", depth=1))


MODELS = {
    "pt-dit-s-class": dict(window=(2, 4), num_classes=3),
    "pt-dit-b": dict(window=None, proxy_window=(1, 2, 2), caption_channels=24, out_channels=4),
    "dit-s": dict(num_classes=3),
    "pixart-alpha": dict(caption_channels=24),
}


@pytest.fixture(params=MODELS)
def model(request):
    return create_model(request.param, depth=1, dim=32, num_heads=2, **MODELS[request.param])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_folder_holds_every_kind_of_model(model, tmp_path, dtype):
    model = model.to(dtype)
    folder = tmp_path / "deep" / "folder"
    checkpoint.save_model(model, folder)
    back = checkpoint.load_model(folder, backend="reference")
    assert type(back) is type(model)
    assert back.config == model.config
    states = back.state_dict(), model.state_dict()
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in back.parameters())
    assert {m.backend for m in back.modules() if hasattr(m, "backend")} == {"reference"}
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1  # whoever may read the configuration may read the weights
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }


@pytest.fixture
def folder(tmp_path):
    checkpoint.save_model(tiny(), tmp_path)
    return tmp_path


def test_weights_of_another_configuration_are_refused(folder):
    path = folder / checkpoint.CONFIG_FILE
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "depth": 2, "caption_channels": 12}))
    with pytest.raises(ValueError, match="does not fit the configuration") as error:
        checkpoint.load_model(folder)
    message = str(error.value)
    assert message.startswith(str(folder / checkpoint.WEIGHTS_FILE))
    assert "missing: blocks.1.global_interaction.cross_attn.kv.bias, " in message
    assert "misshapen: condition.caption.0.weight (got (32, 24), expected (32, 12))" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope": True}, "config.json does not fit: unknown: rope$"),
        ({"_class_name": "UNet"}, "_class_name must be PTDiT, DiT, PixArt; got 'UNet'"),
        ({"_class_name": None}, "got None"),
        ({"_class_name": ["PTDiT"]}, r"got \['PTDiT'\]"),
        ({"window": 5}, r"config\.json: window must be 2 or 3 integers >= 1; got 5"),
        ({"window": [2, "a", 2]}, r"got \(2, 'a', 2\)"),
        ({"proxy_window": [0, 2]}, "proxy_window must be 2 or 3 integers >= 1"),
        ({"dim": 33}, r"config\.json: dim must be a multiple of 16 and of num_heads; got 33, 2"),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_is_named(folder, change, message):
    path = folder / checkpoint.CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        checkpoint.load_model(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"_class_name": "PTDiT"}', "missing: depth, dim, num_heads"),
        (b"[1]", "must hold a JSON object; got list"),
        (b'{"depth": ', "is not JSON: Expecting value"),
        (b"\xff", "is not JSON: 'utf-8'"),
    ],
    ids=["empty", "list", "cut", "bytes"],
)
def test_a_configuration_that_is_none_is_named(folder, content, message):
    (folder / checkpoint.CONFIG_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        checkpoint.load_model(folder)


@pytest.mark.parametrize("name", [checkpoint.CONFIG_FILE, checkpoint.WEIGHTS_FILE])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        checkpoint.load_model(folder)


def test_other_modules_have_no_folder(tmp_path):
    with pytest.raises(TypeError, match=r"model must be a PTDiT, DiT, PixArt; got Linear$"):
        checkpoint.save_model(torch.nn.Linear(1, 1), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


# What is saved can be loaded.


def tiny():
    return create_model("pt-dit-b", depth=1, dim=32, num_heads=2, caption_channels=24)


@pytest.fixture
def small():
    return tiny()


def assert_same(model, other):
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_mixed_dtypes_come_back(small, tmp_path):
    """`load_model` once refused what `save_model` had written."""
    small.bfloat16().output.float()
    checkpoint.save_model(small, tmp_path)
    assert_same(checkpoint.load_model(tmp_path), small)
    with pytest.raises(ValueError, match="model must have one dtype and device"):
        checkpoint.save_official(small, tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("wrapper", "where"),
    [(torch.compile, "_orig_mod"), (AveragedModel, "module"), (nn.DataParallel, "module")],
    ids=["compiled", "averaged", "parallel"],
)
def test_a_model_within_a_wrapper(small, tmp_path, wrapper, where):
    with pytest.raises(TypeError, match=rf"which holds a PTDiT: give its \.{where}$"):
        checkpoint.save_model(wrapper(small), tmp_path / "folder")
    checkpoint.save_model(getattr(wrapper(small), where), tmp_path)
    assert_same(checkpoint.load_model(tmp_path), small)


def test_adapters_are_merged_first(small, tmp_path):
    """What was written with them could not be read."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(small, peft.LoraConfig(r=2, target_modules=["qkv"]))
    with pytest.raises(TypeError, match=r"got PeftModel, .*: give its \.base_model\.model"):
        checkpoint.save_model(adapted, tmp_path / "folder")
    with pytest.raises(ValueError, match=r"merge adapters, .* unknown: blocks\.0\.\S+base_layer"):
        checkpoint.save_model(small, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    checkpoint.save_model(adapted.merge_and_unload(), tmp_path)
    assert_same(checkpoint.load_model(tmp_path), small)


def test_quantized_weights_are_not_saved(small, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(small, quantization.Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"plain tensors, not quantized or sharded ones: got: blo"):
        checkpoint.save_model(small, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


# Files are written whole or not at all.


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write():
        with files.replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_full_disk_leaves_the_old_file(tmp_path, suffix):
    resource = pytest.importorskip("resource")
    path = tmp_path / f"weights{suffix}"
    files.write_tensors({"old": torch.ones(3)}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot write "):
            files.write_tensors({"new": torch.ones(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files.read_tensors(path).keys() == {"old"}
    assert list(tmp_path.iterdir()) == [path]
