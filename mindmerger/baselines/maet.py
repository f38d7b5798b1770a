"""A merge in the style of MAET (Chen et al., "Extracting and Transferring Abilities For Building Multi-lingual
Ability-enhanced Large Language Models", arXiv 2410.07825), and its controls: task arithmetic and the uniform soup.

    python -m mindmerger.baselines.maet --base B --task_expert A --language_experts L1 L2 --output merged
    python -m mindmerger.baselines.maet --task_arithmetic --base B --task_expert A --language_experts L1 --output merged
    python -m mindmerger.baselines.maet --soup --task_expert A --language_experts L1 L2 --output merged

The method's code and coefficients were never published: every default here is ours.
"""

import argparse
import math
from dataclasses import dataclass, field
from fractions import Fraction

from mindmerger.baselines.merge_flags import HelpFormatter, add_output_flags, evaluation_of, number, ratio
from mindmerger.runtime.command import CommandParser, run_main
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.processes import log

HELP = """\
MAET-style merge (Chen et al., arXiv 2410.07825). Base t0, task expert tA, English general expert tE (optional),
language experts t1..tJ; t names one tensor:

  K       the --key_ratio share of scalars with the largest |probe - t0|, one threshold over all tensors
  R_A     = [alpha * (tA - t0) - beta * (tE - t0)] * 1[K]                task weights
  R_L     = sum_j mu_j * (tj - t0)                                       language weights
  s_t     = cosine(R_A[t], R_L[t])
  T       the --tensor_ratio share of tensors with the lowest s_t (--tensor_order)
  merged  = t0 + eta * R_L + gamma * R_A * 1[t in T]

*(ours)*: all defaults (the paper gives no coefficients and released no code); s_t = 0 where one of the two is zero;
only the layers' projections take part, everything else is the base's unless --include_nonlayer is given; ties at the
threshold are all in K, ties of s_t go to the earlier tensor; the sums are computed as one linear combination of the
models, in fp32, cast once; the task expert's tokenizer and number of vocabulary rows are kept, rows that not all models
have are its own.

Controls: --task_arithmetic (Ilharco et al., ICLR 2023, arXiv 2212.04089) is the same with both ratios 1 and no tE:
  merged = t0 + eta * sum_j mu_j * (tj - t0) + gamma * alpha * (tA - t0)
--soup (Wortsman et al., ICML 2022, arXiv 2203.05482) is the uniform mean of all experts given, over all tensors:
  merged = mean(tA, [tE,] t1..tJ)

The output is an ordinary model folder: python run_evaluation.py --llm_only --llm_path merged --save_name merged
"""

FORMULA = "t0 + eta * sum_j mu_j * (tj - t0) + gamma * [alpha * (tA - t0) - beta * (tE - t0)] * 1[K] * 1[t in T]"

# |difference| in fp32 is ordered as its bit pattern is. Its upper bits make log-spaced bins (4096 to each power of
# two), its lower bits tell apart what falls into one bin.
LOW_BITS = 11
LOW = 1 << LOW_BITS
UPPER = 1 << (31 - LOW_BITS)
NOTHING = 1 << 31  # a threshold above every bit pattern


@dataclass(frozen=True)
class Recipe:
    """The coefficients of a merge; see the module's help."""

    alpha: float = 1.0
    beta: float = 1.0  # 0 without an English expert
    gamma: float = 1.0
    eta: float = 1.0
    mu: tuple[float, ...] = (1.0,)
    key_ratio: Fraction = Fraction(1, 20)
    tensor_ratio: Fraction = Fraction(4, 5)
    tensor_order: str = "lowest"
    include_nonlayer: bool = False


@dataclass(frozen=True)
class Models:
    """The open model folders; `probe` is often the task expert itself."""

    task: object
    base: object
    probe: object
    languages: tuple
    english: object | None = None

    def all(self) -> list:
        """Each folder once, the task expert first."""
        given = (self.task, self.base, self.probe, self.english, *self.languages)
        return list({id(model): model for model in given if model is not None}.values())


