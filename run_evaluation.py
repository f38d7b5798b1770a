"""Evaluates a mapping, or the LLM alone, on one task: greedy answers, scores, one table.

    python run_evaluation.py --task math --init_checkpoint outputs/MindMerger/math/augmentation
    deepspeed run_evaluation.py --deepspeed --task xnli --init_checkpoint pytorch_model.bin --llm_path … --mt_path …
    python run_evaluation.py --compare results/MindMerger/math_mgsm results/MindMerger/math_mgsm-llm_only

Read it from `main`, the order of an evaluation: settings, the results folder and what is finished in it, answers,
summary. `answer()`, for use from Python, can be imported from here.
"""

import time
from dataclasses import asdict

from mindmerger.evaluation.flags import parse
from mindmerger.evaluation.settings import MAPPING_HASH, Settings, settle
from mindmerger.evaluation.summary import summarise
from mindmerger.generation.answers import answer, answer_batches, split_evaluation
from mindmerger.generation.gold import score_gold
from mindmerger.generation.loading import load_model, started_engine
from mindmerger.runtime.command import collect_as_usual, run_main
from mindmerger.runtime.processes import (
    agree_on,
    broadcast_object,
    broadcast_weights,
    gather_objects,
    init_distributed,
    is_main,
    locked_folder,
    log,
    on_all_ranks,
    on_rank_0,
    progress_bar,
    rank,
    warn,
    world_size,
)
from mindmerger.runtime.signals import watch_launcher

__all__ = ["answer", "main"]


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; see the module's docstring."""
    # First of all: a launcher that dies while models load would leave ranks that wait for ever.
    watch_launcher()
    args = parse(argv)
    if args.compare:
        # Before any process group: comparing needs neither torch nor a GPU.
        return compare(args.compare, args.seed)
    device = init_distributed()
    # Before settings: hashing the models and reading the test sets may take minutes.
    on_all_ranks(check_engine, args.engine, device)
    settings = on_all_ranks(settle, args, on_gpu=device.type == "cuda")
    settings.identity = agree_on(settings.identity, but=MAPPING_HASH)
    # A second run in one folder would mix its answers into these.
    with locked_folder(settings.folder):
        results, finished = open_folder(settings)
        if results is None:
            results = evaluate(settings, device, finished)
    return report(settings, results)


def compare(folders: list[str], seed: int) -> int:
    """Prints the comparison of finished evaluations."""
    from mindmerger.evaluation.comparison import compare_results

    if is_main():
        print(compare_results(folders, seed))
    return 0


def check_engine(engine: str, device) -> None:
    """Refuses an engine that this run cannot use, before anything is read."""
    if engine == "vllm":
        from mindmerger.generation.vllm_engine import check_vllm

        log(f"--engine vllm: version {check_vllm(device.type)}")


def open_folder(settings: Settings) -> tuple[dict | None, dict[int, dict]]:
    """Makes the results folders of all ranks ready for this evaluation.

    Returns:
        the results where all that is asked is finished, else None; and what earlier runs finished of it, wherever a
        rank has it: nodes may have results folders of their own.
    """
    from mindmerger.evaluation.extension import asked_rows
    from mindmerger.evaluation.results import join_results, open_results

    folder, identity = settings.folder, settings.identity
    results, finished = on_rank_0(open_results, folder, identity, asked_rows(settings), settings.overwrite)
    if results is not None:
        log(f"{folder} holds this evaluation already, nothing is generated; --overwrite starts over")
        if "resampling" not in results and len(results["languages"]) > 1:
            warn("its interval of the mean is too narrow: an earlier version took the languages for independent")
        return results, finished
    # A folder that a node keeps for itself may hold answers of an earlier run: generating them again costs GPU time.
    joined = on_all_ranks(lambda: {} if is_main() else join_results(folder, identity, settings.overwrite))
    return None, finished | {index: record for one in gather_objects(joined) for index, record in one.items()}


