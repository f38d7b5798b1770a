"""Reads data files as they come: a fault becomes one `file:line: what`, nothing is dropped or truncated silently.

A leaf that knows no task: bytes in; lines, JSON values and checked fields out.
"""

import codecs
import contextlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mindmerger.runtime.errors import UserError
from mindmerger.runtime.files import what_is


class DataError(UserError):
    """Data, a language, a task or a tokenizer that cannot be used."""


class RowError(DataError):
    """A fault of one row of a data file, whose other rows can be used."""


@contextlib.contextmanager
def name_skip_flag():
    """Context manager: names the flag that leaves a row out where a single row is faulty.

    Raises:
        DataError: for that row.
    """
    try:
        yield
    except RowError as error:
        raise DataError(f"{error} (--skip_faulty_rows leaves such rows out and lists them)") from None


# All are listed in a file as well: data that are wrong throughout would bury the screen.
FAULTS_SHOWN = 20


def describe_faults(faults: list[str], where: str) -> str:
    """Returns the warning of rows that --skip_faulty_rows leaves out: how many, where all are listed, the first."""
    lines = faults[:FAULTS_SHOWN]
    if len(faults) > FAULTS_SHOWN:
        lines.append(f"and {len(faults) - FAULTS_SHOWN} more")
    return "\n".join([f"--skip_faulty_rows leaves out {len(faults)} faulty rows{where}:", *lines])


def preview(value: object) -> str:
    """Returns a value as Python writes it, in at most 60 characters: a fault is one line, whatever the file holds."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def find_file(data_root, relative: str) -> Path:
    """Finds the path of a data file.

    Raises:
        DataError: naming the path and what the nearest existing folder holds, where the file is missing; where it may
            not be read, or is a Git LFS pointer.
    """
    path = Path(data_root) / relative
    try:
        if path.is_file():
            with open(path, "rb") as file:
                # Before anything is read: two pointers have three lines each and would pass for three sentence pairs.
                refuse_lfs_pointer(path, file.read(len(LFS_POINTER)))
            return path
        # A pipe in a file's place would be waited for, for ever.
        if (found := what_is(path)) != "missing":
            raise DataError(f"{path} is {found}: a file is expected there")
        folder = path.parent
        # The nearest folder that exists shows where the path went wrong.
        while not folder.is_dir() and folder != folder.parent:
            folder = folder.parent
        there = sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"cannot look for {path}: {error.strerror}") from error
    shown_names = ", ".join(there[:10]) + (f" and {len(there) - 10} more" if len(there) > 10 else "")
    if not Path(data_root).is_dir():
        raise DataError(f"no folder {data_root} (--data_root); {folder.resolve()} holds: {shown_names or 'nothing'}")
    raise DataError(
        f"no file {path}; {folder.resolve()} holds: {shown_names or 'nothing'} (--data_root names the data folder)"
    )


LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_lfs_pointer(path: Path, start: bytes) -> None:
    """Makes sure that a file's first bytes are not those of the pointer which Git keeps in place of a large file.

    Raises:
        DataError: where they are.
    """
    if start.startswith(LFS_POINTER):
        raise DataError(f"{path} is a Git LFS pointer, not the data: run git lfs pull")


def _refuse_utf16(path: Path, start: bytes) -> None:
    # Without a mark at its start, UTF-16 shows by the one NUL in the two bytes of a Latin letter or a bracket.
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or start[:2].count(0) == 1:
        raise DataError(f"{path}:1: UTF-16 text (a UTF-16 mark or NUL bytes at its start): convert the file to UTF-8")


def read_lines(path: Path, faults: list[str] | None = None) -> Iterator[tuple[int, str | None]]:
    """Yields (line number from 1, text without its line end). Only LF ends a line: texts hold U+0085, U+001D and CR.

    Args:
        faults: takes the faults of single lines, whose text is then None; without it the first one is raised.

    Raises:
        DataError: where a line is not UTF-8 or holds NUL bytes, or the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            # Bytes, cut at LF: str.splitlines breaks on U+0085, U+001D and U+2028, which stand inside real sentences.
            for number, raw in enumerate(file, start=1):
                if number == 1:
                    refuse_lfs_pointer(path, raw)
                    _refuse_utf16(path, raw)
                    # A BOM would be part of the first row's text, or make its JSON invalid.
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                    # Such a file is one line: all of its rows would be read as a single one.
                    if not raw.endswith(b"\n") and b"\r" in raw.rstrip(b"\r"):
                        raise DataError(f"{path}:1: lines end in CR alone: convert the file to LF line ends")
                try:
                    text = _decode_line(path, number, raw)
                except RowError as error:
                    if faults is None:
                        raise
                    faults.append(str(error))
                    text = None
                yield number, text
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _decode_line(path: Path, number: int, raw: bytes) -> str:
    if b"\0" in raw:
        raise RowError(f"{path}:{number}: NUL byte: the file is damaged, or not UTF-8 text")
    try:
        # CR is part of the line end here alone; the released code kept line ends, and a stray one shifted the sides of
        # pairs.
        return raw.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise RowError(f"{path}:{number}: not UTF-8 (byte {error.start + 1} of the line)") from None


