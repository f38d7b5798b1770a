"""Writes the quickstart's small world: data in the released layout, an English-only Llama and a translating mT5.

Everything follows from the seed: the number combinations are split once into train and test; sentence pairs, queries
and both models' training texts use train combinations, the evaluation files use test combinations. The models are
trained from scratch and saved as ordinary Hugging Face folders.

    python scripts/make_tiny_world.py --output_dir quickstart

    quickstart/datas/bilingual_pairs/en-XX/train_100k.{XX,en}
    quickstart/datas/query_translation/math.json
    quickstart/datas/evaluation/mgsm/mgsm_XX.tsv
    quickstart/llm  quickstart/mt5
"""

import argparse
import os
import random
import shutil
import sys
import time
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
sys.path[:0] = [str(SCRIPTS.parent), str(SCRIPTS)]

from tiny_world_templates import (  # noqa: E402
    LANGUAGES,
    draw_pair,
    draw_problems,
    draw_test_problems,
    split_numbers,
)

import runtime_utils  # noqa: E402
from runtime_utils import UserError, log  # noqa: E402


def write_lines(path: Path, lines) -> None:
    runtime_utils.write_text_atomic(path, "".join(f"{line}\n" for line in lines))


def write_data(folder: Path, seed: int, pairs: int, problems: int, test_problems: int) -> None:
    """Writes the three kinds of data files in the released layout under `folder`.

    Args:
        pairs: sentence pairs per language.
        problems: training queries per language; the same problems in every language.
        test_problems: evaluation problems per language, likewise.
    """
    train_numbers, test_numbers = split_numbers(seed)
    for language in LANGUAGES:
        if language == "en":
            continue
        rng = random.Random(f"pairs {language} {seed}")
        drawn = [draw_pair(problem, language, rng) for problem in draw_problems(pairs, train_numbers, rng)]
        rng.shuffle(drawn)
        stem = folder / "bilingual_pairs" / f"en-{language}"
        write_lines(stem / f"train_100k.{language}", (source for source, _ in drawn))
        write_lines(stem / "train_100k.en", (english for _, english in drawn))

    drawn = draw_problems(problems, train_numbers, random.Random(f"queries {seed}"))
    queries = [
        {"lang": name, "query": problem.question(code), "response": problem.solution()[0]}
        for code, name in LANGUAGES.items()
        for problem in drawn
    ]
    runtime_utils.write_json_atomic(folder / "query_translation" / "math.json", queries)

    drawn = draw_test_problems(test_problems, test_numbers, random.Random(f"test {seed}"))
    for language in LANGUAGES:
        rows = (f"{problem.question(language)}\t{problem.solution()[1]}" for problem in drawn)
        write_lines(folder / "evaluation" / "mgsm" / f"mgsm_{language}.tsv", rows)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = runtime_utils.CommandParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write: datas/, llm/, mt5/")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    parser.add_argument("--seed", type=int, default=0, help="everything follows from it")
    data = parser.add_argument_group("data, per language")
    data.add_argument("--pairs", type=int, default=4000, help="sentence pairs with English")
    data.add_argument("--problems", type=int, default=2000, help="training queries")
    data.add_argument("--test_problems", type=int, default=250, help="evaluation problems")
    models = parser.add_argument_group("models")
    models.add_argument("--vocabulary", type=int, default=2000, help="pieces of a tokenizer at most")
    models.add_argument("--llm_steps", type=int, default=1200, help="training steps of the LLM")
    models.add_argument("--llm_batch_size", type=int, default=32, help="texts per step")
    models.add_argument("--encoder_steps", type=int, default=500, help="training steps of the mT5")
    models.add_argument("--encoder_batch_size", type=int, default=64, help="sentence pairs per step")
    args = parser.parse_args(arguments)
    for name in (
        "pairs",
        "problems",
        "test_problems",
        "llm_steps",
        "llm_batch_size",
        "encoder_steps",
        "encoder_batch_size",
    ):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    return args


def write_world(folder: Path, args: argparse.Namespace) -> None:
    """Writes data and both models under `folder`."""
    # Imported here so that --help and refusals are quick.
    from tiny_world_models import build_tokenizers, train_encoder, train_llm

    started = time.monotonic()

    def report(text):
        log(f"{text} ({time.monotonic() - started:.0f} s)")

    write_data(folder / "datas", args.seed, args.pairs, args.problems, args.test_problems)
    llm_tokenizer, encoder_tokenizer = build_tokenizers(args.seed, args.vocabulary)
    report(f"data and tokenizers: {len(llm_tokenizer)} English pieces, {len(encoder_tokenizer)} multilingual pieces")

    model, loss = train_llm(llm_tokenizer, args.seed, args.llm_steps, args.llm_batch_size)
    model.save_pretrained(folder / "llm")
    llm_tokenizer.save_pretrained(folder / "llm")
    report(f"English LLM: {model.num_parameters()} parameters, loss {loss:.3f}")

    model, loss = train_encoder(encoder_tokenizer, args.seed, args.encoder_steps, args.encoder_batch_size)
    model.save_pretrained(folder / "mt5")
    encoder_tokenizer.save_pretrained(folder / "mt5")
    report(f"translating mT5: {model.num_parameters()} parameters, loss {loss:.3f}")


def main(arguments=None) -> None:
    args = parse_arguments(arguments)
    if args.output_dir.exists() and not args.output_dir.is_dir():
        raise UserError(f"{args.output_dir} is a file: name a folder with --output_dir")
    if args.output_dir.is_dir() and any(args.output_dir.iterdir()) and not args.overwrite:
        raise UserError(f"{args.output_dir} exists: name another --output_dir, or add --overwrite to replace it")
    # A world that stands under its own name is a whole one, whatever stopped an earlier attempt.
    unfinished = args.output_dir.with_name(args.output_dir.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    write_world(unfinished, args)
    if args.output_dir.exists():
        shutil.rmtree(args.output_dir)
    os.replace(unfinished, args.output_dir)
    log(f"small world in {args.output_dir}")


if __name__ == "__main__":
    runtime_utils.run_main(main)
