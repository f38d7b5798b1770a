"""Tuning of an LLM by transformers' Trainer: the loss, the steps, the dev rows, checkpoints and the folder at the end.

Trainer brings loop, optimizer, schedule and resuming. Ours are the rows: a step's batch is split into micro-batches
of similar length, and the loss is the mean over the target tokens of the whole step, so that the split changes no
gradient.

Dimension letters: M target tokens of the whole batch, V vocabulary.
"""

import json
import os
import shutil
import sys
import time
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from mindmerger.data.batches import collate, epoch_batches, split_global_batch
from mindmerger.hub.model_configs import llm_config
from mindmerger.hub.model_files import find_file
from mindmerger.hub.tokenizer_files import TOKENIZER_FILES
from mindmerger.model.adapters import adapted_layers, add_adapter
from mindmerger.model.loss import token_losses
from mindmerger.model.mindmerger import MindMerger
from mindmerger.model.towers import load_llm
from mindmerger.runtime.command import versions
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.files import remove, sync_folder, write_json_atomic, write_text_atomic
from mindmerger.runtime.processes import explain_out_of_memory, log, progress_bar
from mindmerger.training.tuning_settings import RECORD, TuningSettings, describe, refuse_other_run

TRAINED = "trained.safetensors"  # of a checkpoint, in the place of Trainer's model folder
WHOLE = "whole.json"  # of a checkpoint, written last: the sizes of its other files
KEPT_CHECKPOINTS = 2
LOGGING_STEPS = 10
MEMORY_ADVICE = "lower --micro_batch_tokens, or train less with --lora"
# Of the LLM's folder, as they are: the tuned one speaks the same tokens.
COPIED_FILES = (*TOKENIZER_FILES, "generation_config.json", "chat_template.json", "chat_template.jinja")


def tune(settings: TuningSettings) -> None:
    """Tunes the LLM and writes its folder, from the newest whole checkpoint on where there is one.

    Raises:
        UserError: out of memory, for a disk that refuses, and a loss that is not a number.
    """
    checkpoint = find_checkpoint(settings)
    describe(settings)
    with explain_out_of_memory("while tuning", {}, MEMORY_ADVICE):
        model = load_model(settings)
        tuner = Tuner(model, settings, fresh=checkpoint is None)
        try:
            tuner.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        except OSError as error:
            raise UserError(f"cannot write to {settings.work}: {error.strerror or error}") from error
        finally:
            tuner.bar.close()
    history = [entry for entry in tuner.state.log_history if "loss" in entry or "dev_loss" in entry]
    write_folder(settings, model.llm, history)


def load_model(settings: TuningSettings) -> MindMerger:
    """Returns the LLM in fp32, as the `MindMerger` without an encoder that an evaluation of the LLM alone runs.

    All its weights are trained, or a new LoRA. Whatever dropout the LLM was pretrained with stays off.
    """
    torch.manual_seed(settings.args.seed)  # a LoRA starts from random numbers
    path = settings.args.llm_path
    model = MindMerger.from_towers(None, load_llm(path, torch.float32), None, path)
    if settings.adapter is not None:
        add_adapter(model, settings.adapter)
    else:
        model.llm.requires_grad_(True)
    return model


