"""State dicts as they are found: what training scripts, wrappers and diffusers leave on a disk."""

import argparse
import copy
from pathlib import Path
from pickle import UnpicklingError

import pytest
import torch

from ptattn import checkpoint, files
from tests.test_checkpoint import Malicious, assert_same, tiny
from tests.test_golden import FILES, read


@pytest.fixture
def official():
    _, weights, config = read(FILES[0])
    return weights, config


# Files of training scripts.

ARGS = argparse.Namespace(lr=1e-4, betas=[0.9, 0.95], config={"depth": 2})


def prefixed(weights, prefix):
    return {prefix + name: tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ("around", "key"),
    [
        (lambda w: {"state_dict": w, "epoch": 3, "global_step": torch.tensor(7)}, None),
        (lambda w: {"model": w, "args": ARGS, "opt": {"state": {0: w}, "param_groups": []}}, None),
        (lambda w: {"model": {}, "ema": w, "args": ARGS}, None),
        (lambda w: {"model": {"x": torch.zeros(1)}, "ema": w, "args": ARGS}, "ema"),
        (lambda w: {"state_dict": prefixed(w, "module.")}, None),
        (lambda w: prefixed(w, "_orig_mod."), None),
        (lambda w: prefixed(w, "model.module._orig_mod."), None),
        (lambda w: {"n_averaged": torch.tensor(9), **prefixed(w, "module.")}, None),
        (lambda w: {n.replace("blocks.0.", "blocks.0._orig_mod."): t for n, t in w.items()}, None),
    ],
    ids=[
        "state_dict",
        "args",
        "one-of-two",
        "key",
        "module",
        "compiled",
        "nested",
        "averaged",
        "block",
    ],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["", "old"])
def test_a_training_script_s_file(official, tmp_path, around, key, zipped):
    weights, config = official
    content, path = around(weights), tmp_path / "last.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    for model in (
        checkpoint.load_official(path, config, key=key),
        checkpoint.from_official(content, config, key=key),
    ):
        back = checkpoint.to_official(model)
        assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize(
    ("around", "key", "message"),
    [
        (
            lambda w: {"model": w, "ema": w},
            None,
            "several sets of weights: give key, one of ema, m",
        ),
        (
            lambda w: {"model": w, "epoch": 3},
            "ema",
            r"at key 'ema'; .* of epoch \(int\), model \(dict\)",
        ),
        (lambda w: {"epoch": 3, "args": ARGS}, None, r"of args \(Namespace\), epoch \(int\)$"),
        (lambda w: {**w, "epoch": 3}, None, r"dictionary of tensors; got .* of epoch \(int\)$"),
        (lambda w: {}, None, "got a dictionary of nothing"),
        (
            lambda w: {"model": w, "out": Path("runs")},
            None,
            "holds pathlib.PosixPath, which is not l",
        ),
    ],
    ids=["several", "no-such-key", "no-weights", "beside", "empty", "class"],
)
def test_a_file_that_leaves_a_question(official, tmp_path, around, key, message):
    weights, config = official
    path = tmp_path / "last.pt"
    torch.save(around(weights), path)
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.load_official(path, config, key=key)
    assert str(error.value).startswith(str(path))
    assert len(str(error.value)) < 400


def test_arguments_run_no_code(official, tmp_path, capsys):
    path = tmp_path / "last.pt"
    torch.save({"model": official[0], "args": argparse.Namespace(out=Malicious())}, path)
    with pytest.raises(ValueError, match=r"holds builtins\.print, which is not loaded"):
        checkpoint.load_official(path, official[1])
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("zipped", [True, False], ids=["", "old"])
def test_a_byte_that_is_another(tmp_path, zipped, recwarn):
    """Pickles with one once raised KeyError, IndexError, AssertionError and more; and the search
    for classes in them an UnpicklingError of its own."""
    path = tmp_path / "weights.pt"
    torch.save({"weight": torch.zeros(1)}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    errors = []
    for at in range(min(len(content), 400)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x41]) + content[at + 1 :])
        try:
            files.read_tensors(path)
        except ValueError as error:
            errors.append(error)
    assert {type(error.__cause__) for error in errors} >= {UnpicklingError, KeyError}
    for message in map(str, errors):
        assert message.startswith(f"{path} ")
        assert "\n" not in message


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_git_lfs_pointer(official, tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ValueError, match=r"is a Git LFS pointer, .*: run `git lfs pull` there"):
        checkpoint.load_official(path, official[1])


