"""Layer swapping (Bandarkar et al., "Layer Swapping for Zero-Shot Cross-Lingual Transfer in Large Language Models",
ICLR 2025, arXiv 2410.01335): bottom and top layers of a language expert around the middle layers of a math expert.

    python -m mindmerger.baselines.layer_swap --math_expert M --language_expert L --output merged
    python -m mindmerger.baselines.layer_swap analyse --base B --math_expert M --language_expert L --output analysis
"""

import argparse
import io
import math
import sys
from dataclasses import asdict, dataclass
from fractions import Fraction

from mindmerger.baselines.merge_flags import HelpFormatter, add_output_flags, count, evaluation_of, ratio
from mindmerger.runtime.command import CommandParser, run_main
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.files import write_bytes_atomic, write_csv_atomic, write_json_atomic
from mindmerger.runtime.processes import log, warn

MATH, LANGUAGE, MIX = "math", "language", "mix"
EXPERTS = (MATH, LANGUAGE)
# The paper's models have 32 layers: b = 5, u = 2, one transition layer at each end.
PAPER_LAYERS, PAPER_BOTTOM, PAPER_TOP = 32, 5, 2
ANALYSIS_FILE = "suggestion.json"

MERGE_HELP = """\
Layer swapping (Bandarkar et al., ICLR 2025, arXiv 2410.01335). Two experts tuned from the same base; L layers, counted
from 0; b = --bottom, u = --top, tb and tu = --transition_bottom and --transition_top, w = --weight:

  layer i < b                    language expert
  b <= i < b+tb                  w * language + (1-w) * math
  b+tb <= i < L-u-tu             math expert
  L-u-tu <= i < L-u              w * language + (1-w) * math
  i >= L-u                       language expert
  embeddings                     --embeddings
  final norm and output head     --head

With --middle A:B: layers A to B-1 from --middle_from, everything else from the other expert.

*(ours)*, not given by the paper: w = 0.5; embeddings, final norm and head from the language expert; for models that do
not have 32 layers b = round(5L/32) and u = round(2L/32); the math expert's tokenizer and number of vocabulary rows are
kept, rows that only it has are its own; arithmetic in fp32, cast once.

The output is an ordinary model folder: python run_evaluation.py --llm_only --llm_path merged --save_name merged
Which b and u suit two experts: python -m mindmerger.baselines.layer_swap analyse --help
"""

ANALYSE_HELP = """\
How far each expert moved from its base, per layer and kind of projection (q k v o gate up down):

  relative change = |expert - base| / |base|        (Frobenius norms of the weight matrices)

Writes changes.csv, changes.png (heatmaps) and suggestion.json into --output.

*(ours)* The suggested b and u: a layer's change is the mean over the seven kinds; an expert's share of change in a
layer is that mean divided by its sum over all layers; b (u) is the length of the longest run of layers from the bottom
(top) in which the language expert's share exceeds the math expert's.
"""


@dataclass(frozen=True)
class LayerPlan:
    """Sources of a merged model's parts: one entry of `layers` per layer, each "math", "language" or "mix"."""

    layers: tuple[str, ...]
    embeddings: str
    head: str
    weight: float  # the language expert's, where the source is "mix"

    def source(self, place) -> str:
        """Returns the source of a tensor, given its `Place`; the final norm goes with the head."""
        if place.layer is not None:
            return self.layers[place.layer]
        return self.embeddings if place.kind == "embeddings" else self.head


def swap_ends(
    number: int, bottom: int | None, top: int | None, transition_bottom: int | None, transition_top: int | None
) -> tuple[str, ...]:
    """Returns the source of each of `number` layers where the ends are swapped (paper, section 3).

    None stands for the default: the paper's 5, 2, 1, 1 scaled to the number of layers *(ours)*, and no more than the
    given values leave room for.

    Raises:
        UserError: when the given values need more layers than there are.
    """
    given = {
        "--bottom": bottom,
        "--top": top,
        "--transition_bottom": transition_bottom,
        "--transition_top": transition_top,
    }
    # Halves go up: Python's own round would send them to the even neighbour, now up and now down.
    defaults = {
        "--bottom": math.floor(PAPER_BOTTOM * number / PAPER_LAYERS + 0.5),
        "--top": math.floor(PAPER_TOP * number / PAPER_LAYERS + 0.5),
        "--transition_bottom": 1,
        "--transition_top": 1,
    }
    room = number - sum(value for value in given.values() if value is not None)
    if room < 0:
        asked = " ".join(f"{flag} {value}" for flag, value in given.items() if value is not None)
        raise UserError(f"{asked} need {number - room} layers, the experts have {number}")
    # What was given is taken as given; defaults share what is left, in this order, so that a small model gets ends
    # before it gets transitions.
    sizes = {}
    for flag, value in given.items():
        sizes[flag] = min(defaults[flag], room) if value is None else value
        room -= sizes[flag] if value is None else 0
    b, u, tb, tu = sizes.values()
    middle = number - b - u - tb - tu
    return (LANGUAGE,) * b + (MIX,) * tb + (MATH,) * middle + (MIX,) * tu + (LANGUAGE,) * u