def count_lines(path: Path) -> int:
    """Counts the lines of a file; a last line without LF is one."""
    lines, last = 0, b"\n"
    try:
        with open(path, "rb") as file:
            # By blocks: one pass over bytes costs a fraction of decoding, and no line has to fit into memory.
            while block := file.read(1 << 20):
                lines += block.count(b"\n")
                last = block[-1:]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    return lines + (last != b"\n")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    # Plain json.loads keeps the last of two equal keys and drops the other one silently.
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {preview(twice)} stands twice in one object")
    return value


class _JsonCursor:
    """Decodes JSON values one after another out of `text` and knows the line of each."""

    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys)
    blank = re.compile(r"[ \t\r\n]*")

    def __init__(self, path: Path, text: str, line: int = 1):
        self.path, self.text, self.line, self.at = path, text, line, 0
        self._move(0)

    def _move(self, to: int) -> None:
        to = self.blank.match(self.text, to).end()
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def fail(self, what: str, at: int | None = None) -> DataError:
        line = self.line + self.text.count("\n", self.at, self.at if at is None else at)
        return DataError(f"{self.path}:{line}: {what}")

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def take(self, character: str) -> None:
        if self.peek() != character:
            found = repr(self.peek()) if self.peek() else "the end of the file"
            raise self.fail(f"not valid JSON (expected {character!r}, found {found})")
        self._move(self.at + 1)

    def value(self) -> object:
        try:
            value, end = self.decoder.raw_decode(self.text, self.at)
        except json.JSONDecodeError as error:
            raise self.fail(f"not valid JSON ({error.msg}, character {error.colno})", error.pos) from None
        # A few KB of brackets are enough for Python's decoder to give up in its own words.
        except RecursionError:
            raise self.fail("JSON is nested too deeply") from None
        # Integers of thousands of digits, which Python refuses to convert, and equal keys.
        except ValueError as error:
            raise self.fail(f"not usable JSON ({error})") from None
        self._move(end)
        return value

    def key(self, seen: set[str]) -> str:
        """Returns an object's next key and takes its colon; adds the key to `seen`, which must not hold it yet."""
        if self.peek() != '"':
            raise self.fail(f"expected a key in double quotes, found {preview(self.text[self.at : self.at + 40])}")
        line, key = self.line, self.value()
        if key in seen:
            raise DataError(f"{self.path}:{line}: key {preview(key)} stands twice in one object")
        seen.add(key)
        self.take(":")
        return key

    def end(self) -> None:
        if self.at < len(self.text):
            raise self.fail(f"not valid JSON (more text after the end: {preview(self.text[self.at : self.at + 40])})")


