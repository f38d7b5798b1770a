"""--scoring: answers that the LLM writes, or the likeliest of the labels that a row can be answered with."""

import argparse

from mindmerger.runtime.errors import UserError
from mindmerger.runtime.processes import warn

SCORINGS = ("generate", "likelihood")
LIKELIHOOD = "likelihood"
LIKELIHOOD_TITLE = "likeliest label"


def check_scoring(args: argparse.Namespace, task) -> None:
    """Refuses --scoring likelihood where it cannot be.

    Raises:
        UserError: for a task whose answers are free text, and under vLLM.
    """
    from mindmerger.tasks import TASKS

    if args.scoring != LIKELIHOOD:
        return
    if task.labels is None:
        known = ", ".join(one.name for one in TASKS.values() if one.labels and one.evaluation_file)
        raise UserError(
            f"--scoring likelihood chooses among the labels of a task, and {task.name} has none: leave it out, or "
            f"choose --task {known}"
        )
    if args.engine != "hf":
        raise UserError("--scoring likelihood needs the LLM's logits, which --engine vllm keeps: leave one of them out")
    if args.max_new_tokens is not None:
        warn("--scoring likelihood generates nothing: no use of --max_new_tokens")


def find_label_ids(args: argparse.Namespace, tokenizers, examples: list) -> dict[str, list[int]] | None:
    """Returns the tokens of all labels by their text, None where answers are generated.

    Raises:
        UserError: for a row that no label can answer rightly, and labels that are the same tokens.
    """
    from mindmerger.generation.likelihood import encode_labels

    if args.scoring != LIKELIHOOD:
        return None
    for example in examples:
        if example.target not in example.labels:
            raise UserError(
                f"the answer {example.target!r} of {example.id} is none of its labels ({', '.join(example.labels)}): "
                "correct the row, or evaluate with --scoring generate"
            )
    return encode_labels(tokenizers, [example.labels for example in examples])


def note_of_scoring(results: list[dict]) -> str | None:
    """Returns what has to stand beside evaluations whose answers were found in different ways; None where all were
    found alike.

    Args:
        results: content of their `results.json` files.
    """
    if len({one.get("scoring") for one in results}) < 2:
        return None
    return "Not all answers were found alike: some were generated, others are the likeliest label (likelihood)."
