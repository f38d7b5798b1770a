"""One table of bridges on one task: a row per bridge over its seeds, a column per language, paired tests, costs.

    python -m mindmerger.evaluation.bridge_table --row "mindmerger=results/seed0/math_mgsm" \\
        --row "mindmerger=results/seed1/math_mgsm" --row "layalign=results/layalign0/math_mgsm" --against mindmerger

Rows of one label are the seeds of one method. All numbers are over the items that every row has. With y_ks whether
seed s got item k right, a cell is the mean over seeds and items in percent; behind it the lowest and the highest seed.
Its 95 % interval draws questions, each with all its rows and seeds (cluster bootstrap, Field and Welsh 2007): it says
how far other questions would move the number, and the seeds stand beside it for what another training would. avg is
the unweighted mean over languages. Each method is tested against one by flipping the signs of whole questions (Fisher
1935),

    p = (1 + number of flips with |sum_k s_k D_k| >= |sum_k D_k|) / (1 + number of flips),
    D_k: mean over the seeds of the one minus mean over those of the other, on question k, summed over the languages,

and p-values are corrected after Holm (1979): those of languages over the languages of a row, those of avg over the
rows. A row with the prefix of another question ("mindmerger (shuffled prefix)") is tested against its own bridge: where
the two are alike, the LLM does not read the prefix.

Costs: trained parameters, target tokens and seconds of all stages come from the training's folder that the results
name, questions per second from the results, FLOP per target token from --costs. "–": nothing tells.
Writes bridges.md, bridges.csv and bridges.png.
"""

import argparse
import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path

from mindmerger.evaluation.comparison import Cell, Mean, Row, keep_common, read_row
from mindmerger.evaluation.comparison_table import (
    SIGNIFICANT,
    in_points,
    make_figure,
    markdown_table,
    named,
    with_interval,
)
from mindmerger.evaluation.measures import MEASURES, measure_key
from mindmerger.evaluation.results import ResultsError, warn_of_scorers
from mindmerger.evaluation.statistics import (
    bootstrap_intervals,
    describe_questions,
    holm,
    mean_difference_test,
    resampling_note,
)
from mindmerger.evaluation.training_costs import Costs, read_costs
from mindmerger.runtime.command import CommandParser, check_save_name, check_seed, run_main
from mindmerger.runtime.files import model_path, write_text_atomic
from mindmerger.runtime.processes import log, warn
from mindmerger.tasks.languages import code_of

REFERENCE = "mindmerger"  # tested against, where --against names no other


@dataclass
class SeedCell(Cell):
    """Accuracy over all seeds in one language; `n` and `correct` count items times seeds. seeds: lowest, highest."""

    seeds: tuple[float, float] = (0.0, 0.0)


@dataclass
class SeedMean(Mean):
    """Unweighted mean over languages of accuracies over all seeds. seeds: lowest, highest."""

    seeds: tuple[float, float] = (0.0, 0.0)
    p_holm: float | None = None


@dataclass
class Method:
    """One row of the table: its seeds, cells by language, mean, the label it was tested against, and costs."""

    label: str
    rows: list[Row]
    cells: dict[str, SeedCell]
    mean: SeedMean
    costs: Costs
    against: str | None = None

    @property
    def probed(self) -> str | None:
        """The label of its own bridge where this is one with another prefix, else None."""
        probe = self.rows[0].results.get("probe_prefix")
        return self.label.replace(f" ({probe['kind']} prefix)", "") if probe else None

    def shares(self, language: str) -> list[float]:
        """Returns, for each item of a language, the share of seeds that got it right."""
        marks = [row.correct[language] for row in self.rows]
        return [sum(one[id] for one in marks) / len(marks) for id in marks[0]]


def measure(label: str, rows: list[Row], planned: dict | None, seed: int) -> Method:
    """Returns a method's accuracies with intervals, not yet tested, and its costs."""
    marks = {(name, i): list(row.correct[name].values()) for i, row in enumerate(rows) for name in row.correct}
    asked = {(name, i): row.questions[name] for i, row in enumerate(rows) for name in row.correct}

    def interval(keys: list[tuple]) -> list[float]:
        # What is resampled together are questions, whichever columns of languages and seeds they stand in.
        # A column's name seeds its draw: with one seed the intervals are those of an ordinary table.
        names = {key: key[0] if len(rows) == 1 else f"{key[0]}, seed {key[1]}" for key in keys}
        columns = [{names[key]: values[key] for key in keys} for values in (asked, marks)]
        return bootstrap_intervals(*columns, seed)[1]

    cells = {}
    for name, items in rows[0].correct.items():
        keys = [(name, i) for i in range(len(rows))]
        seeds = [100 * sum(marks[key]) / len(items) for key in keys]
        right = sum(sum(marks[key]) for key in keys)
        cells[name] = SeedCell(len(items) * len(rows), right, interval(keys), seeds=(min(seeds), max(seeds)))
    of_seeds = [sum(100 * sum(marks[n, i]) / len(marks[n, i]) for n in cells) / len(cells) for i in range(len(rows))]
    mean = sum(cell.accuracy for cell in cells.values()) / len(cells)
    measured = SeedMean(mean, interval(list(marks)), seeds=(min(of_seeds), max(of_seeds)))
    return Method(label, rows, cells, measured, read_costs([row.results for row in rows], planned))


