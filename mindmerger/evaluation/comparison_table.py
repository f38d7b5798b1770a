"""One table of finished evaluations of one task: a row per method, a column per language, intervals, paired tests.

    python -m mindmerger.evaluation.comparison_table --row "LLM alone=results/MindMerger/math_mgsm-llm_only" \\
        --row "MindMerger-Soft=results/MindMerger/math_mgsm" --against "LLM alone"

All numbers are over the items that every row has. Cells: accuracy in percent and its 95 % percentile bootstrap interval
(Efron 1979); avg is the unweighted mean over languages. Its interval draws questions, each with its rows in all
languages (cluster bootstrap, Field and Welsh 2007). Each row is tested against one chosen row on the same items: exact
two-sided McNemar test (1947) per language,

    p = min(1, 2 * P(Binomial(b + c, 1/2) <= min(b, c))),  b, c: items that only one of the two rows got right,

and the p-values of one row are corrected over languages after Holm (1979):

    p_holm(i) = max over j <= i of min(1, (m - j + 1) * p(j)),  p(1) <= ... <= p(m).

The difference in avg is tested by flipping the signs of whole questions' differences (Fisher 1935):

    p = (1 + number of flips with |sum_k s_k D_k| >= |sum_k D_k|) / (1 + number of flips),
    D_k: what question k adds to the difference, over all languages; s_k: 1 or -1 at random; 100,000 flips.

Answers that are graded, as translations are, have mean grades in place of accuracies and sign-flip tests throughout;
scores of all rows together stand in a table of their own.

Writes table.md, table.csv and table.png. Rows with translations always say who translated (oracle or machine).
"""

import argparse
import csv
import io
from pathlib import Path

from mindmerger.evaluation.comparison import Cell, Mean, Row, build_cells, keep_common, read_row
from mindmerger.evaluation.measures import CORPUS_NOTE, CORPUS_TITLES, MEASURES, measure_key
from mindmerger.evaluation.results import ResultsError, warn_of_scorers
from mindmerger.evaluation.statistics import describe_questions, format_p, resampling_note
from mindmerger.runtime.command import CommandParser, check_save_name, check_seed, run_main
from mindmerger.runtime.files import model_path, write_text_atomic
from mindmerger.runtime.processes import log
from mindmerger.tasks.languages import code_of

SIGNIFICANT = 0.05


def markdown_table(rows: list[list[str]]) -> str:
    """Lays rows of cells out as a Markdown table; the first row is its head."""
    # Labels are the user's: a bar in one would open a further column.
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    rule = ["---"] + ["---:"] * (len(rows[0]) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])


def with_interval(one: Cell | Mean, p: float | None) -> str:
    """Returns an accuracy with its interval, and a star where it differs."""
    star = "*" if p is not None and p < SIGNIFICANT else ""
    return f"{one.accuracy:.1f}{star} [{one.interval[0]:.1f}, {one.interval[1]:.1f}]"


def in_points(one: Cell | Mean, base: Cell | Mean, p: float) -> str:
    """Returns a difference in accuracy with its p-value."""
    return f"{one.accuracy - base.accuracy:+.1f} (p {format_p(p)})"


def format_markdown(
    task: str,
    table: dict,
    against: str,
    missing: dict[str, str],
    notes: list[str],
    measure: str = "accuracy",
    together: dict | None = None,
) -> str:
    """Lays the table out as Markdown: accuracies with intervals, then differences with corrected p-values.

    Args:
        table: as `build_cells` gives it, with None for a missing row, in the order to show.
        missing: the reason of each missing row.
        measure: key of what is averaged, in MEASURES.
        together: row label to scores of all rows together, by language and as "mean", where answers are graded.
    """
    languages = list(table[against][0])
    codes = [code_of(language) for language in languages]
    sizes = sorted({cell.n for cell in table[against][0].values()})
    accuracy, difference = [["method", *codes, "avg"]], [["method", *codes, "avg"]]
    base_cells, base_mean = table[against]
    for label, made in table.items():
        if made is None:
            accuracy.append([label, *["missing"] * (len(languages) + 1)])
            continue
        cells, mean = made
        # Stars after the correction: of sixteen languages about one differs at 0.05 by chance alone.
        texts = [with_interval(cell, cell.p_holm) for cell in cells.values()]
        accuracy.append([label, *texts, with_interval(mean, mean.p)])
        if label != against:
            texts = [in_points(cell, base_cells[name], cell.p_holm) for name, cell in cells.items()]
            difference.append([label, *texts, in_points(mean, base_mean, mean.p)])
    items = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    test = "exact McNemar test" if measure == "accuracy" else "sign-flip test over rows"
    parts = [
        f"# {task}: {MEASURES[measure][0]} on the same items",
        f"{items} items per language; in brackets 95 % bootstrap intervals; \\*: differs from **{against}** at "
        f"{SIGNIFICANT} ({test}, Holm correction over the {len(languages)} languages; avg: sign-flip test "
        "over questions).",
        markdown_table(accuracy),
    ]
    if together:
        parts += corpus_part(codes, together)
    if len(difference) > 1:
        parts += [f"## Difference to {against}, in points (p of languages after Holm)", markdown_table(difference)]
    if missing:
        parts += ["## Missing rows", "\n".join(f"- {label}: {reason}" for label, reason in missing.items())]
    if notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(parts) + "\n"


