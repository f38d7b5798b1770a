"""What DeepSpeed has to be told for a model of which almost everything is frozen.

Kept apart from the training loop because each function stands for one measured behaviour of DeepSpeed 0.19: which
settings it takes in silence, what it compiles at start, how ZeRO-3 loads frozen towers, and where the optimizer's
state lives. Heavy imports happen inside the functions that need them.
"""

import difflib
import json
from contextlib import contextmanager
from pathlib import Path

from runtime_utils import UserError, world_size

# DeepSpeed takes a misspelt key in silence, so these are the ones we know to work with this training loop.
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


def read_deepspeed_config(path: str | None) -> dict:
    """Reads a user's DeepSpeed JSON and refuses what this loop cannot honour.

    Raises:
        UserError: naming the file and the key for unreadable JSON, unknown keys, a precision, optimizer or scheduler
            section.
    """
    if path is None:
        return {"zero_optimization": {"stage": 0}}
    file = Path(path)
    if not file.is_file():
        raise UserError(f"no DeepSpeed config {file}: presets are scripts/ds_zero0.json to ds_zero3_offload.json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} must hold a JSON object, not {type(config).__name__}")
    for section, instead in (("optimizer", "--lr"), ("scheduler", "--lr_scheduler and --warmup_ratio")):
        if section in config:
            raise UserError(f"{file}: remove the section {section!r}, its settings come from {instead}")
    for section in ("bf16", "fp16"):
        if isinstance(config.get(section), dict) and config[section].get("enabled"):
            raise UserError(
                f"{file}: remove the section {section!r}: it would cast the mapping too; --precision sets the towers' "
                "dtype and the mapping stays in fp32"
            )
    _refuse_unknown(config, KNOWN_KEYS, str(file))
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        raise UserError(f"{file}: zero_optimization.stage must be 0, 1, 2 or 3")
    aliases = {field.alias for field in DeepSpeedZeroConfig.model_fields.values() if field.alias}
    _refuse_unknown(zero, set(DeepSpeedZeroConfig.model_fields) | aliases, f"{file}: zero_optimization")
    return config