def _json_list(path: Path) -> Iterator[tuple[int, object]]:
    """Yields (line, element) of a JSON list, or of the list under "data" in a JSON object."""
    try:
        raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
        refuse_lfs_pointer(path, raw)
        _refuse_utf16(path, raw)
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{raw.count(10, 0, error.start) + 1}: not UTF-8") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    # Value by value and not by json.loads, which would tell the line of no row.
    cursor = _JsonCursor(path, text)
    if not cursor.peek():
        return
    wrapped = cursor.peek() == "{"
    form = 'expected a JSON list, or {"data": [...]}'
    keys: set[str] = set()  # a second "data" would be rows lost
    if wrapped:
        cursor.take("{")
        while (key := cursor.key(keys)) != "data":
            cursor.value()
            if cursor.peek() != ",":
                raise cursor.fail(f"{form}; there is no key 'data' but {preview(key)}")
            cursor.take(",")
    if cursor.peek() != "[":
        raise cursor.fail(form)
    cursor.take("[")
    while cursor.peek() != "]":
        line = cursor.line
        yield line, cursor.value()
        if cursor.peek() != ",":
            break
        cursor.take(",")
        if cursor.peek() == "]":
            raise cursor.fail("not valid JSON (comma before the end of the list)")
    cursor.take("]")
    # What follows "data" is read too: half a file must not pass for a whole one.
    while wrapped and cursor.peek() == ",":
        cursor.take(",")
        cursor.key(keys)
        cursor.value()
    if wrapped:
        cursor.take("}")
    cursor.end()


@dataclass(frozen=True)
class Record:
    """One row of a data file and where it stands. `value` is a JSON value, or the list of a .tsv line's columns."""

    path: Path
    line: int
    value: object

    def fail(self, what: str) -> RowError:
        """Returns the error that names this row's file and line."""
        return RowError(f"{self.path}:{self.line}: {what}")

    def get(self, *keys: str | int) -> object:
        """Returns the value under nested keys.

        Raises:
            DataError: naming the file, the line and the field.
        """
        value, name = self.value, ""
        for key in keys:
            holder = list if isinstance(key, int) else dict
            if not isinstance(value, holder):
                kind = "list" if holder is list else "object"
                raise self.fail(f"{name or 'row'} must be a JSON {kind}, got {preview(value)}")
            name += f"[{key}]" if isinstance(key, int) else f".{key}" if name else key
            if (key >= len(value)) if isinstance(key, int) else (key not in value):
                present = f"; the row has {preview(list(self.value))}" if isinstance(self.value, dict) else ""
                raise self.fail(f"field {name!r} is missing{present}")
            value = value[key]
        return value

    def text(self, *keys: str | int, may_be_empty: bool = False) -> str:
        """Returns the text under nested keys as it is: a NUL spelt \\u0000 in JSON is text, a raw NUL byte is damage.

        Raises:
            DataError: where it is missing, no text, empty, or holds half a surrogate pair (which no tokenizer takes).
        """
        value = self.get(*keys)
        name = ".".join(map(str, keys))
        if not isinstance(value, str):
            raise self.fail(f"field {name!r} must be text, got {preview(value)}")
        if not may_be_empty and not value.strip():
            raise self.fail(f"field {name!r} is empty")
        try:
            # JSON can spell half a pair as \ud800; no tokenizer takes that, and its error would name no line.
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise self.fail(f"field {name!r} holds half a surrogate pair: {preview(value)}") from None
        return value


def read_records(path: Path, faults: list[str] | None = None) -> Iterator[Record | None]:
    """Yields the rows of a .tsv, .jsonl or .json file; blank lines hold no row.

    Args:
        faults: takes the faults of single lines of a .tsv or .jsonl file, which are then None; without it the first
            one is raised. Where a row of a .json file ends is not known after a fault in its JSON.

    Raises:
        DataError: `file:line: what` for the first fault, and for a file without rows.
    """
    rows = 0
    if path.suffix == ".json":
        for line, value in _json_list(path):
            rows += 1
            yield Record(path, line, value)
    else:
        for line, text in read_lines(path, faults):
            if text is not None and not text.strip():
                continue
            rows += 1
            yield None if text is None else _line_record(path, line, text, faults)
    if not rows:
        raise DataError(f"{path}: the file holds no rows")


def _line_record(path: Path, line: int, text: str, faults: list[str] | None) -> Record | None:
    if path.suffix == ".tsv":
        return Record(path, line, text.split("\t"))
    # Our cursor and not json.loads: it refuses equal keys, and text after the value.
    cursor = _JsonCursor(path, text, line)
    try:
        value = cursor.value()
        cursor.end()
    except DataError as error:
        if faults is None:
            raise RowError(str(error)) from None
        faults.append(str(error))
        return None
    return Record(path, line, value)
