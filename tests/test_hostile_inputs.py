"""Hostile data files: every reader either loads exactly the rows that are there or refuses with one line, `file:line`.

The readers stop at the first faulty row, so rows before it are read and the row itself is refused by name; nothing is
skipped but pairs with an empty side, which one warning counts. Three families of inputs for each file of the data
folder:

- harmless: BOM, CRLF, blank lines, no last line end, unknown keys (NaN, Infinity, long integers, nesting in them), any
  key order, escapes or raw UTF-8, any JSON layout, the list under "data". The rows must come back as written, with
  U+0085, U+2028, U+001D and, in JSON, CR, LF and an escaped NUL inside their texts.
- damaged: one fault in a known row or in the whole file. It must be refused at its line, after the rows before it.
- arbitrary: bytes cut, moved, doubled or replaced. A strict reading of the result (`strict_rows`) says what is there.

A raw NUL byte is damage and is refused; the JSON escape \\u0000 is text and is kept.
"""

import contextlib
import io
import json
import random
import re
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mindmerger.runtime.errors import UserError
from mindmerger.tasks import find_task
from mindmerger.tasks.languages import LANGUAGES
from mindmerger.tasks.readers import DataError, preview
from mindmerger.tasks.scoring import corrected_number
from mindmerger.tasks.translation import read_pairs

GERMAN = LANGUAGES["German"]
BOM = b"\xef\xbb\xbf"
MESSAGE_LIMIT = 550  # characters besides the path; the list of known languages alone takes 400


def hostile(examples: int):
    """Seeded settings: the same inputs in every run."""
    unhurried = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, derandomize=True, deadline=None, suppress_health_check=unhurried)


# ---------------------------------------------------------------------------------------------------------------------
# The files of the data folder: what a row looks like in the file and what must come out of it

Expected = tuple[str, str, str]  # language, source, target


class Faulty(Exception):
    """The strict reading found a row that no reader may accept."""


@dataclass(frozen=True, repr=False)
class Format:
    """One file of the data folder. `expected` maps a row's value to what must be read; it raises Faulty, LookupError or
    TypeError where the row is wrong, and returns None for another language's row."""

    path: str
    kind: str  # "json", "jsonl", "tsv" or "pairs"
    row: st.SearchStrategy
    expected: Callable[[object], Expected | None]
    texts: tuple[tuple, ...]  # keys of the fields that must hold text
    read: Callable
    faults: tuple[tuple[tuple, object], ...] = ()  # keys and a value that must be refused there

    def __repr__(self):
        return self.path.rsplit("/", 1)[1]


ODD = "\x85\u2028\x1d\r\u00a0\u200b\ufeff\u0301😀क"


def text(banned: str) -> st.SearchStrategy[str]:
    plain = st.characters(exclude_categories=["Cs"], exclude_characters=banned)
    kept = "".join(c for c in ODD + "\n\t\0" if c not in banned)
    # A U+FEFF that starts a file is a BOM, not text.
    return st.text(plain | st.sampled_from(kept), min_size=1, max_size=12).filter(
        lambda t: t.strip() and not t.startswith("\ufeff")
    )


JSON_TEXT = text("")
LINE_TEXT = text("\n\0")
COLUMN_TEXT = text("\n\0\t")
NUMBER = st.sampled_from(["3", "3.0", "1,234", "-7", "The answer is 12"])
NAMES = st.sampled_from(["German", "Thai", "Flemish", "English"])


def need(condition) -> None:
    if not condition:
        raise Faulty


def text_at(value, *keys) -> str:
    for key in keys:
        value = value[key]
    need(isinstance(value, str) and value.strip())
    need(not any("\ud800" <= c <= "\udfff" for c in value))
    return value


def language_name(written: str) -> str:
    for one in LANGUAGES.values():
        spellings = [one.name, one.code, one.nllb, *one.also]
        spellings += [one.iso1, one.iso3] if one.code in (one.iso1, one.iso3) else []
        if written.strip().casefold() in [spelling.casefold() for spelling in spellings if spelling]:
            return one.name
    raise Faulty


def number(answer: str) -> str:
    need(any(c.isdecimal() for c in answer))
    return answer


def math_row(value) -> Expected:
    return language_name(text_at(value, "lang")), text_at(value, "query"), text_at(value, "response")


def msvamp_row(value) -> Expected:
    return "German", text_at(value, "m_query"), number(text_at(value, "response"))


def mgsm_row(columns) -> Expected:
    question, answer = (column.strip() for column in columns) if len(columns) == 2 else ("", "")
    need(question and answer)
    return "German", question, number(answer)


