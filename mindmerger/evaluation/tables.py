"""The table that one evaluation prints."""

from pathlib import Path

from mindmerger.evaluation.measures import CORPUS_NOTE, CORPUS_TITLES, MEASURES, measure_key
from mindmerger.evaluation.models import DEFAULT_BRIDGE
from mindmerger.evaluation.probes import PROBE_TITLES
from mindmerger.evaluation.scoring import LIKELIHOOD_TITLE
from mindmerger.evaluation.statistics import resampling_note
from mindmerger.tasks.base import PUBLISHED_ENCODER, PUBLISHED_LLMS, Task

FORM_TITLES = {
    "soft": "MindMerger-Soft (mapped source and prompt)",
    "hard": "MindMerger-Hard (mapped source only)",
    "llm_only": "LLM alone (prompt only)",
}


def form_title(results: dict) -> str:
    """Returns in words what was evaluated, from the content of a `results.json`; translations say who made them."""
    # Folders of earlier versions have no "bridge": they hold MindMerger's results.
    title, bridge = FORM_TITLES.get(results["form"], results["form"]), results.get("bridge")
    if bridge not in (None, DEFAULT_BRIDGE):
        title = f"{bridge} ({'prefix and prompt' if results['form'] == 'soft' else 'prefix only'})"
    if results.get("adapter") is not None:
        kind = {"lora": "LoRA", "dora": "DoRA"}[results["adapter"]["adapter"]]
        title = f"{title}, {kind} adapter on the LLM"
    parallel, probe = results.get("parallel_input"), results.get("probe_prefix")
    if probe is not None:
        title = f"{title}, {PROBE_TITLES[probe['kind']]}"
    elif (translated := results.get("translate_test")) is not None:
        # The label stands before a bracket, as the names of the forms do.
        title = f"{title.replace(' (prompt only)', '')}, {translated['name']}: translations into English in the prompt"
    elif parallel is not None:
        who = "the benchmark's own rows" if parallel["translations"] == "oracle" else "machine translations"
        title = f"LLM alone with parallel input, {parallel['name']}: {who}, {parallel['order']}"
    if results.get("chat_template") is not None:
        title = f"{title}, chat template"
    if (kind := (results.get("identity") or {}).get("--quantization")) is not None:
        title = f"{title}, LLM in {kind}"
    return title if results.get("scoring") is None else f"{title}, {LIKELIHOOD_TITLE}"