def swap_middle(number: int, span: str, middle_from: str) -> tuple[str, ...]:
    """Returns the source of each of `number` layers: A to B-1 of "A:B" from one expert, all others from the other.

    Raises:
        UserError: for a range that the model does not have.
    """
    first, colon, last = span.partition(":")
    # isdigit alone takes digits of every script, and so does int.
    valid = colon and all(part.isascii() and part.isdigit() for part in (first, last))
    if not (valid and int(first) < int(last) <= number):
        raise UserError(
            f"--middle {span} is not a range of layers: expected A:B with 0 <= A < B <= {number}, the number of layers"
        )
    other = MATH if middle_from == LANGUAGE else LANGUAGE
    return tuple(middle_from if int(first) <= i < int(last) else other for i in range(number))


def settle_layers(args: argparse.Namespace, config) -> LayerPlan:
    """Returns the sources that the command line asks for, for models of this config.

    Raises:
        UserError: for values that contradict each other or the number of layers.
    """
    number = config.num_hidden_layers
    if args.middle is None:
        sizes = (args.bottom, args.top, args.transition_bottom, args.transition_top)
        layers, outer = swap_ends(number, *sizes), LANGUAGE
    else:
        layers = swap_middle(number, args.middle, args.middle_from)
        outer = MATH if args.middle_from == LANGUAGE else LANGUAGE
    # Outside the layers, what is not asked for comes from the expert that surrounds the middle: its residual stream is
    # the one that begins and ends there.
    sources = {"average": MIX, MATH: MATH, LANGUAGE: LANGUAGE, None: outer}
    plan = LayerPlan(layers, sources[args.embeddings], sources[args.head], float(args.weight))
    # A tied head is not stored: whatever the embeddings become, it becomes too.
    if config.tie_word_embeddings and plan.head != plan.embeddings:
        warn("these models tie the output head to the embeddings: it follows --embeddings, --head the final norm alone")
    return plan


def merge(args: argparse.Namespace) -> None:
    """Writes the merged model folder.

    Raises:
        UserError: for anything that keeps it from being written; nothing is left behind then.
    """
    # Imported here: torch takes seconds, which --help and a wrong flag need not wait for.
    from mindmerger.baselines.compatibility import check_compatible
    from mindmerger.baselines.merged_folder import check_output, write_merged
    from mindmerger.baselines.model_folder import open_model, place_of

    output = check_output(args.output, args.overwrite, [args.math_expert, args.language_expert])
    # The math expert is the task expert: its config, tokenizer and vocabulary rows are the merged model's, since what
    # the merged model is asked are the task's prompts.
    math_expert = open_model("math expert", args.math_expert)
    language_expert = open_model("language expert", args.language_expert)
    common_rows = check_compatible(math_expert, [language_expert])
    plan = settle_layers(args, math_expert.config)
    for source, meaning in ((LANGUAGE, "language"), (MIX, "mixed"), (MATH, "math")):
        log(f"{meaning} layers: {_spans(plan.layers, source)}")
    source_of = {name: plan.source(place_of(name)) for name in math_expert.tensors}

    def combine(name: str, start: int, stop: int):
        source = source_of[name]
        if source != MIX:  # as it is stored, so that the merged tensor has the expert's very bits
            return (math_expert if source == MATH else language_expert).read(name, start, stop)
        # Products are new tensors: float() of an fp32 block is the block itself, which may map the expert's file.
        mixed = language_expert.read(name, start, stop).float() * plan.weight
        return mixed.add_(math_expert.read(name, start, stop).float() * (1 - plan.weight))

    record = {
        "method": "layer swapping (arXiv 2410.01335)",
        "formula": "language | math | weight * language + (1 - weight) * math, by layer",
        "arguments": {name: str(value) if isinstance(value, Fraction) else value for name, value in vars(args).items()},
        "plan": {**asdict(plan), "tensors": source_of},
    }
    models, form = [math_expert, language_expert], {"dtype": args.dtype, "max_shard_gb": args.max_shard_gb}
    write_merged(output, math_expert, models, common_rows, combine, record, **form)
    log(f"wrote {args.output}; evaluate it with: {evaluation_of(output)}")