def compare_with(base: Method, methods: list[Method], seed: int) -> None:
    """Tests methods against `base`; fills in their p-values, Holm's correction and `against`."""
    tested = [method for method in methods if method is not base]
    for method in tested:
        method.against, differences = base.label, {}
        questions = method.rows[0].questions
        for name, cell in method.cells.items():
            pairs = zip(method.shares(name), base.shares(name), strict=True)
            # Rounded: means of three seeds that are equal must not differ in the last bit.
            differences[name] = [round(one - other, 12) for one, other in pairs]
            # Not McNemar's, as in other tables: over several seeds an item is right in a share of them, not right or
            # wrong.
            cell.p = mean_difference_test({name: questions[name]}, {name: differences[name]}, seed)
        for cell, p in zip(method.cells.values(), holm([one.p for one in method.cells.values()]), strict=True):
            cell.p_holm = p
        method.mean.p = mean_difference_test(questions, differences, seed)
    correct_means(tested)


def correct_means(methods: list[Method]) -> None:
    """Corrects the p-values of avg over a family of methods."""
    for method, p in zip(methods, holm([one.mean.p for one in methods]), strict=True):
        method.mean.p_holm = p


def compare(methods: list[Method], base: Method, seed: int) -> None:
    """Makes all tests: bridges and others against `base`, each probe against its own bridge."""
    by_label = {method.label: method for method in methods}
    # Probes are no rivals: each asks one thing of its own bridge, and together they are a family of their own for Holm.
    compare_with(base, [method for method in methods if method.probed is None], seed)
    probes = [method for method in methods if method.probed in by_label]
    for method in probes:
        compare_with(by_label[method.probed], [method], seed)
    # Once more, over all of them: `compare_with` saw one probe at a time.
    correct_means(probes)


def _spread(one: SeedCell | SeedMean, seeds: int) -> str:
    # Lowest and highest: a standard deviation of two or three seeds would pretend to more than is known.
    return f" ({one.seeds[0]:.1f} to {one.seeds[1]:.1f})" if seeds > 1 else ""


def _number(value, form: str) -> str:
    return "–" if value is None else format(value, form)


def accuracy_tables(methods: list[Method | str], base: Method) -> list[str]:
    """Returns the two tables of accuracy and of differences; a label alone is a missing row."""
    codes = [code_of(name) for name in base.cells]
    accuracy, differences = [["method", "seeds", *codes, "avg"]], [["method", *codes, "avg"]]
    for method in methods:
        if isinstance(method, str):
            accuracy.append([method, *["missing"] * (len(codes) + 2)])
            continue
        seeds = len(method.rows)
        ones = [*method.cells.values(), method.mean]
        texts = [with_interval(one, one.p_holm) + _spread(one, seeds) for one in ones]
        accuracy.append([method.label, str(seeds), *texts])
        if method is not base:
            pairs = zip(ones, [*base.cells.values(), base.mean], strict=True)
            differences.append([method.label, *(in_points(one, other, one.p_holm) for one, other in pairs)])
    parts = [markdown_table(accuracy)]
    if len(differences) > 1:
        parts += [f"## Difference to {base.label}, in points (p after Holm)", markdown_table(differences)]
    return parts


def probe_table(methods: list[Method]) -> list[str]:
    """Returns the table of bridges with the prefix of another question."""
    by_label = {method.label: method for method in methods}
    rows = [["bridge", "own prefix, avg", "prefix", "avg", "difference (p after Holm)"]]
    for method in methods:
        if method.probed not in by_label:
            continue
        own, kind = by_label[method.probed], method.rows[0].results["probe_prefix"]["kind"]
        texts = [with_interval(one.mean, None) + _spread(one.mean, len(one.rows)) for one in (own, method)]
        rows.append([own.label, texts[0], kind, texts[1], in_points(method.mean, own.mean, method.mean.p_holm)])
    return ["## With another prefix", markdown_table(rows)] if len(rows) > 1 else []


