"""Plans a comparison of bridges: how many steps each stage takes, so that all bridges read equally many target tokens.

    python -m scripts.bridge_plan plan --output plan.json --target_tokens 200000 --pairs=--task --pairs=math …

Every bridge gets the same number of target tokens. One with stages on sentence pairs and on the task's rows spends
`--pairs_share` of them on the pairs, in equal parts where it has several such stages, and the rest on the task's rows;
one with a single kind spends all of them there, as does `--control`, an adapter on the LLM alone. A stage ends at the
step whose sum of target tokens is nearest to its share, in the very order of examples that the seed decides, so plan
and training agree to the token.

`choose` picks the learning rate with the lowest dev loss among finished trainings.

FLOP of the training are counted from the real lengths, as `run_training.py --dry_run` does (the formula stands at
`training_flop` in mindmerger/training/dry_run.py).
"""

import json
import math
import sys
from pathlib import Path

from mindmerger.runtime import command, files
from mindmerger.runtime.command import CommandParser, at_least, number_where
from mindmerger.runtime.errors import UserError

KINDS = ("pairs", "question_pairs", "task", "english_task")  # what a stage reads: `Stage.data`
CONTROL = "LLM + adapter"
REFERENCE = "mindmerger"  # whose published epochs give the target tokens where --target_tokens does not


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _seeds(text: str) -> list[int]:
    return [at_least(0)(name) for name in _names(text)]


def build_parser():
    """Returns the parser."""
    parser = CommandParser(prog="python -m scripts.bridge_plan", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="write the plan and print a line for each stage to train")
    add = plan.add_argument
    add("--output", type=Path, required=True, help="JSON file for the plan and the costs")
    add("--bridges", type=_names, default=[], help="names of mindmerger.bridges.BRIDGES, with commas (default: all)")
    add("--bridge_option", action="append", default=[], metavar="BRIDGE:KEY=VALUE", help="an option of one of them, as "
        "run_training.py takes it; once per option")  # fmt: skip
    add("--seeds", type=_seeds, default=[0], help="of the trainings, with commas (default 0)")
    add("--target_tokens", type=at_least(1), help="of each bridge over all its stages (default: what mindmerger's "
        "stages read in the passes that the flags give them)")  # fmt: skip
    add("--search_tokens", type=at_least(1), help="of each training that searches a learning rate (default: as "
        "--target_tokens, and the best one counts as the first seed's training)")  # fmt: skip
    share = number_where(lambda value: 0 < value < 1, "a number above 0 and below 1")
    add("--pairs_share", type=share, help="share of the target tokens for stages on sentence pairs, of a bridge that "
        "has both kinds (default: as mindmerger's stages share them, 0.5 with --target_tokens)")  # fmt: skip
    add("--control", action="store_true", help="also an adapter on the LLM alone, with the words for stages on task "
        "and those of --adapter_word")  # fmt: skip
    add("--adapter_word", action="append", default=[], metavar="WORD", help="as --task=WORD, for the adapter alone")
    for kind in KINDS:
        add(f"--{kind}", action="append", default=[], metavar="WORD", help=f"a word of run_training.py's command line "
            f"for stages on {kind}, written --{kind}=WORD; once per word")  # fmt: skip
    choose = commands.add_parser("choose", help="print the candidate with the lowest dev loss")
    choose.add_argument("--output", type=Path, required=True, help="JSON file for the dev losses and the choice")
    choose.add_argument("candidates", nargs="+", metavar="LR=FOLDER", help="output folder of the last stage")
    return parser


