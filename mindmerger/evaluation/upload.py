"""Uploads a trained mapping to the Hugging Face hub, with the scores of its evaluations on the model card.

    python -m mindmerger.evaluation.upload --init_checkpoint outputs/MindMerger/math/augmentation \\
        --push_to_hub user/name --results results/MindMerger/math_mgsm
"""

import argparse
from pathlib import Path

from mindmerger.hub.repositories import add_upload_arguments, check_can_upload
from mindmerger.runtime.command import CommandParser, run_main
from mindmerger.runtime.errors import UserError

HELP = """\
Uploads a trained mapping to the Hugging Face hub: mapping.safetensors, config.json, an adapter if there is one, and a
model card. MindMerger.from_pretrained and --init_checkpoint take it by its id then.

--results puts scores of finished evaluations on the card. They must be of this very mapping and adapter.
"""
# By the key of results.json: the hub's name of the metric, and the card's.
METRICS = {"accuracy": ("accuracy", "accuracy"), "chrf2": ("chrf", "chrF2"), "bleu": ("bleu", "BLEU")}


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser."""
    parser = CommandParser(prog="mindmerger.evaluation.upload", description=HELP)
    parser.add_argument("--init_checkpoint", required=True, help="folder of the mapping, as training writes it")
    add_upload_arguments(parser.add_argument, "the mapping")
    parser.add_argument(
        "--results", nargs="+", default=[], metavar="FOLDER", help="results folders of evaluations of this mapping"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; see the module's docstring."""
    args = build_parser().parse_args(argv)
    if args.push_to_hub is None:
        raise UserError("no --push_to_hub given: pass USER/NAME")
    check_can_upload(args.push_to_hub)

    from mindmerger.model.sharing import push_folder

    scores = [one for folder in args.results for one in card_results(folder, args.init_checkpoint)]
    datasets = args.hub_dataset or trained_datasets(args.init_checkpoint)
    address = push_folder(args.init_checkpoint, args.push_to_hub, args.hub_private, args.hub_license, datasets, scores)
    print(address)
    return 0


def trained_datasets(folder: str) -> list[str]:
    """Returns the hub ids of the data that a mapping was trained on, as far as its `config.json` tells."""
    from mindmerger.model.mapping_files import read_config, stage_of
    from mindmerger.tasks import find_task

    config = read_config(folder)
    # The sentence pairs of the first stage are not on the hub.
    if config is None or config.task is None or "task" not in stage_of(config).data:
        return []
    found = find_task(config.task).training_dataset
    return [found] if found else []


def card_results(results_folder: str, folder: str) -> list:
    """Returns a finished evaluation as a model card lists it: one entry a language and metric, and those of the mean.

    Args:
        folder: of the mapping whose card it is.

    Returns:
        `huggingface_hub.EvalResult`s.

    Raises:
        UserError: for results that cannot be read, and those of another mapping or adapter.
    """
    from huggingface_hub import EvalResult

    from mindmerger.evaluation.results import find_results, read_results
    from mindmerger.evaluation.tables import form_title
    from mindmerger.tasks import TASKS
    from mindmerger.tasks.languages import code_of

    results_folder = find_results(results_folder)
    results = read_results(results_folder)
    refuse_other_mapping(results_folder, results.get("identity") or {}, folder)
    task, title = results["task"], form_title(results)
    dataset = TASKS[task].hub_dataset if task in TASKS else None
    found, languages = [], results["languages"]
    for name, scores in [*languages.items(), ("mean", results["mean"])]:
        rows = {"rows": scores["n"]} if name != "mean" else {"languages": len(languages)}
        for key, (metric, shown) in METRICS.items():
            if key in scores:
                found.append(
                    EvalResult(
                        task_type="text-generation",
                        dataset_type=dataset or task,
                        dataset_name=f"{task}, {name if name != 'mean' else f'mean of {len(languages)} languages'}",
                        dataset_config=code_of(name) if name != "mean" else "mean",
                        dataset_args=rows,
                        metric_type=metric,
                        metric_name=f"{shown}, {title}",
                        metric_value=round(scores[key], 2),
                    )
                )
    return found


def refuse_other_mapping(results_folder: str, identity: dict, folder: str) -> None:
    """Refuses results whose mapping and adapter are not those in a folder, by their hashes.

    Raises:
        UserError: naming both folders.
    """
    from mindmerger.evaluation.settings import ADAPTER_HASH, MAPPING_HASH
    from mindmerger.model.adapters import ADAPTER_FOLDER, adapter_sha256
    from mindmerger.model.mapping_files import find_mapping_file, mapping_sha256, read_config

    config, own = read_config(folder), {MAPPING_HASH: None, ADAPTER_HASH: None}
    if config is None or config.mt_path is not None:
        own[MAPPING_HASH] = mapping_sha256(str(find_mapping_file(folder)))
    if config is not None and config.adapter is not None:
        own[ADAPTER_HASH] = adapter_sha256(str(Path(folder) / ADAPTER_FOLDER))
    for name, digest in own.items():
        if identity.get(name) != digest:
            raise UserError(
                f"{results_folder} holds scores of another {'mapping' if name == MAPPING_HASH else 'adapter'} than "
                f"{folder} (its {name} differs): evaluate this one, or leave these results out"
            )


if __name__ == "__main__":
    run_main(main, alone=True)
