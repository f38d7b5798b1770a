"""A merge in the style of MAET (Chen et al., "Extracting and Transferring Abilities For Building Multi-lingual
Ability-enhanced Large Language Models", arXiv 2410.07825), and its controls: task arithmetic and the uniform soup.

    python -m mindmerger.baselines.maet --base B --task_expert A --language_experts L1 L2 --output merged
    python -m mindmerger.baselines.maet --task_arithmetic --base B --task_expert A --language_experts L1 --output merged
    python -m mindmerger.baselines.maet --soup --task_expert A --language_experts L1 L2 --output merged

The method's code and coefficients were never published: every default here is ours.
"""

import argparse
import math
from fractions import Fraction

from mindmerger.baselines.merge_flags import HelpFormatter, add_output_flags, evaluation_of, number, ratio
from mindmerger.baselines.selection import NOTHING, Models, Recipe, Selection, difference_bits, select, taking_part
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


def linear_combination(terms: list[tuple[float, object]], name: str, rows: tuple[int, int]):
    """Returns the sum of coefficient * model over rows of a tensor, in fp32; one model with coefficient 1 as stored.

    As one combination of the models, and not base plus differences, the merge of a single model with coefficient 1
    gives that model's very bits.
    """
    import torch

    # One model may stand in several terms, as the base does in every difference: its coefficients are added up first,
    # and where they cancel it is not read at all.
    coefficients: dict[int, float] = {}
    model_of = {id(model): model for _, model in terms}
    for key in model_of:
        coefficients[key] = math.fsum(coefficient for coefficient, model in terms if id(model) == key)
    used = [(coefficient, model_of[key]) for key, coefficient in coefficients.items() if coefficient != 0]
    if len(used) == 1 and used[0][0] == 1:
        return used[0][1].read(name, *rows)
    if not used:  # all coefficients cancel: zeros of the right shape
        return torch.zeros_like(terms[0][1].read(name, *rows), dtype=torch.float32)
    total = None
    for coefficient, model in used:
        term = model.read(name, *rows).float() * coefficient
        total = term if total is None else total.add_(term)
    return total


def mean(models: list, name: str, rows: tuple[int, int]):
    """Returns the mean of the models over rows of a tensor: summed in fp32 and then divided, as mergekit does it.

    Weighing each model by 1/3 first would round three times, and change one bf16 scalar in some 600.
    """
    # Not in place: float() of an fp32 block is that block itself, which may map the file.
    total = models[0].read(name, *rows).float()
    for model in models[1:]:
        total = total + model.read(name, *rows).float()
    return total / len(models)


def maet_combiner(models: Models, recipe: Recipe, selection: Selection):
    """Returns the function that gives merged rows of a tensor."""
    import torch

    part = set(taking_part(models.task.tensors, recipe.include_nonlayer))
    chosen = set(selection.tensors)
    # The two forms that a merged scalar can have, as one combination each: with the task weights, and without.
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
        # K is found again and was not stored: a mask of a 70B model would be 9 GB, and both blocks are read anyway.
        bits = difference_bits(models.probe.read(name, *rows), models.base.read(name, *rows))
        return torch.where(
            bits >= selection.key_bits,
            linear_combination(within, name, rows).float(),
            linear_combination(without, name, rows).float(),
        )

    return combine


def open_models(args: argparse.Namespace) -> Models:
    """Opens every model folder that the command line names.

    Raises:
        MergeError: for a folder that is missing, incomplete or damaged.
    """
    from mindmerger.baselines.model_folder import open_model

    task = open_model("task expert", args.task_expert)
    base = open_model("base", args.base) if args.base is not None else None
    probe = open_model("probe", args.probe) if args.probe is not None else task
    english = open_model("English expert", args.english_expert) if args.english_expert is not None else None
    languages = tuple(open_model(f"language expert {i}", path) for i, path in enumerate(args.language_experts, start=1))
    return Models(task, base, probe, languages, english)


def uniform_soup(models: Models) -> tuple:
    """Returns a soup's combiner, and what merge.json says of its method."""
    experts = models.all()
    method = {
        "method": "uniform soup (arXiv 2203.05482)",
        "formula": "mean of all experts",
        "plan": {"weights": {model.role: 1 / len(experts) for model in experts}},
    }
    return lambda name, start, stop: mean(experts, name, (start, stop)), method


