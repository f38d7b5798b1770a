"""The DeepSpeed JSON: what a user may set in it, what comes from the command line, and what DeepSpeed really gets.

DeepSpeed accepts misspelt keys silently, so every key and value is checked here first.
"""

import difflib
import json
import math
import os
from pathlib import Path

from mindmerger.runtime.errors import UserError
from mindmerger.runtime.processes import warn, world_size

# DeepSpeed silently takes a misspelt key, so these are the ones we know to work with this training loop.
KNOWN_KEYS = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "communication_data_type",
    "comms_logger",
    "flops_profiler",
    "activation_checkpointing",
    "aio",
    "dump_state",
    "bf16",
    "fp16",
}
FROM_COMMAND_LINE = {
    "train_batch_size": "--train_batch_size",
    "train_micro_batch_size_per_gpu": "--train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps": "--train_batch_size / (--train_micro_batch_size_per_gpu x processes)",
}
# Keys of zero_optimization with the values that training runs at: DeepSpeed takes others, and fails once models are
# loaded, or trains with them what nobody has compared.
UNSUPPORTED = {
    "zenflow": (None,),
    "legacy_stage1": (False,),
    "zero_hpz_partition_size": (0, 1),
    "zero_quantized_weights": (False,),
    "zero_quantized_nontrainable_weights": (False,),
    "zero_quantized_gradients": (False,),
    "offload_optimizer.super_offload": (False,),
}


def read_deepspeed_config(path: str | None) -> dict:
    """Reads a user's DeepSpeed JSON and refuses what this loop cannot honour.

    Raises:
        UserError: naming the file and the key for unreadable JSON, unknown keys, values of a wrong type or range, a
            precision, optimizer or scheduler section.
    """
    if path is None:
        # The trained 25 million parameters of the published run take 0.4 GB with gradient and moments: little to share.
        return {"zero_optimization": {"stage": 0}}
    file = Path(path)
    if not file.is_file():
        raise UserError(f"no DeepSpeed config {file}: presets are scripts/ds_zero0.json to ds_zero3_offload.json")
    from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys

    def number(text: str) -> float:
        value = float(text)  # 5e8 is how DeepSpeed's documentation writes whole numbers
        return int(value) if value.is_integer() else value

    try:
        text = file.read_text(encoding="utf-8")
        # DeepSpeed gets a dictionary and not this file, so that its own check of keys given twice would see nothing.
        config = json.loads(text, parse_float=number, object_pairs_hook=dict_raise_error_on_duplicate_keys)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} must hold a JSON object, not {type(config).__name__}")
    # DeepSpeed would also compile an optimizer of its own at start, and fail where there is no compiler.
    for section, instead in (("optimizer", "--lr"), ("scheduler", "--lr_scheduler and --warmup_ratio")):
        if section in config:
            raise UserError(f"{file}: remove the section {section!r}, its settings come from {instead}")
    # DeepSpeed's list of modules to keep in fp32 spares buffers only, so that the trained part would lose its
    # precision.
    for section in ("bf16", "fp16"):
        if isinstance(config.get(section), dict) and config[section].get("enabled"):
            raise UserError(
                f"{file}: remove the section {section!r}: it would cast the mapping too; --precision sets the towers' "
                "dtype and the mapping stays in fp32"
            )
    _refuse_unknown(config, KNOWN_KEYS, f"{file}: ")
    check_values(config, f"{file}: ")
    return config