def xnli_row(value) -> Expected:
    language = language_name(text_at(value, "language"))
    label = {"contradictory": "contradiction"}.get(text_at(value, "label"), value["label"])
    need(label in ("entailment", "neutral", "contradiction"))
    source = f"Premise: {text_at(value, 'sentence1')}\nHypothesis: {text_at(value, 'sentence2')}\nLabel:"
    return language, source, label


def german_xnli_row(value) -> Expected | None:
    return xnli_row(value) if language_name(text_at(value, "language")) == "German" else None


def x_csqa_row(value) -> Expected:
    choices = value["question"]["choices"]
    if isinstance(choices, dict):
        need(isinstance(choices["label"], list) and isinstance(choices["text"], list))
        need(len(choices["label"]) == len(choices["text"]))
        choices = [{"label": a, "text": b} for a, b in zip(choices["label"], choices["text"], strict=True)]
    need(isinstance(choices, list))
    labels = [text_at(choice, "label") for choice in choices]
    texts = [choice["text"] and text_at({"text": "." + choice["text"]}, "text")[1:] for choice in choices]
    need(labels and len(set(labels)) == len(labels) and all(isinstance(one, str) for one in texts))
    need(value["answerKey"] in labels)
    options = "\t".join(f"{label}. {one}" for label, one in zip(labels, texts, strict=True))
    return "German", f"{text_at(value, 'question', 'stem')}\nOptions:{options}\nAnswer:", value["answerKey"]


@st.composite
def x_csqa_values(draw):
    labels, texts = list("ABC"), draw(st.lists(JSON_TEXT | st.just(""), min_size=3, max_size=3))
    choices = [{"label": a, "text": b} for a, b in zip(labels, texts, strict=True)]
    choices = draw(st.sampled_from([choices, {"label": labels, "text": texts}]))
    question = {"stem": draw(JSON_TEXT), "choices": choices}
    return {"id": "7", "lang": "de", "question": question, "answerKey": draw(st.sampled_from(labels))}


MATH = st.fixed_dictionaries({"lang": NAMES, "query": JSON_TEXT, "response": JSON_TEXT})
MSVAMP = st.fixed_dictionaries({"m_query": JSON_TEXT, "response": NUMBER})
XNLI = {
    "sentence1": JSON_TEXT,
    "sentence2": JSON_TEXT,
    "label": st.sampled_from(["entailment", "neutral", "contradiction", "contradictory"]),
}
CHOICES, STEM = ("question", "choices"), ("question", "stem")
X_CSQA_FAULTS = (
    (("answerKey",), "Z"),
    (("answerKey",), ["A"]),
    (("answerKey",), "A\nB" * 4000),
    (CHOICES, []),
    (CHOICES, "AB"),
    (CHOICES, ["A", "B"]),
    (CHOICES, [{"label": "A", "text": "x"}] * 2),
    (CHOICES, [{"label": letter * 3000 + "\n", "text": "x"} for letter in "DEF"]),
    (CHOICES, [{"label": "A", "text": 7}]),
    (CHOICES, {"label": list("ABC"), "text": ["x"]}),
    (CHOICES, {"label": "ABC", "text": "xyz"}),
    (CHOICES, {"label": list("ABC")}),
    (("question",), "Wo?"),
)
LANGUAGE_FAULTS = ("Klingon", "xx", "german " * 9000, "\n")
XNLI_TEXTS = (("sentence1",), ("sentence2",), ("label",), ("language",))
XNLI_FAULTS = tuple((("label",), label) for label in ("Neutral", "neutral ", "1", "x\n" * 9000))


def augmentation(task):
    return lambda root: find_task(task).read_augmentation(root, [GERMAN] if task == "x-csqa" else None)


def evaluation(task):
    return lambda root: find_task(task).read_evaluation(root, GERMAN)


def pairs(root):
    return read_pairs(root, GERMAN)


def x_csqa(path, read):
    return Format(path, "jsonl", x_csqa_values(), x_csqa_row, (STEM, ("answerKey",)), read, X_CSQA_FAULTS)


