"""One table of finished evaluations of one task: a row per method, a column per language, intervals, paired tests.

    python scripts/compare_table.py --row "LLM alone=results/MindMerger/math_mgsm-llm_only" \\
        --row "MindMerger-Soft=results/MindMerger/math_mgsm" --against "LLM alone"

All numbers are over the items that every row has. Cells: accuracy in percent and its 95 % percentile bootstrap interval
(Efron 1979); avg is the unweighted mean over languages. Each row is tested against one chosen row on the same items:
exact two-sided McNemar test (1947) per language,

    p = min(1, 2 * P(Binomial(b + c, 1/2) <= min(b, c))),  b, c: items that only one of the two rows got right,

and the p-values of one row are corrected over languages after Holm (1979):

    p_holm(i) = max over j <= i of min(1, (m - j + 1) * p(j)),  p(1) <= ... <= p(m).

Writes table.md, table.csv and table.png. Rows with parallel input always say who translated (oracle or machine).
"""

import argparse
import csv
import io
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_tasks import find_language  # noqa: E402
from results_utils import (  # noqa: E402
    ResultsError,
    bootstrap_intervals,
    mcnemar_exact,
    paired_counts,
    read_predictions,
    read_results,
)
from runtime_utils import CommandParser, log, run_main, write_text_atomic  # noqa: E402

SIGNIFICANT = 0.05


@dataclass
class Row:
    """One evaluation. `correct`: {language: {item id: whether it was right}}."""

    label: str
    folder: str
    results: dict
    correct: dict[str, dict[str, bool]]


@dataclass
class Cell:
    """Accuracy of one row in one language, and its test against the chosen row (None for the chosen one itself)."""

    n: int
    correct: int
    interval: list[float]
    only_row: int | None = None
    only_against: int | None = None
    p: float | None = None
    p_holm: float | None = None

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * self.correct / self.n


def read_row(label: str, folder: str) -> Row:
    """Reads a results folder; a row with parallel input gets "oracle" or "machine" into its label.

    Raises:
        ResultsError: when the folder holds no finished evaluation.
    """
    results = read_results(folder)
    parallel = results.get("parallel_input")
    if parallel is not None and parallel["translations"] not in label:
        label = f"{label} ({parallel['translations']})"
    correct = {
        language: {id: bool(item["correct"]) for id, item in read_predictions(folder, language).items()}
        for language in results["languages"]
    }
    return Row(label, folder, results, correct)


def keep_common(rows: list[Row]) -> list[str]:
    """Cuts every row to the languages and items that all have; returns notes on what was left out.

    Raises:
        ResultsError: for other tasks, nothing in common, or other questions under one id.
    """
    first, notes = rows[0], []
    for row in rows[1:]:
        if row.results["task"] != first.results["task"]:
            raise ResultsError(
                f"{row.folder} is {row.results['task']} but {first.folder} is {first.results['task']}: one table holds "
                "one task"
            )
    languages = [language for language in first.correct if all(language in row.correct for row in rows)]
    left_out = dict.fromkeys(name for row in rows for name in row.correct if name not in languages)
    if left_out:
        notes.append(f"Left out, since not every row has them: {', '.join(left_out)}.")
    for language in languages:
        for row in rows[1:]:
            paired_counts(first.folder, row.folder, language)  # refuses other questions under one id
    kept = {}
    for language in languages:
        kept[language] = [id for id in first.correct[language] if all(id in row.correct[language] for row in rows)]
        longest = max(len(row.correct[language]) for row in rows)
        if len(kept[language]) < longest:
            notes.append(f"{language}: {len(kept[language])} of up to {longest} items stand in every row.")
    kept = {language: ids for language, ids in kept.items() if ids}
    if not kept:
        raise ResultsError("these evaluations have no item in common: no table can be made of them")
    for row in rows:
        row.correct = {language: {id: row.correct[language][id] for id in ids} for language, ids in kept.items()}
    return notes


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down adjusted p-values (Holm 1979), in the order given."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def build_cells(rows: list[Row], against: Row, seed: int) -> dict[str, tuple[dict[str, Cell], float, list[float]]]:
    """{row label: (cell of each language, mean accuracy, its interval)}."""
    table = {}
    for row in rows:
        counts = {language: (sum(items.values()), len(items)) for language, items in row.correct.items()}
        intervals, mean_interval = bootstrap_intervals(counts, seed)
        cells = {language: Cell(n, right, intervals[language]) for language, (right, n) in counts.items()}
        if row is not against:
            for language, cell in cells.items():
                other = against.correct[language]
                cell.only_row = sum(right and not other[id] for id, right in row.correct[language].items())
                cell.only_against = sum(other[id] and not right for id, right in row.correct[language].items())
                cell.p = mcnemar_exact(cell.only_row, cell.only_against)
            for cell, p in zip(cells.values(), holm([cell.p for cell in cells.values()]), strict=True):
                cell.p_holm = p
        mean = sum(cell.accuracy for cell in cells.values()) / len(cells)
        table[row.label] = cells, mean, mean_interval
    return table


