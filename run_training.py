"""Trains what stands between the two frozen models: all stages share this command line and this one loop.

    deepspeed run_training.py --deepspeed --llm_path meta-math/MetaMath-7B-V1.0 --mt_path google/mt5-xl --task math \\
        --stage_name mapping --train_num 100000 --train_batch_size 128 --train_micro_batch_size_per_gpu 8

Read it from the end: `main` is the order of a run, `train` its loop, `train_step` one optimizer step.
"""

import itertools
import json
import math
import os
import signal
import tempfile
import time
from typing import TYPE_CHECKING

from mindmerger.runtime.command import collect_as_usual, run_main
from mindmerger.runtime.errors import ReportedError
from mindmerger.runtime.processes import (
    agree_on,
    broadcast_object,
    first_on_each_node,
    init_distributed,
    is_main,
    log,
    on_all_ranks,
    on_rank_0,
    progress_bar,
    rank,
    warn,
    world_size,
)
from mindmerger.runtime.signals import Signals, end_with_parent, watch_launcher
from mindmerger.training.deepspeed_config import zero_stage
from mindmerger.training.dev_accuracy import check_selection, dev_accuracy, has_accuracy, is_best, read_labels
from mindmerger.training.dev_split import GROUPS, describe_dev_split, settle_dev_split
from mindmerger.training.dry_run import print_estimate
from mindmerger.training.encoder_cache import cached_states
from mindmerger.training.guards import (
    EVAL_MEMORY_FLAGS,
    UPDATE_MEMORY_FLAGS,
    explain_step_out_of_memory,
    not_finite_error,
    probe_memory,
)
from mindmerger.training.outputs import (
    find_checkpoint_to_resume,
    locked,
    save_checkpoint,
    save_mapping,
    write_settings,
)
from mindmerger.training.packing import check_rows_apart
from mindmerger.training.record import draw_loss, peak_memory_gb, perplexity, recording
from mindmerger.training.settings import (
    FAULTS_FILE,
    Settings,
    check_lengths,
    check_tokens,
    parse,
    settle,
    settle_precision,
)
from mindmerger.training.sharing import share_mapping
from mindmerger.training.time_limit import TimeLimit
from mindmerger.training.trainer import Progress, Run, build, set_learning_rate

if TYPE_CHECKING:  # numpy and torch are imported where they are used: --help answers at once
    from mindmerger.data.loader import GlobalBatch, TrainingData

# What a stage trains on, by the names that tokenised data of earlier versions is found under.
DATA_OF_STAGE = {
    "pairs": "mapping",
    "question_pairs": "question",
    "task": "augmentation",
    "english_task": "augmentation",
}
STEPS_PER_RELEASE = 4  # how often pages of the data set are given back: a step may touch 10 MB of them


def load_data(settings: Settings, cache_dir=None) -> "TrainingData":
    """Tokenises the stage's examples, once on each node, and splits them."""
    from mindmerger.data.batches import automatic_dev_size, split_dev
    from mindmerger.data.loader import TrainingData
    from mindmerger.data.tokenising import load_tokenizers
    from mindmerger.data.training_set import open_or_build
    from mindmerger.tasks.examples import StageData
    from mindmerger.tasks.readers import describe_faults

    args = settings.args
    tokenizers = on_all_ranks(load_tokenizers, args.mt_path, args.llm_path, settings.chat)
    stage = StageData(
        settings.task,
        DATA_OF_STAGE[settings.stage.data],
        args.data_root,
        settings.languages,
        args.train_num,
        settings.stage.encoder_text,
        args.skip_faulty_rows,
    )
    examples = first_on_each_node(
        open_or_build,
        stage,
        tokenizers,
        max_seq_len=args.max_seq_len,
        max_gen_len=args.max_gen_len,
        with_prompt=settings.with_prompt,
        cache_dir=cache_dir,
        with_groups=args.dev_split == GROUPS and args.dev_size != 0,
    )
    number = len(examples.dataset)
    if examples.faults:
        where = "" if args.dry_run else f", all of them listed in {settings.output_dir / FAULTS_FILE}"
        warn(describe_faults(examples.faults, where))
    if args.dev_size == "auto":  # the number is what a checkpoint knows
        args.dev_size = automatic_dev_size(number)
        log(f"--dev_size auto: {args.dev_size} of {number} examples")
        if args.dev_size == 0:
            warn(
                f"--dev_size auto takes a tenth, none of {number} examples: nothing is evaluated and the last mapping "
                "counts as the best; give a number for a dev split"
            )
    dev, train = on_all_ranks(split_dev, number, args.dev_size, args.seed, examples.groups)
    describe_dev_split(args, stage, examples, dev)
    if len(dev) > len(train):
        warn(f"--dev_size {len(dev)} takes {len(dev) / number:.0%} of the examples: --dev_size auto takes a tenth")
    log(f"data: {len(train)} training and {len(dev)} dev examples; " + json.dumps(examples.counts, ensure_ascii=False))
    check_selection(args, settings.task, settings.stage)  # again: by now the dev split has its size
    labels = None
    if has_accuracy(args, settings.task, settings.stage) and not args.dry_run:
        labels = on_all_ranks(read_labels, args, stage, tokenizers, dev, examples)
    return TrainingData(examples, tokenizers, dev, train, labels)