def _refuse_unknown(given: dict, known: set[str], where: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise UserError(f"{where}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else ""))


def gradient_clipping(config: dict, flag: float | None) -> float:
    """The norm at which gradients are clipped: --max_grad_norm, else the user's JSON, else 1.

    Raises:
        UserError: when the two contradict each other, or the JSON's is no number above 0.
    """
    given = config.get("gradient_clipping", "auto")
    if given == "auto":
        return 1.0 if flag is None else flag
    if isinstance(given, bool) or not isinstance(given, int | float) or not given > 0:
        raise UserError(
            "DeepSpeed config: gradient_clipping must be 'auto' or a number above 0 (a large one to clip nothing), "
            f"not {given!r}"
        )
    if flag not in (None, given):
        raise UserError(f"DeepSpeed config says gradient_clipping {given}, the command line {flag} (--max_grad_norm)")
    return float(given)


def effective_config(config: dict, batch_size: int, micro_batch_size: int, accumulation: int, clip: float) -> dict:
    """The JSON that DeepSpeed really gets: the user's, completed from the command line and with `clip`, as
    `gradient_clipping` settled it.

    Raises:
        UserError: when the user's numbers contradict the command line, naming both.
    """
    ours = {
        "train_batch_size": batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
    }
    for key, value in ours.items():
        given = config.get(key, "auto")
        if given not in ("auto", value):
            raise UserError(f"DeepSpeed config says {key} {given}, the command line {value} ({FROM_COMMAND_LINE[key]})")
    merged = {k: v for k, v in config.items() if k not in ("bf16", "fp16")} | ours
    merged.setdefault("zero_optimization", {"stage": 0})
    # The loop clips by itself at ZeRO 0: there DeepSpeed neither reports the norm nor stops at one that is not finite.
    merged["gradient_clipping"] = clip if zero_stage(merged) else 0.0
    merged.setdefault("steps_per_print", 1_000_000_000)  # the loop prints its own progress
    merged["zero_allow_untested_optimizer"] = True
    merged["zero_force_ds_cpu_optimizer"] = False  # offload works with torch's AdamW and needs no compiler then
    return merged


def zero_stage(config: dict) -> int:
    """The ZeRO stage of a DeepSpeed config."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def offloaded(config: dict) -> list[str]:
    """Which of "offload_optimizer" and "offload_param" move something out of the GPU, at this config's ZeRO stage."""
    sections = {key: config["zero_optimization"].get(key) for key in ("offload_optimizer", "offload_param")}
    used = {"offload_optimizer": zero_stage(config) >= 1, "offload_param": zero_stage(config) == 3}
    devices = {key: section.get("device", "none") for key, section in sections.items() if isinstance(section, dict)}
    return [key for key, device in devices.items() if used[key] and device != "none"]


def quiet_start() -> None:
    """Imports DeepSpeed so that it neither compiles anything at start nor prints a line for every setting."""
    import logging
    import os

    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # On CPU the process group would build this C++ extension: 20 s, and an error where there is no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextmanager
def keeping_explicit_dtypes():
    """Within it, `zero.Init` leaves floating tensors alone that are made with an explicit dtype.

    It would cast them all to the weights' dtype, and rotary frequencies rounded to bf16 turn far positions wrongly.
    transformers from 5.23 on avoids this by itself, for `torch.arange` only.
    """
    from deepspeed.runtime.zero import partition_parameters

    original = partition_parameters.zero_wrapper_for_fp_tensor_constructor

    def wrapper(fn, target_fp_dtype, target_device):
        cast, keep = original(fn, target_fp_dtype, target_device), original(fn, None, target_device)
        return lambda *args, **kwargs: (cast if kwargs.get("dtype") is None else keep)(*args, **kwargs)

    partition_parameters.zero_wrapper_for_fp_tensor_constructor = wrapper
    try:
        yield
    finally:
        partition_parameters.zero_wrapper_for_fp_tensor_constructor = original


@contextmanager
def loading_towers(config: dict, bf16: bool):
    """Within it, `from_pretrained` shards the weights it loads when `config` asks for ZeRO-3.

    Without a precision section transformers' hook silently loads fp32; with one left in the final config DeepSpeed
    would cast the mapping. So the section exists only in here, and the mapping is built outside.
    """
    if zero_stage(config) != 3:
        yield
        return
    import os

    from transformers.integrations import HfDeepSpeedConfig

    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it, also for a plain python run
    live = HfDeepSpeedConfig(dict(config, bf16={"enabled": True}) if bf16 else dict(config))
    try:
        with keeping_explicit_dtypes():
            yield
    finally:
        del live  # transformers holds it weakly: from here on nothing is sharded at construction


def make_engine(model, config: dict, lr: float):
    """Wraps the model in a DeepSpeed engine that optimises `model.mapping` with AdamW (SPEC's hyper-parameters).

    Returns:
        the engine; its `basic_optimizer` is the torch AdamW whose learning rate the loop sets.
    """
    import os

    import deepspeed
    import torch

    os.environ.setdefault("LOCAL_RANK", "0")  # as above
    parameters = list(model.mapping.parameters())
    on_cuda = parameters[0].device.type == "cuda" and not config["zero_optimization"].get("offload_optimizer")
    optimizer = torch.optim.AdamW(
        parameters, lr=lr, betas=(0.8, 0.999), eps=1e-8, weight_decay=3e-7, fused=True if on_cuda else None
    )
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=parameters, optimizer=optimizer, config=config, dist_init_required=False
    )
    return engine


@contextmanager
def gathered(engine):
    """Within it, the mapping's parameters are whole on every rank, also at ZeRO-3."""
    import deepspeed

    parameters = list(engine.module.mapping.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=zero_stage(engine.config) == 3):
        yield


def mapping_state(engine) -> dict:
    """The mapping's fp32 parameters as whole CPU tensors; a collective call at ZeRO-3."""
    with gathered(engine):
        return {name: p.detach().cpu().clone() for name, p in engine.module.mapping.named_parameters()}


def optimizer_state(engine) -> dict:
    """Adam's two moments, whole, as `{"exp_avg.NAME", "exp_avg_sq.NAME"}` CPU tensors; a collective call."""
    state = {}
    for name, parameter in engine.module.mapping.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            if zero_stage(engine.config) == 0:
                value = engine.basic_optimizer.state[parameter][key]
            else:
                from deepspeed.utils import safe_get_full_optimizer_state

                value = safe_get_full_optimizer_state(parameter, key)
            state[f"{key}.{name}"] = value.detach().cpu().view(_full_shape(parameter)).clone()
    return state


def _full_shape(parameter):
    return getattr(parameter, "ds_shape", parameter.shape)


def load_optimizer_state(engine, state: dict, step: int, first_batch: dict) -> None:
    """Puts saved moments and step count into the engine, whatever its ZeRO stage and world size.

    DeepSpeed creates the moments in its first step, so one step with a zero gradient at learning rate 0 comes first:
    it changes no parameter.

    Arguments:
        state: as `optimizer_state` returns it.
        step: optimizer steps taken so far.
        first_batch: any micro-batch, on the engine's device.
    """
    for group in engine.basic_optimizer.param_groups:
        group["lr"] = 0.0
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(engine(**first_batch).loss_sum * 0.0, scale_wrt_gas=False)
    engine.step()
    for name, parameter in engine.module.mapping.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            value = state[f"{key}.{name}"].to(engine.device)
            if zero_stage(engine.config) == 0:
                engine.basic_optimizer.state[parameter][key].copy_(value)
            else:
                from deepspeed.utils import safe_set_full_optimizer_state

                safe_set_full_optimizer_state(parameter, value, key)
    for entry in engine.basic_optimizer.state.values():
        entry["step"].fill_(step)


def describe(config: dict) -> str:
    """One line about the parallelism for the log."""
    offload = offloaded(config)
    return f"ZeRO {zero_stage(config)}{' with ' + ' and '.join(offload) if offload else ''}, {world_size()} processes"
