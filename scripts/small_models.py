"""What the experiment with small pretrained models needs beside the programs: its data folder, a random encoder.

    python -m scripts.small_models data --data_root datas --output_dir small_models/datas --languages sw,de,zh
    python -m scripts.small_models random_encoder --mt_path intfloat/multilingual-e5-small --output_dir random
    python -m scripts.small_models encoder_alone --mt_path intfloat/multilingual-e5-small \\
        --data_root small_models/datas --languages en,sw,de,zh --limit 150

`data` parts the premises of XNLI's dev set in two, since one row must not tune the LLM in English and then train a
mapping in another language: the LLM would know the answer from the row, whatever the prefix says. It writes

    tuning.json                          the English rows of one part, for `python -m scripts.tune_llm --rows`
    query_translation/xnli_dev.json      the rows of the other part, in English and the languages
    evaluation/xnli/test.json            the test rows in English and the languages, as they are
    bilingual_pairs/en-XX/               the data folder's sentence pairs; where it has none, the sentences of XNLI's
                                         dev set with their translations

`random_encoder` writes a model folder of the same shape and tokenizer with random weights, as its library initialises
them: the control that says what of a gain is the encoder's knowledge.

`encoder_alone` prints the accuracy of a classifier on the encoder's states without any LLM, trained on the rows that
train the mappings: the control that says whether the LLM is needed.

`summary` prints English, the mean of the other languages and its differences to chosen rows, by premises.
"""

import json
import random
from pathlib import Path

from mindmerger.evaluation.comparison_table import named
from mindmerger.runtime import command, files
from mindmerger.runtime.command import CommandParser, at_least, number_where
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.files import model_path
from mindmerger.runtime.processes import log

ROWS_FILE, TEST_FILE, TUNING_FILE = "query_translation/xnli_dev.json", "evaluation/xnli/test.json", "tuning.json"