PAIR = st.tuples(LINE_TEXT, LINE_TEXT)
FORMATS = [
    Format("bilingual_pairs/en-de/train_100k.de", "pairs", PAIR, lambda row: ("German", *row), (), pairs),
    Format("bilingual_pairs/en-de/train_100k.en", "pairs", PAIR, lambda row: ("German", *row[::-1]), (), pairs),
    Format(
        "query_translation/math.json",
        "json",
        MATH,
        math_row,
        (("lang",), ("query",), ("response",)),
        augmentation("math"),
        tuple((("lang",), name) for name in LANGUAGE_FAULTS),
    ),
    x_csqa("query_translation/x-csqa/train_de.jsonl", augmentation("x-csqa")),
    x_csqa("evaluation/x-csqa/de/dev.jsonl", evaluation("x-csqa")),
    Format(
        "query_translation/xnli_dev.json",
        "json",
        st.fixed_dictionaries(XNLI | {"language": NAMES}),
        xnli_row,
        XNLI_TEXTS,
        augmentation("xnli"),
        XNLI_FAULTS + tuple((("language",), name) for name in LANGUAGE_FAULTS),
    ),
    Format(
        "evaluation/xnli/test.json",
        "json",
        st.fixed_dictionaries(XNLI | {"language": st.just("German")}),
        german_xnli_row,
        XNLI_TEXTS,
        evaluation("xnli"),
        XNLI_FAULTS,
    ),
    Format(
        "evaluation/mgsm/mgsm_de.tsv",
        "tsv",
        st.tuples(COLUMN_TEXT, NUMBER),
        mgsm_row,
        (),
        evaluation("math"),
    ),
    Format(
        "evaluation/msvamp/test_German.jsonl",
        "jsonl",
        MSVAMP,
        msvamp_row,
        (("m_query",), ("response",)),
        evaluation("math_msvamp"),
        tuple((("response",), answer) for answer in ("drei", "²", "1e999", "9" * 5000)),
    ),
]
JSON_FORMATS = [form for form in FORMATS if form.kind.startswith("json")]
each_format = pytest.mark.parametrize("form", FORMATS, ids=str)
each_json_format = pytest.mark.parametrize("form", JSON_FORMATS, ids=str)


# ---------------------------------------------------------------------------------------------------------------------
# Writing files: pieces of bytes, of which some are rows


@dataclass(frozen=True)
class Piece:
    data: bytes
    row: int | None = None


@dataclass
class File:
    """A file in the making: the known rows' values, the pieces that hold them, and for pairs the other side's file."""

    form: Format
    values: list
    ascii: bool
    bom: bool
    pieces: list[Piece] = field(default_factory=list)
    other: bytes | None = None
    empty: int = 0  # pairs with an empty side

    def at(self, row: int) -> int:
        return next(i for i, piece in enumerate(self.pieces) if piece.row == row)

    def lines(self, row: int) -> tuple[int, int]:
        """First and last line of a row."""
        first = 1 + sum(piece.data.count(b"\n") for piece in self.pieces[: self.at(row)])
        return first, first + self.pieces[self.at(row)].data.count(b"\n")

    def put(self, row: int, data: bytes) -> None:
        self.pieces[self.at(row)] = Piece(data, row)

    def data(self) -> bytes:
        return BOM * self.bom + b"".join(piece.data for piece in self.pieces)

    def expected(self, rows: int | None = None) -> list[Expected]:
        values = self.values[:rows]
        if self.form.kind == "pairs":
            values = [tuple(side.strip() for side in value) for value in values]
        return [self.form.expected(value) for value in values]


DEEP = json.loads("[" * 80 + "]" * 80)
JUNK = st.sampled_from(
    [
        None,
        True,
        float("nan"),
        float("-inf"),
        10**4000,
        -1e300,
        "x\n\0\x85",
        [[[]]],
        {"data": [{}]},
        DEEP,
    ]
)


def encode(value, ascii_only: bool, indent: int | None = None) -> bytes:
    return json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()


@st.composite
def files(draw, form: Format) -> File:
    """A valid file of 2 to 5 known rows in a harmless disguise (see the top of this file)."""
    values = draw(st.lists(form.row, min_size=2, max_size=5))
    random.Random(draw(st.integers(0, 99))).shuffle(values)
    file = File(form, values, ascii=draw(st.booleans()), bom=draw(st.booleans()))
    if form.kind == "json":
        _draw_list(draw, file)
    else:
        _draw_lines(draw, file)
    if draw(st.booleans()):
        file.pieces = [replace(piece, data=piece.data.replace(b"\n", b"\r\n")) for piece in file.pieces]
    return file


def _draw_keys(draw, value):
    """Another order of the keys, and some that no reader knows."""
    if not isinstance(value, dict):
        return value
    more = draw(st.dictionaries(st.sampled_from(["extra", "Query", "", "data", "id"]), JUNK, max_size=2))
    keys = draw(st.permutations([*value, *(key for key in more if key not in value)]))
    return {key: value.get(key, more.get(key)) for key in keys}


