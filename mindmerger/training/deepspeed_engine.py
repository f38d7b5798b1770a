"""DeepSpeed for a model of which almost everything is frozen.

Each function stands for one measured behaviour of DeepSpeed 0.19: what it compiles at start, how ZeRO-3 loads frozen
towers, and where the optimizer's state lives. Heavy imports happen inside the functions that need them.
"""

import os
from contextlib import contextmanager

from mindmerger.runtime.errors import UserError, one_line
from mindmerger.runtime.processes import rank, world_size
from mindmerger.training.deepspeed_config import zero_stage


def import_deepspeed_quietly() -> None:
    """Imports DeepSpeed so that it neither compiles anything at start nor prints a line for every setting, and makes
    it known to the process group if there is one."""
    import logging
    import warnings

    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    import deepspeed
    import torch
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # On CPU the process group would build this C++ extension: 20 s, and an error where there is no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Its calls of torch's older collectives, at each ZeRO-2 step's first.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    if torch.distributed.is_initialized():
        # Else the first `zero.Init` takes the run for one of a single process and refuses the batch size.
        deepspeed.init_distributed(dist_init_required=False)


@contextmanager
def preserve_explicit_dtypes():
    """Context manager: `zero.Init` leaves floating tensors alone that are made with an explicit dtype.

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
def sharded_loading(config: dict, bf16: bool):
    """Context manager: `from_pretrained` shards the weights it loads when `config` asks for ZeRO-3.

    Without a precision section transformers' hook silently loads fp32; with one left in the final config DeepSpeed
    would cast the mapping. So the section exists only in here, and the mapping is built outside.
    """
    if zero_stage(config) != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it, also for a plain python run
    live = HfDeepSpeedConfig(dict(config, bf16={"enabled": True}) if bf16 else dict(config))
    try:
        with preserve_explicit_dtypes():
            yield
    finally:
        del live  # transformers holds it weakly: from here on nothing is sharded at construction


@contextmanager
def broadcastable_scalars():
    """Context manager: DeepSpeed takes parameters without a dimension, such as layer fusion's temperature.

    It sends every parameter as bytes from rank 0, and torch views no scalar as bytes: not even one process would start.
    At ZeRO 0 to 2 they are sent as vectors. At ZeRO 3 they are not sent: all ranks have the same, from seed or file.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.partition_parameters import Init

    broadcast, take = DeepSpeedEngine._broadcast_model, Init._zero_init_param

    def broadcast_as_vectors(engine):
        scalars = [parameter for parameter in engine.module.parameters() if parameter.dim() == 0]
        for parameter in scalars:
            parameter.data = parameter.data.reshape(1)
        broadcast(engine)
        for parameter in scalars:
            parameter.data = parameter.data.reshape(())

    def take_without_sending(init, parameter):
        if parameter.dim():
            take(init, parameter)
        else:
            init._convert_to_deepspeed_param(parameter)
            parameter.partition()

    DeepSpeedEngine._broadcast_model, Init._zero_init_param = broadcast_as_vectors, take_without_sending
    try:
        yield
    finally:
        DeepSpeedEngine._broadcast_model, Init._zero_init_param = broadcast, take


def make_engine(model, config: dict, lr: float, head_lr: float | None = None):
    """Wraps the model in a DeepSpeed engine that optimises its trained parameters with AdamW.

    Args:
        head_lr: learning rate of the LLM's output head, where the bridge trains it; None for the same.

    Returns:
        the engine; its `basic_optimizer` is the torch AdamW whose learning rate the loop sets. Each of its groups says
        in `share_of_lr` by which factor its rate differs.

    Raises:
        UserError: for settings that DeepSpeed finds at odds with each other, the model or the machine.
    """
    import deepspeed
    import torch
    from deepspeed.runtime.config import DeepSpeedConfigError

    os.environ.setdefault("LOCAL_RANK", "0")  # as above
    trained = model.trained_parameters()
    parameters = list(trained.values())
    groups = [{"params": parameters, "share_of_lr": 1.0}]
    if head_lr is not None:
        parts = {False: [], True: []}  # whether they are the output head's
        for name, parameter in trained.items():
            parts[name.startswith("lm_head.")].append(parameter)
        groups = [{"params": parts[head], "share_of_lr": head_lr / lr if head else 1.0} for head in parts]
    on_cuda = parameters[0].device.type == "cuda" and not config["zero_optimization"].get("offload_optimizer")
    # The published runs' constants. Given as an object: from JSON, DeepSpeed would compile an AdamW of its own.
    optimizer = torch.optim.AdamW(
        groups, lr=lr, betas=(0.8, 0.999), eps=1e-8, weight_decay=3e-7, fused=True if on_cuda else None
    )
    if zero_stage(config) == 0:
        # The loop clips by itself there: DeepSpeed neither reports the norm nor stops at one that is not finite.
        config = config | {"gradient_clipping": 0.0}
    # Its timer of throughput waits for the GPU twice a micro-batch, for numbers that nobody reads.
    config = config | {"timers": {"throughput": {"enabled": False}}}
    try:
        with broadcastable_scalars():
            engine, *_ = deepspeed.initialize(
                model=model, model_parameters=parameters, optimizer=optimizer, config=config, dist_init_required=False
            )
    except Exception as error:
        # What it asserts of its settings, one beside another; some of that it raises as a plain `Exception`.
        if not (isinstance(error, AssertionError | ValueError | DeepSpeedConfigError) or type(error) is Exception):
            raise
        raise UserError(f"DeepSpeed refuses this configuration: {one_line(error)}; see --deepspeed_config") from error
    return engine


