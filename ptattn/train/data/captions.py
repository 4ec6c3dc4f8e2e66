"""Captions as the world has them: of any encoding, with any character, several for one file."""

from __future__ import annotations

import codecs
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

FILE = "metadata.jsonl"
# The longer marks first: that of UTF-32 begins with that of UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# Control characters but white space, and marks of byte order that have slipped into a text.
UNWANTED = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff]")
SHOWN = 5  # lines that a note names


def read(listing: Path) -> tuple[dict[str, list[str]], list[str]]:
    """The captions of every file name, and notes on those that were repaired or are empty.

    A line is {"file_name": ..., "text": ...}. The file is in UTF-8, or in UTF-16 or UTF-32 with a
    mark of the byte order; a line that is no UTF-8 is taken as Windows-1252, Latin-1 in the main.

    Raises:
        ValueError: no such file, or a line that is something else; it is named.
    """
    captions: dict[str, list[str]] = defaultdict(list)
    notes: dict[str, list[int]] = defaultdict(list)
    for number, line in enumerate(_lines(listing), 1):
        try:
            text = line.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            text = line.decode("cp1252", "replace")
            notes["no UTF-8, read as Windows-1252"].append(number)
        text = text.lstrip("\ufeff")
        if not text.strip():
            continue
        name, caption = _entry(text, f"{listing}, line {number}")
        repaired = repair(caption)
        if repaired != caption:
            notes["control characters or halves of characters left out"].append(number)
        if not repaired.strip():
            notes["an empty caption, as good as none"].append(number)
        captions[name].append(repaired)
    return captions, [f"{listing}, {_name(lines)}: {what}" for what, lines in notes.items()]


def repair(text: str) -> str:
    """Text without what stands for no character: control characters and lone surrogates.

    The halves of a surrogate pair are put together.
    """
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore")
    return UNWANTED.sub("", whole)


def _lines(listing: Path) -> list[bytes]:
    """Of a file in UTF-8; only bytes are split at line feeds and carriage returns alone."""
    try:
        content = listing.read_bytes()
        for mark, encoding in MARKS.items():
            if content.startswith(mark):
                text = content.decode(encoding, "surrogatepass")
                return text.encode("utf-8", "surrogatepass").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the captions in {listing}: {error}") from error
    return content.splitlines()


def _entry(line: str, where: str) -> tuple[str, str]:
    try:
        entry = json.loads(line, strict=False)  # control characters need no escape
        name, text = entry["file_name"], entry["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        name = text = None
    if not isinstance(name, str) or not isinstance(text, str):
        shown = line if len(line) <= 200 else f"{line[:200]}…"
        raise ValueError(f'{where}: expected {{"file_name": ..., "text": ...}}; got {shown}')
    return name, text


def _name(lines: Sequence[int]) -> str:
    more = f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return f"line{'s' * (len(lines) > 1)} {', '.join(map(str, lines[:SHOWN]))}{more}"
