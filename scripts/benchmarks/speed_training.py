"""Training in the speed benchmark: the project's own step against the textbook loop, and with each bridge."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mindmerger.runtime.errors import UserError
from mindmerger.runtime.processes import log, rank, world_size
from scripts.benchmarks.speed_world import synchronise

ROOT = Path(__file__).resolve().parent.parent.parent
OF_LAUNCHER = {
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_SIZE",
    "CROSS_RANK",
    "CROSS_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
}


def make_run(
    args,
    folder: Path,
    stage: str,
    model,
    device,
    token_budget: int | None,
    bridge: str = "mindmerger",
    keeps_states: bool = False,
):
    """Puts the project's own training run around the given model, ready to step; one that keeps states has those of the
    encoder on disk already, as in a second epoch."""
    import run_training
    from mindmerger.data.loader import BatchLoader
    from mindmerger.training import settings as training_settings
    from mindmerger.training.deepspeed_engine import make_engine
    from mindmerger.training.trainer import Run

    flags = ["--llm_path", str(folder / "llm"), "--mt_path", str(folder / "encoder"), "--data_root", args.data_root]
    flags += ["--task", "math", "--bridge", bridge, "--stage_name", stage, "--train_num", str(args.train_num)]
    flags += ["--precision", args.precision, "--train_batch_size", str(args.global_batch)]
    flags += ["--train_micro_batch_size_per_gpu", str(args.micro_batch), "--dev_size", "0", "--init_checkpoint", "none"]
    flags.append("--dry_run")  # does not ask for weight files: these models are random
    if token_budget:
        flags += ["--micro_batch_tokens", str(token_budget)]
    settings, data = run_training.prepare(training_settings.parse(flags), folder / "cache")
    if keeps_states:
        data = data._replace(states=keep_states(folder / f"states-{stage}-{rank()}", data, model, device))
    engine = make_engine(model, settings.config, settings.args.lr)
    loader = BatchLoader(settings.args, data, settings.bridge.prefix_length, device, model.plan_input)
    return Run(settings, engine, loader, total_steps=1, eval_steps=1, save_steps=1, signals=NoSignals())


def keep_states(folder: Path, data, model, device):
    """Writes what the model's encoder makes of all rows, as --cache_encoder_states does, and opens it."""
    from mindmerger.data.encoder_states import EncoderStates
    from mindmerger.training.encoder_cache import FILE, TOKENS_PER_PASS, Plan, batches_by_length, write_states

    encoder, lengths = model.encoder, data.examples.encoder_lengths
    layers, tokens = tuple(model.mapping.encoder_layers), int(lengths.sum(dtype="int64"))
    plan = Plan(folder, len(lengths), tokens, layers, encoder.config.hidden_size, encoder.dtype)
    folder.mkdir(exist_ok=True)
    (folder / FILE).touch()
    write_states(plan, folder / FILE, batches_by_length(lengths, TOKENS_PER_PASS), encoder, data, device)
    return EncoderStates(folder / FILE, lengths, len(layers), plan.width, plan.dtype)


class NoSignals:
    """Stands for `Signals` where nothing has to be interrupted; it reads the same values."""

    save_agreed = False

    def alive(self):
        """Notes nothing."""

    def agree(self, device, *values):
        """Returns the values, read."""
        import torch

        return 0, torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in values]).cpu()


# What a window counts, over all processes: LLM positions that are real, encoder tokens, target tokens, LLM positions
# with padding, examples; and seconds, with those of them spent waiting for data.
COUNTED = ("useful", "encoder", "targets", "processed", "samples")


