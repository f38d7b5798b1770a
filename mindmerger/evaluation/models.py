"""The models of an evaluation: which ones the flags and the mapping mean, and whether they fit each other."""

import argparse
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mindmerger.runtime.chat_template import AUTO
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.processes import is_main, log, on_rank_0, warn

# The released scripts' defaults, which published commands rely on.
DEFAULT_LLM = "../LLMs/Llama-2-7b-hf"
DEFAULT_ENCODER = "../LLMs/mt5-xl"
DEFAULT_BRIDGE = "mindmerger"


class Models(NamedTuple):
    """The models that are evaluated, those of the LLM alone without `mapping_file`, `encoder` and `config`.

    config: of the mapping, with MindMerger's bridge where it has no config.json, as the released ones have none.
    adapter: a folder, not looked into yet. recorded: what --init_checkpoint's config.json says, also where the LLM
    alone is evaluated.
    """

    mapping_file: str | None
    encoder: str | None
    llm: str
    config: object | None
    adapter: str | None = None
    recorded: object | None = None


def find_models_on_rank_0(args: argparse.Namespace, task) -> Models:
    """Returns on every rank what `find_models` finds on rank 0, whose node alone may have the mapping."""
    # Rank 0's answer: a node without the file would otherwise end the run.
    return on_rank_0(find_models, args, task)


def find_models(args: argparse.Namespace, task) -> Models:
    """Returns the models that the flags name, else the mapping's config.json, else the defaults.

    Raises:
        UserError: where no mapping is found.
    """
    from mindmerger.model.mapping_files import MindMergerConfig, find_mapping_file, read_config
    from mindmerger.model.sharing import fetch_mapping

    given = args.init_checkpoint
    if given is None and not args.llm_only:
        given = trained_mapping(args.save_name, task, args.bridge or DEFAULT_BRIDGE)
    elif given is not None:
        given = fetch_mapping(given)
        given = last_stage(given, args.bridge or DEFAULT_BRIDGE, task.translates) or given
    recorded = read_config(given) if given is not None else None
    without_mapping = recorded is not None and recorded.mt_path is None
    if without_mapping and not args.llm_only:
        raise UserError(
            f"{given} holds an adapter that was trained on the LLM alone, without a mapping: pass --llm_only"
        )
    mapping_file = str(find_mapping_file(given)) if given is not None and not without_mapping else None
    adapter = choose_adapter(args, given, recorded)
    llm = choose_path(args, recorded, "llm_path", DEFAULT_LLM)
    # The mapping is looked at all the same until here: its config.json may name the LLM that it was trained for.
    if args.llm_only:
        return Models(None, None, llm, None, adapter, recorded)
    encoder = choose_path(args, recorded, "mt_path", DEFAULT_ENCODER)
    bridge, options = choose_bridge(args, recorded, mapping_file)
    # Widths are read from the models later: a released pytorch_model.bin stands alone, without a config.json.
    config = recorded or MindMergerConfig(encoder, llm, None, 0, bridge=bridge, bridge_options=options)
    return Models(mapping_file, encoder, llm, config, adapter, recorded)


def choose_adapter(args: argparse.Namespace, given: str | None, recorded) -> str | None:
    """Returns the folder of the adapter that is evaluated with the LLM: as given, else the one that was trained over
    the mapping, or, with --llm_only, over none."""
    from mindmerger.model.adapters import ADAPTER_FOLDER

    if args.adapter_path is not None:
        return None if args.adapter_path.lower() == "none" else args.adapter_path
    if recorded is None or recorded.adapter is None or (args.llm_only and recorded.mt_path is not None):
        return None
    folder = Path(given) if Path(given).is_dir() else Path(given).parent
    log(f"--adapter_path not given: taking {folder / ADAPTER_FOLDER}, named by the config.json beside it")
    return str(folder / ADAPTER_FOLDER)


