"""Folders and files as cameras, systems and other programs leave them: used, or named."""

import os
import struct
import unicodedata

import pytest

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
PngImagePlugin = pytest.importorskip("PIL.PngImagePlugin")
data = pytest.importorskip("ptattn.train.data")
from tests.support.data import CLASSES, TEXT, make, picture  # noqa: E402


def by_caption(folder, *names, **settings):
    lines = [f'{{"file_name": "{name}", "text": "{i}"}}' for i, name in enumerate(names)]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return data.load(make(settings.pop("source", "images"), TEXT, folder=str(folder), **settings))


def by_class(folder, classes=1, **settings):
    model = {**CLASSES, "num_classes": classes}
    return data.load(make(settings.pop("source", "images"), model, folder=str(folder), **settings))


def skipped(found):
    return {path.name: reason for path, reason in found.skipped}


@pytest.fixture
def odd_suffixes(tmp_path):
    """The same picture in formats that Pillow reads, and files that hold none."""
    for name, format in (("a.jfif", "JPEG"), ("a.jpe", "JPEG"), ("a.AVIF", "AVIF"), ("a", "PNG")):
        picture(tmp_path / "x" / name, format=format)
    for name in ("notes.txt", "more.TXT", "phone.heic", "README"):
        (tmp_path / "x" / name).write_bytes(b"no picture")
    return tmp_path


def test_files_with_captions_are_tried_whatever_they_are_called(odd_suffixes):
    """They were neither used nor named."""
    names = ["a.jfif", "a.jpe", "a.AVIF", "a", "phone.heic", "."]
    found = by_caption(odd_suffixes, *(f"x/{name}" for name in names))
    assert sorted(found.conditions) == ["0", "1", "2", "3"]
    for i in range(4):
        assert found.pixels(i)[0].float().mean() > 240
    assert "cannot identify" in skipped(found)["phone.heic"]
    assert skipped(found)["x"] == "is no file"
    assert "left out for their suffix: 2 .txt, 1 without" in found.notes


def test_other_files_are_taken_by_the_suffixes_that_the_reader_knows(odd_suffixes):
    found = by_class(odd_suffixes)
    assert len(found) == 3
    assert list(found.notes) == ["left out for their suffix: 1 .heic, 2 .txt, 2 without"]
    for path in (odd_suffixes / "x").glob("a.*"):
        path.unlink()
    with pytest.raises(
        ValueError, match=r"holds no images; left out for their suffix: 1 .heic, 2 .txt, 2 without"
    ):
        by_class(odd_suffixes)


def exif(*entries, prefix=b"Exif\0\0"):
    """EXIF of entries (tag, type, number, value), and that the picture lies on its side."""
    entries = (*entries, (0x112, 3, 1, struct.pack("<H", 6)))
    head, behind = struct.pack("<H", len(entries)), b""
    for tag, kind, count, value in sorted(entries):
        if len(value) > 4:
            place = struct.pack("<I", 8 + 2 + 12 * len(entries) + 4 + len(behind))
            value, behind = place, behind + value
        head += struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")
    return prefix + b"II*\0" + struct.pack("<I", 8) + head + bytes(4) + behind


BROKEN_EXIF = {
    "width is a negative short": exif((0x100, 8, 1, struct.pack("<h", -5))),
    "maker is a rational": exif((0x10F, 5, 1, struct.pack("<II", 1, 2))),
    "resolution is -1/0": exif((0x11A, 10, 1, struct.pack("<ii", -1, 0))),
    "twice the prefix": exif(prefix=b"Exif\0\0Exif\0\0"),
    "whole": exif(),
}


@pytest.mark.parametrize("case", BROKEN_EXIF)
def test_photos_with_broken_exif_stand_upright(tmp_path, case):
    """ImageOps.exif_transpose failed as it wrote EXIF anew, and ended the run."""
    lying = Image.new("RGB", (40, 20), "blue")
    lying.paste("red", (0, 0, 20, 20))  # its left half comes to the top
    (tmp_path / "x").mkdir()
    lying.save(tmp_path / "x" / "photo.jpg", exif=BROKEN_EXIF[case], quality=95)
    found = by_class(tmp_path, size=(16, 8))
    red = found.pixels(0)[0].float()
    assert red[:7].mean() > 200 > 50 > red[9:].mean()


