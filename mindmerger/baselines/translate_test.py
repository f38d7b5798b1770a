"""Translate-test: the questions are translated into English by a machine, and the LLM alone answers the English prompt.

    python -m mindmerger.baselines.translate_test --task math --translator facebook/nllb-200-distilled-600M \\
        --output_dir translations/math
    python run_evaluation.py --llm_only --llm_path LLM --task math --translate_test translations/math

    prompt = template( T(text_1), ..., T(text_n) )

T translates from the question's language into English, each text of a row by itself: the question (math), stem and
options (x-csqa), premise and hypothesis (xnli). The template is the task's own. English questions are left as they are.

The first command writes OUTPUT_DIR/translations.jsonl, {"id", "language", "text", "source_language", "source"} lines,
with "field" for the further texts of a row, and translations.json, the record of how they were made. It may be
interrupted, and be called again with other --languages or another --limit: what is translated is kept.
"""

import argparse
import json
import sys
from pathlib import Path

from mindmerger.evaluation.items import add_item_flags, find_items
from mindmerger.evaluation.translate_test import RECORD_FILE, TRANSLATIONS_FILE
from mindmerger.runtime.command import CommandParser, at_least, run_main, versions
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.files import model_path, remove, write_json_atomic, write_text_atomic
from mindmerger.runtime.precision import add_argument as add_precision
from mindmerger.runtime.precision import settle_precision
from mindmerger.runtime.processes import locked_folder, log, progress_bar, warn
from mindmerger.tasks.languages import Language
from mindmerger.tasks.readers import describe_faults, name_skip_flag
from mindmerger.tasks.texts import Row, check_text_fields, read_rows

UNFINISHED_FILE = "unfinished.jsonl"
CHUNK = 32  # rows of one language whose translations reach the disk together: an interruption costs no more than these
Key = tuple[str, str]  # id of the row, field of the text


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of the command line."""
    parser = CommandParser(prog="python -m mindmerger.baselines.translate_test", description=__doc__)
    parser.add_argument(
        "--translator",
        type=model_path,
        required=True,
        help="the sequence-to-sequence model, a folder or a hub name: NLLB, M2M100, mBART, MADLAD-400",
    )
    parser.add_argument(
        "--untagged",
        action="store_true",
        help="the translator takes no language tags and writes nothing but English (opus-mt-mul-en)",
    )
    parser.add_argument("--output_dir", type=model_path, required=True, help="folder of the translations")
    add_item_flags(parser, "; English has nothing to translate")
    parser.add_argument("--limit", type=at_least(1), help="translate only the first N rows of each language")
    parser.add_argument(
        "--skip_faulty_rows", action="store_true", help="leave out and list faulty rows of the test sets"
    )
    parser.add_argument(
        "--num_beams", type=at_least(1), default=1, help="beams of the translator's search (default 1, greedy)"
    )
    parser.add_argument("--batch_size", type=at_least(1), default=16, help="texts of a batch (default 16)")
    parser.add_argument(
        "--max_seq_len", type=at_least(2), default=512, help="most tokens of a text to translate (default 512)"
    )
    parser.add_argument(
        "--max_new_tokens", type=at_least(1), default=512, help="most tokens of a translation (default 512)"
    )
    add_precision(parser.add_argument)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the translations that the output folder holds"
    )
    return parser


def settle(args: argparse.Namespace) -> tuple:
    """Returns the task, its languages but English, and their rows.

    Raises:
        UserError: for the first thing that is wrong.
    """
    task, languages = find_items(args)
    check_text_fields(task)
    languages = [language for language in languages if language.name != "English"]
    if not languages:
        raise UserError("--languages names English only, which needs no translation")
    faults = [] if args.skip_faulty_rows else None
    with name_skip_flag():
        rows = {one: list(read_rows(task, args.data_root, one, faults))[: args.limit] for one in languages}
    if faults:
        warn(describe_faults(faults, ""))
    return task, languages, rows


def open_folder(folder: Path, record: dict, overwrite: bool) -> dict[Key, dict]:
    """Makes the folder ready and returns the lines that earlier calls have left in it.

    Raises:
        UserError: when it holds the translations of another model or of other settings.
    """
    kept = [folder / TRANSLATIONS_FILE, folder / UNFINISHED_FILE]
    if overwrite:
        # The record last: without it nobody could tell what the other two are.
        for path in (*kept, folder / RECORD_FILE):
            remove(path)
    lines = {}
    for path in kept:
        for line in path.read_bytes().split(b"\n") if path.is_file() else ():
            try:
                one = json.loads(line)
                lines[one["id"], one.get("field", "")] = one
            # What a kill has cut short, at the end of the second file, is translated again.
            except (ValueError, KeyError, TypeError):
                continue
    # A record alone says nothing: its model may not have loaded.
    if lines and not (folder / RECORD_FILE).is_file():
        raise UserError(f"{folder} holds translations without {RECORD_FILE}: pass --overwrite or another --output_dir")
    if lines:
        refuse_other_settings(folder / RECORD_FILE, record)
    return lines


def refuse_other_settings(file: Path, record: dict) -> None:
    """Refuses to add to translations that were made in another way.

    Raises:
        UserError: naming the first difference.
    """
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        before = {"task": before["task"]} | before["translator"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is not the record of translations: pass --overwrite or another --output_dir"
        ) from error
    for name, now in ({"task": record["task"]} | record["translator"]).items():
        # The same model may lie in another place; its fingerprint tells.
        if name != "path" and before.get(name) != now:
            raise UserError(
                f"{file.parent} holds translations with another {name}: {before.get(name)} then, {now} now: pass "
                "--overwrite to start over, or another --output_dir to keep both"
            )


def describe_translator(args: argparse.Namespace, precision: str) -> dict:
    """Returns everything that a translation depends on, apart from its text."""
    from mindmerger.model.towers import model_fingerprint

    return {
        "path": args.translator,
        "fingerprint": model_fingerprint(args.translator),
        "untagged": args.untagged,
        "num_beams": args.num_beams,
        "max_seq_len": args.max_seq_len,
        "max_new_tokens": args.max_new_tokens,
        "precision": precision,
    }


def is_translated(row: Row, lines: dict[Key, dict]) -> bool:
    """Tells whether all texts of a row are translated; lines of other texts, from data that changed, do not count."""
    stored = (lines.get((row.example.id, field), {}) for field in row.texts)
    texts = row.texts.values()
    return all(line.get("source") == text for line, text in zip(stored, texts, strict=True) if text.strip())


def translate_rows(translator, language: Language, rows: list[Row]) -> list[dict]:
    """Returns the lines of a chunk of rows, in their order."""
    # A blank option has nothing to translate.
    wanted = [(row, field, text) for row in rows for field, text in row.texts.items() if text.strip()]
    lines = []
    found = translator.translate([text for _, _, text in wanted], language)
    for (row, field, text), one in zip(wanted, found, strict=True):
        line = {"id": row.example.id, "language": "en", **({"field": field} if field else {})}
        # A text for which the model writes nothing stays in its own language (ours): the prompt needs one there.
        line |= {"text": one.text or text, "source_language": language.code, "source": text}
        marks = {"untranslated": not one.text, "truncated": one.truncated, "hit_limit": one.hit_limit}
        lines.append(line | {name: True for name, marked in marks.items() if marked})
    return lines


def as_text(lines: list[dict]) -> str:
    """Writes lines as the text of a .jsonl file."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def translate_missing(load, rows: dict[Language, list[Row]], lines: dict[Key, dict], folder: Path) -> int:
    """Translates every chunk that is not whole in `lines`, and adds it there and on disk.

    Args:
        load: returns the translator; not called where nothing is missing.

    Returns:
        the number of rows that were translated.
    """
    from mindmerger.evaluation.results import append_records

    chunks = [(one, some[i : i + CHUNK]) for one, some in rows.items() for i in range(0, len(some), CHUNK)]
    # Whole chunks: what is continued sees the same batches as what was never interrupted.
    chunks = [(one, some) for one, some in chunks if not all(is_translated(row, lines) for row in some)]
    number = sum(len(some) for _, some in chunks)
    if not number:
        return 0
    translator = load()
    # One clean file replaces what may end in half a line.
    write_text_atomic(folder / UNFINISHED_FILE, as_text(list(lines.values())))
    with (
        open(folder / UNFINISHED_FILE, "ab", buffering=0) as file,
        progress_bar(total=number, unit="row", desc="translating") as progress,
    ):
        for language, some in chunks:
            made = translate_rows(translator, language, some)
            append_records(file, made)
            lines |= {(line["id"], line.get("field", "")): line for line in made}
            progress.update(len(some))
    return number


