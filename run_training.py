"""Trains MindMerger's mapping: both stages share this command line and this one loop.

    deepspeed run_training.py --deepspeed --llm_path meta-math/MetaMath-7B-V1.0 --mt_path google/mt5-xl --task math \\
        --stage_name mapping --train_num 100000 --train_batch_size 128 --train_micro_batch_size_per_gpu 8

Reads top to bottom: flags, what can be checked before models load, the run's parts, the loop, its outputs.
"""

import contextlib
import json
import math
import os
import signal
import tempfile
import time

from mindmerger.runtime.command import run_main
from mindmerger.runtime.errors import ReportedError
from mindmerger.runtime.processes import (
    agree_on,
    broadcast_object,
    first_on_each_node,
    init_distributed,
    is_main,
    log,
    on_all_ranks,
    progress_bar,
    warn,
    world_size,
)
from mindmerger.runtime.signals import end_with_parent, watch_launcher
from mindmerger.training.checkpoints import remove_leftovers
from mindmerger.training.dry_run import print_estimate
from mindmerger.training.guards import (
    EVAL_MEMORY_FLAGS,
    UPDATE_MEMORY_FLAGS,
    not_finite_error,
    out_of_memory_named,
    probe_memory,
)
from mindmerger.training.outputs import (
    clear_outputs,
    find_checkpoint_to_resume,
    save_checkpoint,
    save_mapping,
    write_settings,
)
from mindmerger.training.record import Recorder, draw_loss, peak_memory_gb, perplexity
from mindmerger.training.settings import FAULTS_FILE, Settings, check_lengths, check_tokens, parse, settle
from mindmerger.training.trainer import EpochCut, Trainer, build_trainer

# What a stage trains on, by the names that tokenised data of earlier versions is found under.
DATA_OF_STAGE = {"pairs": "mapping", "task": "augmentation", "english_task": "augmentation"}
EVAL_BATCHES_PER_CHECK = 16  # how often an evaluation looks whether the run was asked to stop
STEPS_PER_RELEASE = 4  # how often pages of the data set are given back: a step may touch 10 MB of them


def load_data(args, settings: Settings, cache_dir=None):
    """Tokenised training set, tokenizers and the dev/train split; tokenising happens once on each node."""
    from mindmerger.data.batches import automatic_dev_size, split_dev
    from mindmerger.data.tokenising import load_tokenizers
    from mindmerger.data.training_set import open_or_build
    from mindmerger.tasks.examples import StageData
    from mindmerger.tasks.readers import describe_faults

    tokenizers = on_all_ranks(load_tokenizers, args.mt_path, args.llm_path)
    stage = StageData(
        settings.task,
        DATA_OF_STAGE[settings.stage.data],
        args.data_root,
        settings.languages,
        args.train_num,
        settings.stage.encoder_text,
        args.skip_faulty_rows,
    )
    data = first_on_each_node(
        open_or_build,
        stage,
        tokenizers,
        max_seq_len=args.max_seq_len,
        max_gen_len=args.max_gen_len,
        with_prompt=settings.with_prompt,
        cache_dir=cache_dir,
    )
    number = len(data.dataset)
    if data.faults:
        where = "" if args.dry_run else f", all of them listed in {settings.output_dir / FAULTS_FILE}"
        warn(describe_faults(data.faults, where))
    if args.dev_size == "auto":  # the number is what a checkpoint knows
        args.dev_size = automatic_dev_size(number)
        log(f"--dev_size auto: {args.dev_size} of {number} examples")
        if args.dev_size == 0:
            warn(
                f"--dev_size auto takes a tenth, none of {number} examples: nothing is evaluated and the last mapping "
                "counts as the best; give a number for a dev split"
            )
    dev, train = on_all_ranks(split_dev, number, args.dev_size, args.seed)
    if len(dev) > len(train):
        warn(f"--dev_size {len(dev)} takes {len(dev) / number:.0%} of the examples: --dev_size auto takes a tenth")
    log(f"data: {len(train)} training and {len(dev)} dev examples; " + json.dumps(data.counts, ensure_ascii=False))
    return tokenizers, data, (dev, train)


def train(trainer: Trainer, record) -> int:
    """Runs from where the trainer stands to the last step, with evaluations and checkpoints where they are due.

    Returns:
        0, or the exit code of the signal that ended it; a checkpoint of that moment is then written.

    Raises:
        UserError: as `train_step` and `evaluate_and_save` do, and when the disk refuses what is written.
    """
    bar = progress_bar(total=trainer.total_steps, initial=trainer.step, desc=trainer.args.stage_name, unit="step")
    with bar:  # closed after an error too, whose line would else begin behind it
        return train_steps(trainer, record, bar)