def _spans(layers: tuple[str, ...], source: str) -> str:
    """Writes layers of one source as ranges: "0-4, 30-31"."""
    spans: list[list[int]] = []
    for i, one in enumerate(layers):
        if one != source:
            continue
        if spans and spans[-1][1] == i - 1:
            spans[-1][1] = i
        else:
            spans.append([i, i])
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in spans) or "none"


def analyse(args: argparse.Namespace) -> None:
    """Writes changes.csv, changes.png and suggestion.json.

    Raises:
        UserError: for models that do not fit each other, or an expert that equals its base.
    """
    from mindmerger.baselines.compatibility import check_compatible
    from mindmerger.baselines.merged_folder import check_output, new_folder
    from mindmerger.baselines.model_folder import KINDS, open_model

    output = check_output(
        args.output, args.overwrite, [args.base, args.math_expert, args.language_expert], ANALYSIS_FILE
    )
    base = open_model("base", args.base)
    experts = {
        MATH: open_model("math expert", args.math_expert),
        LANGUAGE: open_model("language expert", args.language_expert),
    }
    # Each against the base too: a tensor of another shape would end the sweep after minutes.
    for expert in experts.values():
        check_compatible(expert, [base])
    check_compatible(experts[MATH], [experts[LANGUAGE]])
    changes = relative_changes(base, experts)
    shares = {expert: _shares(changes[expert], str(experts[expert])) for expert in EXPERTS}
    bottom, top = suggest_ends(shares[LANGUAGE], shares[MATH])
    rows = [["layer", "kind", "math", "language"]]
    for layer in range(base.config.num_hidden_layers):
        rows += [[layer, kind, *(changes[expert][layer][k] for expert in EXPERTS)] for k, kind in enumerate(KINDS)]
    suggestion = {
        "bottom": bottom,
        "top": top,
        "share_of_change": shares,
        "models": {"base": str(base.path), **{name: str(model.path) for name, model in experts.items()}},
    }
    with new_folder(output) as folder:
        write_csv_atomic(folder / "changes.csv", rows)
        write_bytes_atomic(folder / "changes.png", draw_changes(changes, shares, bottom, top))
        write_json_atomic(folder / ANALYSIS_FILE, suggestion)
    log(f"suggested (ours): --bottom {bottom} --top {top}; the figures are in {args.output}")


def relative_changes(base, experts: dict) -> dict[str, list[list[float]]]:
    """Returns |expert - base| / |base| of every weight matrix: per expert a row per layer, per row the seven kinds.

    Args:
        base: an open `ModelFolder`.
        experts: such folders by name.

    Raises:
        UserError: for a base matrix of zeros, which nothing can be relative to.
    """
    from mindmerger.baselines.merged_folder import progress_bar
    from mindmerger.baselines.model_folder import KINDS, place_of, row_blocks

    found = {name: [[math.nan] * len(KINDS) for _ in range(base.config.num_hidden_layers)] for name in experts}
    with progress_bar(base.weight_bytes(), "comparing") as bar:
        for tensor, stored in base.tensors.items():
            place = place_of(tensor)
            if place.kind in KINDS and tensor.endswith(".weight"):
                norm, moved = 0.0, dict.fromkeys(experts, 0.0)
                for rows in row_blocks(stored.shape):
                    # In float64: tuning moves weights little, and fp32 loses digits where it adds millions of squares.
                    block = base.read(tensor, *rows).double()
                    norm += block.square().sum().item()
                    for name, expert in experts.items():
                        moved[name] += (expert.read(tensor, *rows).double() - block).square().sum().item()
                if not norm > 0:
                    raise UserError(f"{base}: {tensor} is zero or not finite, so no change is relative to it")
                for name in experts:
                    found[name][place.layer][KINDS.index(place.kind)] = math.sqrt(moved[name] / norm)
            bar.update(math.prod(stored.shape) * stored.dtype.itemsize)
    return found


def _shares(changes: list[list[float]], model: str) -> list[float]:
    """Returns each layer's mean change over the kinds, as a share of the sum over layers."""
    # A mean over kinds, not over scalars: the MLP's matrices, nearly three times as large, would drown the attention's.
    means = [math.fsum(row) / len(row) for row in changes]
    total = math.fsum(means)
    if not 0 < total < math.inf:
        raise UserError(f"{model} does not differ from the base, or not by finite numbers: pass the tuned expert")
    return [mean / total for mean in means]


def suggest_ends(language: list[float], math_shares: list[float]) -> tuple[int, int]:
    """Suggests (b, u) *(ours)*: the longest ends where each layer's share is larger in the language expert.

    Shares sum to one on both sides, so the two ends never meet.
    """
    exceeds = [one > other for one, other in zip(language, math_shares, strict=True)]
    bottom = next((i for i, holds in enumerate(exceeds) if not holds), 0)
    top = next((i for i, holds in enumerate(reversed(exceeds)) if not holds), 0)
    return bottom, top


