"""Neurons of a language model's MLPs that are active while it answers.

    python -m mindmerger.analysis.neurons count --llm_only --llm_path LLM --task math --limit 50
    python -m mindmerger.analysis.neurons count --init_checkpoint outputs/MindMerger/math/augmentation --task math
    python -m mindmerger.analysis.neurons analyse results/MindMerger/math_mgsm-llm_only results/MindMerger/math_mgsm

A neuron of a gated MLP, down(act(gate(x)) * up(x)), is active at a position where act(gate(x)) > 0, before the product
(Mu et al., EMNLP 2024, arXiv 2403.09073); of Bloom's MLP, where gelu(h(x)) > 0. Counted are the positions that predict
a token: the last one of the input and every generated token but the last. Padding and what follows the end never are.

    count[layer, neuron] = number of counted positions at which the neuron is active
    active share of a layer = sum over its neurons of count / (width * counted positions)

Families: Llama, Mistral, Qwen2, Qwen3, Gemma (mlp.act_fn), Bloom (mlp.gelu_impl), the encoder of T5 and mT5
(DenseReluDense.act, ours; every real token of the question counts there).
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from mindmerger.analysis.activations import NeuronError, find_activations, observe_answers, observe_encoder
from mindmerger.runtime.command import CommandParser, number_where, run_main, versions
from mindmerger.runtime.files import write_bytes_atomic, write_csv_atomic, write_json_atomic, write_text_atomic
from mindmerger.runtime.processes import log, progress_bar, warn, world_size

COUNTS_FILE = "neurons.safetensors"
PROPORTION_FILE = "proportion.jsonl"
RUN_FILE = "run.json"
_HEATMAP_COLUMNS = 1000  # about as many as a picture has pixels: a layer of a 7B model has 11,008 neurons


def count_all(model, settings, args: argparse.Namespace) -> tuple[dict, list[dict]]:
    """Counts over all examples of an evaluation, in the batches that its settings ask for.

    Returns:
        {"counts": (layers, width), "tokens": (1,), and both again as "counts.<code>" for every language}, int64 on the
        CPU; and one record per example, in order, for proportion.jsonl.
    """
    import torch

    from mindmerger.generation.answers import batch_inputs, split_evaluation
    from mindmerger.tasks.languages import find_language

    tensors: dict[str, torch.Tensor] = {}
    # Batches come by length; records keep the order of the items, by which `analyse` compares runs.
    records: list[dict] = [{}] * len(settings.examples)
    by_language: dict[str, list[int]] = {}
    for i, example in enumerate(settings.examples):
        by_language.setdefault(example.language, []).append(i)
    with progress_bar(total=len(settings.examples), unit="example", desc="counting") as progress:
        # Batches hold one language: one forward pass gives one sum of counts, which nothing could take apart later.
        for language, indices in by_language.items():
            code = find_language(language).code
            for batch in split_evaluation(indices, settings):
                inputs = batch_inputs(model, settings.tokenizers, settings.columns, batch)
                if args.tower == "encoder":
                    seen = observe_encoder(model, inputs)
                else:
                    seen = observe_answers(model, inputs, settings.max_new_tokens)
                counts, tokens = seen.counts.cpu(), seen.tokens.cpu()
                # Integers: the sums are exact, so that no batch size changes them.
                for suffix in ("", f".{code}"):
                    for name, value in (("counts", counts), ("tokens", tokens.sum().reshape(1))):
                        tensors[name + suffix] = tensors.get(name + suffix, 0) + value
                width = counts.shape[1]
                for i, row, n in zip(batch, seen.row_counts.tolist(), tokens.tolist(), strict=True):
                    # Shares, not counts: a long answer has more tokens, and items are to be compared.
                    shares = [active / (n * width) for active in row]
                    share = sum(row) / (n * width * len(row))
                    head = {"id": settings.examples[i].id, "language": language, "tokens": n}
                    records[i] = head | {"active_share": share, "active_share_per_layer": shares}
                progress.update(len(batch))
    return tensors, records


def count(args: argparse.Namespace) -> int:
    """Runs the command `count`."""
    import torch

    from mindmerger.evaluation.settings import settle
    from mindmerger.generation.loading import load_model

    if world_size() > 1:
        raise NeuronError("neurons are counted by one process: start it with python, not with the launcher")
    if args.tower == "encoder" and args.llm_only:
        raise NeuronError("--tower encoder needs an encoder: leave --llm_only out")
    # With vLLM there is nothing to observe: of our LLM only the input embedding is left.
    if args.engine != "hf":
        raise NeuronError("neurons are counted in transformers' model: leave --engine out")
    if args.score_gold:
        raise NeuronError("neurons are counted over greedy answers alone: leave --score_gold out")
    if args.scoring != "generate":
        raise NeuronError("neurons are counted over greedy answers alone: leave --scoring out")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = settle(args, device.type == "cuda")
    folder = Path(args.output_dir or settings.folder / ("neurons" if args.tower == "llm" else "neurons-encoder"))
    if (folder / COUNTS_FILE).exists() and not args.overwrite:
        raise NeuronError(f"{folder} holds counts already: pass --overwrite to replace them, or another --output_dir")
    model = load_model(settings, device)
    # Only to refuse an unknown family now: the first batch would find it out after minutes of decoding.
    find_activations(model.encoder if args.tower == "encoder" else model.llm)
    tensors, records = count_all(model, settings, args)
    write_counts(folder, args.tower, settings, tensors, records)
    return 0


def write_counts(folder: Path, tower: str, settings, tensors: dict, records: list[dict]) -> None:
    """Writes the three files that `read_counts` reads, and prints the mean share of active neurons."""
    from safetensors.torch import save

    from mindmerger.evaluation.tables import form_title

    if (translated := settings.parallel_input or settings.translate_test) is not None:
        name = f"LLM alone, {translated['name']}"
    else:
        # A legend has room for the form alone: its explanation in brackets goes.
        shown = {"form": settings.form, "bridge": settings.bridge_name if settings.bridge is not None else None}
        name = form_title(shown).split(" (")[0]
        name += f", {settings.probe_prefix['kind']} prefix" if settings.probe_prefix is not None else ""
        name = f"encoder of {name}" if tower == "encoder" else name
    run = {
        "name": name,
        "tower": tower,
        "task": settings.task.name,
        "form": settings.form,
        "parallel_input": settings.parallel_input,
        "tokens": int(tensors["tokens"]),
        "identity": settings.identity,
        "command": sys.argv,
        "versions": versions(),
    }
    # By safetensors and not by pickle: reading counts that others share must not run their code.
    write_bytes_atomic(folder / COUNTS_FILE, save(tensors, metadata={"tower": tower, "task": settings.task.name}))
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_text_atomic(folder / PROPORTION_FILE, lines)
    write_json_atomic(folder / RUN_FILE, run)
    layers, width = tensors["counts"].shape
    share = float(tensors["counts"].sum()) / (layers * width * run["tokens"])
    print(f"{run['name']}: {100 * share:.2f} % of {layers} x {width} neurons active, mean over {run['tokens']} tokens")
    log(f"counts are in {folder}")


@dataclass
class Counts:
    """Content of a folder that `count` left. counts: {language code or "all": int64 (layers, width)}; tokens likewise;
    ids: of the items, in order."""

    name: str
    tower: str
    counts: dict
    tokens: dict
    ids: list[str]

    def shares(self, language: str = "all"):
        """Returns the active share of each layer, float64 (layers,)."""
        counts = self.counts[language]
        # Divided last: the counts are whole numbers, so that the only rounding is this one.
        return counts.sum(1) / (counts.shape[1] * self.tokens[language])


def read_counts(folder) -> Counts:
    """Reads what `count` left.

    Raises:
        NeuronError: for a folder without counts, or a file that cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = Path(folder)
    # A results folder stands for the counts in it: that is what other commands are given.
    if not (folder / COUNTS_FILE).is_file() and (folder / "neurons" / COUNTS_FILE).is_file():
        folder = folder / "neurons"
    absent = [name for name in (COUNTS_FILE, RUN_FILE, PROPORTION_FILE) if not (folder / name).is_file()]
    if absent:
        raise NeuronError(f"{folder} holds no counts: {absent[0]} is missing; make them by the count command")
    try:
        tensors = load_file(folder / COUNTS_FILE)
        run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        lines = (folder / PROPORTION_FILE).read_text(encoding="utf-8").splitlines()
        ids = [json.loads(line)["id"] for line in lines]
        name, tower = run["name"], run["tower"]
    # Folders come from other machines too: whatever is wrong in one is a line, not a traceback.
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise NeuronError(f"{folder} cannot be read: {type(error).__name__} {error}") from error
    counts = {key.partition(".")[2] or "all": t for key, t in tensors.items() if key.startswith("counts")}
    tokens = {key.partition(".")[2] or "all": int(t[0]) for key, t in tensors.items() if key.startswith("tokens")}
    return Counts(name, tower, counts, tokens, ids)