def trained_tensors(model: MindMerger) -> dict[str, torch.nn.Parameter]:
    """Returns what is trained by name; of tied weights the first name alone."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class Steps(torch.utils.data.Dataset):
    """The batches of all optimizer steps in order, a function of the seed: each a list of micro-batches."""

    def __init__(self, settings: TuningSettings):
        args = settings.args
        epochs = (epoch_batches(settings.train, args.train_batch_size, args.seed, i) for i in range(args.epoch_num))
        self.settings = settings
        self.batches = [batch for epoch in epochs for batch in epoch][: settings.steps]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> list[dict]:
        return list(micro_batches(self.settings, self.batches[step]))


def micro_batches(settings: TuningSettings, rows):
    """Yields rows as arguments of `MindMerger.forward`, in micro-batches of similar length."""
    tokenizers, columns = settings.tokenizers, settings.columns
    [parts] = split_global_batch(rows, settings.lengths, 1, 1, settings.args.micro_batch_tokens)
    for part in parts:
        chosen = [{name: columns[name][i] for name in ("prompt_ids", "target_ids")} for i in part.indices]
        yield collate(chosen, tokenizers.encoder_pad_id, tokenizers.llm_pad_id).tensors


class Tuner(Trainer):
    """transformers' Trainer with this project's rows, loss, dev scores and checkpoints.

    To Trainer a step is one batch without accumulation: it never sees the micro-batches inside.
    """

    def __init__(self, model: MindMerger, settings: TuningSettings, fresh: bool):
        self.settings = settings
        self.positions, self.padded, self.since = 0, 0, time.perf_counter()
        self.bar = progress_bar(total=settings.steps, desc="tuning", unit="step")
        super().__init__(
            model=model,
            args=training_arguments(settings, fresh),
            data_collator=lambda steps: steps[0],
            train_dataset=Steps(settings),
            eval_dataset=settings.dev.tolist(),
            callbacks=[KeepCheckpoints(settings.work), ShowProgress(self)],
        )
        self.remove_callback(PrinterCallback)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Runs the micro-batches of one step forward and backward; returns the mean loss of its target tokens."""
        tokens = sum(int(micro["target_mask"].sum()) for micro in inputs)
        loss = torch.zeros((), device=self.args.device)
        for micro in inputs:
            loss += super().training_step(model, micro, tokens)
            self._count_positions(micro)
        # Before the optimizer: the weights of the last checkpoint, and those in memory, are still good.
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss of step {self.state.global_step + 1} is not a number: lower --lr and start over with "
                "--overwrite_output_dir, or check the LLM's weights"
            )
        return loss

    def _count_positions(self, micro: dict) -> None:
        lengths = int(self.model.bos_token_id is not None) + micro["prompt_mask"].sum(1) + micro["target_mask"].sum(1)
        self.positions += int(lengths.sum())
        self.padded += len(lengths) * int(lengths.max())

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Returns a micro-batch's share of the step's mean loss."""
        output = model(**inputs)
        loss = output.loss_sum / num_items_in_batch
        return (loss, output) if return_outputs else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Scores the dev rows and logs the scores: loss and perplexity of a target token, and for a task with labels
        the share of rows whose greedy answer is the target, token by token."""
        scores = [
            score
            for micro in micro_batches(self.settings, self.settings.dev)
            for score in score_targets(self.model, {name: one.to(self.args.device) for name, one in micro.items()})
        ]
        loss = sum(score[0] for score in scores) / sum(score[1] for score in scores)
        found = {"dev_loss": loss, "dev_perplexity": float(torch.exp(torch.tensor(loss)))}
        if self.settings.task.labels is not None:  # of a worked solution other words may be right too
            found["dev_accuracy"] = sum(score[2] for score in scores) / len(scores)
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the speed since the last such line to the line of a step's loss."""
        if "loss" in logs and self.positions:
            now = time.perf_counter()
            logs["positions_per_second"] = round(self.positions / (now - self.since), 1)
            logs["padding"] = round(1 - self.positions / self.padded, 4)
            self.positions, self.padded, self.since = 0, 0, now
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes what is trained in fp32, for a checkpoint alone: the model folder is written at the end."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: one.detach().cpu().contiguous() for name, one in trained_tensors(self.model).items()}
        save_file(tensors, folder / TRAINED, metadata={"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        own, saved = trained_tensors(self.model), load_file(Path(resume_from_checkpoint) / TRAINED)
        if own.keys() != saved.keys():
            raise UserError(f"{resume_from_checkpoint} is of another model: start over with --overwrite_output_dir")
        with torch.no_grad():
            for name, tensor in saved.items():
                own[name].copy_(tensor)

    def floating_point_ops(self, inputs) -> int:
        """Returns 0: Trainer's estimate knows no micro-batches, and nobody reads it."""
        return 0


def training_arguments(settings: TuningSettings, fresh: bool) -> TrainingArguments:
    """Returns Trainer's settings."""
    args, on_gpu = settings.args, torch.cuda.is_available()
    logging.set_verbosity_error()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # accelerate imports DeepSpeed, which would warn of it
    arguments = TrainingArguments(
        output_dir=str(settings.work),
        per_device_train_batch_size=1,
        max_steps=settings.steps,
        train_sampling_strategy="sequential",  # `Steps` has shuffled
        learning_rate=args.lr,
        lr_scheduler_type=args.lr_scheduler,
        warmup_steps=int(args.warmup_ratio * settings.steps),
        weight_decay=0.0,
        max_grad_norm=args.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=settings.precision == "bf16",
        use_cpu=not on_gpu,
        seed=args.seed,
        eval_strategy="steps" if len(settings.dev) else "no",
        eval_steps=args.eval_steps,
        eval_on_start=fresh and len(settings.dev) > 0,
        save_strategy="steps",
        save_steps=args.save_steps,
        logging_steps=LOGGING_STEPS,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would put the average in the place of a loss that is not a number
        log_level="error",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    _ = arguments.device
    # Trainer would split rows over all visible GPUs by DataParallel, which copies the model in every step.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


@torch.no_grad()
def score_targets(model: MindMerger, inputs: dict) -> list[tuple[float, int, bool]]:
    """Returns for each row the summed loss of its target, its target tokens, and whether every one of them is the
    likeliest: then greedy decoding gives exactly the target."""
    outputs = []
    model.eval()
    handle = model.llm.register_forward_hook(lambda module, given, output: outputs.append(output.logits[0]))
    try:
        model(**inputs)
    finally:
        handle.remove()
    [logits_MV], mask_BT = outputs, inputs["target_mask"].bool()
    labels_M = inputs["target_ids"][mask_BT]
    losses_M, right_M = token_losses(logits_MV, labels_M), logits_MV.argmax(1) == labels_M
    sizes = mask_BT.sum(1).tolist()
    rows = zip(losses_M.split(sizes), right_M.split(sizes), sizes, strict=True)
    return [(loss.double().sum().item(), size, bool(right.all())) for loss, right, size in rows]


class ShowProgress(TrainerCallback):
    """Callback that moves the bar and prints a line for each evaluation."""

    def __init__(self, tuner: Tuner):
        self.tuner = tuner

    def on_step_end(self, args, state, control, **others):
        """Moves the bar to the step."""
        self.tuner.bar.update(state.global_step - self.tuner.bar.n)

    def on_log(self, args, state, control, logs=None, **others):
        """Shows loss and speed on the bar, and the dev scores in a line."""
        if "loss" in logs:
            speed = {name: logs[name] for name in ("positions_per_second", "padding") if name in logs}
            self.tuner.bar.set_postfix(loss=f"{logs['loss']:.4f}", **speed)
        elif "dev_loss" in logs:
            accuracy = f", accuracy {logs['dev_accuracy']:.1%}" if "dev_accuracy" in logs else ""
            log(
                f"step {state.global_step} of {state.max_steps}: dev loss {logs['dev_loss']:.4f}, perplexity "
                f"{logs['dev_perplexity']:.3f}{accuracy}"
            )


class KeepCheckpoints(TrainerCallback):
    """Callback that marks a checkpoint as whole and removes older ones.

    Trainer writes a checkpoint's files one after another under its final name: a killed one looks like any other.
    """

    def __init__(self, work: Path):
        self.work = work

    def on_save(self, args, state, control, **others):
        """Flushes the new checkpoint to disk, marks it, and only then removes those beyond the newest."""
        folder = self.work / f"checkpoint-{state.global_step}"
        sizes = flush(folder)
        write_json_atomic(folder / WHOLE, sizes)
        sync_folder(folder)
        for old in checkpoints(self.work)[KEPT_CHECKPOINTS:]:
            remove(old)


def flush(folder: Path) -> dict[str, int]:
    """Flushes a folder's files to disk; returns their sizes in bytes."""
    sizes = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        sizes[path.name] = path.stat().st_size
    sync_folder(folder)
    return sizes


def checkpoints(work: Path) -> list[Path]:
    """Returns the folders of checkpoints, newest first."""
    found = [path for path in work.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-")))


def is_whole(folder: Path) -> bool:
    """Tells whether a checkpoint was written to its end and has kept its size."""
    try:
        sizes = json.loads((folder / WHOLE).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (FileNotFoundError, json.JSONDecodeError):
        return False


def find_checkpoint(settings: TuningSettings) -> Path | None:
    """Returns the newest whole checkpoint of this very command, None where there is none; half-written ones go.

    Raises:
        UserError: where the unfinished run is another one's.
    """
    work, identity = settings.work, settings.work / "settings.json"
    if settings.args.overwrite_output_dir:
        for entry in [one for one in work.iterdir() if one.name != ".lock"]:
            remove(entry)
    if identity.is_file():
        refuse_other_run(settings, json.loads(identity.read_text(encoding="utf-8")), work)
    else:
        write_json_atomic(identity, settings.identity)
    for folder in checkpoints(work):
        if is_whole(folder):
            log(f"resumes from {folder}")
            return folder
        log(f"{folder} was cut short while it was written, it is removed")
        remove(folder)
    return None


def is_finished(settings: TuningSettings) -> bool:
    """Tells whether the output folder holds this very tuning.

    Raises:
        UserError: where it holds another one.
    """
    record = settings.output / RECORD
    if settings.args.overwrite_output_dir or not record.is_file():
        return False
    refuse_other_run(settings, json.loads(record.read_text(encoding="utf-8"))["identity"], settings.output)
    log(f"{settings.output} is tuned already by this command, nothing is done; --overwrite_output_dir starts over")
    return True


def write_folder(settings: TuningSettings, llm: torch.nn.Module, history: list[dict]) -> None:
    """Writes the model folder beside the output and gives it the output's name when it is whole.

    Raises:
        UserError: when the disk refuses; the checkpoints stay.
    """
    folder, output = settings.work / "model", settings.output
    try:
        remove(folder)
        merge_lora(llm)
        llm.to(stored_dtype(settings)).save_pretrained(folder)
        for path in folder.glob("*.safetensors"):
            shutil.copymode(folder / "config.json", path)  # safetensors makes files that their owner alone may read
        copy_settings(settings.args.llm_path, folder)
        lines = "".join(json.dumps(entry) + "\n" for entry in history)
        write_text_atomic(folder / "log.jsonl", lines)
        write_json_atomic(folder / RECORD, record_of(settings, history))
        flush(folder)
        if output.is_dir():
            # A folder that holds something cannot be renamed over. A kill right here leaves both under `work`.
            remove(settings.work / "replaced")
            os.replace(output, settings.work / "replaced")
        os.replace(folder, output)
        sync_folder(output.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {output}: {error.strerror or error}; the same command tries again from the last checkpoint"
        ) from error
    remove(settings.work)
    log(f"wrote {output}; evaluate it with: python run_evaluation.py --llm_only --llm_path {output}")


def merge_lora(llm: torch.nn.Module) -> None:
    """Adds a LoRA to the weights that it changes, in fp32, and takes it out; does nothing without one."""
    if not hasattr(llm, "peft_config"):
        return
    for name, layer in adapted_layers(llm).items():
        layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(llm.get_submodule(parent), child, layer.get_base_layer())
    del llm.peft_config


def stored_dtype(settings: TuningSettings) -> torch.dtype:
    """Returns the dtype to write the weights in."""
    fixed = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(settings.args.save_dtype)
    found = fixed or llm_config(settings.args.llm_path)[0].dtype or torch.float32
    return found if isinstance(found, torch.dtype) else getattr(torch, found)


def copy_settings(llm_path: str, folder: Path) -> None:
    """Copies tokenizer, generation config and licence texts of the LLM as they are."""
    files = [file for name in COPIED_FILES if (file := find_file(llm_path, name)) is not None]
    for pattern in ("LICENSE*", "NOTICE*", "USE_POLICY*"):
        files += [file for file in Path(llm_path).glob(pattern) if file.is_file()]
    for file in files:
        shutil.copyfile(file, folder / file.name)


def record_of(settings: TuningSettings, history: list[dict]) -> dict:
    """Returns what `tune.json` says of the folder: the command, data, settings, dev scores and versions."""
    cuda = torch.cuda.is_available()
    return {
        "command": sys.argv,
        "arguments": vars(settings.args),
        "identity": settings.identity,
        "data": settings.data,
        "positions_per_row": round(float(settings.lengths.mean()), 1),
        "dev": [entry for entry in history if "dev_loss" in entry],
        "device": torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads",
        "versions": versions() | {"accelerate": metadata.version("accelerate")},
    }
