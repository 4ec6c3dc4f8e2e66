"""Splits where they are used: training, sampling, the pipeline."""

import dataclasses
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ptattn.parallel import split_tokens

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("tensorboard")
from ptattn.train import config as configs

ROOT = Path(__file__).resolve().parents[2]
CLIPS = {
    "data": {"source": "tests.parallel.test_use:videos", "size": [16, 24], "frames": 4},
    "model": {
        "depth": 2, "dim": 32, "num_heads": 2, "patch_size": 2, "window": [2, 2, 2],
        "in_channels": 3, "out_channels": 6, "caption_channels": 256,
    },
    "steps": 3,
    "batch_size": 2,
    "learning_rate": 1e-2,
    "save_every": 3,
    "sample_every": 100,
    "samples": {"count": 1, "steps": 2},
}  # fmt: skip


def videos(config):
    """Noise under captions: nothing is read or decoded."""
    from ptattn.train.data import Dataset

    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (8, *config.shape), dtype=torch.uint8, generator=random)
    return Dataset([f"video {i}" for i in range(8)], lambda i: pixels[i])


TRAIN = """
import json, sys
import torch
from tests.parallel import test_use
torch.set_num_threads(1)
print(json.dumps(test_use.train(json.loads(sys.argv[1]), sys.argv[2])))
"""


def train(raw, folder):
    """The losses of a run."""
    from ptattn.train import loop

    return [record.loss for record in loop.train(configs.parse(raw), folder)]


def train_together(mesh, raw, folder):
    """The losses, and whether the model that drew the pictures was split."""
    from ptattn.train import loop

    whole, drawn = loop.sample, []

    def sample(model, *args, **options):
        drawn.append(model.token_split)
        return whole(model, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "sample", sample)
        for name, value in world(mesh.size(), mesh.get_rank(), port=0).items():
            patch.setenv(name, value)
        found = train(raw, folder)
    return found, [split is not None for split in drawn]


def world(number, rank, port):
    """What torchrun says to each of its processes."""
    own, size = str(rank), str(number)
    return dict(
        RANK=own, LOCAL_RANK=own, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), ACCELERATE_USE_CPU="true",
    )  # fmt: skip


def launched(number, *command):
    """What the first of so many processes prints last; each as torchrun would start it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [world(number, i, port) for i in range(number)]
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
            stderr=subprocess.PIPE,
            env={**os.environ, **(own if number > 1 else {})},
        )
        for own in ranks
    ]  # fmt: skip
    done = [process.communicate(timeout=300) for process in processes]
    for process, (_, error) in zip(processes, done, strict=True):
        assert process.returncode == 0, error
    return done[0][0].strip().splitlines()[-1]


def losses(folder, number, **changes):
    raw = {**CLIPS, **changes}
    return json.loads(launched(number, "-c", TRAIN, json.dumps(raw), folder))


def picture(folder):
    """The last of a run, as it wrote it for tensorboard."""
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    encoded = events.Images("samples")[-1].encoded_image_string
    return torch.from_numpy(np.array(Image.open(io.BytesIO(encoded)))).int()


def test_training_on_two_processes_that_share_every_video(two, tmp_path):
    """The losses and the pictures of one process."""
    alone = train(CLIPS, tmp_path / "alone")
    assert len(alone) == 3
    raw = {**CLIPS, "token_ranks": 2}
    for together, split in two.all(train_together, raw, tmp_path / "together"):
        assert together == pytest.approx(alone, rel=1e-5)
        assert split == [True]
    whole, split = (picture(tmp_path / name) for name in ("alone", "together"))
    assert whole.float().std() > 1
    torch.testing.assert_close(split, whole, atol=1, rtol=0)  # of 255: both are rounded


@pytest.mark.long
def test_a_run_goes_on_with_another_split(tmp_path):
    alone = losses(tmp_path / "alone", 1, steps=9)
    changing = [
        *losses(tmp_path / "changing", 1, steps=3),
        *losses(tmp_path / "changing", 3, steps=6, token_ranks=3),
        *losses(tmp_path / "changing", 4, steps=9, token_ranks=2),  # and two of the data
    ]
    assert changing == pytest.approx(alone, rel=1e-4)


@pytest.mark.long
def test_sampling_on_two_processes(tmp_path):
    """Two processes draw the same picture as one."""
    losses(tmp_path / "run", 1)
    files = []
    for number in (1, 2):
        out = tmp_path / str(number)
        command = ("-m", "ptattn", "sample", tmp_path / "run", "a disc", "--out", out)
        files.append(launched(number, *command))
    assert Path(files[0]).read_bytes() == Path(files[1]).read_bytes()


def draw(mesh):
    """A picture by the pipeline, before and after its transformer is split."""
    from tests.support import components

    torch.manual_seed(0)
    pipe = components.pipeline()
    options = dict(height=32, width=48, num_inference_steps=2, output_type="pt")

    def image():
        return pipe("a red cat", generator=components.seeded(0), max_sequence_length=8, **options)

    whole = image().images
    split_tokens(pipe.transformer, mesh)
    return whole, image().images


@pytest.mark.long
def test_the_pipeline_on_two_processes(two):
    for whole, split in two.all(draw):
        torch.testing.assert_close(split, whole)


class Pipeline:
    """One of which it is written down where its components are put."""

    transformer = "on the CPU"

    def to(self, device):
        self.transformer = f"on {device}"
        return self

    def enable_model_cpu_offload(self):
        self.transformer = "offloaded"

    def __call__(self, prompt, **options):
        return SimpleNamespace(images=torch.zeros(1, 3, 2, 2))


@pytest.mark.parametrize("split", [False, True])
def test_a_pipeline_is_offloaded_unless_it_is_split(monkeypatch, split):
    """What is split by a mesh of GPUs must be on one."""
    from ptattn.train import pipelines

    pipe, given = Pipeline(), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(pipelines.PTDiTPipeline, "from_pretrained", lambda *_, **__: pipe)
    monkeypatch.setattr(pipelines, "split_tokens", lambda model, mesh: given.append(model))
    mesh = SimpleNamespace(device_type="cuda") if split else None
    pipelines.draw("", ["a cat"], (2, 2), False, mesh, seed=0)
    assert given == (["on cuda"] if split else [])
    assert pipe.transformer == ("on cuda" if split else "offloaded")


def test_processes_that_token_ranks_do_not_divide(tmp_path):
    from ptattn.train import loop

    config = configs.parse({**CLIPS, "token_ranks": 2})
    with pytest.raises(ValueError, match="token_ranks must divide the number of processes, 1"):
        loop.train(config, tmp_path)


def test_token_ranks_that_a_run_cannot_have():
    with pytest.raises(ValueError, match=r"token_ranks: 7 ranks cannot share a grid of \(4, 8, 12"):
        configs.parse({**CLIPS, "token_ranks": 7})
    model = {**CLIPS["model"], "caption_channels": None, "num_classes": 2}
    data = {**CLIPS["data"], "frames": 1}
    with pytest.raises(ValueError, match="token_ranks must be 1 for dit"):
        configs.parse({**CLIPS, "data": data, "model": model, "architecture": "dit",
                       "token_ranks": 2})  # fmt: skip


def test_another_number_of_ranks_is_no_other_run():
    one = configs.parse(CLIPS)
    assert configs.differences(one, dataclasses.replace(one, token_ranks=2)) == []