def summed(total: dict, device) -> dict:
    """Adds up the counts of all processes; seconds are this one's, since the steps go together."""
    import torch

    # float64 holds every count exactly; one collective for all of them.
    counts = torch.tensor([total[name] for name in COUNTED], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(counts)
    return total | dict(zip(COUNTED, counts.tolist(), strict=True))


class Ours:
    """The project's training step, timed over whole optimizer steps."""

    def __init__(self, run, steps: int):
        self.run, self.steps = run, steps
        if len(run.loader.data.train) < run.args.train_batch_size:  # none would ever come
            raise UserError(
                f"--global_batch {run.args.train_batch_size} is more than the {len(run.loader.data.train)} rows of the "
                f"{run.args.stage_name} stage: take a smaller one, or a larger --train_num"
            )
        # The last batch of an epoch may be smaller.
        whole = (batch for batch in run.loader.starting_at(0, 0) if len(batch.indices) == run.args.train_batch_size)
        self.batches = whole

    def window(self) -> dict:
        """Returns one window's counts."""
        import run_training

        data, lengths = self.run.data, self.run.loader.lengths
        total = dict.fromkeys(("seconds", "waited", *COUNTED), 0)
        for _ in range(self.steps):
            # Outside the clock, since `train_step` counts its own waiting for data.
            batch = next(self.batches)
            synchronise(self.run.device)
            started = time.perf_counter()
            line, _ = run_training.train_step(self.run, 0, batch)
            synchronise(self.run.device)
            seconds = time.perf_counter() - started
            total["seconds"] += seconds
            total["waited"] += line["data_wait_share"] * seconds
            for micro in batch.micro_batches:
                rows = micro.rows
                total["processed"] += len(rows) * int(lengths[rows].max())
                # Rows of weight 0 only keep ranks in step: their work is not useful.
                if micro.weight:
                    total["targets"] += int(data.target_lengths[rows].sum())
                    total["useful"] += int(lengths[rows].sum())
                    total["encoder"] += int(data.encoder_lengths[rows].sum())
                    total["samples"] += len(rows)
        return summed(total, self.run.device)


class Plain:
    """The textbook loop on the same model and the same texts."""

    def __init__(self, run, examples: list, micro_batches: int, rows: int):
        import numpy as np
        import torch

        self.run, self.examples, self.micro_batches, self.rows = run, examples, micro_batches, rows
        self.model = run.engine.module
        # One shuffle for all epochs, as the published code has it.
        self.order = np.random.RandomState(0).permutation(len(examples))[rank() :: world_size()]
        self.position = 0
        self.optimizer = torch.optim.AdamW(
            self.model.mapping.parameters(), lr=2e-5, betas=(0.8, 0.999), weight_decay=3e-7
        )

    def window(self) -> dict:
        """Runs one window of micro-batches with one optimizer step at its end."""
        import torch

        total = dict.fromkeys(("seconds", "waited", *COUNTED), 0)
        synchronise(self.run.device)
        started = time.perf_counter()
        for _ in range(self.micro_batches):
            if self.position + self.rows > len(self.order):
                self.position = 0
            chosen = [self.examples[i] for i in self.order[self.position : self.position + self.rows]]
            self.position += self.rows
            self.forward(chosen, total)
            total["samples"] += len(chosen)
        # By hand, since this loop has no DeepSpeed engine: the ranks' exchange must be in its time as it is in ours.
        for parameter in self.model.mapping.parameters():
            torch.distributed.all_reduce(parameter.grad)
        torch.nn.utils.clip_grad_norm_(self.model.mapping.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronise(self.run.device)
        total["seconds"] = time.perf_counter() - started
        return summed(total, self.run.device)

    def tokenised(self, example) -> tuple[list, list, list]:
        """Returns the ids of source, prompt and target."""
        limits, tokenizers = self.run.args, self.run.loader.data.tokenizers
        encoder, llm = tokenizers.encoder, tokenizers.llm
        limit = {"add_special_tokens": False, "truncation": True, "max_length": limits.max_gen_len}
        source = encoder(example.source, truncation=True, max_length=limits.max_seq_len).input_ids
        prompt = llm(example.prompt, **limit).input_ids if self.run.settings.with_prompt else []
        return source, prompt, llm(example.target, **limit).input_ids + [2]

    def forward(self, examples: list, total: dict) -> None:
        """Tokenises row by row, pads left, runs the LLM with labels over all positions in fp32, and back."""
        import torch

        started = time.perf_counter()
        model, device = self.model, self.run.device
        texts = [self.tokenised(example) for example in examples]
        ids_BS = torch.zeros(len(examples), max(len(source) for source, _, _ in texts), dtype=torch.long)
        mask_BS = torch.zeros_like(ids_BS)
        for i, (source, _, _) in enumerate(texts):
            ids_BS[i, : len(source)], mask_BS[i, : len(source)] = torch.tensor(source), 1
        # Tokenising counts as waiting for data: the GPU has nothing to do meanwhile.
        total["waited"] += time.perf_counter() - started
        with torch.no_grad():
            states = model.encoder(input_ids=ids_BS.to(device), attention_mask=mask_BS.to(device)).last_hidden_state
        hidden = torch.relu(model.mapping.mlp.linear1(states.to(torch.float32)))
        mapped, boundary = model.mapping.mlp.linear2(hidden), model.mapping.end_boundary
        dtype = next(model.llm.parameters()).dtype
        embed, rows, labels = model.llm.get_input_embeddings(), [], []
        for i, (source, prompt, target) in enumerate(texts):
            text = embed(torch.tensor([[1, *prompt, *target]], device=device))[0]
            row = torch.cat([text[:1], mapped[i, : len(source)].to(dtype), boundary[0].to(dtype), text[1:]])
            rows.append(row)
            labels.append([-100] * (len(row) - len(target)) + target)
            total["encoder"] += len(source)
            total["targets"] += len(target)
        length = max(len(row) for row in rows)
        # On the left, as the published code pads.
        embeds = torch.stack([torch.nn.functional.pad(row, (0, 0, length - len(row), 0)) for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
        labels_BL = torch.tensor([[-100] * (length - len(row)) + row for row in labels], device=device)
        logits = model.llm(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits.float()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels_BL[:, 1:].flatten())
        loss.item()  # as the published loop does for its progress bar
        (loss / self.micro_batches).backward()
        total["useful"] += sum(len(row) for row in rows)
        total["processed"] += len(rows) * length


def flop(model, window: dict, head_on_all: bool, runs_encoder: bool) -> float:
    """Returns the useful FLOP of a window, the output head's on all useful positions or on target tokens alone."""
    # Looking an embedding up is not arithmetic.
    llm = sum(p.numel() for name, p in model.llm.named_parameters() if "embed_tokens" not in name)
    head = model.llm.get_output_embeddings().weight.numel()
    encoder = sum(p.numel() for name, p in model.encoder.named_parameters() if "shared" not in name) * runs_encoder
    mapping = sum(p.numel() for p in model.mapping.parameters())
    with_head = window["useful"] if head_on_all else window["targets"]
    # 4 N, not 6 N: no weight of the LLM gets a gradient.
    return 4 * ((llm - head) * window["useful"] + head * with_head) + (2 * encoder + 6 * mapping) * window["encoder"]


def timed_windows(args, runners: dict, told) -> dict[str, list[dict]]:
    """Runs windows of all runners in turn, the first of each to warm up; returns those that count.

    Args:
        told: called with every window's number, runner's name and counts.
    """
    windows = {name: [] for name in runners}
    for number in range(args.windows + 1):
        for name, runner in runners.items():
            window = runner.window()
            if number or not args.windows:
                windows[name].append(window)
            told(number, name, window)
    return windows


def figures(model, windows: list[dict], rate: float, runs_encoder: bool = True) -> dict:
    """Returns medians over windows."""
    per = {
        "samples_per_s": [w["samples"] / w["seconds"] for w in windows],
        "useful_tokens_per_s": [w["useful"] / w["seconds"] for w in windows],
        "real_position_share": [w["useful"] / w["processed"] for w in windows],
        "data_wait_share": [w["waited"] / w["seconds"] for w in windows],
    }
    for name, head_on_all in (("flop_utilisation", True), ("flop_utilisation_head_on_targets", False)):
        per[name] = [flop(model, w, head_on_all, runs_encoder) / w["seconds"] / rate for w in windows]
    return {name: statistics.median(values) for name, values in per.items()}


def time_stage(args, folder: Path, stage: str, model, device, rate: float) -> dict:
    """Times ours at the micro-batch, ours by token budget, and plain, window by window in turn."""
    from mindmerger.tasks import find_task
    from mindmerger.tasks.examples import StageData

    budget = args.micro_batch_tokens or (2048 if stage == "mapping" else 4096)
    names = {"rows": f"ours, micro-batch {args.micro_batch}", "tokens": f"ours, {budget} tokens", "plain": "plain"}
    names["states"] = f"{names['tokens']}, states kept"
    modes, first_step = {}, {}
    for mode in args.modes.split(","):
        started = time.perf_counter()
        kept, by_tokens = mode == "states", budget if mode in ("tokens", "states") else None
        run = make_run(args, folder, stage, model, device, by_tokens, keeps_states=kept)
        if mode == "plain":
            examples = list(StageData(find_task("math"), stage, args.data_root, None, args.train_num).examples())
            modes[mode] = Plain(run, examples, args.plain_micro_batches, args.micro_batch)
        else:
            modes[mode] = Ours(run, args.steps)
        first_step[mode] = time.perf_counter() - started

    def told(number: int, mode: str, window: dict) -> None:
        if not number:
            first_step[mode] += window["seconds"]
        log(f"{stage} window {number} {names[mode]}: {window['useful'] / window['seconds']:.0f} useful tokens/s")

    windows = timed_windows(args, modes, told)
    result = {names[mode]: figures(model, found, rate, mode != "states") for mode, found in windows.items()}
    for mode in modes:
        result[names[mode]]["time_to_first_step_s"] = first_step[mode]
        if "plain" in result:
            ours = result[names[mode]]["useful_tokens_per_s"]
            result[names[mode]]["times_plain"] = ours / result["plain"]["useful_tokens_per_s"]
    return result


def time_bridges(args, folder: Path, model, device, rate: float) -> dict:
    """Times ours with each bridge, in its last stage, window by window in turn; the towers are the same for all."""
    from mindmerger.bridges import BRIDGES
    from mindmerger.model.mindmerger import MindMerger

    runners, paths = {}, (str(folder / "encoder"), str(folder / "llm"))
    for name in args.bridge:
        stage = list(BRIDGES[name].stages)[-1]
        # The same towers for all: a copy of a 7B model per bridge would not fit.
        one = MindMerger.from_towers(model.encoder, model.llm, *paths, name).to(device)
        runners[name] = Ours(make_run(args, folder, stage, one, device, None, name), args.steps)

    def told(number: int, name: str, window: dict) -> None:
        log(f"{name} window {number}: {window['targets'] / window['seconds']:.0f} target tokens/s")

    windows = timed_windows(args, runners, told)
    result = {}
    for name, runner in runners.items():
        trained = sum(parameter.numel() for parameter in runner.run.engine.module.trained_parameters().values())
        made = {"stage": runner.run.args.stage_name, "trained_parameters": trained}
        # By target tokens: a bridge with a longer prefix would look faster by useful ones.
        made["target_tokens_per_s"] = statistics.median(w["targets"] / w["seconds"] for w in windows[name])
        result[name] = made | figures(runner.run.engine.module, windows[name], rate)
    for made in result.values():
        for unit in ("target_tokens_per_s", "useful_tokens_per_s"):
            made[f"{unit}_relative"] = made[unit] / result["mindmerger"][unit]
    return result


def peak_memory(args, stage: str) -> dict:
    """Measures peak memory of training in each mode, each in a process of its own."""
    found = {}
    for mode in args.modes.split(","):
        with tempfile.TemporaryDirectory() as name:
            report = Path(name) / "report.json"
            # A process for each mode: a peak never falls, so a second mode would show the first one's.
            flags = ["--parts", stage, "--modes", mode, "--windows", "0", "--output", str(report)]
            flags += ["--global_batch", str(4 * args.micro_batch), "--plain_micro_batches", "4"]
            for flag in (
                "preset",
                "data_root",
                "train_num",
                "precision",
                "micro_batch",
                "micro_batch_tokens",
                "models",
            ):
                if (value := getattr(args, flag)) is not None:
                    flags += [f"--{flag}", str(value)]
            if args.gradient_checkpointing:
                flags.append("--gradient_checkpointing")
            command = [sys.executable, "-m", "scripts.benchmarks.speed", *flags]
            # Without the launcher's variables: with them it would wait for ranks that nobody starts.
            alone = {name: value for name, value in os.environ.items() if name not in OF_LAUNCHER}
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT, env=alone)
            found[mode] = json.loads(report.read_text(encoding="utf-8"))["peak_memory_gb"]
        log(f"{stage} memory {mode}: {found[mode]:.2f} GB")
    return found