def peak_neurons(counts, share: float) -> list[tuple[int, int, int]]:
    """Returns the most active neurons as (layer, neuron, count): the first floor(N * share) of all N = layers * width.

    Counts descend; of equal ones the lower layer's and then the lower neuron's comes first.
    """
    import numpy as np

    flat = counts.reshape(-1)
    # Flat order is layer by layer, so a stable sort breaks ties as promised.
    order = np.argsort(-flat, kind="stable")[: int(len(flat) * share)]
    return [(int(i) // counts.shape[1], int(i) % counts.shape[1], int(flat[i])) for i in order]


def draw_active_share(runs: list[Counts], path) -> None:
    """Draws one line per run: active share of each layer."""
    from mindmerger.evaluation.plots import legend_label, line, new_figure, save_figure

    figure, axes = new_figure(7.5, 4.5)
    for i, run in enumerate(runs):
        shares = 100 * run.shares()
        label = f"{legend_label(run.name)} (all layers: {shares.mean():.1f} %)"
        axes.plot(range(len(shares)), shares, label=label, **line(i))
    axes.set(xlabel="layer (0 = first)", ylabel="active neurons, % of the layer's (mean over tokens)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def draw_heatmap(run: Counts, path) -> None:
    """Draws counts / tokens, layers bottom-up, neurons from left to right.

    Where there are more neurons than the picture has room for, a column is the mean of neighbouring ones.
    """
    import numpy as np

    from mindmerger.evaluation.plots import new_figure, save_figure

    shares = 100 * run.counts["all"] / run.tokens["all"]
    layers, width = shares.shape
    # Grouped by us: drawn as they are, a picture would show one neuron of each group and leave its neighbours out.
    group = -(-width // _HEATMAP_COLUMNS)
    starts = np.arange(0, width, group)
    # The last group may be smaller: a mean of its own members, not of missing ones.
    columns = np.add.reduceat(shares, starts, axis=1) / np.diff([*starts, width])
    figure, axes = new_figure(9, 4)
    # Nearest: any other interpolation would mix layers.
    # One scale for every run, 0 to 100: pictures of two models are there to be compared.
    image = axes.imshow(
        columns,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        vmin=0,
        vmax=100,
        cmap="viridis",
        extent=(-0.5, len(starts) * group - 0.5, -0.5, layers - 0.5),
    )
    means = f" (a column: mean of {group} neighbours)" if group > 1 else ""
    axes.set(xlabel=f"neuron{means}", ylabel="layer (0 = first)", title=run.name, xlim=(-0.5, width - 0.5))
    axes.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, label="active, % of tokens")
    save_figure(figure, path)


def draw_peaks(runs: list[Counts], peaks: list[list], share: float, folder: Path) -> None:
    """Draws the rank-count curve of all neurons, and how many of the kept ones each layer has."""
    import numpy as np

    from mindmerger.evaluation.plots import LINE_STYLES, colour, legend_label, line, new_figure, save_figure

    figure, axes = new_figure(7.5, 4.5)
    for i, run in enumerate(runs):
        # In percent of tokens and of neurons, so that models of different sizes share the axes.
        ranked = 100 * np.sort(run.counts["all"].reshape(-1))[::-1] / run.tokens["all"]
        style = LINE_STYLES[i % len(LINE_STYLES)]
        axes.plot(
            np.linspace(0, 100, len(ranked)), ranked, color=colour(i), linestyle=style, label=legend_label(run.name)
        )
    axes.axvline(100 * share, color="grey", linestyle="--", linewidth=1, label=f"kept: first {100 * share:g} %")
    axes.set(xlabel="rank of the neuron, % of all neurons", ylabel="active, % of tokens")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, folder / "rank_count.png")
    figure, axes = new_figure(7.5, 4.5)
    for i, (run, kept) in enumerate(zip(runs, peaks, strict=True)):
        per_layer = np.bincount([layer for layer, *_ in kept], minlength=len(run.counts["all"]))
        axes.plot(range(len(per_layer)), per_layer, label=legend_label(run.name), **line(i))
    axes.set(xlabel="layer (0 = first)", ylabel=f"neurons among the {100 * share:g} % most active")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, folder / "peak_per_layer.png")


def read_runs(args: argparse.Namespace) -> list[Counts]:
    """Reads the folders to compare and gives them the names of --names.

    Raises:
        NeuronError: for folders that were counted on different items or towers, and for names that do not tell runs
            apart.
    """
    runs = [read_counts(folder) for folder in args.folders]
    if args.names is not None:
        if len(args.names) != len(runs):
            raise NeuronError(f"--names gives {len(args.names)} names for {len(runs)} folders")
        for run, name in zip(runs, args.names, strict=True):
            run.name = name
    # Tables and legends know runs by their names alone.
    if len({run.name for run in runs}) < len(runs):
        raise NeuronError("two runs have one name: tell them apart by --names, one for each folder")
    for folder, run in zip(args.folders, runs, strict=True):
        if run.tower != runs[0].tower:
            raise NeuronError(f"{folder} counts the {run.tower} but {args.folders[0]} the {runs[0].tower}")
        # Harder items make longer answers and other shares: a difference in items would pass for one between models.
        if run.ids != runs[0].ids:
            raise NeuronError(
                f"{folder} ({len(run.ids)} items) and {args.folders[0]} ({len(runs[0].ids)} items) were counted on "
                "different items: count both with the same --task, --languages and --limit"
            )
    return runs


def write_active_shares(runs: list[Counts], folder: Path) -> None:
    """Writes active_share.csv and .png, and prints each run's mean share."""
    rows = [["run", "language", "layer", "active_share"]]
    for run in runs:
        for language in run.counts:
            shares = run.shares(language)
            per_layer = [[run.name, language, i, f"{share:.6f}"] for i, share in enumerate(shares)]
            rows += [[run.name, language, "all", f"{shares.mean():.6f}"], *per_layer]
    write_csv_atomic(folder / "active_share.csv", rows)
    draw_active_share(runs, folder / "active_share.png")
    for run in runs:
        print(f"{run.name}: {100 * run.shares().mean():.2f} % active over {run.tokens['all']} tokens")


def write_peaks(runs: list[Counts], share: float, folder: Path) -> None:
    """Writes peak.csv and the two pictures of the most active neurons; warns where ties decide which those are."""
    if not share * runs[0].counts["all"].size >= 1:
        warn(f"--peak {share} of {runs[0].counts['all'].size} neurons keeps none")
    peaks = [peak_neurons(run.counts["all"], share) for run in runs]
    rows = [["run", "rank", "layer", "neuron", "count", "tokens"]]
    for run, kept in zip(runs, peaks, strict=True):
        rows += [[run.name, rank, *one, run.tokens["all"]] for rank, one in enumerate(kept, 1)]
        # Few tokens give few different counts: then the order of layers, not activity, says which neurons are kept.
        tied = int((run.counts["all"] == kept[-1][2]).sum()) if kept else 0
        if tied > sum(one[2] == kept[-1][2] for one in kept):
            warn(
                f"{run.name}: {tied} neurons have the count {kept[-1][2]} at which --peak {share} ends; of equals "
                "the lower layers' are kept, so the kept neurons per layer say little here: count more items"
            )
    write_csv_atomic(folder / "peak.csv", rows)
    draw_peaks(runs, peaks, share, folder)


def analyse(args: argparse.Namespace) -> int:
    """Runs the command `analyse`."""
    runs, folder = read_runs(args), Path(args.output_dir)
    write_active_shares(runs, folder)
    write_peaks(runs, args.peak, folder)
    for i, run in enumerate(runs, 1):
        draw_heatmap(run, folder / f"heatmap-{i}.png")
    log(f"tables and pictures are in {folder}")
    return 0


def build_count_parser() -> argparse.ArgumentParser:
    """Builds the parser of `count`: an evaluation's flags, so that the same items are counted, and two of its own."""
    from mindmerger.evaluation.flags import build_parser

    parser = build_parser()
    parser.prog = "python -m mindmerger.analysis.neurons count"
    parser.description = __doc__
    group = parser.add_argument_group("neurons")
    group.add_argument(
        "--tower", choices=["llm", "encoder"], default="llm", help="model whose neurons are counted (default llm)"
    )
    group.add_argument(
        "--output_dir",
        help="folder of the counts (default: neurons, or neurons-encoder, in the evaluation's results folder)",
    )
    return parser


def build_analyse_parser() -> argparse.ArgumentParser:
    """Builds the parser of `analyse`."""
    parser = CommandParser(
        prog="python -m mindmerger.analysis.neurons analyse",
        description="Writes active_share.csv and .png (all runs in one plot), peak.csv, rank_count.png,\n"
        "peak_per_layer.png, and one heatmap of count / tokens per run.",
    )
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="folder that the count command left, on the same items"
    )
    parser.add_argument("--names", nargs="+", help="names of the runs in tables and legends, one per folder")
    parser.add_argument(
        "--peak",
        type=number_where(lambda value: 0 <= value <= 1, "a number from 0 to 1"),
        default=0.01,
        help="the share p of all N neurons to keep as the most active: the first floor(N * p) (default 0.01)",
    )
    parser.add_argument(
        "--output_dir", default="results/neurons", help="folder of tables and pictures (default results/neurons)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one of the two commands; see the module's docstring."""
    argv = sys.argv[1:] if argv is None else argv
    # Two parsers and no subparsers: `count` has an evaluation's parser, with two flags more.
    if argv[:1] == ["count"]:
        return count(build_count_parser().parse_args(argv[1:]))
    if argv[:1] == ["analyse"]:
        return analyse(build_analyse_parser().parse_args(argv[1:]))
    if argv[:1] in (["-h"], ["--help"]):
        print(f"usage: python -m mindmerger.analysis.neurons {{count,analyse}} ...\n\n{__doc__.strip()}")
        return 0
    raise NeuronError(
        "say what to do: python -m mindmerger.analysis.neurons count ..., or analyse FOLDER ... (see --help)"
    )


if __name__ == "__main__":
    run_main(main, alone=True)