# Folders of diffusers.


@pytest.fixture
def component():
    pytest.importorskip("diffusers")
    from ptattn.pipelines import PTDiTTransformer

    return PTDiTTransformer(**vars(tiny().config))


SHARDS = dict(max_shard_size="40KB")


@pytest.mark.parametrize(
    "options",
    [
        {},
        SHARDS,
        dict(variant="fp16"),
        dict(variant="fp16", **SHARDS),
        dict(safe_serialization=False),
        dict(safe_serialization=False, variant="ema", **SHARDS),
    ],
    ids=["plain", "shards", "variant", "variant-shards", "bin", "bin-variant-shards"],
)
def test_whatever_diffusers_writes(component, tmp_path, options):
    component.save_pretrained(tmp_path, **options)
    assert len(list(tmp_path.iterdir())) > (3 if SHARDS.items() <= options.items() else 1)
    assert_same(checkpoint.load_model(tmp_path), component)
    if "variant" in options:
        assert_same(checkpoint.load_model(tmp_path, variant=options["variant"]), component)


def test_the_index_of_a_variant_as_older_diffusers_named_it(component, tmp_path):
    component.save_pretrained(tmp_path, variant="fp16", **SHARDS)
    name = "diffusion_pytorch_model.safetensors{}.json"
    (tmp_path / name.format(".index.fp16")).rename(tmp_path / name.format(".fp16.index"))
    assert_same(checkpoint.load_model(tmp_path, variant="fp16"), component)


def test_one_variant_of_several(component, tmp_path):
    component.save_pretrained(tmp_path, variant="ema")
    half = copy.deepcopy(component).half()
    half.save_pretrained(tmp_path, variant="fp16", **SHARDS)
    assert_same(checkpoint.load_model(tmp_path, variant="ema"), component)
    assert_same(checkpoint.load_model(tmp_path, variant="fp16"), half)
    with pytest.raises(ValueError, match="holds variants: give variant, one of ema, fp16"):
        checkpoint.load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no weights \S+\.bf16\.safetensors; there are "):
        checkpoint.load_model(tmp_path, variant="bf16")
    plain = copy.deepcopy(component).double()
    plain.save_pretrained(tmp_path)
    assert_same(checkpoint.load_model(tmp_path), plain)


def test_shards_and_whole_weights_side_by_side(component, tmp_path):
    """Which of them are meant?"""
    component.save_pretrained(tmp_path, **SHARDS)
    with pytest.raises(
        ValueError, match=r"holds the shards of diffusion\S+index\.json: remove them"
    ):
        checkpoint.save_model(tiny(), tmp_path)
    component.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.safetensors and \S+index\.json: remove the one"):
        checkpoint.load_model(tmp_path)


def test_a_missing_shard(component, tmp_path):
    component.save_pretrained(tmp_path, **SHARDS)
    next(tmp_path.glob("*-00002-of-*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file at .*-00002-of-"):
        checkpoint.load_model(tmp_path)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "a/b.safetensors", "/b.bin", 5, None, []]
)
def test_an_index_names_files_beside_it(tmp_path, name):
    """Files elsewhere on the disk were read."""
    checkpoint.save_model(tiny(), tmp_path / "folder")
    path = tmp_path / "folder" / checkpoint.WEIGHTS_FILE
    path.rename(tmp_path / "secret.safetensors")
    index = path.with_suffix(".safetensors.index.json")
    files.write_json({"weight_map": {"output.table": name}}, index)
    with pytest.raises(
        ValueError, match=r"index\.json: output\.table must be in a file beside it; "
    ):
        checkpoint.load_model(tmp_path / "folder")
