"""How speed, memory and start-up grow: with processes, pairs, target length and micro-batch.

    python -m scripts.benchmarks.growth --data_root ./datas --output growth.json

Every row is a run of `run_training.py` itself, on models of random weights in the shapes of `speed.py`'s presets
(`cpu-small`; `tiny` where only the data matters) and on text of the data folder. Speeds are medians over the steps
after the first, read from the run's log.jsonl. `--parts pairs` writes and tokenises a million pairs: minutes, and 2 GB.
"""

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mindmerger.runtime import command as runtime_command
from mindmerger.runtime import files
from mindmerger.runtime.command import CommandParser
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.processes import log
from scripts.benchmarks import speed_world

ROOT = Path(__file__).resolve().parent.parent.parent


def build_parser():
    """Builds the parser of the command line."""
    parser = CommandParser(prog="python -m scripts.benchmarks.growth", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data_root", default="./datas", help="folder in the released layout: its text is used")
    add("--parts", default="ranks,pairs,lengths,micro_batches", help="which of these to measure, separated by commas")
    add("--pairs", default="10000,100000,1000000", help="numbers of sentence pairs, separated by commas")
    # The first step pays for everything that is done once: it is left out of the medians.
    add("--steps", type=int, default=4, help="optimizer steps of each run; the first is not counted")
    add("--work_dir", help="folder for models and data, kept for a next run (default: a new one, removed at the end)")
    add("--output", help="JSON file for the figures")
    return parser


class World:
    """Models, data and runs in one working folder."""

    def __init__(self, folder: Path, data_root: str, steps: int):
        self.folder, self.steps = folder, steps
        self.data_root = Path(data_root).resolve()
        # A folder of its own for each run: in an earlier run's the program would resume instead of starting.
        self.number = 0

    def models(self, preset: str) -> list[str]:
        """Returns flags that name the preset's two models, saved to disk when first asked for."""
        import torch

        folder = self.folder / preset
        if not (folder / "llm" / "model.safetensors").is_file():
            log(f"making the models of preset {preset}")
            speed_world.build_world(folder, preset, str(self.data_root))
            model = speed_world.make_model(folder, "fp32", torch.device("cpu"))
            model.encoder.save_pretrained(folder / "encoder")
            model.llm.save_pretrained(folder / "llm")
        return ["--llm_path", str(folder / "llm"), "--mt_path", str(folder / "encoder")]

    def pairs(self, name: str, number: int, target_words: int = 0) -> list[str]:
        """Writes so many Swahili-English pairs and returns flags that name their folder: real pairs in turn, made
        different by a number, and longer where `target_words` asks for it."""
        folder = self.folder / name / "bilingual_pairs" / "en-sw"
        if not (folder / "train_100k.en").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            source = self.data_root / "bilingual_pairs" / "en-sw"
            for code in ("sw", "en"):
                lines = (source / f"train_100k.{code}").read_text(encoding="utf-8").split("\n")[:-1]
                # Words of real sentences without end: a target of any length, in the real text's pieces.
                words = itertools.cycle(" ".join(lines).split())
                with open(folder / f"train_100k.{code}", "w", encoding="utf-8") as file:
                    for i in range(number):
                        line = lines[i % len(lines)]
                        if code == "en" and target_words:
                            line = " ".join(itertools.islice(words, target_words))
                        file.write(f"{line} {i}\n")
        return ["--data_root", str(self.folder / name), "--languages", "Swahili", "--train_num", str(number)]

    def run(self, flags: list[str], ranks: int = 1, threads: int | None = None) -> dict:
        """Runs one training; returns its medians, its peak memory and the seconds until its first step was done."""
        self.number += 1
        out = self.folder / "outputs" / str(self.number)
        shutil.rmtree(out, ignore_errors=True)
        launcher = [sys.executable]
        if ranks > 1:
            deepspeed = shutil.which("deepspeed", path=str(Path(sys.executable).parent)) or "deepspeed"
            launcher += [deepspeed, "--num_gpus", str(ranks)]
        command = [*launcher, str(ROOT / "run_training.py"), *flags, "--output_dir", str(out), "--task", "math"]
        # Neither dev passes nor checkpoints: steps alone are timed.
        command += ["--dev_size", "0"]
        command += [
            "--max_steps",
            str(self.steps),
            "--logging_steps",
            "1",
            "--precision",
            "fp32",
            "--save_steps",
            "999",
        ]
        # Threads by the environment, as a launcher sets them: torch would take all cores in each process.
        environment = dict(os.environ) | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        environment["HF_HOME"] = str(self.folder / "cache")  # the tokenised data too: a first start stays a first one
        file, first, started = out / "MindMerger/math/mapping/log.jsonl", None, time.perf_counter()
        # A file and no pipe, which would block the program once nobody reads it.
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(command, stdout=errors, stderr=errors, cwd=self.folder, env=environment)
            # The first step is done when its line is in the log, which a poll every 0.05 s finds soon enough.
            while process.poll() is None:
                if first is None and file.is_file() and file.stat().st_size:
                    first = time.perf_counter() - started
                time.sleep(0.05)
            if process.returncode:
                errors.seek(0)
                raise UserError(f"{' '.join(command)} ended with {process.returncode}: {errors.read()[-2000:]}")
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        found = {
            name: statistics.median(line[name] for line in lines[1:])
            for name in ("samples_per_s", "tokens_per_s", "data_wait_share")
        }
        batch = int(flags[flags.index("--train_batch_size") + 1])
        found["step_s"] = batch / found["samples_per_s"]
        # Peaks are the highest of any step, not a median: memory is what has to be there.
        return found | {"first_step_s": first, "peak_memory_gb": max(line["peak_memory_gb"] for line in lines)}


def measure_ranks(world: World, args) -> dict:
    """Measures the same work on one process and on two, on as many cores."""
    flags = [*world.models("cpu-small"), "--data_root", str(world.data_root), "--train_num", "300"]
    flags += ["--train_batch_size", "32", "--micro_batch_tokens", "2048", "--train_micro_batch_size_per_gpu", "8"]
    return {
        # The same two cores in the last two rows: what they differ in is the cost of exchanging gradients.
        "1 process, 1 thread": world.run(flags, threads=1),
        "1 process, 2 threads": world.run(flags, threads=2),
        "2 processes, 1 thread each": world.run(flags, ranks=2, threads=1),
    }


def measure_pairs(world: World, args) -> dict:
    """Measures first start (tokenising) and second start, memory and step time, by the number of pairs."""
    found = {}
    for number in map(int, args.pairs.split(",")):
        flags = [*world.models("tiny"), *world.pairs(f"pairs-{number}", number), "--train_batch_size", "128"]
        flags += ["--micro_batch_tokens", "2048", "--train_micro_batch_size_per_gpu", "8"]
        # The second start only opens what the first one tokenised.
        for start in ("first", "second"):
            found[f"{number} pairs, {start} start"] = world.run(flags)
            log(f"{number} pairs, {start} start: {found[f'{number} pairs, {start} start']}")
    return found


def measure_lengths(world: World, args) -> dict:
    """Measures targets of exactly 32 to 512 tokens."""
    found = {}
    # More words than the longest limit has tokens: every target is truncated to exactly the limit.
    data = world.pairs("long", 2000, target_words=600)
    for length in (32, 64, 128, 256, 512):
        flags = [*world.models("cpu-small"), *data, "--train_batch_size", "16", "--max_gen_len", str(length)]
        flags += ["--micro_batch_tokens", "2048", "--train_micro_batch_size_per_gpu", "8"]
        found[f"target {length}"] = world.run(flags)
    return found


def measure_micro_batches(world: World, args) -> dict:
    """Measures real pairs, by rows of a micro-batch."""
    flags = [*world.models("cpu-small"), "--data_root", str(world.data_root), "--train_num", "300"]
    return {
        f"micro-batch {rows}": world.run(
            [*flags, "--train_batch_size", "32", "--train_micro_batch_size_per_gpu", str(rows)]
        )
        for rows in (1, 2, 4, 8, 16, 32)
    }


def markdown(report: dict) -> str:
    """Formats the figures as tables."""
    columns = {
        "samples/s": "{samples_per_s:.2f}",
        "useful tokens/s": "{tokens_per_s:.0f}",
        "step, s": "{step_s:.2f}",
        "data wait": "{data_wait_share:.2%}",
        "first step after, s": "{first_step_s:.1f}",
        "peak memory of rank 0, GB": "{peak_memory_gb:.2f}",
    }
    lines = []
    for part, rows in report.items():
        lines += [f"| {part} | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
        lines += [
            f"| {name} | " + " | ".join(c.format(**row) for c in columns.values()) + " |" for name, row in rows.items()
        ]
        lines.append("")
    return "\n".join(lines)


def main(argv=None) -> int:
    """Measures the parts, prints the tables, writes the JSON."""
    args = build_parser().parse_args(argv)
    measures = {
        "ranks": measure_ranks,
        "pairs": measure_pairs,
        "lengths": measure_lengths,
        "micro_batches": measure_micro_batches,
    }
    unknown = set(args.parts.split(",")) - measures.keys()
    if unknown:
        raise UserError(f"--parts has {', '.join(sorted(unknown))}: choose from {', '.join(measures)}")
    report = {}
    with tempfile.TemporaryDirectory() as name:
        world = World(Path(args.work_dir or name).resolve(), args.data_root, args.steps)
        for part in args.parts.split(","):
            log(f"measuring {part}")
            report[part] = measures[part](world, args)
            # After every part: a million pairs take minutes, and a failure in a later part must not cost them.
            if args.output:
                files.write_json_atomic(args.output, report)
    print(markdown(report))
    return 0


if __name__ == "__main__":
    runtime_command.run_main(main, alone=True)
