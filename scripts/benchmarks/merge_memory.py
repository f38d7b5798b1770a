"""Measures the peak memory of merging: two large random checkpoints through the real commands.

    python -m scripts.benchmarks.merge_memory                 # 1.2 GB each, bf16, in shards; takes 5 GB of disk
    python -m scripts.benchmarks.merge_memory --size_gb 0.2   # a quick look

Prints, for each command, seconds, peak resident memory and how far it lies above the largest tensor in fp32; ends with
exit code 1 when that is more than 2 GB (10^9 bytes).
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mindmerger.runtime.command import CommandParser, run_main
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.processes import log

ROOT = Path(__file__).resolve().parent.parent.parent

ALLOWED_GB = 2.0
# Llama-2's proportions, and a vocabulary that makes the embeddings by far the largest tensor, as in Llama 3.
WIDTH, MLP_WIDTH, VOCABULARY = 1536, 4096, 64_000
FORMS = ("safetensors", "bin")


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of the command line."""
    parser = CommandParser(prog="python -m scripts.benchmarks.merge_memory", description=__doc__)
    parser.add_argument(
        "--size_gb", type=float, default=1.2, help="size of each model folder in units of 10^9 bytes (default 1.2)"
    )
    parser.add_argument("--shard_gb", type=float, default=0.4, help="size of its files in the same units (default 0.4)")
    parser.add_argument("--form", choices=FORMS, default="safetensors", help="form of its files (default safetensors)")
    parser.add_argument("--folder", help="folder for the temporary files (default: the system's)")
    return parser


def make_checkpoint(folder: Path, layers: int, shard_bytes: int, seed: int, form: str) -> int:
    """Writes a random bf16 Llama in shards; returns the number of scalars of its largest tensor."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    from mindmerger.baselines.merged_folder import deal_into_shards

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=MLP_WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=WIDTH // 128,
        architectures=["LlamaForCausalLM"],
        dtype=torch.bfloat16,
    )
    folder.mkdir()
    config.save_pretrained(folder)
    # For names and shapes alone: on the meta device a model takes no memory, which would count as this process's.
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    shards = deal_into_shards({name: (shape, torch.bfloat16) for name, shape in shapes.items()}, shard_bytes)
    weight_map = {}
    for file, names in shards.items():
        file = file if form == "safetensors" else f"pytorch_{file.removesuffix('.safetensors')}.bin"
        # One shard at a time: the benchmark must not need the memory that it measures.
        part = {name: torch.randn(shapes[name], generator=generator).mul_(0.02).bfloat16() for name in names}
        (save_file if form == "safetensors" else torch.save)(part, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = "model.safetensors.index.json" if form == "safetensors" else "pytorch_model.bin.index.json"
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return max(math.prod(shape) for shape in shapes.values())


def measure(module: str, *arguments) -> tuple[float, float]:
    """Runs one command; returns its seconds and its peak resident memory in units of 10^9 bytes.

    Raises:
        UserError: when the command fails.
    """
    # The child reads its own high-water mark: ru_maxrss starts at the size of the process that forked it.
    code = (
        "import re, runpy, sys\n"
        f"sys.argv = ['{module}', *sys.argv[1:]]\n"
        "try:\n"
        f"    runpy.run_module('mindmerger.baselines.{module}', run_name='__main__')\n"
        "finally:\n"
        "    print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
    )
    start = time.perf_counter()
    # A process for each command: a peak never falls.
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    if done.returncode != 0:
        raise UserError(f"mindmerger.baselines.{module} ended with exit code {done.returncode}: its message is above")
    return time.perf_counter() - start, int(done.stdout.split()[-1]) * 1024 / 10**9


def main() -> int:
    """Runs the benchmark."""
    args = build_parser().parse_args()
    if not Path("/proc/self/status").is_file():
        raise UserError("the peak is read from /proc, which this system does not have: run it on Linux")
    if not 0 < args.shard_gb <= 5 or args.size_gb <= 0:
        raise UserError("--size_gb must be above 0, --shard_gb above 0 and at most 5")
    per_layer = 4 * WIDTH * WIDTH + 3 * WIDTH * MLP_WIDTH
    # 2 bytes a scalar; twice the vocabulary, since input and output embeddings are two tensors.
    layers = max(1, round((args.size_gb * 10**9 / 2 - 2 * VOCABULARY * WIDTH) / per_layer))
    worst = 0.0
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        folders = {name: Path(root) / name for name in ("base", "task", "language")}
        for seed, folder in enumerate(folders.values()):
            largest = 4 * make_checkpoint(folder, layers, int(args.shard_gb * 10**9), seed, args.form) / 10**9
        size = sum(file.stat().st_size for file in folders["task"].iterdir()) / 10**9
        log(f"checkpoints of {size:.2f} GB, {layers} layers; the largest tensor takes {largest:.2f} GB in fp32")
        experts = {"language_expert": folders["language"], "math_expert": folders["task"]}
        swap = [part for name, folder in experts.items() for part in (f"--{name}", folder)]
        maet = ["--base", folders["base"], "--task_expert", folders["task"], "--language_experts", folders["language"]]
        runs = {
            "layer_swap": ("layer_swap", *swap, "--embeddings", "average"),
            "layer_swap analyse": ("layer_swap", "analyse", "--base", folders["base"], *swap),
            "maet": ("maet", *maet, "--include_nonlayer"),
            "maet --soup": ("maet", "--soup", *maet[2:]),
        }
        print(f"{'command':20} {'seconds':>8} {'peak GB':>8} {'above the largest fp32 tensor, GB':>34}")
        for i, (name, (module, *arguments)) in enumerate(runs.items()):
            seconds, peak = measure(module, *arguments, "--output", Path(root) / f"out{i}", "--overwrite")
            # Above the largest tensor: that one has to be in memory, in the dtype in which it is merged.
            worst = max(worst, peak - largest)
            print(f"{name:20} {seconds:8.1f} {peak:8.2f} {peak - largest:34.2f}", flush=True)
            # At once, so that the disk holds one output at a time.
            for file in (Path(root) / f"out{i}").iterdir():
                file.unlink()
    print(f"highest: {worst:.2f} GB above the largest fp32 tensor (allowed: {ALLOWED_GB:.1f})")
    return 0 if worst <= ALLOWED_GB else 1


if __name__ == "__main__":
    run_main(main, alone=True)
