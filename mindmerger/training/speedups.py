"""Two optional ways to faster training: compiled layers (`--compile`) and Liger's kernels (`--liger`).

Both leave the method as it is and change losses by rounding only. What they need is looked for before data and weights
are read.
"""

import inspect
from importlib import metadata

from mindmerger.runtime.errors import UserError, one_line

LIGER_WRITTEN_FOR = "0.8.5"
# What of Liger is put into the LLM. Its fused loss is called by `next_token_loss`, on target positions alone.
LIGER_KERNELS = {
    "rope": True,
    "rms_norm": True,
    "swiglu": True,
    "cross_entropy": False,
    "fused_linear_cross_entropy": False,
}
SCALED_LOGITS = ("logits_scaling", "lm_head_multiplier", "final_logit_softcapping")  # as configs name it


def check_speed_options(args, zero_stage: int) -> None:
    """Makes sure that this machine, these models and this ZeRO stage can do what `--compile` and `--liger` ask for.

    Raises:
        UserError: for the first thing that cannot be.
    """
    if args.compile and args.liger:
        raise UserError("--compile and --liger speed up the same operations: use one of them")
    if args.compile and zero_stage == 3:
        raise UserError(
            "--compile gains nothing at ZeRO 3, whose hooks in every module break the layers apart: use ZeRO 0 to 2"
        )
    if args.compile:
        check_compiler()
    if args.liger:
        check_liger(args.llm_path)


def check_compiler() -> None:
    """Compiles one small function, as the layers will be.

    Raises:
        UserError: when torch finds no working compiler for this machine's device.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.compile(lambda x: 2 * x + 1, dynamic=True)(torch.ones(4, device=device))
    except RuntimeError as error:
        needed = {"cpu": "a C++ compiler such as g++", "cuda": "triton and a C compiler such as gcc"}[device]
        raise UserError(
            f"--compile needs {needed} here: install it, or leave --compile out ({one_line(error)})"
        ) from error


def compile_layers(model) -> None:
    """Compiles every layer of both towers, each when it is first called.

    Layer by layer, because layers of one kind share their compiled code: the whole model would take as many times
    longer to compile as it has layers. Call it after `gradient_checkpointing_enable`, which is then compiled along.
    """
    import torch
    from transformers.modeling_layers import GradientCheckpointingLayer

    # All layers share one limit. Their code differs by tower, with and without gradient, for a batch of one row, and
    # in T5 for the first layer; torch's own limit of 8 would leave the last of these uncompiled.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            # dynamic: nearly every micro-batch has another length, and would be compiled anew.
            layer.compile(dynamic=True)


def check_liger(llm_path: str) -> None:
    """Makes sure that Liger is there, can run here and knows this LLM.

    Raises:
        UserError: for the first thing that is not so.
    """
    import torch

    from mindmerger.hub.model_configs import llm_config

    if not torch.cuda.is_available():
        raise UserError("--liger needs an NVIDIA GPU, there is none here: leave --liger out")
    try:
        metadata.version("liger-kernel")
    except metadata.PackageNotFoundError as error:
        raise UserError(
            f'--liger needs the package liger-kernel: pip install "liger-kernel>={LIGER_WRITTEN_FOR}", or leave '
            "--liger out"
        ) from error
    _refuse_unknown_to_liger(llm_config(llm_path)[0], llm_path)


def apply_liger(model) -> None:
    """Puts Liger's rotary embedding, RMSNorm and SwiGLU into a model's LLM, and takes its loss by Liger where the LLM
    gives on what its output head returns as it is.

    The norms and MLPs are replaced in this instance, the rotary embedding in transformers' module of its model type.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from torch import nn

    llm = model.llm
    _refuse_unknown_to_liger(llm.config, llm.config.name_or_path)
    _apply_liger_kernel_to_instance(model=llm, **LIGER_KERNELS)
    head, text = llm.get_output_embeddings(), llm.config.get_text_config()
    # An adapter on the head is no weight that multiplies alone; one that is trained needs a gradient of its own size.
    plain = type(head) is nn.Linear and not any(parameter.requires_grad for parameter in head.parameters())
    if plain and not any(getattr(text, name, None) for name in SCALED_LOGITS):
        model.linear_loss = liger_loss


def liger_loss(hidden_MD, weight_VD, labels_M, bias_V):
    """Returns the summed cross-entropy of labels, by Liger's kernel that makes the logits of some rows at a time and
    their gradient with them. It looks at the device twice for each call."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden_MD, weight_VD, labels_M, bias_V, reduction="sum")


def _refuse_unknown_to_liger(config, path: str) -> None:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(config.model_type)
    # Liger silently leaves out what a model type has no kernel for.
    if apply is None or not LIGER_KERNELS.keys() <= inspect.signature(apply).parameters.keys():
        raise UserError(f"--liger has no kernels for {path}, a {config.model_type} model: leave --liger out")
    activation = getattr(config.get_text_config(), "hidden_act", None)
    if activation not in ("silu", "swish"):
        raise UserError(f"--liger computes SwiGLU, but {path} has the activation {activation}: leave --liger out")