def _refuse_unknown(given: dict, known: set[str], where: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise UserError(f"{where}{key}: unknown key" + (f", did you mean {near[0]!r}?" if near else ""))


def check_values(config: dict, where: str) -> None:
    """Makes sure that every value of a user's DeepSpeed JSON has the type and the range that DeepSpeed needs.

    DeepSpeed itself reads "2" as 2 and 1 as True without a word, and looks at the values of some sections never, or
    only once the models are loaded.

    Args:
        where: what every message starts with: the file.

    Raises:
        UserError: naming the path of the first key whose value cannot be used.
    """
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for section, fields in _section_fields().items():
        _check_section(config.get(section, {}), fields, f"{where}{section}")
    top = {key: kind for key, kind in _top_level_fields().items() if key in config}
    _check_values({key: config[key] for key in top}, top, where)
    clip = config.get("gradient_clipping", "auto")
    if clip != "auto" and not (type(clip) in (int, float) and 0 < clip < math.inf):
        raise UserError(
            f"{where}gradient_clipping must be 'auto' or a number above 0 (a large one to clip nothing), not {clip!r}"
        )
    _check_model(config.get("comms_logger", {}), CommsLoggerConfig, f"{where}comms_logger")
    zero = config.get("zero_optimization", {})
    # Not isinstance: True is an int, and pydantic would take it for stage 1.
    if isinstance(zero, dict) and (type(zero.get("stage", 0)) is not int or zero.get("stage", 0) not in range(4)):
        raise UserError(f"{where}zero_optimization.stage must be 0, 1, 2 or 3, not {zero['stage']!r}")
    _check_model(zero, DeepSpeedZeroConfig, f"{where}zero_optimization")
    _check_zero(zero, f"{where}zero_optimization")


def _check_zero(zero: dict, where: str) -> None:
    """Refuses what this training loop cannot work with, and warns of what has no effect at this stage."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    stage = zero.get("stage", 0)
    if zero.get("compute_grad_norm") is False:
        raise UserError(f"{where}.compute_grad_norm must be true: training records the norm and stops when it is NaN")
    for path, values in UNSUPPORTED.items():
        section, _, key = path.rpartition(".")
        given = ((zero.get(section) or {}) if section else zero).get(key, "auto")
        if given != "auto" and given not in values:
            raise UserError(
                f"{where}.{path} is {json.dumps(given)[:80]}: this training loop has not been made to work with it, "
                "leave it out"
            )
    for key, least in (("offload_optimizer", 1), ("offload_param", 3)):
        section = zero.get(key) or {}
        if section.get("device") == "nvme" and not os.path.isdir(section.get("nvme_path") or ""):
            raise UserError(f"{where}.{key}.nvme_path is {section.get('nvme_path')!r}: the device nvme needs a folder")
        if section.get("device") == "nvme" and not AsyncIOBuilder().is_compatible(verbose=False):
            raise UserError(f"{where}.{key}.device nvme needs libaio and a C++ compiler: install them, or use cpu")
        if section.get("device", "none") != "none" and stage < least:
            warn(f"{where}.{key} has no effect at ZeRO {stage}: it needs stage {least} or more")


def _top_level_fields() -> dict:
    from typing import Annotated, Literal

    from pydantic import Field

    whole = Annotated[int, Field(gt=0)]
    switches = ("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "wall_clock_breakdown")
    switches += ("memory_breakdown", "dump_state")
    types = Literal["fp32", "fp16", "bf16", "FP32", "FP16", "BF16"]
    return {
        **dict.fromkeys(FROM_COMMAND_LINE, whole | Literal["auto"]),
        **dict.fromkeys(switches, bool),
        "steps_per_print": whole | None,
        "communication_data_type": types | None,
        "bf16": dict,
        "fp16": dict,
    }


def _section_fields() -> dict[str, dict]:
    """Returns the types of the sections that DeepSpeed takes as they come."""
    from typing import Annotated

    from pydantic import Field

    whole = Annotated[int, Field(gt=0)]
    return {
        "aio": {
            **dict.fromkeys(("block_size", "queue_depth", "intra_op_parallelism"), whole),
            **dict.fromkeys(("single_submit", "overlap_events", "use_gds"), bool),
        },
        "flops_profiler": {
            **dict.fromkeys(("enabled", "detailed"), bool),
            **dict.fromkeys(("profile_step", "top_modules"), whole),
            "module_depth": Annotated[int, Field(ge=-1)],
            "recompute_fwd_factor": Annotated[float, Field(ge=0)],
            "output_file": str | None,
        },
        "activation_checkpointing": {
            **dict.fromkeys(("partition_activations", "contiguous_memory_optimization", "cpu_checkpointing"), bool),
            **dict.fromkeys(("synchronize_checkpoint_boundary", "profile"), bool),
            "number_checkpoints": whole | None,
        },
    }


def _check_section(given, fields: dict, where: str) -> None:
    if not isinstance(given, dict):
        raise UserError(f"{where} must be an object, not {json.dumps(given)[:80]}")
    _refuse_unknown(given, set(fields), f"{where}.")
    _check_values(given, fields, f"{where}.")


def _check_values(given: dict, fields: dict, where: str) -> None:
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    for key, value in given.items():
        adapter = TypeAdapter(fields[key], config=ConfigDict(arbitrary_types_allowed=True))
        reason = "it is too large" if isinstance(value, int) and abs(value) >= 2**63 else None
        try:
            # As JSON: strictly, Python values would have to be enumerators and Path objects.
            adapter.validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            reason = _reason(error).replace("Input", "it", 1)
        if reason is not None:
            raise UserError(f"{where}{key} is {json.dumps(value)[:80]}: {reason}")


def _reason(error) -> str:
    """Returns the first fault of a pydantic error, with its key where the message is one that leaves the key open."""
    first = error.errors()[0]
    reason = first["msg"].removeprefix("Assertion failed, ").removeprefix("Value error, ")
    key = ".".join(map(str, first["loc"])) if first["type"] == "extra_forbidden" else ""
    return f"{key}: {reason}" if key else reason


def _check_model(given, model, where: str) -> None:
    """Checks each value of a section strictly against its field in one of DeepSpeed's own models, then the whole."""
    import typing

    from deepspeed.runtime.config_utils import DeepSpeedConfigModel
    from pydantic import ValidationError

    fields, sections = {}, {}
    for name, field in model.model_fields.items():
        kinds = (field.annotation, *typing.get_args(field.annotation))
        below = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, DeepSpeedConfigModel)]
        for key in (name, field.alias or name):
            fields[key] = dict | None if below else typing.Annotated[field.annotation, *field.metadata, None]
            sections |= {key: below[0]} if below else {}
    # "auto", as in transformers' configs, leaves a value to DeepSpeed.
    told = {k: v for k, v in given.items() if v != "auto"} if isinstance(given, dict) else given
    _check_section(told, fields, where)
    negative = next((k for k, v in told.items() if type(v) in (int, float) and v < 0), None)
    if negative is not None:  # some fields have no bound of their own
        raise UserError(f"{where}.{negative} is {told[negative]}: it should be at least 0")
    for key, below in sections.items():
        if told.get(key) is not None:
            _check_model(told[key], below, f"{where}.{key}")
    _refuse_two_names(told, model, where)
    try:
        model(**told)
    except ValidationError as error:
        raise UserError(f"{where}: {_reason(error)}") from error