def draw_changes(changes: dict[str, list[list[float]]], shares: dict[str, list[float]], bottom: int, top: int) -> bytes:
    """Draws a PNG: a heatmap of relative change per expert (layers bottom-up × kinds), shares of change by layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from mindmerger.baselines.model_folder import KINDS

    layers = len(shares[MATH])
    figure = Figure(figsize=(11, min(14, max(4.5, 1.6 + 0.22 * layers))), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    heat_language, heat_math, curve = figure.subplots(1, 3, sharey=True)
    # One scale for both experts: their colours are there to be compared.
    highest = max(value for rows in changes.values() for row in rows for value in row)
    for axes, expert in ((heat_language, LANGUAGE), (heat_math, MATH)):
        image = axes.imshow(changes[expert], origin="lower", aspect="auto", vmin=0, vmax=highest, cmap="viridis")
        axes.set_title(f"{expert} expert")
        axes.set_xticks(range(len(KINDS)), KINDS)
        axes.set_xlabel("projection")
    heat_language.set_ylabel("layer (0 is next to the embeddings)")
    heat_language.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=[heat_language, heat_math], label="relative change |expert − base| / |base|")
    for expert, marker in ((LANGUAGE, "o-"), (MATH, "s--")):
        curve.plot(
            [100 * share for share in shares[expert]], range(layers), marker, markersize=4, label=f"{expert} expert"
        )
    for low, high, name in ((-0.5, bottom - 0.5, f"b = {bottom}"), (layers - top - 0.5, layers - 0.5, f"u = {top}")):
        if high > low:
            curve.axhspan(low, high, color="tab:blue", alpha=0.12, label=f"suggested {name}")
    curve.set_title("share of change by layer")
    curve.set_xlabel("share of the expert's change (%)")
    curve.set_xlim(0, 110 * max(max(one) for one in shares.values()))
    figure.legend(loc="outside lower right", ncols=4, fontsize="small")  # inside it would hide the curves' ends
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    return png.getvalue()


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of the merging command."""
    parser = CommandParser(
        prog="python -m mindmerger.baselines.layer_swap",
        description=MERGE_HELP,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--math_expert", required=True, help="model folder tuned on the English task; it is the task expert"
    )
    parser.add_argument("--language_expert", required=True, help="model folder tuned on the target language")
    ends = parser.add_argument_group("layers")
    ends.add_argument("--bottom", type=count, help="number b of bottom layers (default 5 of 32)")
    ends.add_argument("--top", type=count, help="number u of top layers (default 2 of 32)")
    ends.add_argument("--transition_bottom", type=count, help="number tb of mixed layers above the bottom (default 1)")
    ends.add_argument("--transition_top", type=count, help="number tu of mixed layers below the top (default 1)")
    ends.add_argument(
        "--weight",
        type=ratio,
        default=Fraction(1, 2),
        help="weight w of the language expert in mixed layers and in `average` (default 0.5, ours)",
    )
    ends.add_argument("--middle", metavar="A:B", help="the mirror: swap layers A to B-1 instead of the ends")
    ends.add_argument(
        "--middle_from", choices=EXPERTS, default=LANGUAGE, help="expert whose layers --middle takes (default language)"
    )
    choices = (LANGUAGE, MATH, "average")
    outside = "default language, ours; with --middle the expert that surrounds it"
    ends.add_argument("--embeddings", choices=choices, help=f"source of the input embeddings ({outside})")
    ends.add_argument("--head", choices=choices, help=f"source of final norm and output head ({outside})")
    add_output_flags(parser)
    return parser


def build_analyse_parser() -> argparse.ArgumentParser:
    """Builds the parser of `analyse`."""
    parser = CommandParser(
        prog="python -m mindmerger.baselines.layer_swap analyse",
        description=ANALYSE_HELP,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--base", required=True, help="model folder that both experts were tuned from")
    parser.add_argument("--math_expert", required=True, help="model folder tuned on the English task")
    parser.add_argument("--language_expert", required=True, help="model folder tuned on the target language")
    parser.add_argument("--output", required=True, help="new folder for the figures")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier analysis")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; see the module's docstring."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["analyse"]:
        analyse(build_analyse_parser().parse_args(argv[1:]))
        return 0
    args = build_parser().parse_args(argv)
    # Only what was given: their defaults are filled in later, and no default can clash.
    clashing = [
        f"--{name}"
        for name in ("bottom", "top", "transition_bottom", "transition_top")
        if getattr(args, name) is not None
    ]
    if args.middle is not None and clashing:
        raise UserError(f"--middle replaces {clashing[0]}: give one of them")
    merge(args)
    return 0


if __name__ == "__main__":
    run_main(main, alone=True)
