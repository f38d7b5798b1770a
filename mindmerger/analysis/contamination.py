"""Test items that stand in training text, per language.

    python -m mindmerger.analysis.contamination --train datas/query_translation/math.json --fields query --task math

After the study of benchmark leakage of arXiv 2311.01964. Both sides are normalised: NFKC, lower case, punctuation and
symbols dropped. An item's n-grams are 13 consecutive words; in Chinese, Japanese and Thai, which do not put blanks
between words, 30 consecutive characters.

    share of an item = its n-grams that stand in the training text / all its n-grams
    contaminated: share >= 0.7 (--threshold)        any hit: share > 0, a screen only

An item with fewer words (characters) than one n-gram counts when a whole training text equals it. Each item is looked
up on its own and on its English side, the parallel English item: training data translated from English leaks that one.
The text of an item is its question, stem or premise (ours); longest is the longest stretch of words (characters) that
one training text shares with it (ours). The training text is read as a stream: memory grows with the test set alone.
"""

import argparse
import json
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mindmerger.evaluation.items import add_item_flags, find_items
from mindmerger.runtime.command import CommandParser, number_where, run_main, versions
from mindmerger.runtime.files import model_path, write_csv_atomic, write_json_atomic
from mindmerger.runtime.processes import log, progress_bar
from mindmerger.tasks.base import Task
from mindmerger.tasks.examples import read_parallel, varying_text
from mindmerger.tasks.languages import Language, find_language
from mindmerger.tasks.readers import DataError, Record, find_file, read_lines, read_records

WORDS_PER_GRAM = 13
CHARACTERS_PER_GRAM = 30
# Scripts that put no blanks between words: as words, an item would be two or three units long.
CHARACTER_SCRIPTS = ("Hans", "Hant", "Jpan", "Thai", "Laoo", "Khmr", "Mymr", "Tibt")
THRESHOLD = 0.7

_CHUNK = 1 << 20  # characters read at once from a .json file
_LARGEST_ELEMENT = 1 << 26  # beyond that a broken file is to blame, whose rest would fill the memory


class _Kept(dict):
    """For str.translate: what a character becomes, looked up once for each character there is."""

    # Filled as characters come: a table of all of Unicode would be made at every start, for a few hundred of them.
    def __missing__(self, code: int):
        character = chr(code)
        category = unicodedata.category(character)
        # Before the categories: line ends and tabs are control characters, and dropping them would glue words together.
        if character.isspace():
            kept = " "
        elif category[0] in "PS" or category in ("Cf", "Cc"):
            kept = None
        else:
            kept = character
        self[code] = kept
        return kept


_KEPT = _Kept()


def normalise(text: str) -> str:
    """Normalises a text: NFKC, lower case, no punctuation, symbols or invisible characters, single blanks."""
    text = unicodedata.normalize("NFKC", text).lower()
    # Again, since lower() can leave what NFKC would compose: without it the same word would have two spellings.
    return " ".join(unicodedata.normalize("NFKC", text).translate(_KEPT).split())


def splits_into_words(language: Language) -> bool:
    """Tells whether the language's n-grams are of words (else of characters); they are where its script is unknown."""
    return (language.nllb or "").rpartition("_")[2] not in CHARACTER_SCRIPTS


@dataclass
class Item:
    """One test item. hits: for each of its n-grams whether any training text holds it; longest: in `unit`s."""

    id: str
    unit: str  # "word" or "character"
    units: int
    short: bool
    hits: bytearray
    longest: int = 0
    where: str | None = None  # file:row of the training text with the longest stretch

    @property
    def share(self) -> float:
        """Returns the share of the n-grams that were found."""
        return sum(self.hits) / len(self.hits)


@dataclass
class _Grams:
    """The items of one unit: {n-gram: [(item, position)]}, and whole short items by their text."""

    size: int
    joiner: str
    grams: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    short: dict[str, list[int]] = field(default_factory=dict)