def _refuse_two_names(told: dict, model, where: str) -> None:
    """Refuses a setting that is given by two of its names: its own, its alias, and those of earlier versions."""
    names: dict[str, set[str]] = {}
    for name, field in model.model_fields.items():
        setting = (field.json_schema_extra or {}).get("new_param", name)
        names.setdefault(setting, set()).update((name, field.alias or name))
    for one in names.values():
        given = sorted(one & told.keys())
        if len(given) > 1:
            raise UserError(f"{where}: {' and '.join(given)} are names of the same setting: leave all but one out")


def gradient_clipping(config: dict, flag: float | None) -> float:
    """Returns the norm at which gradients are clipped: --max_grad_norm, else the user's JSON, else 1.

    Raises:
        UserError: when the two contradict each other.
    """
    given = config.get("gradient_clipping", "auto")
    if given == "auto":  # 1.0 is the published runs' value
        return 1.0 if flag is None else flag
    if flag not in (None, given):
        raise UserError(f"DeepSpeed config says gradient_clipping {given}, the command line {flag} (--max_grad_norm)")
    return float(given)


def effective_config(config: dict, batch_size: int, micro_batch_size: int, accumulation: int, clip: float) -> dict:
    """Returns the JSON that DeepSpeed really gets: the user's, completed from the command line and with `clip`, as
    `gradient_clipping` settled it.

    Raises:
        UserError: when the user's numbers contradict the command line, naming both.
    """
    # The loop counts by itself, but DeepSpeed refuses a config in which these do not multiply.
    ours = {
        "train_batch_size": batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
    }
    for key, value in ours.items():
        given = config.get(key, "auto")
        if given not in ("auto", value):
            raise UserError(f"DeepSpeed config says {key} {given}, the command line {value} ({FROM_COMMAND_LINE[key]})")
    # Sections that are there but disabled go too: everything was measured with none at all.
    merged = {k: v for k, v in config.items() if k not in ("bf16", "fp16")} | ours
    merged.setdefault("zero_optimization", {"stage": 0})
    merged["gradient_clipping"] = clip
    merged.setdefault("steps_per_print", 1_000_000_000)  # the loop prints its own progress
    merged["zero_allow_untested_optimizer"] = True  # torch's own AdamW, which needs no compiler at start
    merged["zero_force_ds_cpu_optimizer"] = False  # offload works with torch's AdamW and needs no compiler then
    return merged


def zero_stage(config: dict) -> int:
    """Returns the ZeRO stage of a DeepSpeed config."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def offloaded(config: dict) -> list[str]:
    """Returns which of "offload_optimizer" and "offload_param" take something off the GPU at this ZeRO stage."""
    sections = {key: config["zero_optimization"].get(key) for key in ("offload_optimizer", "offload_param")}
    used = {"offload_optimizer": zero_stage(config) >= 1, "offload_param": zero_stage(config) == 3}
    devices = {key: section.get("device", "none") for key, section in sections.items() if isinstance(section, dict)}
    return [key for key, device in devices.items() if used[key] and device != "none"]


def describe(config: dict) -> str:
    """Returns one line about the parallelism for the log."""
    offload = offloaded(config)
    return f"ZeRO {zero_stage(config)}{' with ' + ' and '.join(offload) if offload else ''}, {world_size()} processes"
