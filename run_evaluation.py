"""Evaluates a mapping, or the LLM alone, on one task: greedy answers, scores, one table.

    python run_evaluation.py --task math --init_checkpoint outputs/MindMerger/math/augmentation
    deepspeed run_evaluation.py --deepspeed --task xnli --init_checkpoint pytorch_model.bin --llm_path … --mt_path …
    python run_evaluation.py --compare results/MindMerger/math_mgsm results/MindMerger/math_mgsm-llm_only

The order of an evaluation: settings, the results folder and what is finished in it, generation, merging. `answer()`,
for use from Python, can be imported from here.
"""

import argparse
import contextlib
import time
from dataclasses import asdict

from mindmerger.evaluation.settings import START, Plan, build_parser, find_models_on_rank_0, prepare
from mindmerger.evaluation.summary import finish
from mindmerger.generation.answers import answer, answer_batches, load_model, split_evaluation, start_engine
from mindmerger.runtime.command import run_main
from mindmerger.runtime.files import FolderLock
from mindmerger.runtime.processes import (
    agree_on,
    broadcast_object,
    broadcast_weights,
    gather_objects,
    init_distributed,
    is_main,
    log,
    on_all_ranks,
    progress_bar,
    rank,
    warn,
    world_size,
)
from mindmerger.runtime.signals import watch_launcher

__all__ = ["answer", "main"]


def generate_share(model, engine, plan: Plan, batches: list[list[int]], shard) -> None:
    """Generates this rank's batches, each (with vLLM: each chunk of them) on disk before the next begins.

    Args:
        shard: this rank's open file in the folder of unfinished results.

    Raises:
        UserError: out of memory, naming what to lower, or when the disk refuses the answers.
    """
    from mindmerger.evaluation.results import append_records

    total, done = sum(map(len, batches)), 0
    with progress_bar(total=total, unit="example", desc=f"rank 0 of {world_size()}") as progress:
        try:
            for chunk, generations in answer_batches(model, engine, plan, batches):
                following = iter(generations)
                for batch in chunk:
                    keys = {"batch": batch[0], "batch_size": len(batch)}
                    append_records(shard, [{"index": i, **asdict(next(following)), **keys} for i in batch])
                    done += len(batch)
                    progress.update(len(batch))
        except KeyboardInterrupt:
            log(f"stopped; {done} examples of this run are kept: the same command continues")
            raise


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; see the module's docstring."""
    watch_launcher()
    parser = build_parser()
    args = parser.parse_args(argv)
    from mindmerger.evaluation.comparison import compare_results
    from mindmerger.evaluation.results import open_results
    from mindmerger.evaluation.tables import format_results

    if args.compare:
        ignored = [name for name, value in vars(args).items() if value != parser.get_default(name)]
        ignored = [f"--{name}" for name in ignored if name not in ("compare", "seed", "deepspeed", "local_rank")]
        if ignored:
            warn(f"--compare evaluates nothing: no use of {', '.join(ignored)}")
        if is_main():
            print(compare_results(args.compare, args.seed))
        return 0
    device = init_distributed()
    if args.engine == "vllm":
        from mindmerger.generation.vllm_engine import check_vllm

        log(f"--engine vllm: version {on_all_ranks(check_vllm, device.type)}")
    plan = on_all_ranks(prepare, args, device.type == "cuda", find_models_on_rank_0(args))
    plan.identity = agree_on(plan.identity, but=START)
    number = len(plan.examples)
    with contextlib.ExitStack() as stack:
        lock = on_all_ranks(lambda: FolderLock(plan.folder) if is_main() else None)
        if lock is not None:
            stack.callback(lock.release)
        opened = on_all_ranks(
            lambda: open_results(plan.folder, plan.identity, number, args.overwrite) if is_main() else None
        )
        results, finished = broadcast_object(opened)
        if results is None:
            results = evaluate(plan, args, device, finished | join_machines(plan, args.overwrite))
        else:
            log(f"{plan.folder} holds this evaluation already, nothing is generated; --overwrite starts over")
            if "resampling" not in results and len(results["languages"]) > 1:
                warn("its interval of the mean is too narrow: an earlier version took the languages for independent")
    if is_main():
        print(format_results(results))
        log(f"results are in {plan.folder}")
    return 0


def evaluate(plan: Plan, args: argparse.Namespace, device, finished: dict[int, dict]) -> dict | None:
    """Generates what is not finished, merges on rank 0 and returns the results there.

    Raises:
        UserError: out of memory, or a full disk.
    """
    from mindmerger.evaluation.results import leave_results, open_shard

    remaining = [i for i in range(len(plan.examples)) if i not in finished]
    # Dealing out batches of falling length one by one gives every rank about the same work.
    batches = split_evaluation(remaining, plan, args)[rank() :: world_size()]
    start = time.perf_counter()
    if remaining:
        where = f"{world_size()} processes" if world_size() > 1 else device.type
        where += " by vLLM" if plan.engine == "vllm" else ""
        log(f"{plan.task.name}, {plan.form}: generating {len(remaining)} answers in {plan.precision} on {where}")
        with on_all_ranks(open_shard, plan.folder, rank()) as shard:
            model = on_all_ranks(load_model, plan, device, input_side_only=plan.engine == "vllm")
            if plan.checkpoint is not None:
                broadcast_weights(model.mapping)
            engine = on_all_ranks(start_engine, plan)
            start = time.perf_counter()
            generate_share(model, engine, plan, batches, shard)
    collect_answers(plan)  # the ranks may come to it far apart
    seconds = time.perf_counter() - start
    results = on_all_ranks(lambda: finish(plan, args, set(remaining), seconds) if is_main() else None)
    on_all_ranks(lambda: None if is_main() else leave_results(plan.folder))
    return results


def join_machines(plan: Plan, overwrite: bool) -> dict[int, dict]:
    """Makes the other ranks' results folders ready, and returns the records that an earlier run finished there."""
    from mindmerger.evaluation.results import join_results

    found = on_all_ranks(lambda: {} if is_main() else join_results(plan.folder, plan.identity, overwrite))
    return {index: record for one in gather_objects(found) for index, record in one.items()}


def collect_answers(plan: Plan) -> None:
    """Writes the answers that rank 0's results folder lacks into it: other nodes may have folders of their own."""
    from mindmerger.evaluation.results import PARTIAL, append_records, open_shard, read_finished

    if world_size() == 1:
        return
    finished = read_finished(plan.folder / PARTIAL) if (plan.folder / PARTIAL).is_dir() else {}
    known = broadcast_object(set(finished))
    others = gather_objects({index: record for index, record in finished.items() if index not in known})
    lacking = {index: record for one in others for index, record in one.items()}

    def write():
        if is_main() and lacking:
            with open_shard(plan.folder, rank()) as shard:
                append_records(shard, list(lacking.values()))

    on_all_ranks(write)


if __name__ == "__main__":
    run_main(main)
