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
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mindmerger.runtime import command, files, processes
from mindmerger.runtime.command import CommandParser
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.processes import is_main, log, on_all_ranks, rank, world_size
from mindmerger.training.record import peak_memory_gb

ROOT = Path(__file__).resolve().parent.parent.parent

PARTS = "mapping,augmentation,augmentation_memory,soft,hard"
# Llama-2's size: the output head's share of the arithmetic depends on it.
VOCABULARY = 32_000
PRESETS = {
    "tiny": {  # where only the data path is measured
        "encoder": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2},
        "llm": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    },
    # Large enough for matrix products to take most of the time, small enough for two cores.
    "cpu-small": {
        "encoder": {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
        "llm": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    },
    "7b": {  # mT5-xl's encoder and Llama-2-7B
        "encoder": {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
        "llm": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    },
}


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
    add("--modes", default="rows,tokens,plain", help="rows, tokens: ours by micro-batch and by token budget; plain")
    add("--global_batch", type=int, default=128, help="examples of one optimizer step")
    add("--micro_batch", type=int, default=8, help="rows of a micro-batch in both modes")
    add("--micro_batch_tokens", type=int, help="ours also by this token budget (default: 2048 mapping, 4096 else)")
    # Medians over several: other work on a machine slows single windows, not all of them.
    add("--windows", type=int, default=5, help="timed windows of each mode")
    add("--steps", type=int, default=1, help="optimizer steps of ours in a window")
    add("--plain_micro_batches", type=int, default=8, help="micro-batches of plain in a window")
    add("--questions", type=int, default=480, help="questions to generate answers for, over three languages")
    # Measured on two cores: with 32768 the inputs' activations outgrow the caches, 8192 gains nothing.
    add("--eval_max_tokens", type=int, default=16384, help="token budget of a batch of ours in generation")
    add("--max_new_tokens", type=int, default=64, help="length limit of generation")
    add("--gradient_checkpointing", action="store_true", help="in both modes")
    add("--models", help="folder that keeps the preset's tokenizers and configs for a next run (default: a new one)")
    add("--output", help="JSON file for the figures")
    add("--local_rank", type=int, help="set by the launcher")
    return parser


def parse(argv=None):
    """Reads the command line; `parts` are then the ones to time, `bridge` the bridges to time, MindMerger's first.

    Raises:
        UserError: for an unknown bridge.
    """
    args = build_parser().parse_args(argv)
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


# ---------------------------------------------------------------------------------------------------------------------
# Models and tokenizers


def train_tokenizers(folder: Path, data_root: str) -> None:
    """Trains one BPE vocabulary of the preset's size for each model on the data's own text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    # On the data's own text: random ids would have none of the real texts' lengths, on which padding depends.
    pairs = sorted(Path(data_root).glob("bilingual_pairs/*/train_100k.*"))
    queries = Path(data_root) / "query_translation" / "math.json"
    rows = json.loads(queries.read_text(encoding="utf-8"))
    english = [line for p in pairs if p.suffix == ".en" for line in p.read_text(encoding="utf-8").split("\n")]
    others = [line for p in pairs if p.suffix != ".en" for line in p.read_text(encoding="utf-8").split("\n")]
    sets = {
        "llm": (english + [row["response"] for row in rows], ["<unk>", "<s>", "</s>"], "<s> $A"),
        "encoder": (others + english + [row["query"] for row in rows], ["<pad>", "</s>", "<unk>"], "$A </s>"),
    }
    for name, (texts, specials, template) in sets.items():
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        # Bytes as pieces: no text is unknown, whatever the vocabulary lacks.
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=specials + alphabet, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        used = [(token, tokenizer.token_to_id(token)) for token in specials if token in template]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
        roles = {"<pad>": "pad_token", "<s>": "bos_token", "</s>": "eos_token", "<unk>": "unk_token"}
        wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{roles[token]: token for token in specials})
        wrapped.save_pretrained(folder / name)


def make_configs(folder: Path, preset: str) -> None:
    """Writes both models' configs beside their tokenizers."""
    from transformers import LlamaConfig, MT5Config

    shapes = PRESETS[preset]
    encoder = MT5Config(vocab_size=VOCABULARY, **shapes["encoder"], num_decoder_layers=shapes["encoder"]["num_layers"])
    encoder.save_pretrained(folder / "encoder")
    llm = LlamaConfig(
        vocab_size=VOCABULARY, **shapes["llm"], max_position_embeddings=4096, bos_token_id=1, eos_token_id=2
    )
    llm.save_pretrained(folder / "llm")


def make_model(folder: Path, precision: str, device):
    """Makes a MindMerger with random towers directly on the device in the run's dtype."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM, MT5EncoderModel

    from mindmerger.model.mindmerger import MindMerger

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    # Made in the run's dtype and place: a 7B model in fp32 on the host first would take 28 GB.
    torch.set_default_dtype(dtype)
    try:
        with device:
            encoder = MT5EncoderModel(AutoConfig.from_pretrained(folder / "encoder", trust_remote_code=False))
            llm = LlamaForCausalLM(AutoConfig.from_pretrained(folder / "llm", trust_remote_code=False))
    finally:
        torch.set_default_dtype(before)
    return MindMerger.from_towers(encoder, llm, str(folder / "encoder"), str(folder / "llm")).to(device)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def make_run(args, folder: Path, stage: str, model, device, token_budget: int | None, bridge: str = "mindmerger"):
    """Puts the project's own training run around the given model, ready to step."""
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
    engine = make_engine(model, settings.config, settings.args.lr)
    loader = BatchLoader(settings.args, data, settings.bridge.prefix_length, device)
    return Run(settings, engine, loader, total_steps=1, eval_steps=1, save_steps=1, signals=NoSignals())


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


def synchronise(device) -> None:
    """Waits for the GPU, where there is one."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def matmul_rate(precision: str, device) -> float:
    """Measures FLOP per second of a large square matmul, against a transposed matrix as linear layers run it."""
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # Large enough that the rate is the machine's, not that of starting kernels.
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(size, size, device=device).to(dtype), torch.randn(size, size, device=device).to(dtype)
    best = 0.0
    for _ in range(8):
        synchronise(device)
        started = time.perf_counter()
        a @ b.T
        synchronise(device)
        # The best, not the median: utilisation is a share of what the machine can do.
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def flop(model, window: dict, head_on_all: bool) -> float:
    """Returns the useful FLOP of a window, the output head's on all useful positions or on target tokens alone."""
    # Looking an embedding up is not arithmetic.
    llm = sum(p.numel() for name, p in model.llm.named_parameters() if "embed_tokens" not in name)
    head = model.llm.get_output_embeddings().weight.numel()
    encoder = sum(p.numel() for name, p in model.encoder.named_parameters() if "shared" not in name)
    mapping = sum(p.numel() for p in model.mapping.parameters())
    with_head = window["useful"] if head_on_all else window["targets"]
    # 4 N, not 6 N: no weight of the LLM gets a gradient.
    return 4 * ((llm - head) * window["useful"] + head * with_head) + (2 * encoder + 6 * mapping) * window["encoder"]


def figures(model, windows: list[dict], rate: float) -> dict:
    """Returns medians over windows."""
    per = {
        "samples_per_s": [w["samples"] / w["seconds"] for w in windows],
        "useful_tokens_per_s": [w["useful"] / w["seconds"] for w in windows],
        "real_position_share": [w["useful"] / w["processed"] for w in windows],
        "flop_utilisation": [flop(model, w, True) / w["seconds"] / rate for w in windows],
        "flop_utilisation_head_on_targets": [flop(model, w, False) / w["seconds"] / rate for w in windows],
        "data_wait_share": [w["waited"] / w["seconds"] for w in windows],
    }
    return {name: statistics.median(values) for name, values in per.items()}


def time_stage(args, folder: Path, stage: str, model, device, rate: float) -> dict:
    """Times ours at the micro-batch, ours by token budget, and plain, window by window in turn."""
    from mindmerger.tasks import find_task
    from mindmerger.tasks.examples import StageData

    budget = args.micro_batch_tokens or (2048 if stage == "mapping" else 4096)
    names = {"rows": f"ours, micro-batch {args.micro_batch}", "tokens": f"ours, {budget} tokens", "plain": "plain"}
    modes, first_step = {}, {}
    for mode in args.modes.split(","):
        started = time.perf_counter()
        run = make_run(args, folder, stage, model, device, budget if mode == "tokens" else None)
        if mode == "plain":
            examples = list(StageData(find_task("math"), stage, args.data_root, None, args.train_num).examples())
            modes[mode] = Plain(run, examples, args.plain_micro_batches, args.micro_batch)
        else:
            modes[mode] = Ours(run, args.steps)
        first_step[mode] = time.perf_counter() - started
    windows = {mode: [] for mode in modes}
    for number in range(args.windows + 1):
        for mode, runner in modes.items():
            window = runner.window()
            if number or not args.windows:
                windows[mode].append(window)
            if not number:
                first_step[mode] += window["seconds"]
            log(f"{stage} window {number} {names[mode]}: {window['useful'] / window['seconds']:.0f} useful tokens/s")
    result = {names[mode]: figures(model, found, rate) for mode, found in windows.items()}
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
    windows = {name: [] for name in runners}
    for number in range(args.windows + 1):
        for name, runner in runners.items():
            window = runner.window()
            if number or not args.windows:
                windows[name].append(window)
            log(f"{name} window {number}: {window['targets'] / window['seconds']:.0f} target tokens/s")
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
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
            found[mode] = json.loads(report.read_text(encoding="utf-8"))["peak_memory_gb"]
        log(f"{stage} memory {mode}: {found[mode]:.2f} GB")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Generation


def plain_generation(model, tokenizers, columns: dict, batch: list[int], new: int) -> list:
    """Answers by transformers' `generate` as it comes, with the cache it makes for itself."""
    from mindmerger.generation import answers as generation_answers

    inputs = generation_answers.batch_inputs(model, tokenizers, columns, batch)
    every = ("encoder_input_ids", "encoder_attention_mask", "prompt_ids", "prompt_mask")
    # Not `merged_embeddings`, which refuses a bridge whose LLM also attends to a memory: here it does.
    embeds, mask, memory = model._merged(*(inputs.get(name) for name in every))
    with memory:
        ids = model.llm.generate(
            inputs_embeds=embeds, attention_mask=mask.to(embeds.device), max_new_tokens=new, do_sample=False
        )
    return [generation_answers.to_generation(model, tokenizers, row) for row in ids.tolist()]


def time_generation(args, folder: Path, form: str, model, device) -> dict:
    """Measures questions per second of both modes on the same questions, and how many answers are the same."""
    import torch

    from mindmerger.data.tokenising import load_tokenizers
    from mindmerger.generation import answers as generation_answers
    from mindmerger.model.mapping_files import stage_of
    from mindmerger.tasks import find_task
    from mindmerger.tasks.examples import evaluation_examples
    from mindmerger.tasks.languages import find_language

    tokenizers = load_tokenizers(str(folder / "encoder"), str(folder / "llm"))
    task = find_task("math_mgsm")
    examples = [
        example
        for code in ("sw", "de", "zh")
        for example in evaluation_examples(task, args.data_root, find_language(code), args.questions // 3)
    ]
    kept = {"with_source": form != "llm_only", "with_prompt": form != "hard"}
    kept["encoder_text"] = stage_of(model.config).encoder_text
    columns = generation_answers.tokenise_inputs(tokenizers, examples, **kept, max_seq_len=512, max_gen_len=512)
    lengths = generation_answers.input_positions(columns, model.mapping)
    every, new = list(range(len(examples))), args.max_new_tokens
    batches = {
        "ours": generation_answers.split_batches(every, lengths, None, args.eval_max_tokens, new),
        # In file order, as the published code evaluates.
        "plain": [every[i : i + 8] for i in range(0, len(every), 8)],
    }
    generate = {"ours": generation_answers.generate_batch, "plain": plain_generation}
    found, answers, tokens = {mode: [] for mode in batches}, {}, {}
    for number in range(args.windows + 1):
        for mode in batches:
            torch.distributed.barrier()
            synchronise(device)
            started, mine = time.perf_counter(), {}
            with torch.no_grad():
                for batch in batches[mode][rank() :: world_size()]:
                    mine |= zip(batch, generate[mode](model, tokenizers, columns, batch, new), strict=True)
            synchronise(device)
            torch.distributed.barrier()
            seconds, shares = time.perf_counter() - started, [None] * world_size()
            torch.distributed.all_gather_object(shares, mine)
            outputs = {i: generation for share in shares for i, generation in share.items()}
            answers[mode] = [outputs[i].output for i in every]
            tokens[mode] = sum(generation.generated_tokens for generation in outputs.values())
            where = f"generation, {model.config.bridge}, {form}, window {number} {mode}"
            log(f"{where}: {len(examples) / seconds:.2f} questions/s")
            if number or not args.windows:
                found[mode].append(seconds)
    result = {"mean_input": statistics.mean(lengths)}
    for mode, seconds in found.items():
        median = statistics.median(seconds)
        result[mode] = {"questions_per_s": len(examples) / median, "generated_tokens_per_s": tokens[mode] / median}
    # In bf16 a random model's best tokens lie so close that another batch shape tips them; in fp32 all answers agree.
    result["same_answers"] = sum(map(str.__eq__, answers["ours"], answers["plain"])) / len(every)
    result["times_plain"] = result["ours"]["questions_per_s"] / result["plain"]["questions_per_s"]
    return result


def time_bridges_generation(args, folder: Path, model, device) -> dict:
    """Times generation with each bridge in the form that its last stage trains; the towers are the same for all."""
    from mindmerger.model.mapping_files import form_of
    from mindmerger.model.mindmerger import MindMerger

    result, paths = {}, (str(folder / "encoder"), str(folder / "llm"))
    for name in args.bridge:
        one = MindMerger.from_towers(model.encoder, model.llm, *paths, name).to(device)
        form = form_of(one.config, None)
        result[name] = {"form": form, **time_generation(args, folder, form, one, device)}
    return result


# ---------------------------------------------------------------------------------------------------------------------


def markdown(report: dict) -> str:
    """Formats the figures as tables."""
    lines = [
        f"preset {report['preset']}, {report['precision']}, {report['processes']} process(es), matmul "
        f"{report['matmul_gflops']:.0f} GFLOP/s each",
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


def build_world(folder: Path, preset: str, data_root: str) -> None:
    """Makes tokenizers and configs of the preset, unless the folder has them."""
    if is_main() and not (folder / "llm" / "config.json").is_file():
        train_tokenizers(folder, data_root)
        make_configs(folder, preset)


def run(args, folder: Path, device) -> dict:
    """Returns the figures of all parts."""
    import torch

    on_all_ranks(build_world, folder, args.preset, args.data_root)
    report = {
        "preset": args.preset,
        "precision": args.precision,
        "processes": world_size(),
        "versions": command.versions(),
        "flags": vars(args),
    }
    model = make_model(folder, args.precision, device)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
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
            report[part] = peak_memory(args, part.removesuffix("_memory"))
        else:
            report[part] = time_stage(args, folder, part, model, device, rate * world_size())
    report["peak_memory_gb"] = peak_memory_gb(device)
    if device.type == "cuda":
        report["device"] = torch.cuda.get_device_name(device)
    return report


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
    if is_main():
        print(markdown(report))
        if args.output:
            files.write_json_atomic(args.output, report)
    return 0


if __name__ == "__main__":
    command.run_main(main)