def _draw_list(draw, file: File) -> None:
    indent = draw(st.sampled_from([None, 0, 1]))
    gap = draw(st.sampled_from(["", "\n", "\n\n \t", " "])).encode()
    rows = [Piece(encode(_draw_keys(draw, value), file.ascii, indent), i) for i, value in enumerate(file.values)]
    before, after = b"[", b"]"
    if draw(st.booleans()):
        keys = st.dictionaries(st.sampled_from(["version", "Data", "more", ""]), JUNK, max_size=2)
        head, tail = draw(keys), draw(keys)
        # Plain keys of a wrapper must differ, as everywhere.
        tail = {f"{key} after": value for key, value in tail.items()}
        before = b"{" + b"".join(encode(k, True) + b": " + encode(v, True) + b",\n" for k, v in head.items())
        before += b'"data":' + gap + b"["
        after = b"]" + b"".join(b"," + encode(k, True) + b":" + encode(v, True) for k, v in tail.items()) + b"}"
    file.pieces = [Piece(gap + before + gap)]
    for row in rows:
        file.pieces += [row, Piece(gap + b"," + gap)]
    file.pieces[-1] = Piece(gap + after + gap)


def _draw_lines(draw, file: File) -> None:
    kind, other = file.form.kind, []
    blank = st.tuples(*[st.sampled_from(["", " ", " \t", "\u2028"])] * 2)
    for i, value in enumerate(file.values):
        for here, beside in draw(st.lists(blank, max_size=2)):
            # In pairs, a blank line is an empty side.
            sides = (here, draw(st.sampled_from([beside, "one"])))
            file.pieces += [Piece(sides[0].encode()), Piece(b"\n")]
            other.append(sides[1])
            file.empty += 1
        if kind == "jsonl":
            data = encode(_draw_keys(draw, value), file.ascii)
        else:
            data = (value[0] if kind == "pairs" else "\t".join(value)).encode()
        file.pieces += [Piece(data, i), Piece(b"\n")]
        other.append(value[1] if kind == "pairs" else "")
    if draw(st.booleans()):
        file.pieces.pop()
    elif kind != "pairs":
        file.pieces += draw(st.sampled_from([[], [Piece(b"\n")], [Piece(b" \n\n")]]))
    if kind == "pairs":
        file.other = "".join(f"{side}\n" for side in other).encode()
    else:
        file.empty = 0


# ---------------------------------------------------------------------------------------------------------------------
# Reading them


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("datas")


@dataclass
class Outcome:
    """Outcome of reading a file: the rows it gave, its one-line refusal, the line it names, its warnings."""

    rows: list[Expected]
    message: str | None
    line: int | None
    warnings: list[str]


def read(root, form: Format, data: bytes, other: bytes | None = None) -> Outcome:
    path = root / form.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    if other is not None:
        path.with_suffix(".en" if path.suffix == ".de" else ".de").write_bytes(other)
    rows, message, line, log = [], None, None, io.StringIO()
    with contextlib.redirect_stderr(log):
        try:
            for example in form.read(root):
                assert example.source in example.prompt and example.id.startswith(
                    f"{LANGUAGES[example.language].code}-"
                )
                rows.append((example.language, example.source, example.target))
        except UserError as error:
            message = str(error)
            assert len(message.splitlines()) == 1 and message.isprintable(), message[:1000]
            assert str(path) in message and len(message) - len(str(path)) <= MESSAGE_LIMIT, message[:1000]
            found = re.match(rf"{re.escape(str(path))}:(\d+): \S", message)
            line = int(found[1]) if found else None
            assert line is None or 1 <= line <= data.count(b"\n") + 1
    return Outcome(rows, message, line, log.getvalue().splitlines())


def assert_empty_sides_counted(outcome: Outcome, empty: int) -> None:
    counts = [re.search(r": (\d+) pairs with an empty side are left out", warning) for warning in outcome.warnings]
    assert [int(count[1]) for count in counts] == ([empty] if empty else [])


@each_format
@hostile(25)
@given(data=st.data())
def test_harmless_disguise_loads_every_row_exactly(root, form, data):
    """A row lost, doubled, cut or changed by a BOM, CRLF, blank lines, odd characters, key order or layout."""
    file = data.draw(files(form))
    outcome = read(root, form, file.data(), file.other)
    assert outcome.message is None
    assert outcome.rows == file.expected()
    assert_empty_sides_counted(outcome, file.empty)


# ---------------------------------------------------------------------------------------------------------------------
# One fault in one known row

