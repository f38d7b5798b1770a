"""First pass of a MAET-style merge: which scalars (K) and which tensors (T) get task weights.

Nothing heavy is imported before it is needed, so that `--help` answers at once.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction

from mindmerger.runtime.errors import UserError

# |difference| in fp32 is ordered as its bit pattern is. Its upper bits make log-spaced bins (4096 to each power of
# two), its lower bits tell apart what falls into one bin.
LOW_BITS = 11
LOW = 1 << LOW_BITS
UPPER = 1 << (31 - LOW_BITS)
NOTHING = 1 << 31  # a threshold above every bit pattern


@dataclass(frozen=True)
class Recipe:
    """Coefficients of a merge; see the help of `maet`."""

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
    """Open model folders; `probe` is often the task expert itself, `base` None in a soup."""

    task: object
    base: object
    probe: object
    languages: tuple
    english: object | None = None

    def all(self) -> list:
        """Returns each folder once, the task expert first."""
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
    """Returns the tensors that are merged: the layers' projections, or all."""
    from mindmerger.baselines.model_folder import KINDS, place_of

    return [name for name in names if include_nonlayer or place_of(name).kind in KINDS]


def select(models: Models, recipe: Recipe, common_rows: dict[str, int]) -> Selection:
    """Finds K and T in two sweeps.

    The first, over base and probe alone, gives a histogram of |probe - base|; the second, over all models, the dot
    products and norms and, inside the threshold's bin, the exact threshold.

    Memory: two histograms of `UPPER` and `LOW` integers, and two rows of `LOW` doubles for each tensor.

    Raises:
        UserError: for weights that are not finite.
    """
    names = taking_part(models.task.tensors, recipe.include_nonlayer)
    # Ratios are fractions, so these products are exact: as floats, 0.29 of 100 would be 28.
    wanted_tensors = math.floor(recipe.tensor_ratio * len(names))
    scalars = sum(common_rows[name] * math.prod(models.task.tensors[name].shape[1:]) for name in names)
    wanted = math.floor(recipe.key_ratio * scalars)
    # All scalars of all tensors or of none, as in task arithmetic: nothing to measure, two sweeps over models saved.
    if wanted == scalars and wanted_tensors in (0, len(names)):
        return Selection(0, scalars, scalars, names[:wanted_tensors])
    if wanted in (0, scalars):
        upper, above = (-1, scalars) if wanted else (UPPER, 0)  # a bin below, or above, all that there are
    else:
        upper, above = _threshold_bin(models, names, common_rows, wanted)
    sums, low_histogram, low_sums = _measure(models, recipe, names, common_rows, upper)
    low = LOW
    if 0 <= upper < UPPER:
        low = _bin_of_rank(low_histogram, wanted - above)
    # From the threshold's own bin on, whole: ties are all in K, so it may be larger than was asked for.
    keys = above + int(low_histogram[low:].sum())
    cosines = {}
    for name in names:
        dot, task_square, language_square = sums[name]
        if name in low_sums:
            dot += low_sums[name][0][low:].sum().item()
            task_square += low_sums[name][1][low:].sum().item()
        # A NaN compares as neither lower nor higher: sorting would put such tensors anywhere in T.
        if not all(math.isfinite(value) for value in (dot, task_square, language_square)):
            raise UserError(f"{name} is not finite in one of the models: check {', '.join(map(str, models.all()))}")
        norm = math.sqrt(task_square) * math.sqrt(language_square)
        cosines[name] = dot / norm if norm else 0.0
    sign = 1 if recipe.tensor_order == "lowest" else -1
    chosen = set(sorted(names, key=lambda name: sign * cosines[name])[:wanted_tensors])  # a stable sort
    key_bits = {-1: 0, UPPER: NOTHING}.get(upper, upper * LOW + low)
    return Selection(key_bits, keys, scalars, [name for name in names if name in chosen], cosines)


def difference_bits(probe_block, base_block):
    """Returns the bit patterns (int32) of |probe - base| in fp32: larger differences have larger patterns."""
    import torch

    return (probe_block.float() - base_block.float()).abs_().view(torch.int32)


def _bin_of_rank(histogram, rank: int) -> int:
    """Returns the bin that holds the value of the given rank, counted from 1 at the largest."""
    from_top = histogram.flip(0).cumsum(0)
    return len(histogram) - 1 - int((from_top < rank).sum())


def _threshold_bin(models: Models, names: list[str], common_rows: dict[str, int], wanted: int) -> tuple[int, int]:
    """Returns the upper bits of the threshold, and how many scalars lie in higher bins."""
    import torch

    histogram = torch.zeros(UPPER, dtype=torch.int64)
    for name, rows in _sweep(models, names, common_rows, "pass 1 of 2: histogram"):
        bits = difference_bits(models.probe.read(name, *rows), models.base.read(name, *rows))
        if bits.max() >= 0x7F800000:  # infinity; above it NaN
            raise UserError(f"{name} is not finite in {models.probe} or {models.base}: check these models")
        # Sorting all differences, or quantiles of them, would need every scalar of the model in memory at once.
        histogram += torch.bincount(bits.flatten() >> LOW_BITS, minlength=UPPER)
    upper = _bin_of_rank(histogram, wanted)
    return upper, int(histogram[upper + 1 :].sum())


def _measure(models: Models, recipe: Recipe, names: list[str], common_rows: dict[str, int], upper: int):
    """Sums up for the cosines over scalars above the threshold's bin, and separately inside it by lower bits.

    Returns:
        {tensor: [R_A·R_L, |R_A|², |R_L|²]}, the histogram inside the bin, and {tensor: the first two sums inside the
        bin, (2, LOW)}.
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
        # Differences inside the threshold's bin are in K or not, which is known only after the sweep: they are summed
        # by their lower bits and added then, which saves a third sweep over all models.
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