# ---------------------------------------------------------------------------------------------------------------------
# The three files


def _markdown(rows: list[list[str]]) -> str:
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    rule = ["---"] + ["---:"] * (len(rows[0]) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])


def _p(value: float) -> str:
    return "<0.0001" if value < 1e-4 else f"{value:.2g}"


def format_markdown(task: str, table: dict, against: str, missing: dict[str, str], notes: list[str]) -> str:
    """The table as Markdown: accuracies with intervals, then differences with corrected p-values.

    Arguments:
        table: as `build_cells` gives it, with None for a missing row, in the order to show.
        missing: the reason of each missing row.
    """
    languages = list(table[against][0])
    codes = [find_language(language).code for language in languages]
    sizes = sorted({cell.n for cell in table[against][0].values()})
    accuracy, difference = [["method", *codes, "avg"]], [["method", *codes, "avg"]]
    base_cells, base_mean, _ = table[against]
    for label, made in table.items():
        if made is None:
            accuracy.append([label, *["missing"] * (len(languages) + 1)])
            continue
        (cells, mean, (low, high)), texts = made, []
        for cell in cells.values():
            star = "*" if cell.p_holm is not None and cell.p_holm < SIGNIFICANT else ""
            texts.append(f"{cell.accuracy:.1f}{star} [{cell.interval[0]:.1f}, {cell.interval[1]:.1f}]")
        accuracy.append([label, *texts, f"{mean:.1f} [{low:.1f}, {high:.1f}]"])
        if label != against:
            texts = [f"{c.accuracy - base_cells[name].accuracy:+.1f} (p {_p(c.p_holm)})" for name, c in cells.items()]
            difference.append([label, *texts, f"{mean - base_mean:+.1f}"])
    items = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    parts = [
        f"# {task}: accuracy in percent on the same items",
        f"{items} items per language; in brackets 95 % bootstrap intervals; \\*: differs from **{against}** at "
        f"{SIGNIFICANT} (exact McNemar test, Holm correction over the {len(languages)} languages).",
        _markdown(accuracy),
    ]
    if len(difference) > 1:
        parts += [f"## Difference to {against}, in points (p after Holm)", _markdown(difference)]
    if missing:
        parts += ["## Missing rows", "\n".join(f"- {label}: {reason}" for label, reason in missing.items())]
    if notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(parts) + "\n"


def format_csv(table: dict, against: str, rows: list[Row], missing: dict[str, str]) -> str:
    """One line per row and language ("avg" for the mean); missing rows have one line with the reason."""
    head = "method,folder,translations,language,items,correct,accuracy,low,high,against,difference,only_method"
    head += ",only_against,p,p_holm,missing"
    text = io.StringIO()
    writer = csv.DictWriter(text, head.split(","), lineterminator="\n", restval="")
    writer.writeheader()
    base_cells, base_mean, _ = table[against]
    for row in rows:
        cells, mean, (low, high) = table[row.label]
        parallel = row.results.get("parallel_input")
        common = {
            "method": row.label,
            "folder": row.folder,
            "translations": parallel["translations"] if parallel else "",
        }
        for language, cell in cells.items():
            line = common | {"language": find_language(language).code, "items": cell.n, "correct": cell.correct}
            line |= {"accuracy": round(cell.accuracy, 4), "low": cell.interval[0], "high": cell.interval[1]}
            if cell.p is not None:
                line |= {"against": against, "difference": round(cell.accuracy - base_cells[language].accuracy, 4)}
                line |= {"only_method": cell.only_row, "only_against": cell.only_against}
                line |= {"p": cell.p, "p_holm": cell.p_holm}
            writer.writerow(line)
        line = common | {"language": "avg", "accuracy": round(mean, 4), "low": low, "high": high}
        if row.label != against:
            line |= {"against": against, "difference": round(mean - base_mean, 4)}
        writer.writerow(line)
    for label, reason in missing.items():
        writer.writerow({"method": label, "missing": reason})
    return text.getvalue()