WRONG = [None, True, 7, 1.5, float("nan"), 10**4000, [], {}, ["text"], {"text": "text"}, DEEP]
BAD_UTF8 = [b"\xff", b"\xfe", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf5\x80\x80\x80"]


def with_field(value: dict, keys: tuple, new) -> dict:
    """A copy with another value under nested keys; `...` takes the key away."""
    copy = json.loads(json.dumps(value))
    holder = copy
    for key in keys[:-1]:
        holder = holder[key]
    if new is ...:
        del holder[keys[-1]]
    else:
        holder[keys[-1]] = new
    return copy


def bad_bytes(draw, file: File, row: int) -> bytes:
    whole = file.pieces[file.at(row)].data
    at = draw(st.integers(0, len(whole)))
    return whole[:at] + draw(st.sampled_from([*BAD_UTF8, b"\0"])) + whole[at:]


def bad_tsv(draw, file: File, row: int) -> bytes:
    question, answer = file.values[row]
    lines = [
        question,
        f"{question}\t",
        f"\t{answer}",
        f"{question}\t{answer}\t",
        f"{question}\tdrei",
        f"{question}\t \t1",
    ]
    return draw(st.sampled_from([line for line in lines if line.strip()])).encode()


def bad_json_value(draw, file: File, row: int) -> bytes:
    """Valid JSON that is not a row of this file."""
    value, form = file.values[row], file.form
    keys = draw(st.sampled_from(form.texts))
    half_pair = draw(JSON_TEXT) + draw(st.sampled_from(["\ud800", "\udfff", "\ud83dx", "\udc00\ud800"]))
    news = st.sampled_from([..., "", " \n\u2028", half_pair, *WRONG])
    faults = [
        with_field(value, keys, draw(news)),
        draw(st.sampled_from([*WRONG, "text", [value], value.get("response", 0)])),
    ]
    faults += [with_field(value, *fault) for fault in form.faults]
    fault = draw(st.sampled_from(faults))
    return encode(fault, True)


def bad_json_texts(draw, file: File, row: int) -> list[bytes]:
    """Rows that are not valid JSON, or JSON whose plain reading would lose something."""
    whole = file.pieces[file.at(row)].data
    inside = whole[1:]
    junk = encode(draw(JSON_TEXT), True)
    return [
        whole[: draw(st.integers(1, len(whole) - 1))],
        b'{"x": 1, "x": 2, ' + inside,
        b'{"x": {"y": [{"z": 1, "z": 1}]}, ' + inside,
        b'{"x": ' + b"9" * 5000 + b", " + inside,
        b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b", " + inside,
        b'{"x": ' + b'{"y": ' * 100_000 + b", " + inside,
        b'{"x": ' + b"[" * 100_000,
        b'{"x": "\x01", ' + inside,
        b'{"x": "\t", ' + inside,
        b'{"x": "\\x41", ' + inside,
        b'{"x": "\\u12", ' + inside,
        b"{'x': 1, " + inside,
        b"{x: 1, " + inside,
        b'{"x": 01, ' + inside,
        b'{"x": nan, ' + inside,
        b"{, " + inside,
        b"{7: 1, " + inside,
        whole + b" " + whole,
        whole + junk,
        junk + whole,
        whole + b"}",
    ]


def bad_json_text(draw, file: File, row: int) -> bytes:
    return draw(st.sampled_from(bad_json_texts(draw, file, row)))


DAMAGE = {
    "pairs": [bad_bytes],
    "tsv": [bad_bytes, bad_tsv, bad_tsv],
    "json": [bad_bytes, bad_json_value, bad_json_value, bad_json_text, bad_json_text],
}
DAMAGE["jsonl"] = DAMAGE["json"]


@each_format
@hostile(50)
@given(data=st.data())
def test_damaged_row_is_refused_at_its_line_after_the_rows_before_it(root, form, data):
    """A faulty row skipped or repaired silently, blamed on another line, echoed whole, or a traceback."""
    file = data.draw(files(form))
    other = file.other
    row = data.draw(st.integers(0, len(file.values) - 1))
    damage = data.draw(st.sampled_from(DAMAGE[form.kind]))
    file.put(row, damage(data.draw, file, row))
    if data.draw(st.booleans()) and form.kind != "pairs":
        del file.pieces[file.at(row) + 1 :]
    outcome = read(root, form, file.data(), other)
    assert outcome.message is not None
    first, last = file.lines(row)
    before_next = [b"".join(p.data for p in file.pieces[:i]) for i, p in enumerate(file.pieces) if p.row == row + 1]
    if form.kind == "json" and damage is bad_json_text:
        # A syntax error is named where it is, at the latest at the next sign after the row.
        last = 1 + (before_next + [file.data()])[0].count(b"\n")
    assert first <= outcome.line <= (last if form.kind == "json" else first)
    if form.kind == "json" and damage is not bad_json_value:
        # The row may be whole and what follows it wrong; bad UTF-8 is found before any row is.
        assert outcome.rows == file.expected()[: len(outcome.rows)] and len(outcome.rows) <= row + 1
    else:
        assert outcome.rows == file.expected(row)


@each_json_format
@hostile(2)
@given(data=st.data())
def test_every_kind_of_broken_json_is_refused_at_its_row(root, form, data):
    """Equal keys of which the last one wins, or nesting and integers that Python refuses in its own words."""
    file = data.draw(files(form))
    row = data.draw(st.integers(0, len(file.values) - 1))
    for broken in bad_json_texts(data.draw, file, row):
        file.put(row, broken)
        outcome = read(root, form, file.data())
        assert outcome.message is not None and outcome.line >= file.lines(row)[0], broken[:200]
        assert outcome.rows == file.expected()[: len(outcome.rows)] and len(outcome.rows) <= row + 1


# ---------------------------------------------------------------------------------------------------------------------
# Faults of a whole file


def whole_file_faults(form: Format, data: bytes) -> Iterator[bytes]:
    yield from (b"", BOM, b" \n\n", b"\n" * 9, b"\r\n \r\n")
    plain = data.removeprefix(BOM).decode()
    yield from (plain.encode(code) for code in ("utf-16", "utf-32", "utf-16-le", "utf-16-be"))
    yield "\ufeff".encode("utf-16-be") + plain.encode("utf-16-be")
    yield b"\0" * len(data)
    yield data + b"\0" * 4096
    if form.kind in ("tsv", "pairs"):
        return
    yield from (data + tail for tail in (b"]", b"{", b"x", b"\xef\xbb\xbf", b"\n[", b',{"a":1}', b"\x0c\n."))
    yield from (BOM * 2 + plain.encode(), b"," + plain.encode(), b"[" * 100_000 + plain.encode())
    if form.kind == "json":
        rows = plain.strip()
        rows = rows if rows.startswith("[") else json.dumps(json.loads(rows)["data"])
        yield from (
            template.replace("ROWS", rows).replace("LAST", rows.rstrip()[:-1]).encode()
            for template in (
                '{"data": ROWS, "data": ROWS}',
                '{"data": ROWS, "x": 1, "data": []}',
                '{"x": 1, "x": 2, "data": ROWS}',
                '{"data": ROWS, "x": 1, "x": 1}',
                '{7: 1, "data": ROWS}',
                '{"data": ROWS, [3]: 1}',
                '{"data": ROWS,}',
                '{"data": ROWS',
                '{"rows": ROWS}',
                '{"data": {"rows": ROWS}}',
                '{"data": null}',
                '{"data": []}',
                "[]",
                "{}",
                "LAST",
                "LAST,]",
                "LAST,,]",
                "[ROWS]",
                "ROWSROWS",
                "null",
                '"text"',
            )
        )


@each_format
@hostile(4)
@given(data=st.data())
def test_faulty_file_is_refused_whatever_it_holds(root, form, data):
    """A file in another encoding, half a list, or rows under a second "data" taken for the whole."""
    file = data.draw(files(form))
    for content in whole_file_faults(form, file.data()):
        outcome = read(root, form, content, file.other)
        assert outcome.message is not None, content[:200]
        # Rows that were given before the fault showed are rows of the file, in order.
        assert outcome.rows == file.expected()[: len(outcome.rows)]
        if content.startswith((b"\xff\xfe", b"\xfe\xff")) and "lines but" not in outcome.message:
            assert outcome.line == 1 and "UTF-16" in outcome.message and outcome.rows == []


@pytest.mark.parametrize("form", [form for form in FORMATS if form.kind != "json"], ids=str)
def test_lines_that_end_in_cr_alone_are_refused_not_read_as_one_row(root, form):
    line = {"pairs": "eins", "tsv": "Wie viele?\t3", "jsonl": '{"m_query": "q", "response": "1"}'}[form.kind]
    outcome = read(root, form, f"{line}\r{line}\r{line}".encode(), b"one\n")
    assert outcome.line == 1 and "CR alone" in outcome.message


# ---------------------------------------------------------------------------------------------------------------------
# Arbitrary bytes against a strict reading


def strict_rows(form: Format, data: bytes, other: bytes | None) -> tuple[list[Expected], int | None, int]:
    """Content of a file: its rows up to the first fault, that fault's line (0 unknown, None for none), empty pairs."""
    if form.kind == "json":
        return *_strict_list(form, data), 0
    lines = data.removesuffix(b"\n").split(b"\n") if data else []
    others = other.removesuffix(b"\n").split(b"\n") if other is not None else lines
    if len(lines) != len(others):
        return [], 0, 0
    rows, empty, line = [], 0, None
    for line, (raw, beside) in enumerate(zip(lines, others, strict=True), start=1):
        raw = raw.removeprefix(BOM) if line == 1 else raw
        try:
            need(b"\0" not in raw and not (data.count(b"\n") == 0 and b"\r" in raw.rstrip(b"\r")))
            content = raw.decode()
            if form.kind == "pairs":
                sides = content.strip(), beside.decode().strip()
                empty += not all(sides)
                rows += [form.expected(sides)] if all(sides) else []
            elif content.strip():
                rows.append(form.expected(content.split("\t") if form.kind == "tsv" else strict_json(content)))
        except (Faulty, ValueError, LookupError, TypeError):
            return rows, line, 0
    return rows, None if rows else 0, empty


def _strict_list(form: Format, data: bytes) -> tuple[list[Expected], int | None]:
    try:
        values = strict_json(data.removeprefix(BOM).decode())
        values = values["data"] if isinstance(values, dict) else values
        need(isinstance(values, list))
    except (Faulty, ValueError, LookupError):
        return [], 0
    rows = []
    for value in values:
        try:
            rows.append(form.expected(value))
        except (Faulty, LookupError, TypeError):
            return [row for row in rows if row], 0
    rows = [row for row in rows if row]
    return rows, None if rows else 0


def strict_json(content: str):
    def unique(pairs):
        need(len(dict(pairs)) == len(pairs))
        return dict(pairs)

    return json.loads(content, object_pairs_hook=unique)


TOKENS = [
    "\n",
    "\r",
    "\r\n",
    "\t",
    "\0",
    '"',
    "\\",
    ",",
    ":",
    "[",
    "]",
    "{",
    "}",
    " ",
    "\ufeff",
    "\u2028",
    "\x85",
    "\x1d",
]
TOKENS += ["\\ud800", "\\u0000", "NaN", "-Infinity", '"x":1,', "null", '"data":[', "9" * 5000, "[" * 3000, "ä"]
INSERTS = st.sampled_from([token.encode() for token in TOKENS] + BAD_UTF8) | st.binary(min_size=1, max_size=3)


def mutate(draw, data: bytes) -> bytes:
    """Cuts, moves, doubles or replaces bytes or lines."""
    at, to = sorted(draw(st.tuples(st.integers(0, len(data)), st.integers(0, len(data)))))
    ends = [i for i, byte in enumerate(data) if byte == 10] or [len(data)]
    if draw(st.booleans()):  # whole lines
        at, to = sorted(draw(st.tuples(st.sampled_from(ends), st.sampled_from(ends))))
    part, new = data[at:to], draw(INSERTS)
    other = draw(st.integers(0, len(data)))
    rest = data[:at] + data[to:]
    results = [
        data[:at],
        data[to:],
        rest,
        rest[:other] + part + rest[other:],
        data[:to] + part + data[to:],
        data[:at] + new + data[at:],
        data[:at] + new + data[at + len(new) :],
        data[:at] + new + data[to:],
        data[:at] + bytes([(data[at : at + 1] or b"x")[0] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :],
        data[:at] + part.swapcase() + data[to:],
    ]
    return draw(st.sampled_from(results))


@each_format
@hostile(80)
@given(data=st.data())
def test_any_mutation_loads_what_a_strict_reading_finds_or_is_refused(root, form, data):
    """Rows read and rows refused that together are not the rows there; a good file refused; a bad one accepted."""
    file = data.draw(files(form))
    content = file.data()
    for _ in range(data.draw(st.integers(1, 3))):
        content = mutate(data.draw, content)
    rows, fault, empty = strict_rows(form, content, file.other)
    outcome = read(root, form, content, file.other)
    assert (outcome.message is None) == (fault is None), (outcome.message, content)
    if fault is None or form.kind != "json":
        assert outcome.rows == rows
        assert fault in (None, 0) or outcome.line == fault
    if fault is None:
        assert_empty_sides_counted(outcome, empty)


# ---------------------------------------------------------------------------------------------------------------------
# Single claims


@hostile(40)
@given(
    sides=st.lists(
        st.tuples(*[st.sampled_from(["eins", "zwei", "", " ", "\t", "\u2028", "\x85", "\r"])] * 2), min_size=1
    ),
    train_num=st.none() | st.integers(1, 4),
)
def test_pairs_read_and_pairs_left_out_are_the_pairs_there(root, sides, train_num):
    """A pair with an empty side that neither comes out nor is counted, or a count of more than was looked at."""
    form = replace(FORMATS[0], read=lambda root: read_pairs(root, GERMAN, train_num))
    sources, targets = ("".join(f"{pair[i]}\n" for pair in sides).encode() for i in (0, 1))
    outcome = read(root, form, sources, targets)
    full = [i for i, pair in enumerate(sides) if all(side.strip() for side in pair)]
    if not full:
        assert "no pairs" in outcome.message
        return
    taken = full[:train_num]
    assert outcome.rows == [("German", *sides[i]) for i in taken]
    looked_at = taken[-1] + 1 if train_num is not None and len(full) > train_num else len(sides)
    looked_at = full[train_num] if train_num is not None and len(full) > train_num else looked_at
    assert_empty_sides_counted(outcome, looked_at - len(taken))


@each_json_format
def test_nesting_up_to_any_depth_loads_or_is_refused(root, form):
    """A value that the JSON decoder just still takes and that the error message can then not show."""
    row = {
        "math.json": {"lang": "German", "query": "q", "response": "1"},
        "test_German.jsonl": {"m_query": "q", "response": "1"},
    }.get(str(form))
    row = row or {"sentence1": "a", "sentence2": "b", "label": "neutral", "language": "German"}
    if form.expected is x_csqa_row:
        row = {"question": {"stem": "s", "choices": [{"label": "A", "text": "x"}]}, "answerKey": "A"}
    depths = [*range(850, 1010), 5_000, 100_000]
    for depth in depths:
        deep = "[" * depth + "]" * depth
        for keys, loads in (((*form.texts[0][:-1], "unknown"), True), (form.texts[0], False)):
            content = json.dumps([with_field(row, keys, "DEEP")]).replace('"DEEP"', deep)
            outcome = read(root, form, (content if form.kind == "json" else content[1:-1]).encode())
            assert outcome.message is None if loads and depth < 900 else outcome.message or depth < 1000
            assert outcome.message is None or outcome.line == 1
            assert (outcome.rows == []) == (outcome.message is not None)


def test_value_too_deep_for_repr_is_still_shown():
    value = []
    for _ in range(200_000):
        value = [value]
    assert preview(value) == "a deeply nested list"


@each_format
def test_line_of_ten_megabytes_loads_in_bounded_memory_and_is_never_echoed(root, form):
    """A copy of the line for each field or line, or an error as long as the line."""
    size = 10_000_000
    long = "ä" * (size // 2)
    values = {
        "pairs": (long, "one"),
        "tsv": (long, "3"),
        "math.json": {"lang": "German", "query": long, "response": "1"},
        "test_German.jsonl": {"m_query": long, "response": "1"},
    }
    value = values.get(form.kind) or values.get(str(form))
    value = value or {"sentence1": long, "sentence2": "b", "label": "neutral", "language": "German"}
    if form.expected is x_csqa_row:
        value = {"question": {"stem": long, "choices": [{"label": "A", "text": "x"}]}, "answerKey": "A"}
    if form.kind in ("pairs", "tsv"):
        data = "\t".join(value).encode() if form.kind == "tsv" else long.encode()
    else:
        data = encode([value] if form.kind == "json" else value, False)
    tracemalloc.start()
    outcome = read(root, form, data + b"\n", b"one\n")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert outcome.rows == [form.expected(value)]
    assert peak < 8 * size
    for broken in (data[: size // 2 * 2 - 1], data.replace("ä".encode(), b"\xff", 1), data + b"\0", long.encode()):
        refused = read(root, form, broken + b"\n" * 2, b"one\n" * 2)
        assert refused.message or form.kind == "pairs"


@pytest.mark.parametrize("unit", [",11", ",1", "1,1", "1/", "1\u00a011", "1.1.", "-1", "1e1", "٣,", "$-", "1,111,"])
def test_time_to_read_a_number_grows_with_its_length_not_its_square(unit):
    """A gold answer of 100 KB, such as 1,11,11,11,…, that kept the reader busy for hours."""
    start = time.process_time()
    corrected_number("1" + unit * (600_000 // len(unit)) + " x")
    # A hang, not a speed: the quadratic search needed half an hour for this.
    assert time.process_time() - start < 60


@pytest.mark.parametrize(
    "written", ["a\\u0000b", "a\u0085b", "a\u2028b", "a\u001fb".replace("\x1f", "\\u001d"), "a\\rb"]
)
def test_odd_characters_inside_a_text_are_kept(root, written):
    form = next(form for form in FORMATS if str(form) == "test_German.jsonl")
    outcome = read(root, form, f'{{"m_query": "{written}", "response": "1"}}\n'.encode())
    assert outcome.rows == [("German", json.loads(f'"{written}"'), "1")]


def test_label_with_a_line_break_does_not_break_the_message(root):
    """The options' labels were joined into the error as they came."""
    choices = [{"label": "A\nB", "text": "x"}, {"label": "C" * 3000, "text": "y"}]
    row = {"question": {"stem": "s", "choices": choices}, "answerKey": "Z"}
    with pytest.raises(DataError, match=r"dev\.jsonl:1: answerKey must be one of 'A\\nB, C+\.\.\., found 'Z'$"):
        path = root / "evaluation/x-csqa/de/dev.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(row, False))
        list(find_task("x-csqa").read_evaluation(root, GERMAN))
