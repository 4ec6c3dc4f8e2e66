"""The released PT-DiT's own outputs and gradients, on small random models."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ptattn import checkpoint

FILES = sorted((Path(__file__).parent / "golden").glob("*.safetensors"))


def read(path):
    """The file's tensors, its released state dict and its configuration."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    weights = {
        k.removeprefix("weights."): t for k, t in tensors.items() if k.startswith("weights.")
    }
    return tensors, weights, config


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_the_golden_files_are_there():
    assert len(FILES) == 4


# The interpreter takes 10 to 40 s for a file; in tests/kernels it is held to the reference.
CASES = [
    pytest.param(path, backend, id=f"{path.stem}-{backend}", marks=marks)
    for path in FILES
    for backend, marks in (
        ("reference", ()),
        ("sdpa", ()),
        ("triton", pytest.mark.long),
    )
]


@pytest.mark.parametrize(("path", "backend"), CASES)
def test_matches_the_release(path, backend):
    golden, weights, config = read(path)
    model = checkpoint.from_official(weights, config, backend=backend)
    latents = golden["latents"].requires_grad_()
    caption, mask = golden["caption"][:, 0], golden["caption_mask"].bool()

    output = model(latents, golden["timestep"], caption, mask)
    assert relative_error(output, golden["output"]) <= 1e-5

    (output * golden["output_probe"]).sum().backward()
    assert relative_error(latents.grad, golden["grad.latents"]) <= 1e-4
    for parameter in model.parameters():
        parameter.data = parameter.grad  # so that to_official renames the gradients
    gradients = checkpoint.to_official(model)
    checked = [key for key in golden if key.startswith("grad.transformer_blocks")]
    assert len(checked) == 6
    for key in checked:
        error = relative_error(gradients[key.removeprefix("grad.")], golden[key])
        assert error <= 1e-4, f"{key}: {error:.1e}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_checkpoint_round_trip_is_exact(path):
    _, weights, config = read(path)
    model = checkpoint.from_official(weights, config)
    back = checkpoint.to_official(model)
    assert back.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(back[name], tensor), name