def train(run: Run, progress: Progress) -> int:
    """Trains from where the run stands to its last step, with evaluations and checkpoints where they are due.

    Returns:
        0, or the exit code of the signal that ended it; a checkpoint of that moment is then written.

    Raises:
        UserError: as `train_step` and `evaluate_and_save` do, and when the disk refuses what is written.
    """
    # A run that was stopped between a step and its evaluation makes up for it first: the best mapping depends on it.
    if progress.evaluation_due:
        with run.clock.timing("evaluation"):
            code = evaluate_and_save(run, progress)
        if code:
            return code
    # A run that has used up its time is finished: the same command trains it no further.
    code, left = 0, 0 if run.clock.is_over() else run.total_steps - progress.step
    batches = itertools.islice(run.loader.starting_at(progress.epoch, progress.batch), left)
    dev_positions = int(run.loader.lengths[run.loader.data.dev].sum())
    # The bar is closed after an error too, whose line would else begin behind it.
    with progress_bar(total=run.total_steps, initial=progress.step, desc=run.args.stage_name, unit="step") as bar:
        for batch in batches:
            with run.clock.timing("step"):
                line, code = train_step(run, progress.step, batch)
            run.clock.guess_evaluation(dev_positions / line["tokens_per_s"])  # with a backward pass, which it has not
            run.record(line, batch.epoch)
            progress.advance(run.loader.steps_per_epoch)
            bar.update()
            if progress.step % STEPS_PER_RELEASE == 0:
                run.loader.release_pages()
            last = progress.step == run.total_steps or run.clock.is_over()
            if len(run.loader.data.dev) == 0:
                if last:  # without a dev split the last mapping is the best known
                    save_mapping(run, run.settings.output_dir)
                    save_mapping(run, run.settings.output_dir / "last")
            elif progress.step % run.eval_steps == 0 or progress.batch == 0 or last:
                progress.evaluation_due = True  # in the checkpoint of a run that is stopped before it
                with run.clock.timing("evaluation"):
                    code = code or evaluate_and_save(run, progress)
                last = last or run.clock.is_over()  # it may have taken the time of another step
            # After the evaluation, so that the checkpoint knows its outcome and the resumed run does not repeat it.
            if progress.step % run.save_steps == 0 or last or code or run.signals.save_agreed:
                run.record.flush()
                with run.clock.timing("saving"):
                    save_checkpoint(run, progress)
                run.signals.save_agreed = False
            if code or last:
                break
    return code


def train_step(run: Run, step: int, batch: "GlobalBatch") -> tuple[dict, int]:
    """Takes one optimizer step. The loss is summed over all its target tokens and divided by their number, so that
    neither the split into micro-batches nor the number of processes changes the gradient.

    Args:
        step: optimizer steps taken before.
        batch: what it trains on.

    Returns:
        the step's line of the log, and the exit code of a stop that any rank was asked for or 0.

    Raises:
        UserError: on every rank, before the update, when loss or gradient is not finite, or memory ran out.
    """
    started, losses = time.perf_counter(), []
    seed_step(run.args.seed, step)
    # ----------------------------------------------------------------------------------------------------- one step
    rate = set_learning_rate(run, step)
    for micro in batch.micro_batches:
        inputs = micro.load(run.device)
        run.engine.set_gradient_accumulation_boundary(micro is batch.micro_batches[-1])
        with explain_step_out_of_memory(inputs):
            # DeepSpeed averages gradients over processes, hence the factor. Without rows, a rank passes with weight 0.
            loss = run.engine(**inputs.arguments).loss_sum * (micro.weight * world_size() / batch.target_tokens)
            run.engine.backward(loss, scale_wrt_gas=False)  # it would divide by the number of micro-batches
        losses.append(loss.detach())  # read together with the norm: `.item()` here would wait once a micro-batch
        run.signals.alive()
    with explain_step_out_of_memory(inputs, UPDATE_MEMORY_FLAGS, f"in the update of step {step + 1}, "):
        norm, loss, code = apply_gradient(run, step, batch, losses)
    # --------------------------------------------------------------------------------------------------------------
    return {"loss": loss, "lr": rate, "grad_norm": norm, **throughput(run, batch, time.perf_counter() - started)}, code


