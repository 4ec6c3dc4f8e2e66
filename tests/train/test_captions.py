"""Captions as the world has them: encodings, odd characters, several for one image."""

import codecs
import json

import pytest
import torch

pytest.importorskip("PIL.Image")
data = pytest.importorskip("ptattn.train.data")
from ptattn import files  # noqa: E402
from ptattn.train import sampling  # noqa: E402
from ptattn.train.data import captions  # noqa: E402
from tests.support.data import TEXT, make, picture  # noqa: E402


def line(text, name="a.png", **options):
    return json.dumps({"file_name": name, "text": text}, **options)


def read(tmp_path, content):
    listing = tmp_path / "metadata.jsonl"
    listing.write_bytes(content)
    found, notes = captions.read(listing)
    return found.get("a.png"), notes


def load(tmp_path, content):
    (tmp_path / "metadata.jsonl").write_bytes(content)
    return data.load(make("images", TEXT, folder=str(tmp_path)))


def test_all_captions_of_an_image_are_used(tmp_path):
    """Five lines for one image: the last alone was kept."""
    for name in "abc":
        picture(tmp_path / f"{name}.png")
    five = [f"caption {i}" for i in range(5)]
    lines = [line(text) for text in five] + [line("one", "b.png"), line("other", "./c.png")]
    found = load(tmp_path, "\n".join(lines).encode())
    assert [list(found.conditions[0]), *found.conditions[1:]] == [five, "one", "other"]
    assert found.captions == [*five, "one", "other"]
    config = make("images", TEXT, folder=str(tmp_path))
    assert set(sampling.examples(found, config)) == {*five, "one", "other"}


class Named:
    """In place of the text encoder: shows which condition was drawn."""

    def __init__(self, config):
        pass

    def one(self, condition):
        return {"condition": torch.tensor(-1 if condition is None else int(condition))}


def test_the_caption_drawn_depends_on_seed_and_position_alone(monkeypatch):
    monkeypatch.setattr(data.stream, "Conditions", Named)
    config = make("images", TEXT)
    pixels = torch.zeros(config.shape, dtype=torch.uint8)
    several = data.Dataset([list("01234"), "5"], lambda i: pixels)
    single = data.Dataset(["0", "5"], lambda i: pixels)
    stream, plain = data.stream.Stream(several, config), data.stream.Stream(single, config)
    drawn = [stream[position] for position in range(200)]
    seen = {int(example["condition"]) for example in drawn}
    assert seen == {-1, 0, 1, 2, 3, 4, 5}
    again = data.stream.Stream(several, config)
    for position in (150, 7, 199):
        assert again[position]["condition"] == drawn[position]["condition"]
    for position in range(20):  # noise, levels and dropped conditions are what one caption has
        left, right = drawn[position], plain[position]
        assert torch.equal(left["noise"], right["noise"])
        assert torch.equal(left["timestep"], right["timestep"])
        assert (left["condition"] == -1) == (right["condition"] == -1)


@pytest.mark.parametrize(
    ("encoding", "mark"),
    [
        ("utf-8", b""),
        ("utf-8", codecs.BOM_UTF8),
        ("utf-16-le", codecs.BOM_UTF16_LE),
        ("utf-16-be", codecs.BOM_UTF16_BE),
        ("utf-32-le", codecs.BOM_UTF32_LE),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_unicode_in_every_encoding(tmp_path, encoding, mark, end):
    lines = [line("naïve café 猫", ensure_ascii=False), line("b\U0001f600", ensure_ascii=False)]
    found, notes = read(tmp_path, mark + end.join([*lines, ""]).encode(encoding))
    assert found == ["naïve café 猫", "b\U0001f600"]
    assert notes == []


def test_lines_that_are_no_utf_8_are_read_as_windows_1252_and_named(tmp_path):
    lines = [
        line("café", ensure_ascii=False).encode("latin-1"),
        line("猫", ensure_ascii=False).encode(),
        line("the “best”", ensure_ascii=False).encode("cp1252"),
    ]
    found, notes = read(tmp_path, b"\n".join(lines))
    assert found == ["café", "猫", "the “best”"]
    (note,) = notes
    assert note.endswith("metadata.jsonl, lines 1, 3: no UTF-8, read as Windows-1252")


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\t"])
def test_what_separates_lines_elsewhere_does_not_cut_a_caption(tmp_path, odd):
    """str.splitlines cut there, and the run ended with "expected {"file_name": ...}"."""
    raw = '{"file_name": "a.png", "text": "a cat' + odd + 'on a mat"}'
    found, notes = read(tmp_path, raw.encode())
    assert found == [f"a cat{odd}on a mat"]
    assert notes == []


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (r"a smile \ud83d", "a smile "),  # cut in the middle of an emoji
        (r"\ude00 a smile", " a smile"),
        ("a\\u0000b\x01c\\u009f", "abc"),
        (r"\ufeffa cat", "a cat"),
    ],
)
def test_what_stands_for_no_character_is_left_out_and_named(tmp_path, raw, text):
    """A lone surrogate ended training with "TextInputSequence must be str", after it had begun."""
    content = line("fine") + '\n{"file_name": "a.png", "text": "' + raw + '"}'
    found, notes = read(tmp_path, content.encode())
    assert found == ["fine", text]
    (note,) = notes
    assert "line 2: control characters or halves of characters left out" in note


