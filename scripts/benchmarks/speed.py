"""Speed and memory of training and generation against the textbook loop, on real text.

    python -m scripts.benchmarks.speed --preset cpu-small --data_root ./datas --precision fp32 --output benchmark.json

Models have random weights in a preset's exact shapes; texts have their real lengths. `ours` times the project's own
training step (`run_training.train_step`) and generation (`generate_batch` of `mindmerger/generation/answers.py`).
`plain` is the loop as the published code runs it: shuffled micro-batches padded to their longest row, tokenised row by
row inside the step, a dense mask, fp32 logits for every position, generation at batch 8 in file order to the length
limit. They alternate window by window in one process, or in each process of
`deepspeed --module scripts.benchmarks.speed`; figures are medians over windows, after a warm-up window of each.
`--windows 0` reports that one.

    python -m scripts.benchmarks.speed --bridge langbridge,layalign,xbridge,layer_fusion --precision fp32

times the last stage of each bridge beside MindMerger's, between the same two models, again window by window in turn.
Bridges differ in what a row holds (LangBridge's has no prompt), so the ratio is that of target tokens per second. With
`--parts generation` also generation with each bridge against the plain one, in the form that its last stage trains.

Useful tokens are the real positions of merged rows. FLOP utilisation counts 4 N per useful position of the LLM (one
forward pass, and one backward pass to the inputs alone), 2 N per encoder token and 6 N per token of the mapping, over
the rate of a large matmul of the same dtype measured in the same run. Ours computes the output head on target tokens
alone, which a second column counts.

    python -m scripts.benchmarks.speed --check --precision bf16

runs what the documentation says of this precision in reduced form and tells which of it no longer holds: exit code 1.
"""

import tempfile
from pathlib import Path

from mindmerger.runtime import command, files, processes
from mindmerger.runtime.command import CommandParser
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.processes import is_main, on_all_ranks, world_size
from mindmerger.training.record import peak_memory_gb
from scripts.benchmarks.speed_check import CHECK_FLAGS, CLAIMS, check
from scripts.benchmarks.speed_generation import time_bridges_generation, time_generation
from scripts.benchmarks.speed_training import peak_memory, time_bridges, time_stage
from scripts.benchmarks.speed_world import PRESETS, build_world, machine, make_model, matmul_rate

PARTS = "mapping,augmentation,augmentation_memory,soft,hard"


def build_parser():
    """Builds the parser of the command line."""
    parser = CommandParser(prog="python -m scripts.benchmarks.speed", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--preset", choices=sorted(PRESETS), default="cpu-small", help="shapes of the two models")
    add("--data_root", default="./datas", help="folder in the released layout: its text is what is timed")
    add("--train_num", type=int, default=300, help="pairs or queries per language")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="dtype of the frozen models")
    add(
        "--parts",
        help="mapping, augmentation: training; mapping_memory, augmentation_memory: its peak memory, in processes of "
        "their own; soft, hard: generation in that form; generation: with each --bridge; separated by commas (default: "
        "all but mapping_memory and generation; with --bridge none of them)",
    )
    add(
        "--bridge",
        action="append",
        default=[],
        metavar="NAME",
        help="training with this bridge relative to mindmerger, by target tokens; several times, or with commas",
    )
    # states: the encoder's are on disk, as in a second epoch.
    add("--modes", default="rows,tokens,plain", help="rows, tokens, states: ours by micro-batch, by token budget, and "
        "by it with kept encoder states; plain")  # fmt: skip
    add("--global_batch", type=int, default=128, help="examples of one optimizer step")
    add("--micro_batch", type=int, default=8, help="rows of a micro-batch in both modes")
    add("--micro_batch_tokens", type=int, help="ours also by this token budget (default: 2048 mapping, 4096 else)")
    # Medians over several: other work on a machine slows single windows, not all of them.
    add("--windows", type=int, default=5, help="timed windows of each mode")
    add("--steps", type=int, default=1, help="optimizer steps of ours in a window")
    add("--plain_micro_batches", type=int, default=8, help="micro-batches of plain in a window")
    add("--questions", type=int, default=480, help="questions to generate answers for, over three languages")
    add("--eval_max_tokens", type=int, default=32768, help="token budget of a batch of ours in generation")
    add("--max_new_tokens", type=int, default=64, help="length limit of generation")
    add("--gradient_checkpointing", action="store_true", help="in both modes")
    add("--models", help="folder that keeps the preset's tokenizers and configs for a next run (default: a new one)")
    add("--check", action="store_true", help="compare the documented figures of this precision with reduced runs")
    add("--output", help="JSON file for the figures, written after each part")
    add("--local_rank", type=int, help="set by the launcher")
    return parser


