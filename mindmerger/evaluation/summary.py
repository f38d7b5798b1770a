"""Files that an evaluation writes once all answers are there: predictions, scores.tsv and, last, results.json."""

import json
import math
import shutil
import sys

from mindmerger.evaluation.measures import CORPUS_TITLES, GRADE_KEY
from mindmerger.evaluation.models import DEFAULT_BRIDGE
from mindmerger.evaluation.scoring import LIKELIHOOD
from mindmerger.evaluation.settings import Settings
from mindmerger.generation.vllm_engine import installed_version
from mindmerger.runtime.command import versions
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.files import write_json_atomic, write_text_atomic
from mindmerger.runtime.processes import warn, world_size

GOLD = ("gold_loss", "gold_tokens")  # what records and predictions hold of --score_gold


def summarise(settings: Settings, generated_now: set[int], seconds: float) -> dict:
    """Scores all answers and writes predictions, scores.tsv and, last, results.json. Call it on rank 0 only.

    Args:
        generated_now: the examples that this run has answered, for the timing.
        seconds: that it took.

    Raises:
        UserError: when answers are missing, or the disk refuses what is written.
    """
    from mindmerger.evaluation.results import read_kept

    records = read_answers(settings)
    items = score_answers(settings, records)
    results = build_results(settings, items, records)
    # Only what this run has answered: with the earlier answers its speed would grow with every continuation.
    results["timing"] = measure_speed([records[i] for i in sorted(generated_now)], seconds)
    hit_limit, carried = read_kept(settings.folder)
    for name, number in hit_limit.items():
        for counts in (results["languages"][name], results["counts"]):
            counts["hit_limit"] += number
    results |= carried
    write_results(settings.folder, items, results)
    return results


def read_answers(settings: Settings) -> dict[int, dict]:
    """Reads the records of all answers, by the number of their example.

    Raises:
        UserError: when any is missing.
    """
    from mindmerger.evaluation.results import PARTIAL, read_finished

    # From disk, not from memory: what is scored is then what a continuation would find, whichever rank or run wrote it.
    partial, number = settings.folder / PARTIAL, len(settings.examples)
    records = read_finished(partial)
    missing = sum(i not in records for i in range(number))
    if missing:
        raise UserError(f"{missing} of {number} answers are not in {partial}: the same command generates them again")
    return records


def score_answers(settings: Settings, records: dict[int, dict]) -> dict[str, list[dict]]:
    """Returns the lines of predictions/<language>.jsonl, by language in table order."""
    items = {}
    for i, example in enumerate(settings.examples):
        # Scored only now: an unfinished evaluation that an older version left is scored by this one, all of it alike.
        item = prediction_item(settings, example, records[i]["output"])
        if settings.prefix_of is not None:
            item["prefix_of"] = settings.examples[settings.prefix_of[i]].id
        if settings.label_ids is not None:
            item["label_log_probs"] = records[i]["label_log_probs"]
        if settings.score_gold:
            item |= {name: records[i][name] for name in GOLD}
        items.setdefault(example.language, []).append(item)
    return items


def write_results(folder, items: dict[str, list[dict]], results: dict) -> None:
    """Writes the files of a finished evaluation, results.json as the last one: it says that the others are complete."""
    from mindmerger.evaluation.results import PARTIAL

    # That of a smaller evaluation, which is extended, would say something else of them. Its answers are in .partial.
    if (folder / "results.json").is_file():
        (folder / "results.json").unlink()
    for language, rows in items.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text_atomic(folder / "predictions" / f"{language}.jsonl", lines)
    # The released code's file, in its form: language, tab, score; of translations chrF2 of all rows.
    scores = "".join(f"{name}\t{one.get('accuracy', one.get('chrf2'))}\n" for name, one in results["languages"].items())
    write_text_atomic(folder / "scores.tsv", scores)
    write_json_atomic(folder / "results.json", results)
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)  # what stays of it goes at the next start


