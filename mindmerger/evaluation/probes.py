"""Probes: does the LLM read the prefix? The same prompt with the prefix of another question, or with one of zeros.

A mapping whose prefix the LLM ignores scores the same with any of them, however well its prompt is answered. Without a
prompt, as in the Hard form and with LangBridge, the answers belong to other questions: what is still right then is what
the answers' frequencies alone give.
"""

import argparse
import random

from mindmerger.runtime.errors import UserError

PROBES = ("shuffled", "zero")
PROBE_TITLES = {"shuffled": "prefix of another question", "zero": "prefix of zeros"}


def check_probe(args: argparse.Namespace, form: str) -> None:
    """Refuses probes where they say nothing.

    Raises:
        UserError: for the LLM alone, and for gold answers under vLLM.
    """
    if args.probe_prefix is not None and form == "llm_only":
        raise UserError("--probe_prefix changes the prefix, which --llm_only has none of: leave one of them out")
    if args.score_gold and args.engine != "hf":
        raise UserError("--score_gold needs the LLM's logits, which --engine vllm keeps: leave one of them out")


def exchange_rows(examples: list, seed: int) -> list[int]:
    """Returns for every row the number of another one of its language, each taken once: nobody keeps the own one.

    One cycle through all rows of a language, in an order that seed and language decide: a language has the same
    partners whichever others are evaluated beside it.

    Raises:
        UserError: for a language with a single row.
    """
    rows_of: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        rows_of.setdefault(example.language, []).append(i)
    partner = [0] * len(examples)
    for language, rows in rows_of.items():
        if len(rows) < 2:
            raise UserError(
                f"--probe_prefix shuffled exchanges prefixes within a language, but {language} has one row: leave it "
                "out by --languages, or raise --limit"
            )
        random.Random(f"{seed} {language}").shuffle(rows)
        for i, row in enumerate(rows):
            # The neighbour in a cycle, not a random permutation: such a one leaves about one row its own prefix.
            partner[row] = rows[i - 1]
    return partner


def apply_probe(kind: str | None, examples: list, columns: dict, seed: int) -> tuple[dict, dict | None, list | None]:
    """Gives every row the encoder's input of its partner where the probe is "shuffled". Zeros are the model's matter.

    Returns:
        the columns, the probe's record for results.json (None without one), and the partner of each row or None.
    """
    if kind != "shuffled":
        return columns, None if kind is None else {"kind": kind}, None
    partner = exchange_rows(examples, seed)
    # The source alone moves; prompt and gold answer stay, so that a lost point is the prefix's doing.
    own, moved = columns["encoder_ids"], ("encoder_ids", "source_cut")
    columns = columns | {name: [columns[name][i] for i in partner] for name in moved}
    # Rows that share their text get an equal prefix all the same: a reader of the scores has to know how many.
    equal = sum(ids == other for ids, other in zip(own, columns["encoder_ids"], strict=True))
    return columns, {"kind": kind, "seed": seed, "rows_with_an_equal_source": equal}, partner