class TestIndex:
    """All test items, and what `look_up` has found of them so far."""

    __test__ = False  # no class of tests, whatever its name says

    def __init__(self):
        self.items: list[Item] = []
        self.kinds = {"word": _Grams(WORDS_PER_GRAM, " "), "character": _Grams(CHARACTERS_PER_GRAM, "")}

    def add(self, id: str, text: str, language: Language) -> None:
        """Adds a test item."""
        unit = "word" if splits_into_words(language) else "character"
        kind, units = self.kinds[unit], _units(normalise(text), unit)
        # By text and not by hash: a test set is small, and two n-grams that share a hash would be a false hit.
        number, grams = len(self.items), len(units) - kind.size + 1
        self.items.append(Item(id, unit, len(units), grams < 1, bytearray(max(grams, 1))))
        # What is shorter than one n-gram is found by chance inside any text: only a whole text that equals it counts.
        if grams < 1:
            if units:
                kind.short.setdefault(kind.joiner.join(units), []).append(number)
            return
        for position in range(grams):
            gram = kind.joiner.join(units[position : position + kind.size])
            kind.grams.setdefault(gram, []).append((number, position))

    def look_up(self, text: str, where: str) -> None:
        """Marks what one training text shares with the items."""
        text = normalise(text)
        # Both ways: nothing tells the language of a training text, and files mix them.
        for unit, kind in self.kinds.items():
            units = _units(text, unit)
            if len(units) < kind.size:
                for number in kind.short.get(kind.joiner.join(units), ()):
                    self._mark(number, 0, len(units), where)
                continue
            # A dict look-up per word of training text is all that most of it costs: hardly any n-gram is in the index.
            # runs: how many n-grams in a row, ending here, are also in a row in the item.
            runs: dict[tuple[int, int], int] = {}
            for start in range(len(units) - kind.size + 1):
                found = kind.grams.get(kind.joiner.join(units[start : start + kind.size]))
                if found is None:
                    runs = {}
                    continue
                runs = {(item, at): runs.get((item, at - 1), 0) + 1 for item, at in found}
                for (item, at), run in runs.items():
                    self._mark(item, at, run + kind.size - 1, where)

    def _mark(self, number: int, position: int, stretch: int, where: str) -> None:
        item = self.items[number]
        # Marked, not counted: a text that stands in the training data a thousand times covers no more of the item.
        item.hits[position] = 1
        if stretch > item.longest:
            item.longest, item.where = stretch, where


def _units(normalised: str, unit: str) -> list[str] | str:
    # Blanks in these three languages follow the typist, not the words.
    return normalised.split() if unit == "word" else normalised.replace(" ", "")


def stream_json_list(path: Path) -> Iterator[tuple[Record, int]]:
    """Yields (element, bytes read for it) of a JSON list, holding one element and a chunk in memory.

    Raises:
        DataError: for a file that is not a list, not UTF-8 or not valid JSON, naming the element.
    """
    decoder = json.JSONDecoder()
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            buffer, number = file.read(_CHUNK).lstrip(), 0
            if not buffer.startswith("["):
                raise DataError(f"{path}: expected a JSON list; a file of one object per line must end in .jsonl")
            buffer = buffer[1:]
            while True:
                buffer = buffer.lstrip()
                if number and buffer.startswith(","):
                    buffer = buffer[1:].lstrip()
                if buffer.startswith("]"):
                    return
                # json.load would need the whole file in memory, several times over as Python objects.
                try:
                    value, end = decoder.raw_decode(buffer)
                except json.JSONDecodeError as error:
                    # An error at a chunk's end may only mean that the element continues: more is read before the file
                    # is blamed.
                    more = file.read(_CHUNK) if len(buffer) < _LARGEST_ELEMENT else ""
                    if not more:
                        raise DataError(f"{path}: element {number + 1} is not valid JSON ({error.msg})") from None
                    buffer += more
                    continue
                number += 1
                yield Record(path, number, value), len(buffer[:end].encode())
                buffer = buffer[end:]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason})") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def stream_texts(path: Path, fields: list[str] | None) -> Iterator[tuple[str, str, int]]:
    """Yields (text, file:row, bytes read for it) of a .json list, a .jsonl or .tsv file, or any file of lines.

    Args:
        fields: names of the fields to read (`question.stem` for a nested one); None for every text in a row.
    """
    if path.suffix in (".jsonl", ".tsv"):
        # Line by line as well: read_records holds one row.
        records = ((record, len(str(record.value))) for record in read_records(path))
    elif path.suffix == ".json":
        records = stream_json_list(path)
    else:
        records = ((Record(path, number, text), len(text.encode()) + 1) for number, text in read_lines(path))
    for record, size in records:
        where = f"{path}:{record.line}"
        # Every text where no field is named: one field too many finds a leak too much, one too few overlooks it.
        texts = list(_strings(record.value)) if fields is None else [_field(record, name) for name in fields]
        for i, text in enumerate(texts):
            yield text, where, size if i == 0 else 0