def choose_chat_template(args: argparse.Namespace, models: Models, form: str):
    """Returns the chat template around the prompts, None for none: that of training by itself.

    Raises:
        UserError: for another one than that of training, and one that cannot be used.
    """
    from mindmerger.hub.chat_template import keep_template

    if form == "hard":
        if args.chat_template == AUTO:
            warn("--chat_template has no effect on the Hard form, which has no prompt")
        return None
    recorded, record, trained = models.recorded, None, None
    if recorded is not None and recorded.augmentation:  # of a stage without a prompt the record says nothing
        record = recorded.chat_template
        if form == "soft":
            trained = models.mapping_file
        elif recorded.mt_path is None and models.adapter is not None:
            trained = f"the adapter {models.adapter}"
    found = keep_template(args.chat_template, models.llm, record, trained)
    if found is not None and args.chat_template is None:
        log("--chat_template not given: taking the one that this was trained with")
    return found


def check_adapter_fits(models: Models, engine: str):
    """Returns the adapter as `check_adapter` does, on every rank what rank 0 finds; None without one.

    Raises:
        UserError: for one that is damaged or of another LLM, and an engine that takes none.
    """
    from mindmerger.model.adapters import check_adapter

    if models.adapter is None:
        return None
    if engine != "hf":
        raise UserError(
            f"--engine {engine} takes no adapter: merge it first (python -m mindmerger.baselines.merge_adapter), and "
            "pass the merged LLM with --adapter_path none"
        )
    return on_rank_0(check_adapter, models.adapter, models.llm)


def choose_bridge(args: argparse.Namespace, recorded, mapping_file: str) -> tuple[str, dict[str, str]]:
    """Returns the bridge and its options: those of the mapping's config.json, without one as given.

    Raises:
        UserError: for an unknown bridge or option, and where the flags say otherwise than the config.json.
    """
    from mindmerger.bridges.base import contradiction, parse_options
    from mindmerger.model.mapping_files import find_bridge

    bridge = args.bridge or (recorded.bridge if recorded is not None else DEFAULT_BRIDGE)
    # Said before weights load: there a wrong bridge would show as a list of missing tensors.
    if recorded is not None and bridge != recorded.bridge:
        raise UserError(f"{mapping_file} holds the bridge {recorded.bridge}, not --bridge {bridge}")
    before = recorded.bridge_options if recorded is not None else {}
    options = find_bridge(bridge).settle(before | parse_options(args.bridge_option))
    # An option may change numbers without changing a shape, so that the weights would load and answer differently.
    if recorded is not None and (found := contradiction(before, options)) is not None:
        raise UserError(f"{mapping_file} was trained with --bridge_option {found[0]}, not {found[1]}")
    return bridge, options


def trained_mapping(save_name: str, task, bridge: str) -> str:
    """Returns the folder in which the last stage of training left its mapping.

    Raises:
        UserError: when none is there.
    """
    folder = Path("outputs") / save_name / task.training_name
    found = last_stage(folder, bridge, task.translates)
    if found is None:
        raise UserError(
            f"no --init_checkpoint given and training left nothing in {folder}: pass the mapping to evaluate, or "
            "--llm_only for the LLM alone"
        )
    return found


def last_stage(path: str | Path, bridge: str, translates: bool = False) -> str | None:
    """Returns the folder of the last stage that training left in a run's folder of one task: of the adapter, else of
    the bridge's own stages the last one that is there; None where the folder holds no stages.

    Args:
        translates: whether the task is translation, of which stages on sentence pairs know most.

    Raises:
        UserError: where it holds stages of another bridge alone.
    """
    from mindmerger.hub.model_files import ModelError
    from mindmerger.model.mapping_files import (
        ADAPTER_STAGE,
        MAPPING_FILE,
        RELEASED_FILE,
        find_bridge,
        find_mapping_file,
    )

    folder = Path(path)
    if not folder.is_dir():
        return None
    files = [file for kind in (MAPPING_FILE, RELEASED_FILE) for file in sorted(folder.glob(f"*/{kind}"))]
    there = list(dict.fromkeys(file.parent.name for file in files))
    if not there:
        return None
    with suppress(ModelError):  # a stage's own folder, which has last/ in it
        find_mapping_file(folder)
        return None
    # Stages are named in the order in which they are trained: the last one's mapping has seen the task, and what
    # translates is trained on sentence pairs alone.
    stages = find_bridge(bridge).stages
    pairs = [name for name, stage in stages.items() if stage.data == "pairs"]
    names = [*reversed(pairs)] if translates and pairs else [ADAPTER_STAGE, *reversed(stages)]
    found = next((name for name in names if name in there), None)
    if found is None:
        raise UserError(
            f"{folder} holds no stage of --bridge {bridge} ({', '.join(reversed(names))}) but {', '.join(there)}: pass "
            "--bridge, or one of these folders as --init_checkpoint"
        )
    log(f"of the stages there ({', '.join(there)}) taking {folder / found}")
    return str(folder / found)