def build_parser() -> CommandParser:
    """Returns the parser."""
    parser = CommandParser(prog="python -m scripts.small_models", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("data", help="write the experiment's data folder").add_argument
    add("--data_root", type=Path, required=True, help="folder in the released layout, with XNLI")
    add("--output_dir", type=Path, required=True, help="the new data folder")
    add("--languages", required=True, help="languages beside English, by name or code, separated by commas")
    share = number_where(lambda value: 0 < value < 1, "a number above 0 and below 1")
    add("--tuning_share", type=share, default=0.5, help="share of the dev set's premises that tune the LLM")
    add("--seed", type=int, default=0, help="decides which premises")
    add = commands.add_parser("random_encoder", help="write an encoder of random weights").add_argument
    add("--mt_path", type=model_path, required=True, help="folder or hub name of the encoder whose shape it has")
    add("--output_dir", type=Path, required=True, help="the new model folder")
    add("--seed", type=int, default=0, help="of the weights")
    add = commands.add_parser("encoder_alone", help="print the accuracy of a classifier without an LLM").add_argument
    add("--mt_path", type=model_path, required=True, help="folder or hub name of the encoder")
    add("--data_root", type=Path, required=True, help="the experiment's data folder")
    add("--languages", required=True, help="languages to evaluate, by name or code, separated by commas")
    add("--limit", type=at_least(1), default=150, help="test rows of each language")
    add("--seed", type=int, default=0, help="of the premises that choose the weight decay")
    add = commands.add_parser(
        "summary", help="print the mean without English of evaluations, and its tests"
    ).add_argument
    add("--row", action="append", type=named, required=True, metavar="LABEL=FOLDER", help="a results folder, in order")
    add("--against", action="append", required=True, metavar="LABEL", help="a row that the others are tested against")
    add("--data_root", type=Path, required=True, help="the experiment's data folder, which knows the premises")
    add("--output", type=Path, help="file to write the table to as well")
    add("--seed", type=int, default=0, help="of the resampling")
    return parser


def read_rows(data_root: Path, relative: str, languages: list) -> dict[str, list[dict]]:
    """Returns the rows of an XNLI file by the language's name, those of `languages` alone, in the file's order.

    Raises:
        DataError: for a missing or faulty file, and a language without rows.
    """
    from mindmerger.tasks.languages import find_language
    from mindmerger.tasks.readers import DataError, find_file, read_records

    path = find_file(data_root, relative)
    rows: dict[str, list[dict]] = {language.name: [] for language in languages}
    for record in read_records(path):
        name = find_language(record.text("language")).name
        if name in rows:
            rows[name].append({field: record.text(field) for field in ("sentence1", "sentence2", "label")})
    if absent := [name for name, found in rows.items() if not found]:
        raise DataError(f"{path}: no rows in {', '.join(absent)}")
    return rows


def choose_premises(english: list[dict], share: float, seed: int) -> set[str]:
    """Returns the English premises whose rows tune the LLM: a share of all, drawn by the seed."""
    premises = sorted({row["sentence1"] for row in english})
    random.Random(seed).shuffle(premises)
    return set(premises[: max(1, min(len(premises) - 1, round(share * len(premises))))])


def write_rows(path: Path, rows: dict[str, list[dict]], kept: set[int] | None = None) -> None:
    """Writes rows in the released form: those with these numbers in every language, all with None."""
    records = [
        row | {"language": name}
        for name, found in rows.items()
        for number, row in enumerate(found)
        if kept is None or number in kept
    ]
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    files.write_text_atomic(path, f"[\n{lines}\n]\n")


def sentence_pairs(english: list[dict], translated: list[dict]) -> list[tuple[str, str]]:
    """Returns each sentence of the rows and its translation once, the translation first."""
    return list(
        dict.fromkeys(
            (one_line(theirs[name]), one_line(ours[name]))
            for ours, theirs in zip(english, translated, strict=True)
            for name in ("sentence1", "sentence2")
        )
    )


def one_line(text: str) -> str:
    """Returns a text with single spaces: a pair is a line of each of two files."""
    return " ".join(text.split())


def write_pairs(folder: Path, code: str, pairs: list[tuple[str, str]]) -> None:
    """Writes pairs line by line, as the release has them."""
    for end, side in ((code, 0), ("en", 1)):
        files.write_text_atomic(folder / f"train_100k.{end}", "".join(f"{pair[side]}\n" for pair in pairs))


def write_data(data_root: Path, output_dir: Path, names: str, share: float, seed: int) -> None:
    """Writes the experiment's data folder, whole or not at all.

    Raises:
        UserError: for languages, files or rows that cannot be used, and a folder that is there already.
    """
    from mindmerger.baselines.merged_folder import new_folder
    from mindmerger.tasks.languages import LANGUAGES, parse_languages
    from mindmerger.tasks.translation import read_pairs

    languages = [one for one in parse_languages(names) if one.name != "English"]
    if not languages:
        raise UserError("--languages names no language beside English, which alone has nothing to be merged")
    if output_dir.exists():
        raise UserError(f"--output_dir {output_dir} is there already: remove it, or name another folder")
    everyone = [LANGUAGES["English"], *languages]
    rows = read_rows(data_root, ROWS_FILE, everyone)
    test = read_rows(data_root, TEST_FILE, everyone)
    for name, found in rows.items():
        if len(found) != len(rows["English"]):
            raise UserError(
                f"{data_root / ROWS_FILE}: {len(found)} rows in {name}, {len(rows['English'])} in English: the "
                "languages' rows must be translations of each other, one by one"
            )
    tuning = choose_premises(rows["English"], share, seed)
    of_tuning = {number for number, row in enumerate(rows["English"]) if row["sentence1"] in tuning}
    of_stages = set(range(len(rows["English"]))) - of_tuning
    with new_folder(output_dir) as made:
        write_rows(made / TUNING_FILE, {"English": rows["English"]}, of_tuning)
        write_rows(made / ROWS_FILE, rows, of_stages)
        write_rows(made / TEST_FILE, test)
        for language in languages:
            folder, code = Path("bilingual_pairs") / f"en-{language.code}", language.code
            if all((data_root / folder / f"train_100k.{end}").is_file() for end in (code, "en")):
                pairs = [(one_line(pair.source), one_line(pair.target)) for pair in read_pairs(data_root, language)]
            else:
                pairs = sentence_pairs(rows["English"], rows[language.name])
            write_pairs(made / folder, code, pairs)
    log(f"{output_dir}: {len(of_tuning)} English rows tune the LLM, {len(of_stages)} rows of each language train")


def write_random_encoder(path: str, output_dir: Path, seed: int) -> None:
    """Writes a model folder with the shape and tokenizer of the encoder at `path` and random weights.

    Raises:
        UserError: for a model that cannot be used, and a folder that is there already.
    """
    import torch
    from transformers import AutoModel

    from mindmerger.baselines.merged_folder import new_folder
    from mindmerger.data.tokenising import load_tokenizers
    from mindmerger.hub.model_configs import load_config

    if output_dir.exists():
        raise UserError(f"--output_dir {output_dir} is there already: remove it, or name another folder")
    config = load_config(path)
    tokenizer = load_tokenizers(path, None).encoder
    torch.manual_seed(seed)
    with new_folder(output_dir) as made:
        AutoModel.from_config(config, dtype=torch.float32).save_pretrained(made)
        tokenizer.save_pretrained(made)


def read_both(data_root: Path, names: str, limit: int) -> tuple[dict, dict]:
    """Returns the rows that train mappings and the first `limit` test rows of each language, by its name.

    Raises:
        UserError: for languages, files or rows that cannot be used.
    """
    from mindmerger.tasks.languages import parse_languages

    languages = parse_languages(names)
    rows, test = (read_rows(data_root, file, languages) for file in (ROWS_FILE, TEST_FILE))
    return rows, {name: found[:limit] for name, found in test.items()}


def print_accuracies(accuracies: dict[str, float]) -> None:
    """Prints a line for each language, and the mean of those that are not English."""
    for name, value in accuracies.items():
        print(f"{name}: {value:.1%}")
    others = [value for name, value in accuracies.items() if name != "English"]
    if others:
        print(f"mean without English: {sum(others) / len(others):.1%}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; see the module's docstring."""
    args = build_parser().parse_args(argv)
    if args.command == "data":
        write_data(args.data_root, args.output_dir, args.languages, args.tuning_share, args.seed)
    elif args.command == "encoder_alone":
        from scripts.encoder_alone import evaluate

        print_accuracies(evaluate(args.mt_path, *read_both(args.data_root, args.languages, args.limit), args.seed))
    elif args.command == "summary":
        from mindmerger.tasks.languages import LANGUAGES
        from scripts.small_models_summary import summarise

        english = read_rows(args.data_root, TEST_FILE, [LANGUAGES["English"]])["English"]
        table = summarise(args.row, args.against, [row["sentence1"] for row in english], args.seed)
        print(table)
        if args.output is not None:
            files.write_text_atomic(args.output, table)
    else:
        write_random_encoder(args.mt_path, args.output_dir, args.seed)
    return 0


if __name__ == "__main__":
    command.run_main(main, alone=True)