def _field(record: Record, name: str) -> str:
    if not isinstance(record.value, dict):
        raise record.fail(f"--fields {name} was asked for but this row is not a JSON object")
    # Empty texts are common in training data and hold no n-gram.
    return record.text(*name.split("."), may_be_empty=True)


def _strings(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def look_up_files(index: TestIndex, paths: list[Path], fields: list[str] | None) -> int:
    """Looks up every training text; returns how many there were. Shows a progress bar."""
    texts, sizes = 0, [path.stat().st_size for path in paths]
    with progress_bar(total=sum(sizes), unit="B", unit_scale=True, desc="training text") as progress:
        for i, path in enumerate(paths):
            # Sizes of texts are near the bytes read, not equal: the bar is put right at the end of each file.
            for text, where, size in stream_texts(path, fields):
                texts += 1
                index.look_up(text, where)
                progress.update(min(size, max(0, sum(sizes[: i + 1]) - progress.n)))
            progress.update(sum(sizes[: i + 1]) - progress.n)
    return texts


def check(task: Task, data_root, languages: list[Language], paths: list[Path], fields: list[str] | None, threshold):
    """Looks the test items of a task up in training text.

    Returns:
        one record per item: id, language, unit, units, short, ngrams, hits, share, longest, where, any_hit,
        contaminated, and under "english" the same judgement of the parallel English item (None where there is none);
        and the number of training texts.
    """
    # English always, asked for or not: it is the side on which training data translated from English leaks.
    english = find_language("English")
    # One pass over the training text for all languages: it may be far larger than the test set.
    index, at = TestIndex(), {}
    for language in dict.fromkeys([*languages, english]):
        for key, example in read_parallel(task, data_root, language).items():
            at[language, key] = len(index.items)
            index.add(example.id, varying_text(example), language)
    texts = look_up_files(index, paths, fields)
    records = []
    for (language, key), number in at.items():
        if language not in languages:
            continue
        own = _judge(index.items[number], threshold)
        other = None
        if language != english and (english, key) in at:
            judged = _judge(index.items[at[english, key]], threshold)
            other = {name: judged[name] for name in ("id", "share", "longest", "where", "any_hit", "contaminated")}
        records.append({"id": own.pop("id"), "language": language.name, **own, "english": other})
    return records, texts


def _judge(item: Item, threshold: float) -> dict:
    return {
        "id": item.id,
        "unit": item.unit,
        "units": item.units,
        "short": item.short,
        "ngrams": len(item.hits),
        "hits": sum(item.hits),
        "share": round(item.share, 4),
        "longest": item.longest,
        "where": item.where,
        "any_hit": any(item.hits),
        "contaminated": item.share >= threshold,  # not the rounded share: 0.69996 is below 0.7
    }


def is_dirty(record: dict) -> bool:
    """Tells whether an item is contaminated itself or on its English side."""
    # The model may have learnt the item from either side.
    return record["contaminated"] or bool(record["english"] and record["english"]["contaminated"])


def build_table(records: list[dict], results: list[str]) -> list[dict]:
    """Builds one row per language: numbers of items, and per results folder the accuracy (percent) on all, clean and
    dirty items, None where there are none.

    Raises:
        ResultsError: for a results folder without one of the languages, or with none of its items.
    """
    from mindmerger.evaluation.results import ResultsError, read_predictions

    rows = []
    for language in dict.fromkeys(record["language"] for record in records):
        items = [record for record in records if record["language"] == language]
        sides = [record["english"] for record in items if record["english"]]
        row = {
            "language": language,
            "n": len(items),
            "unit": items[0]["unit"],
            "short": sum(record["short"] for record in items),
            "any_hit": sum(record["any_hit"] for record in items),
            "contaminated": sum(record["contaminated"] for record in items),
            "english_any_hit": sum(side["any_hit"] for side in sides),
            "english_contaminated": sum(side["contaminated"] for side in sides),
            "dirty": sum(map(is_dirty, items)),
        }
        for folder in results:
            predictions = read_predictions(folder, language)
            # An evaluation with --limit holds only some of the items.
            known = [record for record in items if record["id"] in predictions]
            if not known:
                raise ResultsError(f"{folder} holds none of the items of {language}: it is another task's evaluation")
            for name, chosen in (
                ("all", known),
                ("clean", [record for record in known if not is_dirty(record)]),
                ("dirty", [record for record in known if is_dirty(record)]),
            ):
                correct = sum(predictions[record["id"]]["correct"] for record in chosen)
                row[f"{folder} n {name}"] = len(chosen)
                row[f"{folder} accuracy {name}"] = round(100 * correct / len(chosen), 2) if chosen else None
        rows.append(row)
    return rows


def format_table(rows: list[dict], results: list[str]) -> str:
    """Formats the table as aligned text."""
    from mindmerger.evaluation.tables import align

    head = ["language", "items", "short", "any hit", "contaminated", "English side", "dirty"]
    cells = [
        [row["language"]]
        + [str(row[name]) for name in ("n", "short", "any_hit", "contaminated", "english_contaminated", "dirty")]
        for row in rows
    ]
    totals = [str(sum(int(line[i]) for line in cells)) for i in range(1, len(head))]
    text = align([head, *cells, ["all", *totals]], rule_before_last=True)
    for folder in results:
        lines = [["language", "all", "clean", "dirty"]]
        for row in rows:
            parts = [(row[f"{folder} accuracy {name}"], row[f"{folder} n {name}"]) for name in lines[0][1:]]
            lines.append([row["language"], *("–" if a is None else f"{a:.1f} (n {n})" for a, n in parts)])
        text += f"\n\n{folder}: accuracy in percent\n{align(lines)}"
    return text


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of the command line."""
    parser = CommandParser(prog="python -m mindmerger.analysis.contamination", description=__doc__)
    parser.add_argument(
        "--train",
        nargs="+",
        required=True,
        metavar="FILE",
        help="training text: .json list, .jsonl, .tsv, or any other file line by line",
    )
    parser.add_argument(
        "--fields",
        help="fields to read of .json and .jsonl rows, with commas: query or question.stem (default: every text)",
    )
    add_item_flags(parser)
    parser.add_argument(
        "--results",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="results folders of evaluations: adds their accuracy on all, clean and dirty items",
    )
    parser.add_argument(
        "--threshold",
        type=number_where(lambda value: 0 < value <= 1, "a number above 0 and at most 1"),
        default=THRESHOLD,
        help="share from which an item is contaminated (default 0.7)",
    )
    parser.add_argument(
        "--output_dir", default="results/contamination", help="folder of the result (default results/contamination)"
    )
    return parser


def write_report(folder: Path, task: Task, settings: dict, rows: list[dict], records: list[dict]) -> None:
    """Writes <task>.json, which holds every item, and <task>.csv, the table."""
    settings = settings | {"command": sys.argv, "versions": versions()}
    write_json_atomic(folder / f"{task.name}.json", {"settings": settings, "languages": rows, "items": records})
    write_csv_atomic(folder / f"{task.name}.csv", [rows[0].keys(), *(row.values() for row in rows)])
    log(f"items and table are in {folder}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; see the module's docstring."""
    from mindmerger.evaluation.results import read_results

    args = build_parser().parse_args(argv)
    task, languages = find_items(args)
    paths = [find_file(".", name) for name in args.train]
    results = [model_path(folder) for folder in args.results]
    for folder in results:
        if (found := read_results(folder)["task"]) != task.name:
            raise DataError(f"{folder} is an evaluation of {found}, not of {task.name}")
    fields = [name.strip() for name in args.fields.split(",")] if args.fields else None
    records, texts = check(task, args.data_root, languages, paths, fields, args.threshold)
    rows = build_table(records, results)
    settings = {
        "task": task.name,
        "train": [str(path) for path in paths],
        "fields": fields,
        "training_texts": texts,
        "words_per_gram": WORDS_PER_GRAM,
        "characters_per_gram": CHARACTERS_PER_GRAM,
        "threshold": args.threshold,
    }
    print(f"{task.name} against {texts} training texts; contaminated: at least {args.threshold:.0%} of the n-grams")
    print(format_table(rows, results))
    write_report(Path(args.output_dir), task, settings, rows, records)
    return 0


if __name__ == "__main__":
    run_main(main, alone=True)