@pytest.mark.parametrize(
    ("name", "options"),
    [("a.tif", {}), ("a.tif", {"compression": "tiff_lzw"}), ("a.png", {}), ("a.webp", {})],
)
def test_pictures_of_other_formats_stand_upright(tmp_path, name, options):
    """Pillow turns TIFFs by itself, and they were turned once more."""
    lying = Image.new("RGB", (40, 20), "blue")
    lying.paste("red", (0, 0, 20, 20))
    orientation = Image.Exif()
    orientation[0x112] = 6
    (tmp_path / "x").mkdir()
    lying.save(tmp_path / "x" / name, exif=orientation, **options)
    red = by_class(tmp_path, size=(16, 8)).pixels(0)[0].float()
    assert red[:7].mean() > 200 > 50 > red[9:].mean()


@pytest.mark.parametrize(
    "error", [struct.error("out of range"), AttributeError(), MemoryError(), KeyError("a")]
)
def test_whatever_a_reader_raises_the_file_is_named_and_left_out(tmp_path, monkeypatch, error):
    good, bad = picture(tmp_path / "x" / "good.png"), picture(tmp_path / "x" / "bad.png")
    read = Image.Image.getexif

    def fail(image):
        if image.filename == str(bad):
            raise error
        return read(image)

    monkeypatch.setattr(Image.Image, "getexif", fail)
    found = by_class(tmp_path)
    assert len(found) == 1
    assert skipped(found) == {"bad.png": f"{type(error).__name__}: {error}"}
    good.unlink()  # during the run
    with pytest.raises(ValueError, match=r"good\.png: .*No such file"):
        found.pixels(0)


@pytest.mark.parametrize("beside", ["text", "profile"])
def test_much_beside_the_pixels_does_not_cost_the_picture(tmp_path, beside, monkeypatch):
    """python-pillow/Pillow#8363: "Decompressed data too large", for pictures that are sound."""
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 1 << 20)
    info = PngImagePlugin.PngInfo()
    if beside == "text":
        info.add_text("workflow", "x" * (2 << 20), zip=True)
    profile = bytes(2 << 20) if beside == "profile" else None
    picture(tmp_path / "x" / "a.png", pnginfo=info, icc_profile=profile)
    assert len(by_class(tmp_path)) == 1


def test_what_systems_and_runs_leave_is_no_data(tmp_path):
    """pytorch/vision#2831: .ipynb_checkpoints was a class; so were runs, on going on."""
    picture(tmp_path / "cat" / "a.png")
    for name in (".git/x.png", "cat/.ipynb_checkpoints/a.png", "__MACOSX/cat/a.png", "cat/._a.png",
                 "cat/@eaDir/a.png/SYNOPHOTO_THUMB.png", ".hidden/a.png", "$RECYCLE.BIN/a.png",
                 "run/samples/step-0000004.png", "cat/Thumbs.db", ".DS_Store"):  # fmt: skip
        picture(tmp_path / name, format="PNG")
    for name in ("config.json", "classes.json"):
        (tmp_path / "run" / name).write_text("{}")
    found = by_class(tmp_path)
    assert found.classes == ["cat"]
    assert len(found) == 1
    assert found.skipped == found.notes == []
    listed = by_caption(tmp_path, "cat/a.png", ".hidden/a.png")  # what is listed is meant
    assert len(listed) == 2
    assert listed.skipped == []


def test_data_may_lie_in_a_hidden_folder(tmp_path):
    picture(tmp_path / ".cache" / "cat" / "a.png")
    assert len(by_class(tmp_path / ".cache")) == 1


def test_links_to_folders_are_followed(tmp_path):
    """pytorch/vision#1580: classes that are links to folders elsewhere were left out in silence."""
    picture(tmp_path / "elsewhere" / "deep" / "a.png")
    picture(tmp_path / "data" / "cat" / "b.png")
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "cat" / "around").symlink_to(tmp_path / "data")
    found = by_class(tmp_path / "data", 2)
    assert found.classes == ["cat", "dog"]
    assert list(found.conditions) == [0, 1]


def test_folders_that_link_to_each_other_have_an_end(tmp_path):
    """Of four, the walk did not end; of two, each file came many times."""
    names = "abcd"
    for name in names:
        picture(tmp_path / name / "deep" / f"{name}.png")
        for other in names.replace(name, ""):
            (tmp_path / name / f"0{other}").symlink_to(f"../{other}")
    (tmp_path / "same").symlink_to("a")
    found = by_class(tmp_path, 5)
    assert found.classes == [*names, "same"]
    assert list(found.conditions) == [label for label in range(5) for _ in names]
    for name in names:  # each by its own name where it has one
        assert tmp_path / name / "deep" / f"{name}.png" in data.walk.walk(tmp_path).paths