def train_steps(trainer: Trainer, record, bar) -> int:
    """The loop of `train`, which also says what it returns; `bar` shows how far it is."""
    code = 0
    if trainer.evaluation_due:  # the run was stopped between a step and its evaluation
        code = evaluate_and_save(trainer, record)
    while trainer.step < trainer.total_steps and not code:
        epoch, first = trainer.epoch, trainer.batch
        batches = iter(trainer.loader(EpochCut(trainer, epoch, first)))
        for micro_batches, target_tokens, indices in trainer.epoch_steps(epoch, first):
            line, code = train_step(trainer, batches, micro_batches, target_tokens, indices)
            record(line, epoch)
            trainer.step += 1
            trainer.epoch, trainer.batch = divmod(
                epoch * trainer.steps_per_epoch + trainer.batch + 1, trainer.steps_per_epoch
            )
            bar.update()
            if trainer.step % STEPS_PER_RELEASE == 0:
                trainer.data.release_pages()
            end = trainer.step == trainer.total_steps
            due = len(trainer.dev) and (trainer.step % trainer.eval_steps == 0 or trainer.batch == 0 or end)
            if due:
                trainer.evaluation_due = True
                code = code or evaluate_and_save(trainer, record)
            elif end:  # without a dev split the last mapping is the best known
                save_mapping(trainer, trainer.settings.output_dir)
                save_mapping(trainer, trainer.settings.output_dir / "last")
            if trainer.step % trainer.save_steps == 0 or end or code or trainer.signals.save_agreed:
                record.flush()
                save_checkpoint(trainer)
                trainer.signals.save_agreed = False
            if end or code:
                break
    return code


def train_step(trainer: Trainer, batches, micro_batches, target_tokens: int, indices) -> tuple[dict, int]:
    """One optimizer step: the loss is summed over all its target tokens and divided by their number, so that neither
    the cut into micro-batches nor the number of processes changes the gradient.

    Returns:
        the step's line of the log, and the exit code of a stop that any rank was asked for or 0.

    Raises:
        UserError: on every rank, before the update, when loss or gradient is not finite, or memory ran out.
    """
    import torch

    engine, started = trainer.engine, time.perf_counter()
    rate = trainer.learning_rate(trainer.step)
    for group in engine.basic_optimizer.param_groups:
        group["lr"] = rate
    losses, waited = [], 0.0
    for number, micro in enumerate(micro_batches, start=1):
        asked = time.perf_counter()
        collated = next(batches)
        waited += time.perf_counter() - asked
        batch = trainer.to_device(collated)
        engine.set_gradient_accumulation_boundary(number == len(micro_batches))
        with out_of_memory_named(batch):
            # DeepSpeed averages gradients over processes, hence the factor. Without rows, a rank passes with weight 0.
            loss = engine(**batch).loss_sum * (micro.weight * world_size() / target_tokens)
            engine.backward(loss, scale_wrt_gas=False)
        losses.append(loss.detach())
        trainer.signals.alive()
    step_loss = torch.stack(losses).sum() / world_size()
    with out_of_memory_named(batch, UPDATE_MEMORY_FLAGS, f"in the update of step {trainer.step + 1}, "):
        norm, loss, code = update(trainer, step_loss, losses, micro_batches)
    seconds = time.perf_counter() - started
    lengths = trainer.lengths
    processed = sum(len(m.indices) * int(lengths[m.indices].max()) for m in micro_batches)
    line = {
        "loss": loss,
        "lr": rate,
        "grad_norm": norm,
        "target_tokens": target_tokens,
        "samples_per_s": len(indices) / seconds,
        "tokens_per_s": int(lengths[indices].sum()) / seconds,
        "padding_share": 1 - sum(int(lengths[m.indices].sum() * m.weight) for m in micro_batches) / processed,
        "data_wait_share": waited / seconds,
        "peak_memory_gb": peak_memory_gb(trainer.device),
    }
    return line, code


def update(trainer: Trainer, step_loss, losses, micro_batches) -> tuple[float, float, int]:
    """Clips and applies the gradient.

    Returns:
        its norm before clipping, the global loss, and the exit code of a stop that any rank was asked for or 0.

    Raises:
        UserError: on every rank, before the update, when loss or gradient is not finite.
    """
    import torch

    from mindmerger.training.deepspeed_config import zero_stage

    engine = trainer.engine
    by_hand = zero_stage(trainer.settings.config) == 0
    norm = step_loss.new_zeros(())
    if by_hand:
        trained = list(engine.module.trained_parameters().values())
        norm = torch.nn.utils.clip_grad_norm_(trained, trainer.args.max_grad_norm)
    # The one synchronisation of the step. At ZeRO 0 all ranks have the same norm.
    code, sums = trainer.signals.agree(trainer.device, step_loss, norm / world_size())
    loss, norm = sums.tolist()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise not_finite_error(trainer, loss, norm, losses, micro_batches)
    engine.step()
    if not by_hand:
        norm = float(engine.get_global_grad_norm())
        if not engine.was_step_applied() or not math.isfinite(norm):
            raise not_finite_error(trainer, loss, norm, losses, micro_batches)
    return norm, loss, code


