"""Files that an evaluation writes once all answers are there: predictions, scores.tsv and, last, results.json."""

import argparse
import json
import math
import shutil
import sys
from importlib import metadata

from mindmerger.evaluation.settings import Plan
from mindmerger.runtime.command import versions
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.files import write_json_atomic, write_text_atomic
from mindmerger.runtime.processes import warn, world_size


def finish(plan: Plan, args: argparse.Namespace, generated_now: set[int], seconds: float) -> dict:
    """Scores all answers and writes predictions, scores.tsv and, last, results.json. Call it on rank 0 only."""
    from mindmerger.evaluation.results import PARTIAL, read_finished

    partial = plan.folder / PARTIAL
    records = read_finished(partial)
    missing = sum(i not in records for i in range(len(plan.examples)))
    if missing:
        raise UserError(
            f"{missing} of {len(plan.examples)} answers are not in {partial}: the same command generates them again"
        )
    items = {}
    for i, example in enumerate(plan.examples):
        items.setdefault(example.language, []).append(prediction_item(plan, example, records[i]["output"]))
    for language, rows in items.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text_atomic(plan.folder / "predictions" / f"{language}.jsonl", lines)
    results = summarise(plan, args, items, records)
    tokens = sum(records[i]["generated_tokens"] for i in generated_now)
    results["timing"] = {
        "seconds": round(seconds, 3),
        "examples": len(generated_now),
        "examples_per_s": round(len(generated_now) / seconds, 3) if generated_now else None,
        "generated_tokens": tokens,
        "generated_tokens_per_s": round(tokens / seconds, 3) if generated_now else None,
        "world_size": world_size(),
        **_device_record(),
    }
    scores = "".join(f"{name}\t{one['accuracy']}\n" for name, one in results["languages"].items())
    write_text_atomic(plan.folder / "scores.tsv", scores)
    write_json_atomic(plan.folder / "results.json", results)
    shutil.rmtree(partial, ignore_errors=True)  # the results are complete; what stays goes at the next start
    return results


def prediction_item(plan: Plan, example, output: str) -> dict:
    """One line of predictions/<language>.jsonl."""
    score = plan.task.score(output, example.target, example.language)
    item = {
        "id": example.id,
        **({"question": example.question} if example.question else {}),
        "source": example.source,
        "prompt": example.prompt if plan.form != "hard" else "",
        "output": output,
        "prediction": score.prediction,
        "answer": example.target,
        "correct": score.correct,
    }
    if plan.two_scorers:
        reference = score.reference_prediction
        # Some 310 digits in a row overflow, and JSON has no infinity.
        item["reference_prediction"] = reference if math.isfinite(reference) else "infinity"
        item["reference_correct"] = score.reference_correct
    return item


def summarise(plan: Plan, args: argparse.Namespace, items: dict[str, list[dict]], records: dict[int, dict]) -> dict:
    """The content of results.json but for the timing: scores first, then everything needed to run again."""
    from mindmerger.evaluation.statistics import bootstrap_intervals, describe_questions, questions_of, resampling_note
    from mindmerger.evaluation.tables import published_scores

    number = len(plan.examples)
    marks = {
        "hit_limit": [records[i]["hit_limit"] for i in range(number)],
        "cut_sources": plan.columns.get("source_cut", [False] * number),
        "cut_prompts": plan.columns.get("prompt_cut", [False] * number),
    }
    questions = {name: questions_of(plan.task.name, name, rows) for name, rows in items.items()}
    resampling = describe_questions(questions)
    if resampling["numbers_with_different_answers"]:
        warn(f"the test sets are not parallel throughout: {resampling_note(resampling)}")
    marks_of = {name: [row["correct"] for row in rows] for name, rows in items.items()}
    intervals, mean_interval = bootstrap_intervals(questions, marks_of, args.seed)
    languages = {}
    for name, rows in items.items():
        correct = sum(row["correct"] for row in rows)
        one = {
            "n": len(rows),
            "correct": correct,
            "accuracy": round(100 * correct / len(rows), 4),
            "interval": intervals[name],
        }
        if plan.two_scorers:
            reference = sum(row["reference_correct"] for row in rows)
            one |= {"reference_correct": reference, "reference_accuracy": round(100 * reference / len(rows), 4)}
        for mark, values in marks.items():
            one[mark] = sum(value for value, e in zip(values, plan.examples, strict=True) if e.language == name)
        languages[name] = one
    scores = ["accuracy", "reference_accuracy"] if plan.two_scorers else ["accuracy"]
    mean = {key: round(sum(one[key] for one in languages.values()) / len(languages), 4) for key in scores}
    # The published rows have no parallel input: beside a PMI run they would be taken for its own.
    published = None
    if plan.parallel_input is None:
        rows_of = {name: one["n"] for name, one in languages.items()}
        published = published_scores(plan.task, plan.form, plan.llm_path, plan.mt_path, rows_of)
    return {
        "task": plan.task.name,
        "form": plan.form,
        "parallel_input": plan.parallel_input,
        "mean": {**mean, "interval": mean_interval},
        "resampling": resampling,
        "languages": languages,
        **({"faulty_rows": plan.faults} if plan.faults else {}),
        "counts": {"examples": number} | {mark: sum(values) for mark, values in marks.items()},
        "published": published,
        "max_new_tokens": plan.max_new_tokens,
        "engine": plan.engine if plan.engine == "hf" else f"vllm {metadata.version('vllm')}",
        "checkpoint": plan.checkpoint,
        "llm_path": plan.llm_path,
        "mt_path": plan.mt_path,
        "identity": plan.identity,
        "arguments": vars(args),
        "command": sys.argv,
        "versions": versions(),
    }


def _device_record() -> dict:
    import torch

    if not torch.cuda.is_available():
        return {"device": "cpu"}
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"device": torch.cuda.get_device_name(), "peak_memory_gb": round(peak, 2)}