def choose_path(args: argparse.Namespace, config, flag: str, default: str) -> str:
    """Returns the path of a model: as given, else as the mapping's config.json records it, else the default."""
    given, recorded = getattr(args, flag), getattr(config, flag, None)
    if given is None and recorded is not None:
        log(f"--{flag} not given: taking {recorded}, named by the mapping's config.json")
    # Resolved: the released scripts write a slash at the end, and a link or ./ names the same folder. A warning, not an
    # error, since a model that was moved or copied has another path.
    elif given is not None and recorded is not None and Path(given).resolve() != Path(recorded).resolve():
        warn(f"this mapping was trained with --{flag} {recorded}, not {given}")
    return given or recorded or default


def warn_of_other_training(config, task, form: str) -> None:
    """Says where a mapping, by its config.json, was trained for another task, stage or form than is evaluated."""
    from mindmerger.model.mapping_files import stages_of

    # Sentence pairs are the same thing whichever task's languages they are in.
    if config.task not in (None, task.training_name) and not task.translates:
        warn(f"this mapping was trained for task {config.task}, now evaluated on {task.name}")
    stage = stages_of(config.bridge, config.bridge_options).get(config.stage)
    if task.translates and stage is not None and stage.data != "pairs":
        warn(f"this mapping comes from the {config.stage} stage: translations are what the stage over pairs trains")
    # Pairs are trained without a prompt: the warning of another form would only repeat this one.
    elif not task.translates and stage is not None and "pairs" in stage.data:
        warn(f"this mapping comes from the {config.stage} stage: it has not been trained on the task yet")
    elif config.augmentation not in (None, form == "soft"):
        name = {True: "Soft, --augmentation True", False: "Hard, --augmentation False"}
        warn(f"this mapping was trained as {name[config.augmentation]}, now evaluated as {name[form == 'soft']}")


def warn_of_other_precision(config, precision: str) -> None:
    """Says where a mapping, by its config.json, was trained between models of another dtype than is evaluated."""
    # Evaluated all the same: a mapping of a GPU is looked at on a laptop. Answers then differ by rounding.
    if config.precision not in (None, precision):
        warn(
            f"this mapping was trained with --precision {config.precision}, now evaluated with {precision}: pass "
            f"--precision {config.precision} for the numbers that it was trained on"
        )


def warn_of_other_quantization(config, quantization: str) -> None:
    """Says where a mapping, by its config.json, was trained before an LLM of another quantisation than is evaluated."""
    if config.quantization not in (None, quantization):
        warn(
            f"this mapping was trained with --quantization {config.quantization}, now evaluated with {quantization}: "
            f"pass --quantization {config.quantization} for the LLM that it was trained with"
        )


def check_models_fit(models: Models, engine: str = "hf", quantization: str = "none"):
    """Refuses models that cannot be used, or a mapping that does not fit between them.

    Args:
        engine: the library that decodes.
        quantization: of the LLM.

    Returns:
        the bridge without storage, None for the LLM alone.

    Raises:
        UserError: naming the model and what does not fit.
    """
    from mindmerger.model.mapping_files import check_mapping, config_of_models, empty_bridge
    from mindmerger.model.towers import check_models, check_roles

    check_roles(models.llm, models.encoder)
    check_models(models.encoder, models.llm, backward=False, quantization=quantization)
    if models.mapping_file is None:
        return None
    config = config_of_models(models.encoder, models.llm, models.config.bridge, models.config.bridge_options)
    bridge = empty_bridge(config)
    # vLLM loads the LLM from its folder: the trained head would be passed over silently.
    if engine == "vllm" and hasattr(bridge, "lm_head"):
        raise UserError(
            f"--engine vllm loads the LLM with its own output head, and {models.mapping_file} holds a trained one: "
            "leave --engine vllm out"
        )
    if is_main():
        check_mapping(models.mapping_file, config)
    return bridge
