"""Loading released weights: what does not fit is refused, whole and by name."""

import pytest
import torch
from safetensors.torch import save_file

from ptattn import checkpoint
from ptattn.models import create_model

from .test_golden import FILES, read


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


def test_config_keys_are_checked(official):
    weights, config = official
    config = {**config, "rope": True}
    del config["num_layers"]
    with pytest.raises(ValueError, match="config does not fit: unknown: rope; missing: num_layers"):
        checkpoint.from_official(weights, config)


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
    path = tmp_path / f"weights{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    back = checkpoint.to_official(checkpoint.load_official(path, config))
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
        checkpoint.load_official(tmp_path / "weights.ckpt", official[1])
    with pytest.raises(FileNotFoundError, match="no checkpoint file at"):
        checkpoint.load_official(tmp_path / "weights.pt", official[1])


def test_class_models_have_no_released_layout():
    with pytest.raises(ValueError, match="text models"):
        checkpoint.to_official(create_model("pt-dit-s-class", depth=1))