@dataclass
class Selection:
    """Result of the first pass: which scalars are in K and which tensors in T."""

    key_bits: int  # bit pattern of the smallest |probe - base| in K
    keys: int  # scalars in K
    scalars: int  # scalars that take part
    tensors: list[str]  # T
    cosines: dict[str, float] = field(default_factory=dict)  # s_t; empty where nothing had to be measured


def taking_part(names, include_nonlayer: bool) -> list[str]:
    """The tensors that are merged: the layers' projections, or all."""
    from mindmerger.baselines.model_folder import KINDS, place_of

    return [name for name in names if include_nonlayer or place_of(name).kind in KINDS]


def select(models: Models, recipe: Recipe, common_rows: dict[str, int]) -> Selection:
    """Finds K and T in two sweeps: the first over base and probe alone, for a histogram of |probe - base|; the second
    over all models, for the dot products and norms and, inside the threshold's bin, for the exact threshold.

    Memory: two histograms of `UPPER` and `LOW` integers, and two rows of `LOW` doubles for each tensor.

    Raises:
        UserError: for weights that are not finite.
    """
    names = taking_part(models.task.tensors, recipe.include_nonlayer)
    wanted_tensors = math.floor(recipe.tensor_ratio * len(names))
    scalars = sum(common_rows[name] * math.prod(models.task.tensors[name].shape[1:]) for name in names)
    wanted = math.floor(recipe.key_ratio * scalars)
    if wanted == scalars and wanted_tensors in (0, len(names)):
        return Selection(0, scalars, scalars, names[:wanted_tensors])
    if wanted in (0, scalars):
        upper, above = (-1, scalars) if wanted else (UPPER, 0)
    else:
        upper, above = _threshold_bin(models, names, common_rows, wanted)
    sums, low_histogram, low_sums = _measure(models, recipe, names, common_rows, upper)
    low = LOW
    if 0 <= upper < UPPER:
        low = _bin_of_rank(low_histogram, wanted - above)
    keys = above + int(low_histogram[low:].sum())
    cosines = {}
    for name in names:
        dot, task_square, language_square = sums[name]
        if name in low_sums:
            dot += low_sums[name][0][low:].sum().item()
            task_square += low_sums[name][1][low:].sum().item()
        if not all(math.isfinite(value) for value in (dot, task_square, language_square)):
            raise UserError(f"{name} is not finite in one of the models: check {', '.join(map(str, models.all()))}")
        norm = math.sqrt(task_square) * math.sqrt(language_square)
        cosines[name] = dot / norm if norm else 0.0
    sign = 1 if recipe.tensor_order == "lowest" else -1
    chosen = set(sorted(names, key=lambda name: sign * cosines[name])[:wanted_tensors])  # a stable sort
    key_bits = {-1: 0, UPPER: NOTHING}.get(upper, upper * LOW + low)
    return Selection(key_bits, keys, scalars, [name for name in names if name in chosen], cosines)


def difference_bits(probe_block, base_block):
    """Bit patterns (int32) of |probe - base| in fp32: larger differences have larger patterns."""
    import torch

    return (probe_block.float() - base_block.float()).abs_().view(torch.int32)


def _bin_of_rank(histogram, rank: int) -> int:
    """The bin that holds the value of the given rank, counted from 1 at the largest."""
    from_top = histogram.flip(0).cumsum(0)
    return len(histogram) - 1 - int((from_top < rank).sum())


def _threshold_bin(models: Models, names: list[str], common_rows: dict[str, int], wanted: int) -> tuple[int, int]:
    """The upper bits of the threshold, and how many scalars lie in higher bins."""
    import torch

    histogram = torch.zeros(UPPER, dtype=torch.int64)
    for name, rows in _sweep(models, names, common_rows, "pass 1 of 2: histogram"):
        bits = difference_bits(models.probe.read(name, *rows), models.base.read(name, *rows))
        if bits.max() >= 0x7F800000:  # infinity; above it NaN
            raise UserError(f"{name} is not finite in {models.probe} or {models.base}: check these models")
        histogram += torch.bincount(bits.flatten() >> LOW_BITS, minlength=UPPER)
    upper = _bin_of_rank(histogram, wanted)
    return upper, int(histogram[upper + 1 :].sum())