def evaluate(settings: Settings, device, finished: dict[int, dict]) -> dict | None:
    """Answers what is not finished, gathers all answers on rank 0 and returns the results there.

    Raises:
        UserError: out of memory, or a full disk.
    """
    from mindmerger.evaluation.results import leave_results, open_shard

    remaining = [i for i in range(len(settings.examples)) if i not in finished]
    started = time.perf_counter()
    if remaining:
        where = f"{world_size()} processes" if world_size() > 1 else device.type
        where += " by vLLM" if settings.engine == "vllm" else ""
        task, form, dtype = settings.task.name, settings.form, settings.precision
        what = "generating" if settings.label_ids is None else "choosing labels for"
        log(f"{task}, {form}: {what} {len(remaining)} answers in {dtype} on {where}")
        with on_all_ranks(open_shard, settings.folder, rank()) as shard:
            model = load(settings, device)
            collect_as_usual()
            with started_engine(settings, device.type) as engine:
                # Speed is that of answering: loading depends on the disk, and on what is in its cache.
                started = time.perf_counter()
                # Dealing out batches of falling length one by one gives every rank about the same work.
                share = split_evaluation(remaining, settings, model)[rank() :: world_size()]
                answer_share(model, engine, settings, share, shard)
    collect_answers(settings)  # the ranks may come to it far apart
    seconds = time.perf_counter() - started
    results = on_all_ranks(lambda: summarise(settings, set(remaining), seconds) if is_main() else None)
    on_all_ranks(lambda: None if is_main() else leave_results(settings.folder))
    return results


def load(settings: Settings, device):
    """Loads the model on every rank, with rank 0's mapping and adapter."""
    model = on_all_ranks(load_model, settings, device)
    if settings.mapping_file is not None:
        # Sent, not read by each: rank 0's node alone may have the file.
        broadcast_weights(model.mapping)
    if settings.adapter is not None:
        own = {name: tensor.detach().cpu() for name, tensor in model.trained_parameters().items()}
        model.load_trained(broadcast_object(own if is_main() else None))
    return model


def answer_share(model, engine, settings: Settings, batches: list[list[int]], shard) -> None:
    """Answers this rank's batches, each (with vLLM: each chunk of them) on disk before the next begins.

    Args:
        shard: this rank's open file in the folder of unfinished results.

    Raises:
        UserError: out of memory, naming what to lower, or when the disk refuses the answers.
    """
    from mindmerger.evaluation.results import append_records

    total, done = sum(map(len, batches)), 0
    with progress_bar(total=total, unit="example", desc=f"rank 0 of {world_size()}") as progress:
        try:
            for chunk, generations in answer_batches(model, engine, settings, batches, progress.update):
                following = iter(generations)
                for batch in chunk:
                    answers = [next(following) for _ in batch]
                    records = [{"index": i, **asdict(one)} for i, one in zip(batch, answers, strict=True)]
                    if settings.score_gold:
                        gold = score_gold(model, settings, batch, answers)
                        records = [one | loss for one, loss in zip(records, gold, strict=True)]
                    # With each line its batch: one cut short by a crash is known by it, and generated again as a whole.
                    keys = {"batch": batch[0], "batch_size": len(batch)}
                    # On disk before the next batch begins: a kill costs one batch at most.
                    append_records(shard, [one | keys for one in records])
                    done += len(batch)
        except KeyboardInterrupt:
            log(f"stopped; {done} examples of this run are kept: the same command continues")
            raise


def collect_answers(settings: Settings) -> None:
    """Writes the answers that rank 0's results folder lacks into it: other nodes may have folders of their own."""
    from mindmerger.evaluation.results import PARTIAL, append_records, open_shard, read_finished

    if world_size() == 1:
        return
    partial = settings.folder / PARTIAL
    finished = read_finished(partial) if partial.is_dir() else {}
    # On a shared disk rank 0 knows them all, and nothing is sent.
    known = broadcast_object(set(finished))
    others = gather_objects({index: record for index, record in finished.items() if index not in known})
    lacking = {index: record for one in others for index, record in one.items()}

    def write():
        if is_main() and lacking:
            with open_shard(settings.folder, rank()) as shard:
                append_records(shard, list(lacking.values()))

    on_all_ranks(write)


def report(settings: Settings, results: dict | None) -> int:
    """Prints the table, on rank 0."""
    from mindmerger.evaluation.tables import format_results

    if is_main():
        print(format_results(results))
        log(f"results are in {settings.folder}")
    return 0


if __name__ == "__main__":
    run_main(main)