def prediction_item(settings: Settings, example, output: str) -> dict:
    """Returns one line of predictions/<language>.jsonl."""
    score = settings.task.score(output, example.target, example.language)
    item = {
        "id": example.id,
        **({"question": example.question} if example.question else {}),
        "source": example.source,
        # What the model read, not what the data hold: the Hard form has no prompt. A chat template around it is in
        # results.json, once.
        "prompt": example.prompt if settings.form != "hard" else "",
        "output": output,
        "prediction": score.prediction,
        "answer": example.target,
        "correct": score.correct,
        **({"grade": score.grade} if score.grade is not None else {}),
    }
    if settings.two_scorers:
        reference = score.reference_prediction
        # Some 310 digits in a row overflow, and JSON has no infinity.
        item["reference_prediction"] = reference if math.isfinite(reference) else "infinity"
        item["reference_correct"] = score.reference_correct
    return item


def build_results(settings: Settings, items: dict[str, list[dict]], records: dict[int, dict]) -> dict:
    """Returns the content of results.json but for the timing: scores, then everything needed to run again."""
    from mindmerger.evaluation.statistics import bootstrap_intervals, describe_questions, questions_of, resampling_note
    from mindmerger.tasks.scoring import signatures

    marks = mark_examples(settings, records)
    questions = {name: questions_of(settings.task.name, name, rows) for name, rows in items.items()}
    resampling = describe_questions(questions)
    # Shifted rows would silently pair one question with another, and widen or narrow the interval of the mean.
    if resampling["numbers_with_different_answers"]:
        warn(f"the test sets are not parallel throughout: {resampling_note(resampling)}")
    graded = settings.task.corpus_scores is not None
    values = {name: [row["grade"] / 100 if graded else row["correct"] for row in rows] for name, rows in items.items()}
    intervals, mean_interval = bootstrap_intervals(questions, values, settings.seed)
    languages = {}
    for name, rows in items.items():
        here = [i for i, example in enumerate(settings.examples) if example.language == name]
        counts = {mark: sum(values[i] for i in here) for mark, values in marks.items()}
        languages[name] = score_language(settings, rows, intervals[name]) | counts
    keys = ["accuracy", "reference_accuracy"] if settings.two_scorers else ["accuracy"]
    keys = [*CORPUS_TITLES, GRADE_KEY] if graded else keys
    keys += ["gold_loss"] * settings.score_gold
    # Unweighted over languages, as the published averages are.
    mean = {key: round(sum(one[key] for one in languages.values()) / len(languages), 4) for key in keys}
    return {
        "task": settings.task.name,
        "form": settings.form,
        "parallel_input": settings.parallel_input,
        # Entries that came later are left out where they say nothing: the files of other runs stay as they were.
        **({"translate_test": settings.translate_test} if settings.translate_test else {}),
        **({"probe_prefix": settings.probe_prefix} if settings.probe_prefix else {}),
        **({"chat_template": settings.chat_record} if settings.chat_record else {}),
        **({"scoring": LIKELIHOOD} if settings.label_ids is not None else {}),
        "mean": {**mean, "interval": mean_interval},
        **({"gold": mean_gold([row for rows in items.values() for row in rows])} if settings.score_gold else {}),
        "resampling": resampling,
        "languages": languages,
        **({"faulty_rows": settings.faults} if settings.faults else {}),
        "counts": {"examples": len(settings.examples)} | {mark: sum(values) for mark, values in marks.items()},
        "published": find_published(settings, languages),
        **({"signatures": signatures()} if graded else {}),
        **describe_run(settings),
    }


def mark_examples(settings: Settings, records: dict[int, dict]) -> dict[str, list[bool]]:
    """Returns what is counted beside the scores, each with a mark for every example."""
    number, columns = len(settings.examples), settings.columns
    return {
        # None of a finished evaluation's answers, which are counted as that one counted them.
        "hit_limit": [records[i]["hit_limit"] is True for i in range(number)],
        "cut_sources": columns.get("source_cut", [False] * number),
        "cut_prompts": columns.get("prompt_cut", [False] * number),
    }