def parse(argv=None):
    """Reads the command line; `parts` are then the ones to time, `bridge` the bridges to time, MindMerger's first.

    Raises:
        UserError: for an unknown bridge.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.check:
        for name, value in CHECK_FLAGS.items():
            if name not in parser.given:
                setattr(args, name, value)
        args.parts = args.parts or ",".join(claim.part for claim in CLAIMS[args.precision])
    from mindmerger.model.mapping_files import find_bridge  # with torch, which --help need not wait for

    named = [name.strip() for text in args.bridge for name in text.split(",")]
    # MindMerger's always runs along: figures of another hour or machine would not compare.
    args.bridge = list(dict.fromkeys(["mindmerger", *named])) if named else []
    for name in args.bridge:
        find_bridge(name)
    args.parts = [part for part in (args.parts or ("" if named else PARTS)).split(",") if part]
    if "generation" in args.parts and not named:
        raise UserError("--parts generation times the bridges of --bridge, and none is given: name some, or take hard")
    return args


def markdown(report: dict) -> str:
    """Formats the figures as tables."""
    lines = [
        f"preset {report['preset']}, {report['precision']}, {report['processes']} process(es), matmul "
        f"{report['matmul_gflops']:.0f} GFLOP/s each",
        ", ".join(f"{name} {value}" for name, value in report["machine"].items()),
        ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        "",
    ]
    columns = {
        "samples/s": "{samples_per_s:.1f}",
        "useful tokens/s": "{useful_tokens_per_s:.0f}",
        "x plain": "{times_plain:.2f}",
        "real positions": "{real_position_share:.1%}",
        "FLOP utilisation": "{flop_utilisation:.1%}",
        "head on targets alone": "{flop_utilisation_head_on_targets:.1%}",
        "data wait": "{data_wait_share:.2%}",
        "first step, s": "{time_to_first_step_s:.1f}",
    }
    for stage in ("mapping", "augmentation"):
        if stage in report:
            lines += [f"| {stage} | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
            for name, row in report[stage].items():
                cells = [cell.format(**{"times_plain": float("nan"), **row}) for cell in columns.values()]
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
            lines.append("")
        if f"{stage}_memory" in report:
            shown = ", ".join(f"{mode} {gb:.2f} GB" for mode, gb in report[f"{stage}_memory"].items())
            lines += [f"peak memory, {stage}: {shown}", ""]
    if "bridges" in report:
        head = ("bridge", "stage", "trained", "target tokens/s", "x mindmerger", "useful tokens/s", "x mindmerger")
        lines += ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
        for name, row in report["bridges"].items():
            cells = [name, row["stage"], f"{row['trained_parameters']:,}"]
            for unit in ("target_tokens_per_s", "useful_tokens_per_s"):
                cells += [f"{row[unit]:.0f}", f"{row[f'{unit}_relative']:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    if "generation" in report:
        head = ("generation", "form", "questions/s", "plain", "x plain", "same answers")
        lines += ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
        for name, row in report["generation"].items():
            cells = [name, row["form"], *(f"{row[mode]['questions_per_s']:.2f}" for mode in ("ours", "plain"))]
            cells += [f"{row['times_plain']:.2f}", f"{row['same_answers']:.0%}"]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    for form in ("soft", "hard"):
        if form in report:
            found = report[form]
            lines += [f"| generation, {form} | questions/s | generated tokens/s |", "|---|---|---|"]
            for mode in ("ours", "plain"):
                row = found[mode]
                lines.append(f"| {mode} | {row['questions_per_s']:.2f} | {row['generated_tokens_per_s']:.0f} |")
            lines += ["", f"x plain: {found['times_plain']:.2f}; same answers: {found['same_answers']:.0%}; "]
            lines[-1] += f"mean input {found['mean_input']:.0f} positions"
            lines.append("")
    lines.append(f"peak memory of this process: {report['peak_memory_gb']:.2f} GB")
    return "\n".join(lines)


def run(args, folder: Path, device) -> dict:
    """Returns the figures of all parts."""
    on_all_ranks(build_world, folder, args.preset, args.data_root)
    report = {
        "preset": args.preset,
        "precision": args.precision,
        "processes": world_size(),
        "machine": machine(device),
        "versions": command.versions(),
        "flags": vars(args),
    }
    model = make_model(folder, args.precision, device)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    command.collect_as_usual()  # as in a training
    # In this very run: other work on the machine slows both sides of a utilisation alike.
    rate = matmul_rate(args.precision, device)
    report["matmul_gflops"] = rate / 1e9
    for part in args.parts + ["bridges"] * bool(args.bridge):
        if part == "bridges":
            report[part] = time_bridges(args, folder, model, device, rate * world_size())
        elif part == "generation":
            report[part] = time_bridges_generation(args, folder, model, device)
        elif part in ("soft", "hard"):
            report[part] = time_generation(args, folder, part, model, device)
        elif part.endswith("_memory"):
            # Processes of their own, of which one at a time is to be on the machine.
            report[part] = on_all_ranks(measured_by_main, args, part.removesuffix("_memory"))
        else:
            report[part] = time_stage(args, folder, part, model, device, rate * world_size())
        if is_main() and args.output:  # a part takes minutes, which a fault in a later one must not cost
            files.write_json_atomic(args.output, report)
    report["peak_memory_gb"] = peak_memory_gb(device)
    return report


def measured_by_main(args, stage: str) -> dict | None:
    """Returns the peak memory that rank 0 measures, None on the other ranks."""
    return peak_memory(args, stage) if is_main() else None


def main(argv=None) -> int:
    """Times the parts, prints the tables, writes the JSON."""
    args = parse(argv)
    device = processes.init_distributed(force=True)

    from mindmerger.training.deepspeed_engine import import_deepspeed_quietly

    import_deepspeed_quietly()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(args.models or processes.broadcast_object(name))
        report = run(args, folder, device)
        on_all_ranks(lambda: None)  # nobody takes the folder away from the others
    if not is_main():
        return 0
    print(markdown(report))
    if args.output:
        files.write_json_atomic(args.output, report)
    return check(report) if args.check else 0


if __name__ == "__main__":
    command.run_main(main)