def write_results(folder: Path, record: dict, rows: dict[Language, list[Row]], lines: dict[Key, dict]) -> None:
    """Writes the finished translations, those of this call last and in their order, and their record."""
    asked = {(row.example.id, field): None for some in rows.values() for row in some for field in row.texts}
    ordered = [line for key, line in lines.items() if key not in asked] + [lines[key] for key in asked if key in lines]
    names = ("untranslated", "truncated", "hit_limit")
    counts = {"texts": len(ordered)} | {name: sum(name in line for line in ordered) for name in names}
    languages = dict.fromkeys(line["source_language"] for line in ordered)
    write_text_atomic(folder / TRANSLATIONS_FILE, as_text(ordered))
    write_json_atomic(folder / RECORD_FILE, record | {"languages": list(languages), "counts": counts})
    remove(folder / UNFINISHED_FILE)
    log(f"{folder / TRANSLATIONS_FILE}: {len(ordered)} texts in {len(languages)} languages")
    said = ("stay untranslated: the model wrote nothing", "were truncated (--max_seq_len)", "ran into --max_new_tokens")
    for name, words in zip(names, said, strict=True):
        if counts[name]:
            warn(f"{counts[name]} of {len(ordered)} texts {words}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; see the module's docstring."""
    args = build_parser().parse_args(argv)
    task, languages, rows = settle(args)
    import torch

    from mindmerger.generation.translator import Limits, Translator, check_translator, load_tags

    limits = Limits(args.max_seq_len, args.max_new_tokens, args.batch_size, args.num_beams)
    check_translator(args.translator, limits)
    tokenizer, tags = load_tags(args.translator, args.untagged, languages)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = settle_precision(args.precision, device.type == "cuda")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    record = {"task": task.name, "translator": describe_translator(args, precision)}
    record |= {"command": sys.argv, "versions": versions()}
    folder = Path(args.output_dir)

    def load() -> Translator:
        # Before the first line: whoever finds lines here can tell what they are.
        write_json_atomic(folder / RECORD_FILE, record)
        return Translator(args.translator, tokenizer, tags, limits, dtype, device)

    with locked_folder(folder):
        lines = open_folder(folder, record, args.overwrite)
        number = translate_missing(load, rows, lines, folder)
        # The second file is there where an earlier call was stopped between its last text and its end.
        if number or (folder / UNFINISHED_FILE).exists():
            write_results(folder, record, rows, lines)
        else:
            log(f"{folder} holds these translations already")
    return 0


if __name__ == "__main__":
    run_main(main, alone=True)
