"""How long a thread should spin for the others: training speed of one process alone and of several at once.

    python -m scripts.benchmarks.threads --output threads.json

After each operation torch's OpenMP threads wait for the next one. A thread that spins answers sooner, and takes a core
from whoever else could use it. Each setting of the environment is measured alone and in company, in turn with the
others, round after round; a process trains a stack of small layers, where the waiting counts most.
"""

import os
import statistics
import subprocess
import sys
import time

from mindmerger.runtime import files
from mindmerger.runtime.command import CommandParser, at_least, positive, run_main, versions
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.processes import log

DEFAULT = "default"
PASSIVE = "OMP_WAIT_POLICY=PASSIVE"
LAYERS, WIDTH, ROWS = 20, 256, 512


def build_parser() -> CommandParser:
    """Builds the parser of the command line."""
    parser = CommandParser(prog="python -m scripts.benchmarks.threads", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--spin_counts", default="0,1000,2000,3000,5000,10000", help="values of GOMP_SPINCOUNT, separated by commas; "
        "beside them libgomp's own default and OMP_WAIT_POLICY=PASSIVE are measured")  # fmt: skip
    add("--rounds", type=at_least(1), default=3, help="measurements of each setting")
    add("--seconds", type=positive, default=4.0, help="length of a measurement")
    add("--processes", type=at_least(2), default=2, help="how many compute at once in company")
    add("--threads", type=at_least(1), default=os.cpu_count() or 1, help="OpenMP threads of a process")
    add("--output", help="JSON file for the figures")
    return parser


def train(seconds: float) -> None:
    """Trains a stack of layers for so long, once a line has come in; prints steps per second. A process of its own."""
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    optimizer = torch.optim.AdamW(model.parameters())
    rows = torch.randn(ROWS, WIDTH)
    steps, started = 0, None
    while started is None or time.perf_counter() - started < seconds:
        model(rows).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        if started is None:  # the first step makes the threads and the moments
            print("ready", flush=True)
            sys.stdin.readline()
            steps, started = 0, time.perf_counter()
    print(steps / (time.perf_counter() - started))


def measure(setting: str, number: int, args) -> float:
    """Returns the mean rate of so many processes at once under a setting, in steps per second each.

    Raises:
        UserError: when one of them fails.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment["OMP_NUM_THREADS"] = str(args.threads)
    if setting != DEFAULT:
        environment |= [setting.split("=")]
    # Not as a program, which would choose a setting by itself.
    command = [sys.executable, "-c", f"from scripts.benchmarks import threads; threads.train({args.seconds})"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = [subprocess.Popen(command, env=environment, **pipes) for _ in range(number)]
    for child in children:
        child.stdout.readline()
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    outputs = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise UserError(f"a process under {setting} ended with an error, see above")
    return statistics.mean(map(float, outputs))


def markdown(found: dict[str, dict[str, list[float]]]) -> str:
    """Formats the medians, each beside its share of the best way known for its column."""
    middle = {name: {where: statistics.median(values) for where, values in one.items()} for name, one in found.items()}
    alone, company = middle[DEFAULT]["alone"], middle[PASSIVE]["company"]
    lines = ["| setting | alone, steps/s | of default | in company, steps/s each | of passive |", "|---|" + "---:|" * 4]
    for name, one in middle.items():
        shares = one["alone"] / alone, one["company"] / company
        lines.append(f"| {name} | {one['alone']:.1f} | {shares[0]:.0%} | {one['company']:.1f} | {shares[1]:.0%} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measures the settings in turn, prints the table, writes the JSON."""
    args = build_parser().parse_args(argv)
    names = [DEFAULT, PASSIVE, *(f"GOMP_SPINCOUNT={count}" for count in args.spin_counts.split(","))]
    found = {name: {"alone": [], "company": []} for name in names}
    for number in range(args.rounds):
        log(f"round {number + 1} of {args.rounds}")
        for name in names:
            found[name]["alone"].append(measure(name, 1, args))
            found[name]["company"].append(measure(name, args.processes, args))
        if args.output:
            report = {
                "versions": versions(),
                "threads": args.threads,
                "processes": args.processes,
                "steps_per_s": found,
            }
            files.write_json_atomic(args.output, report)
    print(markdown(found))
    return 0


if __name__ == "__main__":
    run_main(main, alone=True)