def dev_loss(trainer: Trainer) -> tuple[float, int]:
    """Mean cross-entropy over the dev split's target tokens, its examples shared among the ranks.

    Returns:
        the loss and 0, or nan and the exit code of a signal that cut it short.
    """
    import torch

    micro_batches, target_tokens = trainer.cut(trainer.dev, trainer.args.eval_batch_size)
    total = torch.zeros((), dtype=torch.float64, device=trainer.device)
    nothing = torch.zeros((), device=trainer.device)
    with torch.no_grad():
        batches = trainer.loader([m.indices for m in micro_batches])
        for number, (micro, batch) in enumerate(zip(micro_batches, batches, strict=True)):
            with out_of_memory_named(batch, EVAL_MEMORY_FLAGS):
                total += trainer.engine(**trainer.to_device(batch)).loss_sum.double() * micro.weight
            trainer.signals.alive()
            if number % EVAL_BATCHES_PER_CHECK == 0 and (code := trainer.signals.agree(trainer.device, nothing)[0]):
                return math.nan, code
    code, (total,) = trainer.signals.agree(trainer.device, total)
    return total.item() / target_tokens, code


def evaluate_and_save(trainer: Trainer, record) -> int:
    """Evaluates on the dev split; keeps the mapping as the last one and, when it is, as the best.

    Returns:
        0, or the exit code of a signal; the evaluation is then due again unless it was complete.

    Raises:
        UserError: on every rank, when the dev loss is not finite.
    """
    loss, code = dev_loss(trainer)
    if math.isnan(loss) and code:
        return code
    if not math.isfinite(loss):  # all ranks have the same
        raise ReportedError(
            f"dev loss {loss} at step {trainer.step} is not finite: stopped, earlier checkpoints and the best mapping "
            "so far are kept; lower --lr, or use --precision fp32"
        )
    trainer.evaluation_due = False
    record.evaluation(trainer.step, loss)
    best = loss < trainer.best_dev_loss
    if best:
        trainer.best_dev_loss = loss
        save_mapping(trainer, trainer.settings.output_dir)
    save_mapping(trainer, trainer.settings.output_dir / "last")
    log(
        f"step {trainer.step}: dev loss {loss:.4f}, perplexity {perplexity(loss):.3f}{' (best so far)' if best else ''}"
    )
    return code


def prepare(args):
    """Checks and settles everything that needs no model: the settings, the data, the checkpoint to continue from."""
    settings = on_all_ranks(settle, args)
    settings.init_file, settings.init_hash = broadcast_object((settings.init_file, settings.init_hash))
    cache_dir = None
    with contextlib.ExitStack() as stack:
        if args.dry_run:
            cache_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="mindmerger-dry-run-"))
        tokenizers, data, split = load_data(args, settings, cache_dir)
        llm, encoder = settings.models
        agree_on({"data": data.fingerprint, "LLM (--llm_path)": llm, "encoder (--mt_path)": encoder})
        on_all_ranks(check_lengths, settings, data)
        on_all_ranks(check_tokens, settings, tokenizers, data)
        if args.dry_run:
            on_all_ranks(print_estimate, args, settings, data, split)
            return None
    return settings, tokenizers, data, split


def run(args, device, settings: Settings, tokenizers, data, split) -> int:
    """Trains the stage in its locked output folder; returns the exit code."""
    from mindmerger.runtime.files import FolderLock
    from mindmerger.runtime.signals import Signals

    with contextlib.ExitStack() as stack:
        lock = on_all_ranks(lambda: FolderLock(settings.output_dir) if is_main() else None)
        if lock is not None:
            stack.callback(lock.release)
            remove_leftovers(settings.output_dir)
        if args.overwrite_output_dir:
            on_all_ranks(clear_outputs, settings.output_dir)
        checkpoint = broadcast_object(on_all_ranks(find_checkpoint_to_resume, args, settings, data))
        trainer = build_trainer(args, settings, device, tokenizers, data, split, checkpoint)
        record = Recorder(args, settings.output_dir)
        stack.push(lambda kind, *_: record.close(failed=kind is not None))
        on_all_ranks(write_settings, args, settings, data)
        on_all_ranks(record.rewind, trainer.step, trainer.evaluation_due)
        trainer.engine.train()
        on_all_ranks(probe_memory, trainer)
        trainer.signals = Signals()
        code = train(trainer, record)
        with trainer.signals.saving():
            on_all_ranks(record.flush)
            if is_main():
                draw_loss(record.path, settings.output_dir / "loss.png")
        # Not after an error: a launcher's SIGTERM must not end this rank before it has said what happened.
        trainer.signals.close()
    end = "ended by a signal" if code else "finished"
    log(f"{end} at step {trainer.step} of {trainer.total_steps}: {settings.output_dir}")
    return code


def main(argv: list[str] | None = None) -> int:
    """Parses the flags, trains one stage, writes its outputs; returns the exit code."""
    watch_launcher()
    args = parse(argv)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # asks for a checkpoint; before the first step there is none to write
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = init_distributed(force=True)
    import torch

    from mindmerger.training.deepspeed_engine import import_deepspeed_quietly

    torch.use_deterministic_algorithms(args.deterministic)
    import_deepspeed_quietly()
    prepared = prepare(args)
    return run(args, device, *prepared) if prepared is not None else 0


if __name__ == "__main__":
    run_main(main)
elif __name__ == "__mp_main__":  # in a process that tokenises, which starts by importing this file
    end_with_parent()