def corpus_part(codes: list[str], together: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Returns the part of the Markdown with the scores of all rows of a language together."""
    names = list(next(iter(together.values()))["mean"])
    titles = " / ".join(CORPUS_TITLES[name] for name in names)
    rows = [["method", *codes, "avg"]]
    for label, scores in together.items():
        rows.append([label, *(" / ".join(f"{one[name]:.1f}" for name in names) for one in scores.values())])
    return [f"## {titles} of all rows", f"{CORPUS_NOTE}.", markdown_table(rows)]


def format_csv(
    table: dict, against: str, rows: list[Row], missing: dict[str, str], together: dict | None = None
) -> str:
    """Writes one line per row and language ("avg" for the mean), and one with the reason for a missing row.

    Where answers are graded, `accuracy` is the mean grade, and scores of all rows together are two more columns.
    """
    head = "method,folder,translations,language,items,correct,accuracy,low,high,against,difference,only_method"
    head += ",only_against,p,p_holm,missing" + "".join(f",{name}" for name in CORPUS_TITLES if together)
    text = io.StringIO()
    # LF on every system: csv writes CRLF unless told, and the other files of a results folder have LF.
    writer = csv.DictWriter(text, head.split(","), lineterminator="\n", restval="")
    writer.writeheader()
    base_cells, base_mean = table[against]
    for row in rows:
        cells, mean = table[row.label]
        parallel = row.results.get("parallel_input") or row.results.get("translate_test")
        common = {
            "method": row.label,
            "folder": row.folder,
            "translations": parallel["translations"] if parallel else "",
        }
        corpus = (together or {}).get(row.label, {})
        for language, cell in cells.items():
            line = common | {"language": code_of(language), "items": cell.n, "correct": cell.correct}
            line |= corpus.get(language, {})
            line |= {"accuracy": round(cell.accuracy, 4), "low": cell.interval[0], "high": cell.interval[1]}
            # The row that the others are tested against has no test of its own: its fields stay empty.
            if cell.p is not None:
                line |= {"against": against, "difference": round(cell.accuracy - base_cells[language].accuracy, 4)}
                line |= {"only_method": cell.only_row, "only_against": cell.only_against}
                line |= {"p": cell.p, "p_holm": cell.p_holm}
            writer.writerow(line)
        line = common | {"language": "avg", "accuracy": round(mean.accuracy, 4)} | corpus.get("mean", {})
        line |= {"low": mean.interval[0], "high": mean.interval[1]}
        if mean.p is not None:
            line |= {"against": against, "difference": round(mean.accuracy - base_mean.accuracy, 4), "p": mean.p}
        writer.writerow(line)
    for label, reason in missing.items():
        writer.writerow({"method": label, "missing": reason})
    return text.getvalue()


def make_figure(task: str, table: dict, measure: str = "accuracy"):
    """Draws grouped bars: a group per language and one for the mean, a bar per row, with intervals."""
    from mindmerger.evaluation.plots import colour, hatch, legend_label, new_figure

    languages = list(next(iter(table.values()))[0])
    groups = [code_of(language) for language in languages] + ["avg"]
    # Grows with the bars: ten rows in sixteen languages must stay readable.
    figure, axes = new_figure(min(16, max(7, 0.13 * len(groups) * (len(table) + 1.5) + 3)), 4.5)
    width = 0.85 / len(table)
    for i, (label, (cells, mean)) in enumerate(table.items()):
        heights = [one.accuracy for one in (*cells.values(), mean)]
        bounds = [one.interval for one in (*cells.values(), mean)]
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
            hatch=hatch(i),
            edgecolor="white",
            linewidth=0.3,
            label=legend_label(label),
        )
    axes.axvline(len(languages) - 0.5, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set(xlabel="language", ylabel=f"{MEASURES[measure][1]} (95 % interval)", title=task)
    axes.set_ylim(0, 100)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    # Beside the axes: over the bars it would hide those of the first languages.
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small")
    return figure


def named(text: str) -> tuple[str, str]:
    """Reads LABEL=VALUE, as a flag's type."""
    label, separator, value = text.partition("=")
    if not separator or not label.strip() or not value.strip():
        raise argparse.ArgumentTypeError(f"expected LABEL=VALUE, got {text!r}")
    return label.strip(), value.strip()


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = CommandParser(
        prog="python -m mindmerger.evaluation.comparison_table",
        description=__doc__,
    )
    # One list for both, so that missing rows keep their place.
    parser.add_argument(
        "--row",
        action="append",
        dest="entries",
        type=lambda text: ("row", *named(text)),
        required=True,
        metavar="LABEL=FOLDER",
        help="a finished results folder; once per row, in the table's order",
    )
    parser.add_argument(
        "--missing",
        action="append",
        dest="entries",
        type=lambda text: ("missing", *named(text)),
        metavar="LABEL=REASON",
        help="a row that could not be made: listed as missing, with the reason",
    )
    parser.add_argument(
        "--against", metavar="LABEL", help="the row that the others are tested against (default: first)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap and the sign-flip test (default 0)")
    parser.add_argument("--output_dir", default="results", help="folder of the three files (default results)")
    parser.add_argument("--name", default="table", help="name of the three files (default table)")
    return parser


def read_entries(entries: list[tuple]) -> tuple[list[Row], list[str], dict[str, str]]:
    """Reads the rows of the command line.

    Returns:
        the rows that are there, the labels of all in the order asked, and the reason of each missing one.

    Raises:
        ResultsError: for two rows of one name, or a folder without a finished evaluation.
    """
    order, rows, missing = [], [], {}
    for kind, label, value in entries:
        if kind == "missing":
            missing[label] = value
        else:
            rows.append(read_row(label, model_path(value)))
            label = rows[-1].label
        # The table is keyed by label, so a second row of one name would replace the first.
        if label in order:
            raise ResultsError(f"two rows are called {label!r}: give each its own label")
        order.append(label)
    return rows, order, missing


def find_against(entries: list[tuple], rows: list[Row], wanted: str | None) -> Row:
    """Returns the row that the others are tested against, by its label as given or as the table shows it.

    Raises:
        ResultsError: when no row is called so.
    """
    if wanted is None:
        return rows[0]
    given = [label for kind, label, _ in entries if kind == "row"]
    # Either spelling: `read_row` adds who translated to a label that the user gave without.
    found = [row for label, row in zip(given, rows, strict=True) if wanted in (label, row.label)]
    if not found:
        raise ResultsError(f"--against {wanted!r} is none of the rows: {', '.join(row.label for row in rows)}")
    return found[-1]


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; see the module's docstring."""
    from mindmerger.evaluation.plots import save_figure

    args = build_parser().parse_args(argv)
    check_seed(args.seed)
    check_save_name(args.name, "--name")
    rows, order, missing = read_entries(args.entries)
    against = find_against(args.entries, rows, args.against)
    notes = keep_common(rows)
    # What one version reads as 1,234 and another as 234 is not a difference between methods.
    warn_of_scorers([row.folder for row in rows], [row.results for row in rows])
    notes.append(f"Interval of avg: {resampling_note(describe_questions(rows[0].questions))}.")
    table = build_cells(rows, against, args.seed)
    folder, task = Path(args.output_dir), rows[0].results["task"]
    measure = measure_key(against.results)
    together = {row.label: row.corpus_scores() for row in rows if row.texts}
    shown = {label: table.get(label) for label in order}
    text = format_markdown(task, shown, against.label, missing, notes, measure, together)
    write_text_atomic(folder / f"{args.name}.md", text)
    write_text_atomic(folder / f"{args.name}.csv", format_csv(table, against.label, rows, missing, together))
    # Last: a drawing library that fails must not cost the numbers.
    save_figure(make_figure(task, table, measure), folder / f"{args.name}.png")
    print(text, end="")
    log(f"written: {folder / args.name}.md, .csv, .png")
    return 0


if __name__ == "__main__":
    run_main(main, alone=True)