def trained_state(engine) -> dict:
    """Returns what the stage trains as whole fp32 CPU tensors; a collective call at ZeRO-3."""
    return _whole_state(engine, engine.module.trained_parameters())


def frozen_bridge_state(engine) -> dict | None:
    """Returns a bridge under an adapter as whole CPU tensors, None without a bridge; a collective call at ZeRO-3."""
    bridge = engine.module.mapping
    return None if bridge is None else _whole_state(engine, dict(bridge.named_parameters()))


def _whole_state(engine, parameters: dict) -> dict:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=zero_stage(engine.config) == 3):
        # Copies: on leaving ZeRO 3 takes the gathered values away again, and the next step changes the others in place.
        return {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}


def optimizer_state(engine) -> dict:
    """Gathers Adam's two moments, whole, as `{"exp_avg.NAME", "exp_avg_sq.NAME"}` CPU tensors; a collective call."""
    state = {}
    _link_states_of_all_groups(engine)
    for name, parameter in engine.module.trained_parameters().items():
        for key in ("exp_avg", "exp_avg_sq"):
            # At ZeRO 1 to 3 each rank holds a part, and DeepSpeed alone knows how the whole was divided.
            if zero_stage(engine.config) == 0:
                value = engine.basic_optimizer.state[parameter][key]
            else:
                from deepspeed.utils import safe_get_full_optimizer_state

                value = safe_get_full_optimizer_state(parameter, key)
            state[f"{key}.{name}"] = value.detach().cpu().view(_full_shape(parameter)).clone()
    return state


def _link_states_of_all_groups(engine) -> None:
    """Lets DeepSpeed find the moments of every group of parameters. At ZeRO 1 and 2 it looks for all of them as soon as
    the first group has made its first step, when those of a trained output head are not there yet."""
    if zero_stage(engine.config) in (1, 2) and len(engine.basic_optimizer.param_groups) > 1:
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _full_shape(parameter):
    return getattr(parameter, "ds_shape", parameter.shape)


def load_optimizer_state(engine, state: dict, step: int, first_batch: dict) -> None:
    """Puts saved moments and step count into the engine, whatever its ZeRO stage and world size.

    DeepSpeed creates the moments in its first step, so one step with a zero gradient at learning rate 0 comes first:
    it changes no parameter.

    Args:
        state: as `optimizer_state` returns it.
        step: optimizer steps taken so far.
        first_batch: any micro-batch, on the engine's device.
    """
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    for group in engine.basic_optimizer.param_groups:
        group["lr"] = 0.0
    # Else DeepSpeed takes this pass for one of an accumulation, and makes no step and no moments.
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(engine(**first_batch).loss_sum * 0.0, scale_wrt_gas=False)
    engine.step()
    _link_states_of_all_groups(engine)
    for name, parameter in engine.module.trained_parameters().items():
        for key in ("exp_avg", "exp_avg_sq"):
            value = state[f"{key}.{name}"].to(engine.device)
            if zero_stage(engine.config) == 0:
                engine.basic_optimizer.state[parameter][key].copy_(value)
            elif zero_stage(engine.config) == 3:
                safe_set_local_optimizer_state(parameter, _share_of_rank(parameter, value), key)
            else:
                safe_set_full_optimizer_state(parameter, value, key)
    for entry in engine.basic_optimizer.state.values():
        entry["step"].fill_(step)  # Adam's bias correction depends on it; the zero step has counted as one


def _share_of_rank(parameter, value):
    """Returns this rank's elements of what ZeRO-3 partitions as it does the parameter, padding included.

    DeepSpeed's setter of whole values fails where elements cannot be dealt out evenly: a gate has one for all ranks.
    """
    import torch

    share = parameter.ds_tensor.numel()
    padded = torch.nn.functional.pad(value.flatten(), (0, share * world_size() - value.numel()))
    return padded[rank() * share :][:share]