def test_a_folder_of_data_is_not_walked_again_from_elsewhere(tmp_path):
    picture(tmp_path / "data" / "a" / "a.png")
    picture(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "data" / "a" / "there").symlink_to("../../elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to("../data")
    assert len(by_class(tmp_path / "data")) == 2


def test_folders_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    picture(tmp_path / "cat" / "a.png")
    (tmp_path / "closed").mkdir()
    scan = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert skipped(by_class(tmp_path)) == {"closed": "Permission denied"}


def test_names_are_found_as_other_systems_write_them(tmp_path):
    """macOS decomposes é, Windows writes backslashes: such files were "not there"."""
    composed, decomposed = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
    for name in (decomposed, f"a/{composed}", "b/c.png"):
        picture(tmp_path / name)
    found = by_caption(
        tmp_path, composed, f"a/{decomposed}", r"b\\c.png", "./b/../b/c.png", "d\\u0000"
    )
    assert [found.conditions[0], list(found.conditions[1]), found.conditions[2]] == [
        "1", ["2", "3"], "0",
    ]  # fmt: skip
    assert set(skipped(found)) == {"d\0"}


def test_captions_reach_no_file_outside_of_the_folder(tmp_path):
    """The list of a data set could name any file that its user can read."""
    folder, secret = tmp_path / "data", picture(tmp_path / "secret.png")
    picture(folder / "a.png")
    (folder / "link.png").symlink_to(secret)  # whoever makes the folder makes its links
    long = "x" * 300 + ".png"
    found = by_caption(folder, "a.png", "link.png", "../secret.png", str(secret), long, "b/../../c")
    assert list(found.conditions) == ["0", "1"]
    reasons = {path.relative_to(tmp_path).as_posix(): why for path, why in found.skipped}
    outside = {name for name, why in reasons.items() if why.endswith("outside of data.folder")}
    assert outside == {"data/../secret.png", "secret.png", "data/../c"}
    assert reasons[f"data/{long}"].endswith("but not there")


def test_grey_of_16_bits_may_be_transparent(tmp_path):
    """What was transparent became black."""
    (tmp_path / "x").mkdir()
    values = np.array([[256, 257]], np.uint16).repeat(2, 0)  # one shade in 8 bits
    Image.fromarray(values).save(tmp_path / "x" / "a.png", transparency=257)
    assert by_class(tmp_path, size=(2, 2)).pixels(0)[0].tolist() == [[1, 255]] * 2


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_in_lab(tmp_path, channels):
    picture(tmp_path / "x" / "a.tif", mode="LAB", color=(255, 128, 128))
    assert by_class(tmp_path, channels=channels).pixels(0).float().mean() > 240


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(picture(tmp_path / "cat" / "a.png").with_name("pipe.png"))
    assert skipped(by_class(tmp_path)) == {"pipe.png": "is no file"}


av = pytest.importorskip("av")


def video(path, codec="mpeg4", frames=3, cover=False, **options):
    """A video of frames 0, 60, 120, ... in grey, of 32×16 pixels."""
    with av.open(path, "w", metadata_encoding="latin-1", **options) as file:
        streams = [file.add_stream(codec, rate=25)]
        if cover:
            streams.append(file.add_stream("mjpeg", rate=1))
            streams[1].disposition = av.stream.Disposition.attached_pic
        else:
            file.metadata["title"] = streams[0].metadata["comment"] = "café"
        for stream, format in zip(streams, ("yuv420p", "yuvj420p"), strict=False):
            stream.width, stream.height, stream.pix_fmt = 32, 16, format
        shades = [np.full((16, 32, 3), 60 * i, np.uint8) for i in range(frames)]
        for stream, own in zip(streams, (shades, shades[:1]), strict=False):
            for shade in own:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
            file.mux(stream.encode(None))
    return path


CONTAINERS = {
    "a.mp4": "mpeg4", "a.mov": "mpeg4", "a.mkv": "mpeg4", "a.avi": "mpeg4", "a.flv": "flv",
    "a.webm": "libvpx", "a.asf": "msmpeg4v3", "a.mpg": "mpeg1video",
}  # fmt: skip


@pytest.mark.parametrize("name", CONTAINERS)
def test_videos_with_titles_in_any_encoding(tmp_path, name):
    """PyAV raised UnicodeDecodeError, and videos that can be decoded were left out."""
    (tmp_path / "x").mkdir()
    video(tmp_path / "x" / name, CONTAINERS[name])
    found = by_class(tmp_path, source="videos", frames=3)
    means = found.pixels(0).float().mean((0, 2, 3)).tolist()
    assert means == pytest.approx([0, 60, 120], abs=6)
    assert found.skipped == []


def test_videos_in_a_folder_with_a_colon(tmp_path, monkeypatch):
    """FFmpeg took what precedes it as a protocol."""
    path = tmp_path / "a:b" / "x" / "a.mp4"
    path.parent.mkdir(parents=True)
    video(path)
    monkeypatch.chdir(tmp_path)
    model = {**CLASSES, "num_classes": 1}
    found = data.load(make("videos", model, folder="a:b", frames=3))
    assert len(found) == 1, found.skipped


PLAYLISTS = {
    "hls.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n",
    "concat.mp4": "ffconcat version 1.0\nfile {}\n",
}


@pytest.mark.parametrize("name", PLAYLISTS)
def test_playlists_are_no_videos(tmp_path, name):
    """FFmpeg opens the files that they name."""
    video(tmp_path / "a.mp4")
    (tmp_path / name).write_text(PLAYLISTS[name].format("a.mp4"))
    found = by_caption(tmp_path, name, "a.mp4", source="videos", frames=3)
    assert list(found.conditions) == ["1"]
    assert "is of no format that holds frames: apng, asf" in skipped(found)[name]


class Pipe:
    """A file that nobody can go back in, to write a duration at its head."""

    def __init__(self, path):
        self.path = path

    def write(self, content):
        with self.path.open("ab") as file:
            return file.write(content)


@pytest.mark.parametrize(("name", "format"), [("a.mkv", "matroska"), ("a.m4v", "m4v")])
def test_videos_without_duration_and_number_of_frames(tmp_path, name, format):
    path = tmp_path / "x" / name
    path.parent.mkdir()
    video(Pipe(path), format=format)
    with av.open(str(path), metadata_errors="ignore") as file:
        assert file.duration is None
        assert file.streams.video[0].frames == 0
    assert len(by_class(tmp_path, source="videos", frames=3)) == 1


def boxes(content):
    """The boxes of an MP4 file, or within one, by name."""
    found, place = {}, 0
    while place < len(content):
        size = int.from_bytes(content[place : place + 4], "big")
        found[content[place + 4 : place + 8]] = content[place : place + size]
        place += size
    return found


def test_a_cover_is_no_video(tmp_path):
    """UltraStar-Deluxe/USDX#948: the first video stream of an MP4 may be its cover."""
    (tmp_path / "x").mkdir()
    path = video(tmp_path / "x" / "a.mp4", cover=True)
    content = path.read_bytes()
    movie = boxes(content)[b"moov"]
    parts = boxes(movie[8:])
    cover = parts.pop(b"udta")
    first = movie[:8] + cover + b"".join(parts.values())
    path.write_bytes(content.replace(movie, first))
    with av.open(str(path)) as file:
        assert [stream.name for stream in file.streams.video] == ["mjpeg", "mpeg4"]
    found = by_class(tmp_path, source="videos", frames=3)
    assert len(found) == 1
    with av.open(str(tmp_path / "x" / "sound.mka"), "w", format="matroska") as file:
        stream = file.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        sound.sample_rate = 8000
        file.mux(stream.encode(sound))
    found = by_caption(tmp_path, "x/a.mp4", "x/sound.mka", source="videos", frames=3)
    assert skipped(found) == {"sound.mka": "holds no video"}


def test_videos_stand_upright(tmp_path):
    """As phones write them: lying, with a matrix in the track's header that turns them right."""
    path = tmp_path / "video.mp4"
    lying = np.zeros((32, 64, 3), np.uint8)
    lying[:, :32, 0] = 255  # the left half is red
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for frame in (av.VideoFrame.from_ndarray(lying, format="rgb24"), None):
            file.mux(stream.encode(frame))
    written = path.read_bytes()
    straight, clockwise = (
        struct.pack(">9i", *matrix)
        for matrix in (
            (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30),
            (0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30),
        )
    )
    place = written.index(straight, written.index(b"tkhd"))
    path.write_bytes(written[:place] + clockwise + written[place + len(straight) :])
    (frame,) = data.pixels.read_video(path, 3, (32, 16))
    red = frame[0].float()
    assert red[:14].mean() > 200
    assert red[18:].mean() < 50


def test_no_other_program_is_run(tmp_path):
    """For EPS, whatever it is called, Pillow runs Ghostscript on the program in the file."""
    (tmp_path / "x").mkdir()
    picture(tmp_path / "x" / "good.png")
    for name in ("bad.eps", "bad.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "x" / name, format="EPS")
    assert list(by_class(tmp_path).notes) == ["left out for their suffix: 1 .eps"]
    found = by_caption(tmp_path, "x/good.png", "x/bad.eps", "x/bad.png")
    assert list(found.conditions) == ["0"]
    assert all("cannot identify" in reason for reason in skipped(found).values())
    assert len(skipped(found)) == 2