def selective_merge(models: Models, recipe: Recipe, common_rows: dict[str, int], arithmetic: bool) -> tuple:
    """Selects K and T; returns the combiner, and what merge.json says of the method.

    Args:
        arithmetic: the recipe is that of task arithmetic.
    """
    selection = select(models, recipe, common_rows)
    method = {
        "method": "task arithmetic (arXiv 2212.04089)" if arithmetic else "MAET-style (arXiv 2410.07825)",
        "formula": FORMULA,
        "plan": {"recipe": {name: _plain(value) for name, value in vars(recipe).items()}, **_describe(selection)},
    }
    return maet_combiner(models, recipe, selection), method


def merge(args: argparse.Namespace) -> None:
    """Writes the merged model folder.

    Raises:
        UserError: for anything that keeps it from being written; nothing is left behind then.
    """
    recipe = make_recipe(args)
    # After the flags are settled: torch takes seconds, which a contradiction need not wait for.
    from mindmerger.baselines.compatibility import check_compatible
    from mindmerger.baselines.merged_folder import check_output, lay_out, write_merged

    paths = [args.task_expert, args.base, args.probe, args.english_expert, *args.language_experts]
    output = check_output(args.output, args.overwrite, [path for path in paths if path is not None])
    models = open_models(args)
    common_rows = check_compatible(models.task, [model for model in models.all() if model is not models.task])
    # For its error alone: the selection reads every model for minutes, which a full disk should not cost.
    lay_out(output, models.task, args.dtype)
    if args.soup:
        combine, method = uniform_soup(models)
    else:
        combine, method = selective_merge(models, recipe, common_rows, args.task_arithmetic)
    plan = method.pop("plan")
    record = method | {"arguments": {name: _plain(value) for name, value in vars(args).items()}, "plan": plan}
    form = {"dtype": args.dtype, "max_shard_gb": args.max_shard_gb}
    write_merged(output, models.task, models.all(), common_rows, combine, record, **form)
    log(f"wrote {args.output}; evaluate it with: {evaluation_of(output)}")


def _plain(value):
    return float(value) if isinstance(value, Fraction) else list(value) if isinstance(value, tuple) else value


def _describe(selection: Selection) -> dict:
    """Logs what was selected, and returns it for merge.json: sizes and threshold of K, members of T."""
    import struct

    # The pattern's own value: as a float it tells a reader what difference was large enough.
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
    # A flag without effect would stand in merge.json as if it had one.
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
    # None is "not given": a coefficient of 0 is a wish.
    defaults = Recipe()
    given = {name: getattr(args, name) for name in ("alpha", "beta", "gamma", "eta", "tensor_order")}
    given |= {"key_ratio": args.key_ratio, "tensor_ratio": args.tensor_ratio}
    if args.english_expert is None:
        given["beta"] = 0.0
    if args.task_arithmetic:  # K and T are everything: the formula then is task arithmetic's
        given |= {"key_ratio": Fraction(1), "tensor_ratio": Fraction(1)}
    return Recipe(
        **{name: getattr(defaults, name) if value is None else value for name, value in given.items()},
        # A mean, not a sum: with more language experts the merge must not move further from the base.
        mu=tuple(args.mu) if args.mu is not None else (1 / experts,) * experts,
        include_nonlayer=args.include_nonlayer,
    )


def build_parser() -> argparse.ArgumentParser:
    """Builds the command's parser."""
    parser = CommandParser(prog="python -m mindmerger.baselines.maet", description=HELP, formatter_class=HelpFormatter)
    models = parser.add_argument_group("models")
    models.add_argument("--base", help="t0, the model folder that all experts were tuned from")
    models.add_argument("--task_expert", required=True, help="tA, tuned on the task")
    models.add_argument("--language_experts", nargs="+", required=True, help="t1..tJ, tuned on languages")
    models.add_argument("--english_expert", help="tE, tuned on general English data (default: none, beta = 0)")
    models.add_argument("--probe", help="model whose distance from the base chooses K (default: the task expert)")
    method = parser.add_argument_group("method")
    method.add_argument("--alpha", type=number, help="weight of the task expert in R_A (default 1)")
    method.add_argument("--beta", type=number, help="weight of the English expert in R_A (default 1)")
    method.add_argument("--gamma", type=number, help="weight of R_A (default 1)")
    method.add_argument("--eta", type=number, help="weight of R_L (default 1)")
    method.add_argument("--mu", type=number, nargs="+", help="weight of each language expert (default 1/J)")
    method.add_argument("--key_ratio", type=ratio, help="share of scalars in K (default 0.05)")
    method.add_argument("--tensor_ratio", type=ratio, help="share of tensors in T (default 0.8)")
    method.add_argument(
        "--tensor_order", choices=("lowest", "highest"), help="end of the s_t that T is taken from (default lowest)"
    )
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