def _measure(models: Models, recipe: Recipe, names: list[str], common_rows: dict[str, int], upper: int):
    """Sums for the cosines, over scalars above the threshold's bin, and separately inside it by lower bits.

    Returns {tensor: [R_A·R_L, |R_A|², |R_L|²]}, the histogram inside the bin, and {tensor: the first two sums inside
    the bin, (2, LOW)}.
    """
    import torch

    sums = {name: [0.0, 0.0, 0.0] for name in names}
    low_histogram = torch.zeros(LOW, dtype=torch.int64)
    low_sums: dict = {}
    for name, rows in _sweep(models, names, common_rows, "pass 1 of 2: cosines"):
        base_block = models.base.read(name, *rows).float()
        bits = difference_bits(models.probe.read(name, *rows), base_block).flatten()
        task = recipe.alpha * (models.task.read(name, *rows).float() - base_block).flatten()
        if models.english is not None:
            task -= recipe.beta * (models.english.read(name, *rows).float() - base_block).flatten()
        language = torch.zeros_like(task)
        for mu, model in zip(recipe.mu, models.languages, strict=True):
            language += mu * (model.read(name, *rows).float() - base_block).flatten()
        upper_bits = bits >> LOW_BITS
        in_keys = torch.where(upper_bits > upper, task, 0).double()
        sums[name][0] += (in_keys * language).sum().item()
        sums[name][1] += in_keys.square().sum().item()
        sums[name][2] += language.double().square().sum().item()
        inside = (upper_bits == upper).nonzero().squeeze(1)
        if len(inside):
            low, task_inside = bits[inside] & (LOW - 1), task[inside].double()
            low_histogram += torch.bincount(low, minlength=LOW)
            new = torch.stack(
                [
                    torch.bincount(low, weights=task_inside * language[inside], minlength=LOW),
                    torch.bincount(low, weights=task_inside.square(), minlength=LOW),
                ]
            )
            low_sums[name] = low_sums[name] + new if name in low_sums else new
    return sums, low_histogram, low_sums


def _sweep(models: Models, names: list[str], common_rows: dict[str, int], what: str):
    """Yields (tensor, row range) over everything that takes part, with a progress bar."""
    from mindmerger.baselines.merged_folder import progress_bar
    from mindmerger.baselines.model_folder import row_blocks

    stored = models.task.tensors
    total = sum(common_rows[name] * math.prod(stored[name].shape[1:]) * stored[name].dtype.itemsize for name in names)
    with progress_bar(total, what) as bar:
        for name in names:
            for rows in row_blocks(stored[name].shape, 0, common_rows[name]):
                yield name, rows
                bar.update((rows[1] - rows[0]) * math.prod(stored[name].shape[1:]) * stored[name].dtype.itemsize)


def linear_combination(terms: list[tuple[float, object]], name: str, rows: tuple[int, int]):
    """sum of coefficient * model over rows of a tensor, in fp32; a model alone with coefficient 1 as it is stored.

    As one combination of the models, and not base plus differences, the merge of a single model with coefficient 1
    gives that model's very bits.
    """
    import torch

    coefficients: dict[int, float] = {}
    model_of = {id(model): model for _, model in terms}
    for key in model_of:
        coefficients[key] = math.fsum(coefficient for coefficient, model in terms if id(model) == key)
    used = [(coefficient, model_of[key]) for key, coefficient in coefficients.items() if coefficient != 0]
    if len(used) == 1 and used[0][0] == 1:
        return used[0][1].read(name, *rows)
    if not used:
        return torch.zeros_like(terms[0][1].read(name, *rows), dtype=torch.float32)
    total = None
    for coefficient, model in used:
        term = model.read(name, *rows).float() * coefficient
        total = term if total is None else total.add_(term)
    return total


def mean(models: list, name: str, rows: tuple[int, int]):
    """Mean of the models over rows of a tensor: summed in fp32 and then divided, as mergekit does it.

    Weighing each model by 1/3 first would round three times, and change one bf16 scalar in some 600.
    """
    total = models[0].read(name, *rows).float()
    for model in models[1:]:
        total = total + model.read(name, *rows).float()
    return total / len(models)