def score_language(settings: Settings, rows: list[dict], interval: list[float]) -> dict:
    """Returns the scores of one language."""
    gold = mean_gold(rows) if settings.score_gold else {}
    if settings.task.corpus_scores is not None:
        together = settings.task.corpus_scores([row["prediction"] for row in rows], [row["answer"] for row in rows])
        grade = round(sum(row["grade"] for row in rows) / len(rows), 4)
        return {"n": len(rows), **together, GRADE_KEY: grade, "interval": interval, **gold}

    def percent(key: str) -> tuple[int, float]:
        right = sum(row[key] for row in rows)
        return right, round(100 * right / len(rows), 4)

    correct, accuracy = percent("correct")
    one = {"n": len(rows), "correct": correct, "accuracy": accuracy, "interval": interval}
    if settings.two_scorers:
        one["reference_correct"], one["reference_accuracy"] = percent("reference_correct")
    return one | gold


def mean_gold(rows: list[dict]) -> dict:
    """Returns the mean loss of the gold answers, in nats per token, over all their tokens together."""
    # By tokens, as in training: a mean of rows would give a short answer's tokens more weight than a long one's.
    tokens = sum(row["gold_tokens"] for row in rows)
    return {"gold_loss": round(sum(row["gold_loss"] for row in rows) / tokens, 6), "gold_tokens": tokens}


def find_published(settings: Settings, languages: dict[str, dict]) -> dict | None:
    """Returns the published row that belongs beside this run, None where there is none."""
    from mindmerger.evaluation.tables import published_scores

    # The published rows have none of these: they would be taken for this run's.
    others = settings.parallel_input or settings.translate_test or settings.probe_prefix or settings.adapter
    others = others or settings.label_ids or settings.chat_record or settings.quantization != "none"
    if others or settings.bridge_name != DEFAULT_BRIDGE:
        return None
    rows = {name: one["n"] for name, one in languages.items()}
    return published_scores(settings.task, settings.form, settings.llm_path, settings.mt_path, rows)


def describe_run(settings: Settings) -> dict:
    """Returns the entries of results.json by which the evaluation can be run again."""
    from mindmerger.model.adapters import describe_adapter

    adapter = settings.adapter
    described = {"path": adapter.folder, **describe_adapter(adapter.values)} if adapter is not None else None
    return {
        "max_new_tokens": settings.max_new_tokens,
        "engine": settings.engine if settings.engine == "hf" else f"vllm {installed_version()}",
        "checkpoint": settings.mapping_file,
        "bridge": settings.bridge_name if settings.bridge is not None else None,
        "bridge_options": settings.bridge.options if settings.bridge is not None else None,
        "llm_path": settings.llm_path,
        "mt_path": settings.mt_path,
        **({"adapter": described} if described else {}),
        "identity": settings.identity,
        "arguments": settings.arguments,
        # As typed: `arguments` holds the defaults too, and no longer says which of them were chosen.
        "command": sys.argv,
        "versions": versions(),
    }


def measure_speed(records: list[dict], seconds: float) -> dict:
    """Returns the timing of a run by the records that it has made; rates are None where it made none."""
    tokens = sum(record["generated_tokens"] for record in records)
    return {
        "seconds": round(seconds, 3),
        "examples": len(records),
        "examples_per_s": round(len(records) / seconds, 3) if records else None,
        "generated_tokens": tokens,
        "generated_tokens_per_s": round(tokens / seconds, 3) if records else None,
        "world_size": world_size(),
        **_device_record(),
    }


def _device_record() -> dict:
    import torch

    if not torch.cuda.is_available():
        return {"device": "cpu"}
    # Of tensors: what the allocator only keeps in reserve is left out.
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"device": torch.cuda.get_device_name(), "peak_memory_gb": round(peak, 2)}
