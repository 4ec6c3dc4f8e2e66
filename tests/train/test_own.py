"""Data from a function that the configuration names as module:function."""

import sys

import pytest

pytest.importorskip("PIL.Image")
data = pytest.importorskip("ptattn.train.data")
from tests.support.data import CLASSES, TEXT, make  # noqa: E402

SOURCE = """
import numpy
import torch
from ptattn.train.data import Dataset

def shades(config):
    pixels = torch.arange(2, dtype=torch.uint8)
    return Dataset(numpy.arange(2), lambda i: pixels[i].expand(config.shape), ["dark", "light"])

def texts(config):
    return Dataset(["a", ["b", "c"]], lambda i: torch.zeros(config.shape, dtype=torch.uint8))

def fails(config):
    return {}["key"]

def changed(**values):
    def function(config):
        pixels = lambda i: torch.zeros(config.shape, dtype=torch.uint8)
        return Dataset(**{"conditions": [0], "pixels": pixels, "classes": ["a", "b"], **values})
    return function

other = lambda config: [1, 2]
beyond, word = changed(conditions=[0, 2]), changed(conditions=[0, "a"])
label, none = changed(conditions=["a", 3], classes=[]), changed(conditions=["a", []], classes=[])
empty = changed(conditions=[])
small = changed(pixels=lambda i: torch.zeros(3, 8, 11, dtype=torch.uint8))
floats = changed(pixels=lambda i: torch.zeros(3, 8, 12))
missing = changed(pixels=lambda i: {}[i])
arrays = changed(pixels=lambda i: numpy.zeros((3, 8, 12), numpy.uint8))
number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module in the working directory, which is not on the path, as under the command."""
    (tmp_path / "my_data.py").write_text(SOURCE)
    (tmp_path / "my_broken.py").write_text("x = 1\nx.y\n")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    yield "my_data"
    sys.modules.pop("my_data", None)


def test_a_function_of_your_own_gives_the_data(module):
    found = data.load(make(f"{module}:shades", CLASSES))
    assert found.classes == ["dark", "light"]
    assert found.pixels(1).unique().tolist() == [1]
    stream = data.stream.Stream(found, make(f"{module}:shades", CLASSES))
    assert {int(stream[i]["labels"]) for i in range(20)} <= {0, 1, 2}
    found = data.load(make(f"{module}:texts", TEXT))
    assert found.captions == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("source", "model", "error", "message"),
    [
        ("no_such:f", CLASSES, ImportError, "cannot import no_such: ModuleNotFoundError"),
        ("my_broken:f", CLASSES, ImportError,
         r"cannot import my_broken: AttributeError: .*\(my_broken.py, line 2\)"),
        (":shades", CLASSES, ImportError, "cannot import : ValueError"),
        ("my_data:shade", CLASSES, ValueError, "my_data has no function shade$"),
        ("my_data:", CLASSES, ValueError, "my_data has no function"),
        ("my_data:number", CLASSES, ValueError, "my_data has no function number"),
        ("my_data:fails", CLASSES, ValueError,
         r"the function raised KeyError: 'key' \(my_data.py, line 14\)"),
        ("my_data:other", CLASSES, ValueError, r"return a ptattn\.train\.data\.Dataset; got list"),
        ("my_data:beyond", CLASSES, ValueError, r"labels of \['a', 'b'\]; number 1 is 2"),
        ("my_data:word", CLASSES, ValueError, r"labels of \['a', 'b'\]; number 1 is 'a'"),
        ("my_data:label", TEXT, ValueError, "must be captions; number 1 is 3"),
        ("my_data:none", TEXT, ValueError, r"must be captions; number 1 is \[\]"),
        ("my_data:empty", CLASSES, ValueError, "returned no example"),
        ("my_data:small", CLASSES, ValueError,
         r"torch\.uint8 \(3, 8, 12\); those of example 0 are torch\.uint8 \(3, 8, 11\)"),
        ("my_data:floats", CLASSES, ValueError, r"example 0 are torch\.float32 \(3, 8, 12\)"),
        ("my_data:missing", CLASSES, ValueError,
         r"pixels\(0\) raised KeyError: 0 \(my_data.py, line 28\)"),
        ("my_data:arrays", CLASSES, ValueError, "example 0 are ndarray"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(module, source, model, error, message):
    with pytest.raises(error, match=f"data.source {source}.*{message}"):
        data.load(make(source, model))


def test_other_sources_are_named_with_what_is_known():
    with pytest.raises(ValueError, match=r"one of mnist, .*, or module:function; got 'mnits'"):
        data.load(make("mnits", CLASSES))