def align(rows: list[list[str]], rule_before_last: bool = False) -> str:
    """Lays rows of cells out as lines of text: first column left, others right, a rule below the first row."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    rule = "-" * len(lines[0])  # before the lines lose their trailing blanks: as wide as the widest row
    lines.insert(1, rule)
    if rule_before_last:
        lines.insert(-1, rule)
    return "\n".join(line.rstrip() for line in lines)


def format_results(results: dict) -> str:
    """Returns the table of one evaluation, from the content of its `results.json`."""
    languages, mean, published = results["languages"], results["mean"], results["published"]
    both_scorers, measure = "reference_accuracy" in mean, measure_key(results)
    # Scores of all rows together, which translations are reported by, come first.
    together = [key for key in CORPUS_TITLES if key in mean]
    column = "sentence chrF2" if together else "accuracy"
    head = ["language", "n", *(CORPUS_TITLES[key] for key in together), column, "95 % interval"]
    gold = results.get("gold")
    rows = [head + ["reference"] * both_scorers + ["published"] * bool(published) + ["gold loss"] * bool(gold)]
    for name, one in [*languages.items(), ("mean", {"n": results["counts"]["examples"], **mean})]:
        row = [name, str(one["n"]), *(f"{one[key]:.1f}" for key in (*together, measure))]
        row.append("{:.1f} – {:.1f}".format(*one["interval"]))
        if both_scorers:
            row.append(f"{one['reference_accuracy']:.1f}")
        if published:
            score = published["mean"] if name == "mean" else published["scores"].get(name)
            row.append("–" if score is None else f"{score:.1f}")
        if gold:
            row.append(f"{one['gold_loss']:.4f}")
        rows.append(row)
    lines = [
        f"{results['task']}, {form_title(results)}: {MEASURES[measure][0]}",
        align(rows, rule_before_last=True),
    ]
    if together:
        lines.append(f"{CORPUS_NOTE}; the interval is that of the mean of rows")
    if both_scorers:
        # The released scorer's quirks in words: its column may be the higher one, and is not the better measure.
        lines.append("reference: scored as the released code does (no minus signs, a missing number counts as 0)")
    if published:
        lines.append(f"published: {published['label']}" + published["note"])
    if gold:
        over_all = f"over all {gold['gold_tokens']} tokens {gold['gold_loss']:.4f}"
        lines.append(f"gold loss: mean loss of the gold answers in nats per token; {over_all}")
    # Results of the first version lack it: their interval took the languages for independent.
    if len(languages) > 1 and "resampling" in results:
        lines.append(f"interval of the mean: {resampling_note(results['resampling'])}")
    counts = results["counts"]
    for key, text in (
        ("hit_limit", f"answers stopped at the limit of {results['max_new_tokens']} new tokens"),
        ("cut_sources", "questions were truncated for the encoder (--max_seq_len)"),
        ("cut_prompts", "prompts were truncated for the LLM (--max_gen_len)"),
    ):
        if counts[key]:
            lines.append(f"{counts[key]} of {counts['examples']} {text}")
    if results.get("faulty_rows"):
        lines.append(f"{len(results['faulty_rows'])} faulty rows were left out (--skip_faulty_rows)")
    return "\n".join(lines)


# Files that a merge or an adapter leaves in a model folder, which then holds another model than its name says.
CHANGED_MODEL = ("merge.json", "mergekit_config.yml", "adapter_config.json")


def is_model(path: str, hub_name: str | None, name: str) -> bool:
    """Returns whether a model, as given on the command line, is a certain published one.

    It is by its hub name, by its place in the hub's cache, or by its folder's name. The `_name_or_path` of a config
    says nothing: it names what a folder was tuned from as often as what it is.

    Args:
        hub_name: `organisation/name`, None for a model that is not on the hub.
        name: the other name that its folder may have.
    """
    folder = Path(path)
    if not folder.is_dir():
        return hub_name is not None and path.lower() == hub_name.lower()
    # Asked before the name: a merge may stand under the name of the model that it started from.
    if any((folder / file).exists() for file in CHANGED_MODEL):
        return False
    # A link into the hub's cache counts as the place there.
    folder = folder.resolve()
    cached = [part for part in folder.parts if part.startswith("models--")]
    if cached:
        return hub_name is not None and cached[-1].lower() == f"models--{hub_name.replace('/', '--')}".lower()

    # Hyphens and case differ between a hub's name and the folders that users keep models in.
    def letters(text):
        return "".join(c for c in text.lower() if c.isalnum())

    names = [name] if hub_name is None else [name, hub_name.split("/")[-1]]
    return letters(folder.name) in map(letters, names)


def published_scores(task: Task, form: str, llm_path: str, mt_path: str | None, rows: dict[str, int]) -> dict | None:
    """Returns the published row that belongs beside a run: of the same form, the same LLM and the same encoder.

    Args:
        rows: language to its number of rows in the run.

    Returns:
        label, note (what the mean covers, and whether the rows are others), scores by language, mean; None without
        such a row: for the Hard form, and where an average covers more languages than the run.
    """
    if form == "hard" or (form == "soft" and not is_model(mt_path, PUBLISHED_ENCODER, "mt5-xl")):
        return None
    llms = [name for name, hub_name in PUBLISHED_LLMS.items() if is_model(llm_path, hub_name, name)]
    # Soft and LLM alone are the two forms that numbers are published for.
    same_form = [label for label in task.published if ("MindMerger" in label) == (form == "soft")]
    found = [label for label in same_form if any(name in label for name in llms)]
    if not found:
        return None
    label = found[0]
    scores = {name: score for name, score in task.published[label].items() if name != "avg"}
    mean, notes = task.published[label]["avg"], []
    if not scores:
        if len(rows) < len(task.evaluation_languages):
            return None
        notes.append("of which the average alone is published")
    # The published mean covers all languages: beside fewer, theirs alone can be compared.
    elif set(scores) != set(rows):
        shown = [scores[name] for name in rows if name in scores]
        if not shown:
            return None
        mean = sum(shown) / len(shown)
        notes.append("mean over the languages of this table")
    # Beside a run on the first hundred questions the published mean would look like a target for them.
    if task.published_rows is not None and set(rows.values()) != {task.published_rows}:
        here = sorted({min(rows.values()), max(rows.values())})
        notes.append(f"on other items: {task.published_rows} rows of each language, here {' to '.join(map(str, here))}")
    return {"label": label, "note": "".join(f"; {note}" for note in notes), "scores": scores, "mean": mean}
