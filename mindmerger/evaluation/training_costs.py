"""Costs of a bridge, read from what its training and its evaluations left."""

import json
import math
from pathlib import Path
from typing import NamedTuple

from mindmerger.evaluation.results import ResultsError


class Costs(NamedTuple):
    """Costs of one row of a table; None where nothing tells.

    trained_parameters: of the bridge. target_tokens, seconds: of all its stages, without loading, dev evaluations and
    checkpoints. flop_per_target_token: as a plan counts them. All but the first and this one are means over seeds.
    """

    trained_parameters: int | None = None
    target_tokens: float | None = None
    flop_per_target_token: float | None = None
    seconds: float | None = None
    questions_per_s: float | None = None


def read_costs(results: list[dict], planned: dict | None) -> Costs:
    """Returns the costs of one row.

    Args:
        results: content of its `results.json` files, one for each seed.
        planned: what a plan says of the row: `flop_per_target_token`.

    Raises:
        ResultsError: for a log of training that cannot be read.
    """
    rates = [one.get("timing", {}).get("examples_per_s") for one in results]
    files = [file for one in results if (file := trained_file(one))]
    trainings = [found for file in files if (found := read_trainings(file))]
    return Costs(
        trained_parameters=count_parameters(files[0]) if files else None,
        target_tokens=_mean([tokens for tokens, _ in trainings]),
        flop_per_target_token=planned["flop_per_target_token"] if planned else None,
        seconds=_mean([seconds for _, seconds in trainings]),
        questions_per_s=_mean([rate for rate in rates if rate is not None]),
    )


def trained_file(results: dict) -> Path | None:
    """Returns the file of what was trained: the mapping, or the adapter of an LLM alone; None of an untrained LLM."""
    if results.get("checkpoint"):
        return Path(results["checkpoint"])
    return Path(results["adapter"]["path"]) / "adapter_model.safetensors" if results.get("adapter") else None


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def count_parameters(file: Path) -> int | None:
    """Returns the number of trained parameters in a `.safetensors` file; None for another or an absent one."""
    from safetensors import safe_open

    # A pickle is not opened for a number.
    if file.suffix != ".safetensors" or not file.is_file():
        return None
    # Shapes stand in the header: no weight is read.
    with safe_open(file, framework="numpy") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118


def read_trainings(file: Path) -> tuple[int, float] | None:
    """Returns target tokens and seconds of the training that left a file, with the stages before it.

    A stage's `args.json` names the mapping that it started from: the stage before is one of the same run's folder.

    Raises:
        ResultsError: for a log that cannot be read.
    """
    # An adapter has a folder of its own in that of its training.
    folder = file.parent if (file.parent / "args.json").is_file() else file.parent.parent
    tokens, seconds, seen = 0, 0.0, set()
    # `seen`: files that name each other as their start would be walked for ever.
    while (folder / "args.json").is_file() and folder not in seen:
        seen.add(folder)
        settings = _read(folder / "args.json", json.loads)
        for more_tokens, more_seconds in _read(folder / "log.jsonl", read_steps, settings):
            tokens, seconds = tokens + more_tokens, seconds + more_seconds
        before = Path(settings["init_file"]).parent if settings.get("init_file") else None
        # A mapping of somebody else's run is where this one began, not what it cost.
        if before is None or before.parent.resolve() != folder.parent.resolve():
            break
        folder = before
    return (tokens, seconds) if seen else None


def _read(file: Path, parse, *args):
    try:
        return parse(file.read_text(encoding="utf-8"), *args)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ResultsError(f"{file} is not what a training leaves: {type(error).__name__} {error}") from error


def read_steps(log: str, settings: dict) -> list[tuple[int, float]]:
    """Returns target tokens and seconds of each step in the text of a `log.jsonl`.

    A line has the examples per second alone. Their number is the batch size, and what is left at the end of an epoch.
    """
    flags, counts = settings["arguments"], settings["data"]["counts"]["rows"]
    # Folders without the entry are of earlier versions, whose dev splits had just the size that was asked for.
    dev = settings["data"].get("dev_examples", flags["dev_size"])
    rows, size = sum(counts.values()) - dev, flags["train_batch_size"]
    per_epoch, steps = math.ceil(rows / size), []
    for line in map(json.loads, log.splitlines()):
        if "target_tokens" in line:
            examples = size if line["step"] % per_epoch else rows - size * (per_epoch - 1)
            steps.append((line["target_tokens"], examples / line["samples_per_s"]))
    return steps