class StageRows:
    """One stage of one bridge on its data: what each step would read."""

    def __init__(self, label: str, own: list[str], name: str, words: list[str]):
        """Reads the data.

        Args:
            label: of the bridge in the plan.
            own: words of run_training.py's command line that choose the bridge.
            name: of the stage.
            words: the other ones.
        """
        import run_training
        from mindmerger.training import settings as training_settings

        flags = [*words, *own, "--stage_name", name, "--dry_run"]
        if label != CONTROL:
            flags += ["--init_checkpoint", "none"]
        self.bridge, self.own, self.name = label, own, name
        self.settings, data = run_training.prepare(training_settings.parse(flags))
        self.stage, self.args, self.examples = self.settings.stage, self.settings.args, data.examples
        self.positions = data.examples.merged_lengths(self.settings.bridge.prefix_length)

    def train_rows(self, seed: int):
        """Returns the row numbers that a seed leaves beside its dev split."""
        from mindmerger.data.batches import split_dev

        return split_dev(len(self.positions), self.args.dev_size, seed, self.examples.groups)[1]

    def passes(self) -> int:
        """Returns the target tokens of the passes that --epoch_num asks for, with the seed of the flags."""
        rows = self.train_rows(self.args.seed)
        return self.args.epoch_num * int(self.examples.target_lengths[rows].sum(dtype="int64"))

    def take(self, tokens: int, seed: int) -> tuple[dict, list]:
        """Returns the steps whose target tokens come nearest to `tokens`, at least one, and the rows of each."""
        from mindmerger.data.batches import epoch_batches

        rows, taken, total, epoch = self.train_rows(seed), [], 0, 0
        while True:
            for indices in epoch_batches(rows, self.args.train_batch_size, seed, epoch):
                more = int(self.examples.target_lengths[indices].sum(dtype="int64"))
                # Whole steps alone: a training ends between two of them.
                if taken and abs(total + more - tokens) > abs(total - tokens):
                    return self.line(taken, total, seed, len(rows)), taken
                taken.append(indices)
                total += more
            epoch += 1

    def line(self, taken: list, total: int, seed: int, rows: int) -> dict:
        """Returns what the plan says of one training of this stage."""
        per_epoch = -(-rows // self.args.train_batch_size)
        return {
            "bridge": self.bridge,
            "stage": self.name,
            "data": self.stage.data,
            "seed": seed,
            "steps": len(taken),
            "epochs": -(-len(taken) // per_epoch),
            "target_tokens": total,
            "words": " ".join(self.own),
        }

    def parameters(self) -> int:
        """Returns the number of trained parameters."""
        return sum(math.prod(shape) for shape in self.settings.shapes.values())

    def flop(self, taken: list, llm, encoder) -> float:
        """Returns the FLOP of the steps, as the module's docstring counts them."""
        import numpy as np

        from mindmerger.training.dry_run import training_flop

        alone = self.bridge == CONTROL
        models = (llm, None if alone else encoder, self.settings.bridge, self.parameters() if alone else 0)
        return training_flop(self.args, self.examples, self.positions, np.concatenate(taken), *models)


def towers_without_storage(args):
    """Returns LLM and encoder on the meta device."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    from mindmerger.hub.model_configs import llm_config, load_config

    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(llm_config(args.llm_path)[0], trust_remote_code=False)
        encoder = AutoModel.from_config(load_config(args.mt_path), trust_remote_code=False)
    return llm, encoder.get_encoder() if encoder.config.is_encoder_decoder else encoder


def read_stages(bridge: str, words: dict[str, list[str]], options: list[str] = ()) -> list[StageRows]:
    """Returns the stages that lead to a bridge's last one, in the order in which they are trained, on their data.

    One that no other starts from, such as MindMerger's on pairs of questions, is left out.

    Args:
        words: of run_training.py's command line, for each kind of data.
        options: of the bridge, KEY=VALUE each.
    """
    from mindmerger.bridges.base import parse_options
    from mindmerger.model.mapping_files import find_bridge

    given = parse_options(options)
    stages = find_bridge(bridge).stages_with(find_bridge(bridge).settle(given))
    chain = [list(stages)[-1]]
    while (before := stages[chain[0]].starts_from) is not None:
        chain.insert(0, before)
    own = ["--bridge", bridge, *(word for text in options for word in ("--bridge_option", text))]
    # No equals sign: the table's --row parts a label from its folder there.
    label = f"{bridge} ({', '.join(f'{key} {value}' for key, value in given.items())})" if given else bridge
    return [StageRows(label, own, name, words[stages[name].data]) for name in chain]


def options_by_bridge(texts: list[str], bridges: list[str]) -> dict[str, list[str]]:
    """Returns the options of each bridge, KEY=VALUE each, from the texts of `--bridge_option`.

    Raises:
        UserError: for a text of another form, and a bridge that is not compared.
    """
    found = {name: [] for name in bridges}
    for text in texts:
        bridge, colon, option = text.partition(":")
        if not colon:
            raise UserError(f"--bridge_option {text!r} must be BRIDGE:KEY=VALUE")
        if bridge not in found:
            raise UserError(f"--bridge_option {text}: {bridge!r} is none of the compared bridges: {', '.join(bridges)}")
        found[bridge].append(option)
    return found


def settle_budget(args, reference: list[StageRows] | None) -> tuple[int, float]:
    """Returns the target tokens of each bridge, and the share of them that is for sentence pairs."""
    if args.target_tokens is not None:
        return args.target_tokens, args.pairs_share or 0.5
    tokens = {kind: sum(one.passes() for one in reference if one.stage.data == kind) for kind in ("pairs", "task")}
    total = sum(tokens.values())
    return total, args.pairs_share or tokens["pairs"] / total


def budgets(stages: list[StageRows], tokens: int, share: float) -> list[int]:
    """Returns the target tokens of each stage of one bridge."""
    pairs = [one.stage.data == "pairs" for one in stages]
    # Nothing to share where all stages read one kind: the bridge gets its full budget all the same.
    if all(pairs) or not any(pairs):
        return [round(tokens / len(stages))] * len(stages)
    return [round(tokens * (share / sum(pairs) if one else (1 - share) / pairs.count(False))) for one in pairs]


def make_plan(args) -> dict:
    """Returns the plan: a line for every stage of every training, and each bridge's costs with the first seed."""
    from mindmerger.bridges import BRIDGES

    words = {kind: getattr(args, kind) for kind in KINDS}
    names = args.bridges or list(BRIDGES)
    options = options_by_bridge(args.bridge_option, names)
    read = [read_stages(name, words, options[name]) for name in names]
    bridges = {stages[0].bridge: stages for stages in read}
    reference = None
    if args.target_tokens is None:
        # Its data are read even where it is not compared: its published epochs are the measure.
        reference = bridges.get(REFERENCE) or read_stages(REFERENCE, words)
    tokens, share = settle_budget(args, reference)
    plan = {"target_tokens": tokens, "pairs_share": share, "search_tokens": args.search_tokens or tokens, "lines": []}
    plan["costs"] = {}
    if args.control:
        words = [word for word in args.task if word != "--cache_encoder_states"]  # it has no encoder
        bridges[CONTROL] = [StageRows(CONTROL, ["--llm_only"], "adapter", [*words, *args.adapter_word])]
    llm, encoder = towers_without_storage(next(iter(bridges.values()))[0].args)
    for name, stages in bridges.items():
        made, flop = [], 0.0
        for seed in args.seeds:
            for one, budget in zip(stages, budgets(stages, tokens, share), strict=True):
                line, taken = one.take(budget, seed)
                made.append({"phase": "full", **line})
                flop += one.flop(taken, llm, encoder) if seed == args.seeds[0] else 0
        read = sum(line["target_tokens"] for line in made if line["seed"] == args.seeds[0])
        costs = {
            "trained_parameters": stages[-1].parameters(),
            "target_tokens": read,
            "flop_per_target_token": flop / read,
        }
        plan["costs"][name] = costs
        # Without it the search's best training is the first seed's, and costs nothing twice.
        if args.search_tokens is not None:
            for one, budget in zip(stages, budgets(stages, args.search_tokens, share), strict=True):
                made.append({"phase": "search", **one.take(budget, args.seeds[0])[0]})
        plan["lines"] += made
    return plan


def best_dev_loss(folder: Path) -> float:
    """Returns the lowest dev loss in the log of a training.

    Raises:
        UserError: when it holds none.
    """
    file = folder / "log.jsonl"
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not the log of a training: {error}") from error
    losses = [line["dev_loss"] for line in lines if "dev_loss" in line]
    if not losses:
        raise UserError(f"{file} holds no dev loss, by which a learning rate is chosen: give --dev_size a number")
    return min(losses)


def choose(args) -> str:
    """Writes every candidate's dev loss and returns the learning rate with the lowest one, the first of equal ones."""
    losses = {}
    for candidate in args.candidates:
        rate, separator, folder = candidate.partition("=")
        if not (rate and separator and folder):
            raise UserError(f"expected LR=FOLDER, got {candidate!r}")
        losses[rate] = best_dev_loss(Path(folder))
    chosen = min(losses, key=losses.get)
    files.write_json_atomic(args.output, {"chosen": chosen, "dev_loss": losses})
    return chosen


def main(argv=None) -> int:
    """Runs one of the two commands; see the module's docstring."""
    args = build_parser().parse_args(argv)
    if args.command == "choose":
        print(choose(args))
        return 0
    if not args.seeds:
        raise UserError("--seeds names no seed: give at least one")
    plan = make_plan(args)
    files.write_json_atomic(args.output, plan)
    # Tabs, for a shell to read.
    for line in plan["lines"]:
        columns = ("phase", "bridge", "seed", "stage", "data", "steps", "epochs", "words")
        sys.stdout.write("\t".join(str(line[name]) for name in columns) + "\n")
    return 0


if __name__ == "__main__":
    command.run_main(main, alone=True)