def cost_table(methods: list[Method], rates: dict[str, str]) -> list[str]:
    """Returns the table of costs."""
    head = ["method", "learning rate", "trained parameters", "target tokens", "FLOP per target token", "training, s"]
    rows = [[*head, "questions/s"]]
    for method in methods:
        if method.probed is None:
            costs = method.costs
            numbers = zip(costs, (",", ",.0f", ".3g", ",.0f", ".2f"), strict=True)
            rows.append([method.label, rates.get(method.label, "–"), *(_number(*one) for one in numbers)])
    return ["## Costs", markdown_table(rows)]


def format_markdown(task: str, methods: list[Method], order: list[str], base: Method, texts: dict) -> str:
    """Lays everything out as Markdown.

    Args:
        order: labels as they were asked for, missing ones too.
        texts: "missing" and "rates", by label, and "notes".
    """
    by_label = {method.label: method for method in methods}
    main = [by_label.get(name, name) for name in order if name not in by_label or by_label[name].probed is None]
    # `n` counts an item once for each seed.
    sizes = sorted({cell.n // len(base.rows) for cell in base.cells.values()})
    items = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    parts = [
        f"# {task}: bridges on the same items, {MEASURES[measure_key(base.rows[0].results)][0]}",
        f"{items} items per language; mean over seeds, in square brackets 95 % bootstrap intervals over questions, "
        f"then the lowest and the highest seed; \\*: differs from **{base.label}** at {SIGNIFICANT} (sign-flip test "
        f"over questions; Holm correction over the {len(base.cells)} languages, avg: over the rows).",
        *accuracy_tables([one for one in main if isinstance(one, Method) or "prefix)" not in one], base),
        *probe_table(methods),
        *cost_table(methods, texts["rates"]),
    ]
    if texts["missing"]:
        parts += ["## Missing rows", "\n".join(f"- {name}: {reason}" for name, reason in texts["missing"].items())]
    parts += ["## Notes", "\n".join(f"- {note}" for note in texts["notes"])]
    return "\n\n".join(parts) + "\n"


def format_csv(methods: list[Method], texts: dict) -> str:
    """Returns one line per method and language ("avg" for the mean); missing rows have one line with the reason."""
    head = "method,seeds,language,items,accuracy,low,high,lowest_seed,highest_seed,against,difference,p,p_holm"
    fields = [*head.split(","), "learning_rate", *Costs._fields, "missing"]
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n", restval="")
    writer.writeheader()
    by_label = {method.label: method for method in methods}
    for method in methods:
        base, seeds = by_label.get(method.against), len(method.rows)
        common = {"method": method.label, "seeds": seeds, "learning_rate": texts["rates"].get(method.label, "")}
        common |= {name: "" if value is None else value for name, value in method.costs._asdict().items()}
        for name, one in [*method.cells.items(), ("avg", method.mean)]:
            line = common | {"language": name if name == "avg" else code_of(name)}
            line |= {"items": one.n // seeds} if isinstance(one, SeedCell) else {}
            line |= {"accuracy": round(one.accuracy, 4), "low": one.interval[0], "high": one.interval[1]}
            line |= {"lowest_seed": round(one.seeds[0], 4), "highest_seed": round(one.seeds[1], 4)}
            if base is not None:
                other = base.mean if name == "avg" else base.cells[name]
                line |= {"against": base.label, "difference": round(one.accuracy - other.accuracy, 4)}
                line |= {"p": one.p, "p_holm": one.p_holm}
            writer.writerow(line)
    for name, reason in texts["missing"].items():
        writer.writerow({"method": name, "missing": reason})
    return text.getvalue()


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = CommandParser(prog="python -m mindmerger.evaluation.bridge_table", description=__doc__)
    add = parser.add_argument
    add("--row", action="append", dest="entries", type=lambda text: ("row", *named(text)), required=True,
        metavar="LABEL=FOLDER", help="results folder, once per row and seed, in the table's order")  # fmt: skip
    add("--missing", action="append", dest="entries", type=lambda text: ("missing", *named(text)),
        metavar="LABEL=REASON", help="a row that could not be made: listed as missing, with the reason")  # fmt: skip
    add("--against", metavar="LABEL", help=f"row that the others are tested against (default: {REFERENCE}, or the "
        "first where there is none)")  # fmt: skip
    add("--lr", action="append", default=[], type=named, metavar="LABEL=TEXT", help="learning rate of a row, and among "
        "which it was chosen")  # fmt: skip
    add("--costs", type=Path, help="plan of scripts.bridge_plan, for FLOP per target token")
    add("--seed", type=int, default=0, help="seed of the bootstrap and the sign-flip test (default 0)")
    add("--output_dir", type=Path, default="results", help="folder of the three files (default results)")
    add("--name", default="bridges", help="name of the three files (default bridges)")
    return parser


def read_entries(entries: list[tuple]) -> tuple[dict[str, list[Row]], list[str], dict[str, str], dict[str, str]]:
    """Reads the rows of the command line.

    Returns:
        the seeds of each label, all labels in the order asked, the reason of each missing one, and the label that each
        name on the command line became.

    Raises:
        ResultsError: for a folder without a finished evaluation, one that is given twice, and a label that is both
            there and missing.
    """
    methods, order, missing, labels, folders = {}, [], {}, {}, set()
    for kind, label, value in entries:
        if kind == "row":
            row = read_row(label, model_path(value))
            labels[label] = label = row.label
            # One folder twice would pass for two seeds that agree to the last item.
            if Path(row.folder).resolve() in folders:
                raise ResultsError(f"{row.folder} is given twice: each seed has a folder of its own")
            folders.add(Path(row.folder).resolve())
            methods.setdefault(label, []).append(row)
        else:
            missing[label] = value
        if label in methods and label in missing:
            raise ResultsError(f"{label!r} is given as a row and as missing: call the missing one otherwise")
        order.append(label)
    return methods, list(dict.fromkeys(order)), missing, labels


def read_plan(file: Path | None) -> dict:
    """Reads the costs of a plan, by label.

    Raises:
        ResultsError: when it is not one.
    """
    if file is None:
        return {}
    try:
        costs = json.loads(file.read_text(encoding="utf-8"))["costs"]
        return {label: {"flop_per_target_token": float(one["flop_per_target_token"])} for label, one in costs.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultsError(
            f"--costs {file} is not a plan of scripts.bridge_plan: {type(error).__name__} {error}"
        ) from error


def find_base(methods: list[Method], wanted: str | None, reference: str = REFERENCE) -> Method:
    """Returns the method that the others are tested against: the reference where none is wanted.

    Raises:
        ResultsError: when no row is called so.
    """
    by_label = {method.label: method for method in methods if method.probed is None}
    if not by_label:
        raise ResultsError("all rows have another question's prefix: give one with its own")
    if wanted is None:
        if reference not in by_label:
            warn(f"no row is called {reference}: the others are tested against {next(iter(by_label))}")
        wanted = reference if reference in by_label else next(iter(by_label))
    if wanted not in by_label:
        raise ResultsError(f"--against {wanted!r} is none of the rows: {', '.join(by_label)}")
    return by_label[wanted]


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; see the module's docstring."""
    from mindmerger.evaluation.plots import save_figure

    args = build_parser().parse_args(argv)
    check_seed(args.seed)
    check_save_name(args.name, "--name")
    by_label, order, missing, labels = read_entries(args.entries)
    rows = [row for seeds in by_label.values() for row in seeds]
    notes = keep_common(rows)
    warn_of_scorers([row.folder for row in rows], [row.results for row in rows])
    notes.append(f"Interval of avg: {resampling_note(describe_questions(rows[0].questions))}.")
    # Costs and rates are named as the rows were asked for, before their labels said how they were scored.
    given = read_plan(args.costs), dict(args.lr)
    planned, rates = ({labels.get(name, name): one for name, one in named.items()} for named in given)
    methods = [measure(label, seeds, planned.get(label), args.seed) for label, seeds in by_label.items()]
    base = find_base(methods, labels.get(args.against, args.against), labels.get(REFERENCE, REFERENCE))
    compare(methods, base, args.seed)
    # An interval over questions says nothing of another training; unsaid, a reader would take it for that.
    if min(len(method.rows) for method in methods) == 1:
        notes.append("Where there is one seed, nothing tells how far another training would move the number.")
    task, texts = rows[0].results["task"], {"missing": missing, "rates": rates, "notes": notes}
    text = format_markdown(task, methods, order, base, texts)
    write_text_atomic(args.output_dir / f"{args.name}.md", text)
    write_text_atomic(args.output_dir / f"{args.name}.csv", format_csv(methods, texts))
    # Last: a drawing library that fails must not cost the numbers.
    shown = {one.label: (one.cells, one.mean) for one in methods}
    save_figure(make_figure(task, shown, measure_key(rows[0].results)), args.output_dir / f"{args.name}.png")
    print(text, end="")
    log(f"written: {args.output_dir / args.name}.md, .csv, .png")
    return 0


if __name__ == "__main__":
    run_main(main, alone=True)