def test_pairs_of_surrogates_are_put_together(tmp_path):
    """As Java and MySQL write them into what they call UTF-8."""
    raw = line("a \ud83d\ude00", ensure_ascii=False).encode("utf-8", "surrogatepass")
    found, _ = read(tmp_path, raw)
    assert found == ["a \U0001f600"]


def test_empty_captions_are_used_and_named(tmp_path):
    texts = ["", " ", "\\u0000", "a"]
    lines = ["", *('{"file_name": "a.png", "text": "' + text + '"}' for text in texts), "\ufeff"]
    found, notes = read(tmp_path, "\n".join(lines).encode())
    assert found == ["", " ", "", "a"]
    assert any("lines 2, 3, 4: an empty caption" in note for note in notes)


def test_notes_name_a_few_lines_and_count_the_others(tmp_path):
    _, (note,) = read(tmp_path, "\n".join([line("a\0")] * 12).encode())
    assert "lines 1, 2, 3, 4, 5 and 7 more: control" in note


@pytest.mark.parametrize("raw", ["[" * 100_000, '{"file_name": "a.png", "text": "' + "x" * 10**6])
def test_lines_that_are_no_captions_are_shown_in_part(tmp_path, raw):
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 2: expected") as caught:
        read(tmp_path, (line("fine") + "\n" + raw).encode())
    assert len(str(caught.value)) < 500


def test_files_that_are_cut_short_within_a_character(tmp_path):
    content = codecs.BOM_UTF16_LE + line("a cat").encode("utf-16-le")
    with pytest.raises(ValueError, match="cannot read the captions in"):
        read(tmp_path, content[:-1])


def test_captions_of_any_source_can_be_encoded():
    """Also of your own function, and on the command line of `ptattn sample`."""
    pytest.importorskip("wordllama")
    encode = data.Conditions(make("images", TEXT))
    for odd, plain in (("a smile \ud83d", "a smile "), ("a\0b", "ab")):
        assert torch.equal(encode.one(odd)["caption"], encode.one(plain)["caption"])


def test_long_captions_cost_no_more_than_what_is_kept_of_them():
    pytest.importorskip("wordllama")
    encode = data.Conditions(make("images", TEXT))
    tokens = data.conditions._tokenizer()
    for text in ("a small cat sleeps " * 500, "x" * 9000, "猫" * 9000, " " * 9000, "ab" * 4500):
        whole = tokens.encode(text).ids[:16]
        expected = data.conditions._embeddings()[whole].float()
        assert torch.equal(encode.one(text)["caption"], expected)
    assert encode.one("word " * 10**6)["caption_mask"].all()  # 5 MB; whole they take 8 s


def test_names_that_are_no_utf_8_are_written_and_read_again(tmp_path):
    """A class folder of such a name ended the run as it wrote classes.json."""
    names = {"classes": ["caf\udce9", "猫", "plain"]}
    files.write_json(names, tmp_path / "classes.json")
    assert files.read_json(tmp_path / "classes.json") == names
    assert "猫" in (tmp_path / "classes.json").read_text(encoding="utf-8")
