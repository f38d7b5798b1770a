"""The experiment with small pretrained models in one table: English, the other languages' mean, and its tests.

XNLI asks three hypotheses of each premise, in every language. Rows of one premise are right or wrong together, so that
intervals and tests resample premises, each with all its rows in all languages.
"""

from mindmerger.evaluation.comparison import Row, keep_common, read_row
from mindmerger.evaluation.comparison_table import markdown_table
from mindmerger.evaluation.statistics import Question, bootstrap_intervals, format_p, mean_difference_test
from mindmerger.runtime.errors import UserError

ENGLISH = "English"


def summarise(entries: list[tuple[str, str]], against: list[str], premises: list[str], seed: int) -> str:
    """Returns the table in Markdown.

    Args:
        entries: label and results folder of each row.
        against: labels of the rows that all others are tested against, one column each.
        premises: of each row of the English test file, in its order.
        seed: of resampling and signs.

    Raises:
        UserError: for a label that no row has, and results without languages beside English.
    """
    rows = {label: read_row(label, folder) for label, folder in entries}
    if unknown := [label for label in against if label not in rows]:
        raise UserError(f"--against {unknown[0]!r} is none of the rows: {', '.join(rows)}")
    notes = keep_common(list(rows.values()))
    others = [name for name in rows[entries[0][0]].correct if name != ENGLISH]
    if not others:
        raise UserError("the results have no language beside English in common: evaluate some")
    lines = [["method", "English", "mean without English", *(f"minus {label}" for label in against)]]
    for label, row in rows.items():
        asked = {name: clusters(row, name, premises) for name in others}
        marks = {name: list(row.correct[name].values()) for name in others}
        low, high = bootstrap_intervals(asked, marks, seed)[1]
        cells = [label, f"{percent(row, [ENGLISH]):.1f}" if ENGLISH in row.correct else ""]
        cells.append(f"{percent(row, others):.1f} [{low:.1f}, {high:.1f}]")
        for base in against:
            other = rows[base]
            if row is other:
                cells.append("")
                continue
            differences = {
                name: [mark - other.correct[name][id] for id, mark in row.correct[name].items()] for name in others
            }
            p = format_p(mean_difference_test(asked, differences, seed))
            cells.append(f"{percent(row, others) - percent(other, others):+.1f} (p {p})")
        lines.append(cells)
    number = len({question for name in others for question in asked[name]})
    notes.append(f"{number} premises are resampled, each with all its rows in {len(others)} languages.")
    return markdown_table(lines) + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"


def clusters(row: Row, language: str, premises: list[str]) -> list[Question]:
    """Returns the premise of each item, by the number in its id: the files hold the same rows in every language."""
    return [("premise", premises[int(id.rpartition("-")[2]) - 1], 0) for id in row.correct[language]]


def percent(row: Row, languages: list[str]) -> float:
    """Returns the unweighted mean of the languages' accuracies, in percent."""
    accuracies = [sum(row.correct[name].values()) / len(row.correct[name]) for name in languages]
    return 100 * sum(accuracies) / len(accuracies)