def draw(task: str, table: dict, path) -> None:
    """Grouped bars: a group per language and one for the mean, a bar per row, with intervals."""
    from baselines.plots import COLOURS, colour, new_figure, save_figure

    languages = list(next(iter(table.values()))[0])
    groups = [find_language(language).code for language in languages] + ["avg"]
    figure, axes = new_figure(min(16, max(7, 0.13 * len(groups) * (len(table) + 1.5) + 3)), 4.5)
    width = 0.85 / len(table)
    for i, (label, (cells, mean, mean_interval)) in enumerate(table.items()):
        heights = [cell.accuracy for cell in cells.values()] + [mean]
        bounds = [cell.interval for cell in cells.values()] + [mean_interval]
        # A percentile interval can miss its own estimate by rounding: an error bar must not be negative.
        below = [max(0.0, height - low) for height, (low, _) in zip(heights, bounds, strict=True)]
        above = [max(0.0, high - height) for height, (_, high) in zip(heights, bounds, strict=True)]
        places = [at - 0.425 + width * (i + 0.5) for at in range(len(groups))]
        axes.bar(
            places,
            heights,
            width,
            yerr=[below, above],
            error_kw={"elinewidth": 0.8, "ecolor": "#444444"},
            color=colour(i),
            hatch="//" if i >= len(COLOURS) else None,
            edgecolor="white",
            linewidth=0.3,
            label=label,
        )
    axes.axvline(len(languages) - 0.5, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set(xlabel="language", ylabel="accuracy, % (95 % interval)", title=task)
    axes.set_ylim(0, 100)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small")
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def _named(text: str) -> tuple[str, str]:
    label, separator, value = text.partition("=")
    if not separator or not label.strip() or not value.strip():
        raise argparse.ArgumentTypeError(f"expected LABEL=VALUE, got {text!r}")
    return label.strip(), value.strip()


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    # One list for both, so that missing rows keep their place.
    parser.add_argument(
        "--row",
        action="append",
        dest="entries",
        type=lambda text: ("row", *_named(text)),
        required=True,
        metavar="LABEL=FOLDER",
        help="a finished results folder; once per row, in the table's order",
    )
    parser.add_argument(
        "--missing",
        action="append",
        dest="entries",
        type=lambda text: ("missing", *_named(text)),
        metavar="LABEL=REASON",
        help="a row that could not be made: listed as missing, with the reason",
    )
    parser.add_argument(
        "--against", metavar="LABEL", help="the row that the others are tested against (default: first)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default 0)")
    parser.add_argument("--output_dir", default="results", help="default results")
    parser.add_argument("--name", default="table", help="of the three files (default table)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; see the module's docstring."""
    args = build_parser().parse_args(argv)
    order, rows, asked, missing = [], [], [], {}
    for kind, label, value in args.entries:
        if kind == "missing":
            missing[label] = value
        else:
            rows.append(read_row(label, value.rstrip("/") or "/"))
            asked.append(label)
            label = rows[-1].label
        if label in order:
            raise ResultsError(f"two rows are called {label!r}: give each its own label")
        order.append(label)
    labels = [row.label for row in rows]
    if args.against is not None and args.against not in (*asked, *labels):
        raise ResultsError(f"--against {args.against!r} is none of the rows: {', '.join(labels)}")
    against = rows[0]
    for name, row in zip(asked, rows, strict=True):
        if args.against in (name, row.label):
            against = row
    notes = keep_common(rows)
    table = build_cells(rows, against, args.seed)
    folder, task = Path(args.output_dir), rows[0].results["task"]
    text = format_markdown(task, {label: table.get(label) for label in order}, against.label, missing, notes)
    write_text_atomic(folder / f"{args.name}.md", text)
    write_text_atomic(folder / f"{args.name}.csv", format_csv(table, against.label, rows, missing))
    draw(task, table, folder / f"{args.name}.png")
    print(text, end="")
    log(f"written: {folder / args.name}.md, .csv, .png")
    return 0


if __name__ == "__main__":
    run_main(main)