def maet_combiner(models: Models, recipe: Recipe, selection: Selection):
    """The function that gives merged rows of a tensor."""
    import torch

    part = set(taking_part(models.task.tensors, recipe.include_nonlayer))
    chosen = set(selection.tensors)
    eta_mu = [recipe.eta * mu for mu in recipe.mu]
    language_terms = [(-value, models.base) for value in eta_mu] + list(zip(eta_mu, models.languages, strict=True))
    without = [(1.0, models.base), *language_terms]
    alpha, beta = recipe.gamma * recipe.alpha, recipe.gamma * recipe.beta if models.english is not None else 0.0
    within = [*without, (alpha, models.task), (-alpha, models.base)]
    if models.english is not None:
        within += [(-beta, models.english), (beta, models.base)]

    def combine(name: str, start: int, stop: int):
        rows = (start, stop)
        if name not in part:
            return models.base.read(name, *rows)
        if name not in chosen or selection.key_bits == NOTHING or not (alpha or beta):
            return linear_combination(without, name, rows)
        if selection.key_bits == 0:
            return linear_combination(within, name, rows)
        bits = difference_bits(models.probe.read(name, *rows), models.base.read(name, *rows))
        return torch.where(
            bits >= selection.key_bits,
            linear_combination(within, name, rows).float(),
            linear_combination(without, name, rows).float(),
        )

    return combine


def merge(args: argparse.Namespace) -> None:
    """Writes the merged model folder.

    Raises:
        UserError: for anything that keeps it from being written; nothing is left behind then.
    """
    recipe = make_recipe(args)
    from mindmerger.baselines.compatibility import check_compatible
    from mindmerger.baselines.merged_folder import check_output, plan_output, write_merged
    from mindmerger.baselines.model_folder import open_model

    paths = [args.task_expert, args.base, args.probe, args.english_expert, *args.language_experts]
    output = check_output(args.output, args.overwrite, [path for path in paths if path is not None])
    task = open_model("task expert", args.task_expert)
    base = open_model("base", args.base) if args.base is not None else None
    probe = open_model("probe", args.probe) if args.probe is not None else task
    english = open_model("English expert", args.english_expert) if args.english_expert is not None else None
    languages = tuple(open_model(f"language expert {i}", path) for i, path in enumerate(args.language_experts, start=1))
    models = Models(task, base, probe, languages, english)
    common_rows = check_compatible(task, [model for model in models.all() if model is not task])
    plan_output(output, task, args.dtype)
    shared = {"dtype": args.dtype, "max_shard_gb": args.max_shard_gb}
    arguments = {name: _plain(value) for name, value in vars(args).items()}
    if args.soup:
        experts = models.all()
        record = {
            "method": "uniform soup (arXiv 2203.05482)",
            "formula": "mean of all experts",
            "arguments": arguments,
            "plan": {"weights": {model.role: 1 / len(experts) for model in experts}},
        }
        write_merged(
            output,
            task,
            experts,
            common_rows,
            lambda name, start, stop: mean(experts, name, (start, stop)),
            record,
            **shared,
        )
    else:
        selection = select(models, recipe, common_rows)
        record = {
            "method": "task arithmetic (arXiv 2212.04089)" if args.task_arithmetic else "MAET-style (arXiv 2410.07825)",
            "formula": FORMULA,
            "arguments": arguments,
            "plan": {"recipe": {name: _plain(value) for name, value in vars(recipe).items()}, **_describe(selection)},
        }
        write_merged(
            output, task, models.all(), common_rows, maet_combiner(models, recipe, selection), record, **shared
        )
    log(f"wrote {args.output}; evaluate it with: {evaluation_of(output)}")


def _plain(value):
    return float(value) if isinstance(value, Fraction) else list(value) if isinstance(value, tuple) else value


def _describe(selection: Selection) -> dict:
    """For the log and for merge.json: sizes and threshold of K, members of T."""
    import struct

    threshold = None
    if selection.key_bits != NOTHING:
        threshold = struct.unpack("<f", struct.pack("<i", selection.key_bits))[0]
    limit = "none" if threshold is None else f"|difference| >= {threshold:.4g}"
    log(f"K: {selection.keys} of {selection.scalars} scalars ({limit}); T: {len(selection.tensors)} tensors")
    return {
        "key_threshold": threshold,
        "key_scalars": selection.keys,
        "scalars": selection.scalars,
        "task_tensors": selection.tensors,
        "cosines": selection.cosines,
    }