def seed_step(seed: int, step: int) -> None:
    """Makes dropout in a step a function of seed, step and rank, whatever was computed before: a resumed run draws what
    an uninterrupted one would have drawn."""
    import numpy as np
    import torch

    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank()]).generate_state(1, np.uint64)[0]))


def apply_gradient(run: Run, step: int, batch: "GlobalBatch", losses: list) -> tuple[float, float, int]:
    """Clips and applies the gradient.

    Returns:
        its norm before clipping, the global loss, and the exit code of a stop that any rank was asked for or 0.

    Raises:
        UserError: on every rank, before the update, when loss or gradient is not finite.
    """
    import torch

    engine, step_loss = run.engine, torch.stack(losses).sum() / world_size()
    by_hand = zero_stage(run.settings.config) == 0  # DeepSpeed neither reports the norm there nor stops at a bad one
    norm = step_loss.new_zeros(())
    if by_hand:
        trained = list(engine.module.trained_parameters().values())
        norm = torch.nn.utils.clip_grad_norm_(trained, run.args.max_grad_norm)
    # Loss, norm and what a signal asked for go through one call. At ZeRO 0 all ranks have the same norm.
    code, sums = run.signals.agree(run.device, step_loss, norm / world_size())
    loss, norm = sums.tolist()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise not_finite_error(run, step, batch, loss, norm, losses)
    engine.step()
    if not by_hand:
        norm = float(engine.get_global_grad_norm())
        if not engine.was_step_applied() or not math.isfinite(norm):
            raise not_finite_error(run, step, batch, loss, norm, losses)
    return norm, loss, code


def throughput(run: Run, batch: "GlobalBatch", seconds: float) -> dict:
    """Returns what a step's line says of its speed, of all ranks but for the shares and the memory."""
    lengths, mine = run.loader.lengths, batch.micro_batches
    processed = sum(run.loader.positions(micro.rows) for micro in mine)
    return {
        "target_tokens": batch.target_tokens,
        "samples_per_s": len(batch.indices) / seconds,
        "tokens_per_s": int(lengths[batch.indices].sum()) / seconds,
        "padding_share": 1 - sum(int(lengths[micro.rows].sum() * micro.weight) for micro in mine) / processed,
        "data_wait_share": sum(micro.waited for micro in mine) / seconds,
        "peak_memory_gb": peak_memory_gb(run.device),
    }


def dev_loss(run: Run) -> tuple[float, int]:
    """Computes the mean cross-entropy over the dev split's target tokens, its examples shared among the ranks.

    Returns:
        the loss and 0, or nan and the exit code of a signal that cut it short.
    """
    import torch

    total = torch.zeros((), dtype=torch.float64, device=run.device)
    nothing = torch.zeros((), device=run.device)
    with torch.no_grad():
        for group in run.loader.dev_groups():
            for micro in group:
                inputs = micro.load(run.device)
                with explain_step_out_of_memory(inputs, EVAL_MEMORY_FLAGS):
                    total += run.engine(**inputs.arguments).loss_sum.double() * micro.weight
                run.signals.alive()
            if code := run.signals.agree(run.device, nothing)[0]:
                return math.nan, code
    code, (total,) = run.signals.agree(run.device, total)
    return total.item() / run.loader.dev_target_tokens(), code


def evaluate_and_save(run: Run, progress: Progress) -> int:
    """Evaluates on the dev split; saves the mapping as the last one and, when it is, as the best.

    Returns:
        0, or the exit code of a signal; the evaluation is then due again unless it was complete.

    Raises:
        UserError: on every rank, when the dev loss is not finite.
    """
    run.engine.eval()  # without dropout
    loss, code = dev_loss(run)
    accuracy = math.nan if run.loader.data.labels is not None else None
    if accuracy is not None and not code and math.isfinite(loss):
        accuracy, code = dev_accuracy(run)
    run.engine.train()
    if code and (math.isnan(loss) or accuracy is not None and math.isnan(accuracy)):
        return code
    if not math.isfinite(loss):  # all ranks have the same
        raise ReportedError(
            f"dev loss {loss} at step {progress.step} is not finite: stopped, earlier checkpoints and the best mapping "
            "so far are kept; lower --lr, or use --precision fp32"
        )
    progress.evaluation_due = False
    run.record.evaluation(progress.step, loss, accuracy)
    best = is_best(progress, run.args.select_by, loss, accuracy)
    if best:
        progress.best_dev_loss, progress.best_dev_accuracy = loss, accuracy
        save_mapping(run, run.settings.output_dir)
    save_mapping(run, run.settings.output_dir / "last")
    said = f", accuracy {accuracy:.1f} %" if accuracy is not None else ""
    said += " (best so far)" if best else ""
    log(f"step {progress.step}: dev loss {loss:.4f}, perplexity {perplexity(loss):.3f}{said}")
    return code


def prepare(args, cache_dir=None) -> tuple[Settings, "TrainingData"]:
    """Settles everything that can be known before a weight loads: the flags, the data, and that they fit the models.

    Raises:
        UserError: for the first thing that does not fit.
    """
    settings = on_all_ranks(settle, args)
    # Ranks talk about these, so they are no part of `settle`: there one rank's mistake would leave the others waiting.
    args.precision = settle_precision(args)
    args.dev_split = settle_dev_split(args, settings.output_dir)
    settings.init_file, settings.init_hash = broadcast_object((settings.init_file, settings.init_hash))
    data = load_data(settings, cache_dir)
    models = {"LLM (--llm_path)": settings.models[0], "encoder (--mt_path)": settings.models[1]}
    agree_on({"data": data.examples.fingerprint, **models})
    on_all_ranks(check_lengths, settings, data.examples)
    on_all_ranks(check_tokens, settings, data.tokenizers, data.examples)
    return settings, data


def run_stage(settings: Settings, data: "TrainingData", device) -> int:
    """Trains the stage in its locked output folder; returns the exit code."""
    with locked(settings.output_dir, start_over=settings.args.overwrite_output_dir):
        checkpoint = on_rank_0(find_checkpoint_to_resume, settings, data.examples)
        if settings.args.cache_encoder_states:
            data = data._replace(states=cached_states(settings, data, device))
        run, progress = build(settings, data, device, checkpoint)
        with recording(settings.args, settings.output_dir) as run.record:
            on_all_ranks(write_settings, settings, data.examples, len(data.dev))
            on_all_ranks(run.record.rewind, progress.step, progress.evaluation_due)
            run.engine.train()
            on_all_ranks(check_rows_apart, run)
            on_all_ranks(probe_memory, run)
            run.signals = Signals()
            run.clock = TimeLimit(run.args.max_minutes, progress.minutes)
            collect_as_usual()
            code = train(run, progress)
            with run.signals.saving():
                on_all_ranks(run.record.flush)
                if is_main():
                    draw_loss(run.record.path, settings.output_dir / "loss.png")
            # Not after an error: a launcher's SIGTERM must not end this rank before it has said what happened.
            run.signals.close()
    end = "ended by a signal" if code else "finished"
    if not code and progress.step < run.total_steps:
        end += f", --max_minutes {run.args.max_minutes:g} being over,"
    log(f"{end} at step {progress.step} of {run.total_steps}: {settings.output_dir}")
    if not code:
        on_all_ranks(share_mapping, settings)
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

    if args.deterministic or torch.are_deterministic_algorithms_enabled():  # it imports torch's compiler
        torch.use_deterministic_algorithms(args.deterministic)
    import_deepspeed_quietly()
    if not args.dry_run:
        return run_stage(*prepare(args), device)
    with tempfile.TemporaryDirectory(prefix="mindmerger-dry-run-") as cache_dir:
        on_all_ranks(print_estimate, *prepare(args, cache_dir))
    return 0


if __name__ == "__main__":
    run_main(main)
elif __name__ == "__mp_main__":  # in a process that tokenises, which starts by importing this file
    end_with_parent()