def make_recipe(args: argparse.Namespace) -> Recipe:
    """Fills in the defaults and refuses flags that contradict each other.

    Raises:
        UserError: naming the flags.
    """
    tuning = ("alpha", "beta", "gamma", "eta", "mu", "key_ratio", "tensor_ratio", "tensor_order", "probe")
    unused = {
        "--soup": (args.soup, (*tuning, "base", "include_nonlayer", "task_arithmetic")),
        "--task_arithmetic": (
            args.task_arithmetic,
            ("beta", "key_ratio", "tensor_ratio", "tensor_order", "probe", "english_expert"),
        ),
    }
    for control, (asked, names) in unused.items():
        clash = next((name for name in names if asked and getattr(args, name) not in (None, False)), None)
        if clash is not None:
            raise UserError(f"{control} makes no use of --{clash}: leave one of them out")
    if args.base is None and not args.soup:
        raise UserError("--base is needed: the model folder that all experts were tuned from (only --soup needs none)")
    if args.beta is not None and args.english_expert is None:
        raise UserError("--beta weighs the English expert: pass --english_expert too, or leave --beta out")
    experts = len(args.language_experts)
    if args.mu is not None and len(args.mu) != experts:
        raise UserError(f"--mu has {len(args.mu)} values for {experts} --language_experts: give one each")
    defaults = Recipe()
    given = {name: getattr(args, name) for name in ("alpha", "beta", "gamma", "eta", "tensor_order")}
    given |= {"key_ratio": args.key_ratio, "tensor_ratio": args.tensor_ratio}
    if args.english_expert is None:
        given["beta"] = 0.0
    if args.task_arithmetic:
        given |= {"key_ratio": Fraction(1), "tensor_ratio": Fraction(1)}
    return Recipe(
        **{name: getattr(defaults, name) if value is None else value for name, value in given.items()},
        mu=tuple(args.mu) if args.mu is not None else (1 / experts,) * experts,
        include_nonlayer=args.include_nonlayer,
    )


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = CommandParser(
        prog="python -m mindmerger.baselines.maet", description=HELP, formatter_class=HelpFormatter, allow_abbrev=False
    )
    models = parser.add_argument_group("models")
    models.add_argument("--base", help="t0, the model folder that all experts were tuned from")
    models.add_argument("--task_expert", required=True, help="tA, tuned on the task")
    models.add_argument("--language_experts", nargs="+", required=True, help="t1..tJ, tuned on languages")
    models.add_argument("--english_expert", help="tE, tuned on general English data (default: none, beta = 0)")
    models.add_argument("--probe", help="whose distance from the base chooses K (default: the task expert)")
    method = parser.add_argument_group("method")
    method.add_argument("--alpha", type=number, help="weight of the task expert in R_A (default 1)")
    method.add_argument("--beta", type=number, help="weight of the English expert in R_A (default 1)")
    method.add_argument("--gamma", type=number, help="weight of R_A (default 1)")
    method.add_argument("--eta", type=number, help="weight of R_L (default 1)")
    method.add_argument("--mu", type=number, nargs="+", help="weight of each language expert (default 1/J)")
    method.add_argument("--key_ratio", type=ratio, help="share of scalars in K (default 0.05)")
    method.add_argument("--tensor_ratio", type=ratio, help="share of tensors in T (default 0.8)")
    method.add_argument("--tensor_order", choices=("lowest", "highest"), help="which s_t are in T (default lowest)")
    method.add_argument(
        "--include_nonlayer",
        action="store_true",
        help="merge norms, embeddings and output head too, not only projections",
    )
    controls = parser.add_argument_group("controls")
    controls.add_argument("--task_arithmetic", action="store_true", help="no K, no T, no English expert")
    controls.add_argument("--soup", action="store_true", help="uniform mean of the experts; needs no base")
    add_output_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; see the module's docstring."""
    merge(build_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    run_main(main, alone=True)
